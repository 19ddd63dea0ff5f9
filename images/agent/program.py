"""The pipes of one waiting interpreter: job and stdin go in, stdout, stderr and the value come out."""

import marshal
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from inlet import Inlet
from loop import Loop
from pace import SMALL, Pace

STDIN_FD, VALUE_FD, JOB_FD = 0, 3, 4  # as the bootstrap finds them
STREAMS = {1: "stdout", 2: "stderr", VALUE_FD: "value"}
READ_SIZE = 64 * 1024


class Program:
    """Our ends of the pipes. `ready` once the bootstrap has said that it waits for its job.

    What an interpreter says before it is ready explains why it never will be: `boot_errors`.
    """

    def __init__(
        self,
        loop: Loop,
        on_ready: Callable[[], None],
        *,
        pack: Callable[[dict[str, Any]], bytes] = marshal.dumps,
    ) -> None:
        self.on_output: Callable[[str, bytes], None] = lambda _stream, _data: None
        self.ready = False
        self.boot_errors = b""
        self.handed_at: float | None = None  # when it got its job
        self._loop = loop
        self._on_ready = on_ready
        self._pack = pack
        self._paused: set[int] = set()
        self._pace = Pace(loop)
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

    def feed(self, job: dict[str, Any]) -> None:
        """Hand over the job. Stdin is its owner's to write and end, at any time."""
        self.handed_at = time.monotonic()
        self._job.write(self._pack(job))
        self._job.end()

    def pause(self, stream: str) -> None:
        """Read no more of one stream until `resume`: its writer waits once the pipe is full."""
        for number, fd in self._outputs.items():
            if STREAMS[number] == stream and number not in self._paused:
                self._pace.wake(fd)
                self._paused.add(number)
                self._loop.remove(fd)

    def resume(self, stream: str) -> None:
        """Read on."""
        for number in [number for number in self._paused if STREAMS[number] == stream]:
            self._paused.remove(number)
            self._loop.add(self._outputs[number], partial(self._read, number))

    def drain(self) -> None:
        """Deliver what is left in the pipes of an interpreter that is dead, and close them."""
        self._pace.end()
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
            if len(data) < SMALL and stream not in self._paused and self._pace.is_spent():
                self._pace.rest(self._outputs[stream], partial(self._read, stream))
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
        self._pace.wake(fd)
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
