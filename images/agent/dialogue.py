"""The pipes of a context's interpreter: cells go in, one after the other; records come out beside what is printed."""

import fcntl
import os
import re
import sys
import termios
from collections.abc import Callable
from typing import Any

from inlet import CLOSED
from program import READ_SIZE, STREAMS, VALUE_FD, Program

SIZE_BYTES = 8  # of the length before a cell, as `cells.py` reads it
HEAD_LIMIT = 64
ANNOUNCED = re.compile(rb"([DV]) (\d{1,10})")
ENDED = re.compile(rb"E (\d{1,3}) (\d{1,15})")


class Dialogue(Program):
    """A `Program` whose job pipe stays open. It has no stdin."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.stdin.close()

    def tell(self, cell: dict[str, Any]) -> bool:
        """Hand over a cell; False when the one before was never taken."""
        if self._job.waiting:
            return False
        data = self._pack(cell)
        self._job.write(len(data).to_bytes(SIZE_BYTES, "big") + data)
        return True

    def catch_up(self) -> None:
        """Deliver what the pipes of stdout and stderr hold by now, and no more than that."""
        for stream, name in STREAMS.items():
            fd = self._outputs.get(stream, CLOSED)
            if stream == VALUE_FD or fd == CLOSED:
                continue
            held = bytearray(4)
            fcntl.ioctl(fd, termios.FIONREAD, held)
            left = int.from_bytes(held, sys.byteorder)
            while left > 0 and (data := os.read(fd, min(left, READ_SIZE))):
                left -= len(data)
                self.on_output(name, data)


class Records:
    """Cuts the bytes of the value's descriptor into records, see `records.py`. A line that heads none is passed over.

    The user's code can write there too: what comes is its word, and no more.
    """

    def __init__(
        self,
        on_head: Callable[[bytes, int], None],
        on_body: Callable[[bytes], None],
        on_end: Callable[[int, int], None],
    ) -> None:
        self._on_head = on_head
        self._on_body = on_body
        self._on_end = on_end
        self._head = b""
        self._left = 0

    def feed(self, data: bytes) -> None:
        """Take the bytes read."""
        while data:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                self._left -= len(piece)
                self._on_body(piece)
                continue
            line, newline, data = data.partition(b"\n")
            self._head += line[: HEAD_LIMIT + 1 - len(self._head)]  # longer than any head: it stays none
            if newline:
                line, self._head = self._head, b""
                self._begin(line)

    def _begin(self, line: bytes) -> None:
        if found := ANNOUNCED.fullmatch(line):
            self._left = int(found[2])
            self._on_head(found[1], self._left)
        elif found := ENDED.fullmatch(line):
            self._on_end(int(found[1]) & 0xFF, int(found[2]))
