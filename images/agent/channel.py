"""The agent's end of the channel: bytes in, frames out. Without either end there is nothing to serve."""

import fcntl
import os
import sys
import time
from collections.abc import Callable

from frames import Frame, Lines, decode, encode
from loop import WRITE, Loop

SILENCE_S = 600.0  # without an orchestrator for so long, the agent ends itself
OUT_OF_THE_WAY = 900  # the channel's descriptors live out of the way of everything that is inherited


class Channel:
    """Stdin and stdout of this process, moved away. `on_written` is called when something has been written.

    What is sent waits here as far as the pipe does not take it now: `waiting` counts those bytes.
    Frames leave by `out_fd`, which does not block.
    """

    def __init__(self, loop: Loop, on_frame: Callable[[Frame], None]) -> None:
        self.on_written: Callable[[], None] = lambda: None
        self._loop = loop
        self._on_frame = on_frame
        self._lines = Lines()
        self._out = bytearray()
        self._writing = False
        self._heard_at = time.monotonic()

    def open(self) -> None:
        """Take stdin and stdout, and leave /dev/null there; listen."""
        self._in_fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY)
        self.out_fd = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        os.set_blocking(self._in_fd, False)
        os.set_blocking(self.out_fd, False)
        self._loop.add(self._in_fd, self._receive)
        self._loop.call_later(SILENCE_S / 10, self._watch_silence)

    @property
    def waiting(self) -> int:
        """How many bytes are not written yet."""
        return len(self._out)

    def send(self, frame: Frame | None, *, more: bool = False) -> None:
        """Send a frame; one that is followed by `more` at once waits for those, and goes with them."""
        if frame is not None:
            self._out += encode(frame)
        if not (more or self._writing):
            self._write()

    def _receive(self) -> None:
        data = os.read(self._in_fd, 65536)
        if not data:
            sys.exit(0)
        self._heard_at = time.monotonic()
        for line in self._lines.feed(data):
            if (frame := decode(line)) is not None:
                self._on_frame(frame)

    def _write(self) -> None:
        try:
            while self._out:
                del self._out[: os.write(self.out_fd, self._out)]
        except BlockingIOError:
            pass
        if self._writing != bool(self._out):
            self._writing = not self._writing
            if self._writing:
                self._loop.add(self.out_fd, self._write, WRITE)
            else:
                self._loop.remove(self.out_fd)
        self.on_written()

    def _watch_silence(self) -> None:
        if time.monotonic() - self._heard_at > SILENCE_S:
            sys.exit("no orchestrator spoke for 10 minutes")
        self._loop.call_later(SILENCE_S / 10, self._watch_silence)
