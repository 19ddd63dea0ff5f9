"""A small event loop: readiness of descriptors, and timers on the monotonic clock.

One thread, no coroutines: bwrap dies with the *thread* that started it (PDEATHSIG), and the
path of a warm execution is a handful of callbacks.
"""

import heapq
import itertools
import selectors
import time
from collections.abc import Callable

Callback = Callable[[], object]
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
SWEEP = 256  # timers above which the cancelled ones are swept out


class Timer:
    """One call in the future; `cancel` it when it is no longer wanted."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callback) -> None:
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        """Forget the call."""
        self.callback = None


class Loop:
    """Descriptors with their callbacks, and the timers that are due next."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def add(self, fd: int, callback: Callback, events: int = READ) -> None:
        """Call back whenever the descriptor is ready."""
        self._selector.register(fd, events, callback)

    def remove(self, fd: int) -> None:
        """Stop watching the descriptor; it must still be open."""
        self._selector.unregister(fd)

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        """Call once, after the delay."""
        timer = Timer(callback)
        if len(self._timers) > SWEEP:
            self._timers = [entry for entry in self._timers if entry[2].callback is not None]
            heapq.heapify(self._timers)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), timer))
        return timer

    def run(self) -> None:
        """Serve until a callback raises."""
        while True:
            for key, _ in self._selector.select(self._run_timers()):
                # An earlier callback of this round may have ended what this one watched.
                if self._selector.get_map().get(key.fd) is key:
                    key.data()

    def _run_timers(self) -> float | None:
        """Run what is due; return the seconds until the next timer, None without one."""
        while self._timers:
            due, _, timer = self._timers[0]
            if timer.callback is not None and (wait_s := due - time.monotonic()) > 0:
                return wait_s
            heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        return None
