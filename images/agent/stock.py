"""The sandboxes that wait for the next execution, by language."""

import sys
from collections import defaultdict, deque
from collections.abc import Callable

from launcher import Launcher
from loop import Loop
from seatbelt import Seatbelt

BOOT_RETRY_S = 0.1
AFTER_USE = 1  # sandboxes that wait once a language was used, where the template asks for none


class Stock:
    """As many sandboxes as `wanted` of each language; a language that is used keeps at least one.

    They boot one after the other: boots that share the CPU are all late, this way one is early.
    """

    def __init__(
        self,
        loop: Loop,
        wanted: dict[str, int],
        boot: Callable[[str], Launcher | Seatbelt],
        leave: Callable[[Launcher | Seatbelt], None],
    ) -> None:
        self._loop = loop
        self._wanted = wanted
        self._boot = boot
        self._leave = leave
        self._waiting: defaultdict[str, deque[Launcher | Seatbelt]] = defaultdict(deque)
        self._booting: Launcher | Seatbelt | None = None

    def take(self, language: str) -> Launcher | Seatbelt:
        """Give away the sandbox that was booted first; boot one when there is none. OSError when that fails."""
        self._wanted[language] = max(AFTER_USE, self._wanted.get(language, 0))
        if waiting := self._waiting[language]:
            return waiting.popleft()
        launcher = self._boot(language)
        if self._booting is None:
            self._booting = launcher
            launcher.on_ready = self._booted
        return launcher

    def forget(self, launcher: Launcher | Seatbelt) -> None:
        """Note that a sandbox has ended; it may not have booted yet."""
        if launcher is self._booting:
            self._booting = None

    def refill(self) -> None:
        """Boot the next sandbox, unless one boots or all are there."""
        lacking = (name for name, count in self._wanted.items() if len(self._waiting[name]) < count)
        if self._booting is not None or (language := next(lacking, None)) is None:
            return
        try:
            launcher = self._boot(language)
        except OSError as error:
            print(f"no sandbox could be started: {error}", file=sys.stderr)
            self._loop.call_later(BOOT_RETRY_S, self.refill)
            return
        self._booting = launcher
        launcher.on_ready = self._booted
        launcher.on_end = lambda end: self._lost(language, launcher, end.message)
        self._waiting[language].append(launcher)

    def _booted(self) -> None:
        self._booting = None
        self._loop.call_later(0, self.refill)

    def _lost(self, language: str, launcher: Launcher | Seatbelt, message: str) -> None:
        """A waiting sandbox died: say why, and boot another after a pause."""
        print(f"a waiting sandbox ended: {message}", file=sys.stderr)
        self._waiting[language].remove(launcher)
        self._loop.call_later(BOOT_RETRY_S, lambda: self._leave(launcher))
