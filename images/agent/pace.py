"""How often the pipes of a sandbox are read: many small writes become fewer, larger pieces."""

import time

from loop import Callback, Loop, Timer

SMALL = 4096  # bytes; larger reads are never held back
BURST = 64  # small reads that are not
REST_S = 0.005  # then one in so many seconds


class Pace:
    """A credit of small reads. When it is used up, a pipe rests before it is read again; what is written meanwhile
    is then read as one.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._credit = float(BURST)
        self._counted_at = 0.0
        self._resting: dict[int, tuple[Timer, Callback]] = {}
        self._ended = False

    def is_spent(self) -> bool:
        """Count a small read; tell whether its pipe is to rest now."""
        now = time.monotonic()
        self._credit = min(BURST, self._credit + (now - self._counted_at) / REST_S) - 1
        self._counted_at = now
        return self._credit < 0 and not self._ended

    def rest(self, fd: int, read: Callback) -> None:
        """Stop watching a pipe, which `read` reads, for a while."""
        self._loop.remove(fd)
        self._resting[fd] = self._loop.call_later(REST_S, lambda: self.wake(fd)), read

    def wake(self, fd: int) -> None:
        """Watch a pipe again that rests."""
        if (resting := self._resting.pop(fd, None)) is not None:
            timer, read = resting
            timer.cancel()
            self._loop.add(fd, read)

    def end(self) -> None:
        """Let no pipe rest any more."""
        self._ended = True
        for fd in list(self._resting):
            self.wake(fd)
