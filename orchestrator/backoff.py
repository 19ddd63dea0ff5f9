"""How long to wait after a failure before the next try."""

import random
import time

FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 30.0
PARALLEL_STARTS = 4


def pause_after(failures: int) -> float:
    """Return the pause after so many failures in a row, in seconds: doubled each time, with jitter."""
    longest_s: float = FIRST_PAUSE_S * 2.0 ** min(failures - 1, 16)
    return min(LAST_PAUSE_S, longest_s) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter is no secret


class Backoff:
    """The caution with which containers of one template are started."""

    def __init__(self) -> None:
        self._failures = 0
        self._until = 0.0
        self._away = False

    def failed(self, *, away: bool = False) -> float:
        """Count a failure, of an engine that was away or of a start; return the pause that follows it."""
        self._failures += 1
        self._away = away
        pause_s = pause_after(self._failures)
        self._until = time.monotonic() + pause_s
        return pause_s

    def returned(self) -> None:
        """Learn that the engine answers again: what failed for its absence is tried at once."""
        if self._away:
            self._until = 0.0

    def succeeded(self) -> None:
        """Forget the failures."""
        self._failures = 0
        self._until = 0.0

    def may_start(self, now: float) -> int:
        """How many starts are allowed now; after a failure a single one probes."""
        if now < self._until:
            return 0
        return 1 if self._failures else PARALLEL_STARTS
