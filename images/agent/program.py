"""The pipes of one waiting interpreter: job and stdin go in, stdout, stderr and the value come out."""

import marshal
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from loop import WRITE, Loop

STDIN_FD, VALUE_FD, JOB_FD = 0, 3, 4  # as the bootstrap finds them
STREAMS = {1: "stdout", 2: "stderr", VALUE_FD: "value"}
READ_SIZE = 64 * 1024
CLOSED = -1


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
        self._pending: dict[int, memoryview] = {}
        inward = {fd: os.pipe() for fd in (STDIN_FD, JOB_FD)}
        outward = {fd: os.pipe() for fd in STREAMS}
        # What the interpreter gets, by the descriptors that it expects; closed here once it has them.
        self.child_ends = {fd: pair[0] for fd, pair in inward.items()} | {fd: pair[1] for fd, pair in outward.items()}
        self._stdin, self._job = inward[STDIN_FD][1], inward[JOB_FD][1]
        self._outputs = {fd: pair[0] for fd, pair in outward.items()}
        for fd in (self._stdin, self._job, *self._outputs.values()):
            os.set_blocking(fd, False)

    def watch(self) -> None:
        """Begin to read; the interpreter has its ends."""
        for fd in self.child_ends.values():
            os.close(fd)
        for stream, fd in self._outputs.items():
            self._loop.add(fd, partial(self._read, stream))

    def abandon(self) -> None:
        """Close all ends of an interpreter that was not started."""
        for fd in (*self.child_ends.values(), self._stdin, self._job, *self._outputs.values()):
            os.close(fd)

    def feed(self, job: dict[str, Any], stdin: bytes) -> None:
        """Hand over the job and all of stdin."""
        self._write(self._job, marshal.dumps(job))
        self._write(self._stdin, stdin)

    def drain(self) -> None:
        """Deliver what is left in the pipes of an interpreter that is dead, and close them."""
        for stream in list(self._outputs):
            while stream in self._outputs and self._read(stream):
                pass
            if stream in self._outputs:  # held by a process that outlived the interpreter
                self._close_output(stream)
        for fd in (self._job, self._stdin):
            if fd != CLOSED:
                self._close_inward(fd)

    def _write(self, fd: int, data: bytes | memoryview) -> None:
        """Write the data as far as the pipe takes it now, the rest later, then close the pipe."""
        view = memoryview(data)
        try:
            view = view[os.write(fd, view) :] if view else view
        except BlockingIOError:
            pass
        except BrokenPipeError:
            view = memoryview(b"")
        if not view:
            self._close_inward(fd)
            return
        if fd not in self._pending:
            self._loop.add(fd, lambda: self._write(fd, self._pending[fd]), WRITE)
        self._pending[fd] = view

    def _close_inward(self, fd: int) -> None:
        if self._pending.pop(fd, None) is not None:
            self._loop.remove(fd)
        os.close(fd)
        if fd == self._job:
            self._job = CLOSED
        else:
            self._stdin = CLOSED

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
        self._loop.remove(fd)
        os.close(fd)


def read(fd: int) -> bytes | None:
    """Read what is there: None when nothing is, empty at the end."""
    try:
        return os.read(fd, READ_SIZE)
    except BlockingIOError:
        return None
