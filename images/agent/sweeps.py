"""Cleaning up a little at a time: frames come first."""

import sys
from collections import deque
from collections.abc import Iterator

from loop import Loop


class Sweeps:
    """What is to be removed, each as the steps of doing so; one step is taken whenever nothing else is due."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._waiting: deque[Iterator[None]] = deque()

    def add(self, steps: Iterator[None]) -> None:
        """Have these steps taken, in time."""
        self._waiting.append(steps)
        if len(self._waiting) == 1:
            self._loop.call_later(0, self._step)

    def _step(self) -> None:
        try:
            next(self._waiting[0])
        except StopIteration:
            self._waiting.popleft()
        except OSError as error:
            print(f"a directory was not removed: {error}", file=sys.stderr)
            self._waiting.popleft()
        if self._waiting:
            self._loop.call_later(0, self._step)
