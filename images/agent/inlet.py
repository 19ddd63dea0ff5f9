"""Our end of a pipe that goes into a sandbox."""

import os
from collections import deque
from collections.abc import Callable

from loop import WRITE, Loop

CLOSED = -1


class Inlet:
    """Our end of a pipe that goes in: written as far as it takes it now, the rest later.

    `on_taken` is told how many bytes went in. What is written after the reader has gone is taken, and lost.
    """

    def __init__(self, loop: Loop, fd: int) -> None:
        self.on_taken: Callable[[int], None] = lambda _count: None
        self._loop = loop
        self._fd = fd
        self._pending: deque[memoryview] = deque()
        self._watched = False
        self._ended = False

    @property
    def waiting(self) -> int:
        """How many bytes the pipe has not taken yet."""
        return sum(map(len, self._pending))

    @property
    def name(self) -> str:
        """The pipe as /proc names it."""
        return f"pipe:[{os.fstat(self._fd).st_ino}]"

    @property
    def ended(self) -> bool:
        """Whether nothing more goes in."""
        return self._ended or self._fd == CLOSED

    def write(self, data: bytes) -> None:
        """Write the data, in time."""
        if self._fd == CLOSED:
            self.on_taken(len(data))
        elif data:
            self._pending.append(memoryview(data))
            if not self._watched:
                self._push()

    def end(self) -> None:
        """Close the pipe once everything is written."""
        self._ended = True
        if not self._pending:
            self.close()

    def close(self) -> None:
        """Close the pipe now."""
        if self._fd != CLOSED:
            self._watch(wanted=False)
            os.close(self._fd)
            self._fd = CLOSED
        lost = self.waiting
        self._pending.clear()
        if lost:
            self.on_taken(lost)

    def _push(self) -> None:
        try:
            while self._pending:
                view = self._pending[0]
                count = os.write(self._fd, view)
                if count == len(view):
                    self._pending.popleft()
                else:
                    self._pending[0] = view[count:]
                self.on_taken(count)
        except BlockingIOError:
            pass
        except OSError:  # nobody reads any more: EPIPE of a pipe, EIO of a terminal
            self.close()
            return
        if self._ended and not self._pending:
            self.close()
        else:
            self._watch(wanted=bool(self._pending))

    def _watch(self, *, wanted: bool) -> None:
        if wanted and not self._watched:
            self._loop.add(self._fd, self._push, WRITE)
        elif self._watched and not wanted:
            self._loop.remove(self._fd)
        self._watched = wanted
