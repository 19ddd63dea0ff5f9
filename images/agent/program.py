"""The pipes of one waiting interpreter: job and stdin go in, stdout, stderr and the value come out."""

import marshal
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

from loop import WRITE, Loop

STDIN_FD, VALUE_FD, JOB_FD = 0, 3, 4  # as the bootstrap finds them
STREAMS = {1: "stdout", 2: "stderr", VALUE_FD: "value"}
READ_SIZE = 64 * 1024
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
        lost = sum(map(len, self._pending))
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
        except BrokenPipeError:
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


class Program:
    """Our ends of the pipes. `ready` once the bootstrap has said that it waits for its job.

    What an interpreter says before it is ready explains why it never will be: `boot_errors`.
    """

    def __init__(self, loop: Loop, on_ready: Callable[[], None]) -> None:
        self.on_output: Callable[[str, bytes], None] = lambda _stream, _data: None
        self.ready = False
        self.boot_errors = b""
        self._loop = loop
        self._on_ready = on_ready
        self._paused: set[int] = set()
        inward = {fd: os.pipe() for fd in (STDIN_FD, JOB_FD)}
        outward = {fd: os.pipe() for fd in STREAMS}
        # What the interpreter gets, by the descriptors that it expects; closed here once it has them.
        self.child_ends = {fd: pair[0] for fd, pair in inward.items()} | {fd: pair[1] for fd, pair in outward.items()}
        self._outputs = {fd: pair[0] for fd, pair in outward.items()}
        for fd in (inward[STDIN_FD][1], inward[JOB_FD][1], *self._outputs.values()):
            os.set_blocking(fd, False)
        self.stdin, self._job = Inlet(loop, inward[STDIN_FD][1]), Inlet(loop, inward[JOB_FD][1])

    def watch(self) -> None:
        """Begin to read; the interpreter has its ends."""
        for fd in self.child_ends.values():
            os.close(fd)
        for stream, fd in self._outputs.items():
            self._loop.add(fd, partial(self._read, stream))

    def abandon(self) -> None:
        """Close all ends of an interpreter that was not started."""
        for fd in (*self.child_ends.values(), *self._outputs.values()):
            os.close(fd)
        self.stdin.close()
        self._job.close()

    def feed(self, job: dict[str, Any], stdin: bytes | None) -> None:
        """Hand over the job, and all of stdin; with None it stays open, for its owner to write and end."""
        self._job.write(marshal.dumps(job))
        self._job.end()
        if stdin is not None:
            self.stdin.write(stdin)
            self.stdin.end()

    def pause(self, stream: str) -> None:
        """Read no more of one stream until `resume`: its writer waits once the pipe is full."""
        for number, fd in self._outputs.items():
            if STREAMS[number] == stream and number not in self._paused:
                self._paused.add(number)
                self._loop.remove(fd)

    def resume(self, stream: str) -> None:
        """Read on."""
        for number in [number for number in self._paused if STREAMS[number] == stream]:
            self._paused.remove(number)
            self._loop.add(self._outputs[number], partial(self._read, number))

    def drain(self) -> None:
        """Deliver what is left in the pipes of an interpreter that is dead, and close them."""
        for stream in list(self._outputs):
            while stream in self._outputs and self._read(stream):
                pass
            if stream in self._outputs:  # held by a process that outlived the interpreter
                self._close_output(stream)
        self._job.close()
        self.stdin.close()

    def _read(self, stream: int) -> bool:
        """Read once; return whether there may be more."""
        data = read(self._outputs[stream])
        if data is None:
            return False
        if data == b"":
            self._close_output(stream)
        elif self.ready:
            self.on_output(STREAMS[stream], data)
        elif stream == VALUE_FD:
            self.ready = True
            self._on_ready()
            if data[1:]:
                self.on_output(STREAMS[stream], data[1:])
        else:
            self.boot_errors = (self.boot_errors + data)[:4096]
        return True

    def _close_output(self, stream: int) -> None:
        fd = self._outputs.pop(stream)
        if stream in self._paused:
            self._paused.remove(stream)
        else:
            self._loop.remove(fd)
        os.close(fd)


def read(fd: int) -> bytes | None:
    """Read what is there: None when nothing is, empty at the end."""
    try:
        return os.read(fd, READ_SIZE)
    except BlockingIOError:
        return None
