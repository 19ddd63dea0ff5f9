"""Terminals: each a pseudo-terminal of the container's own devpts instance, and a sandbox that sees its one node.

Code in the sandbox has no /dev/ptmx, so it can make no further one.
"""

import fcntl
import os
import struct
import sys
import termios
from collections.abc import Callable
from pathlib import Path

from frames import CHUNK, Frame, decode
from inlet import Inlet
from launcher import End, Launcher
from loop import Loop
from pace import SMALL, Pace
from seatbelt import Seatbelt
from streams import Refused, Stream

Sandbox = Launcher | Seatbelt
CONTROLLING = "/dev/tty"
SAID_LIMIT = 4096  # bytes of what a sandbox says that never came to its terminal


class Terminals:
    """Opens the streams `terminal`, and `resize`, which names one of those."""

    def __init__(self, loop: Loop, boot: Callable[[tuple[str, ...]], Sandbox], done: Callable[[Sandbox], None]) -> None:
        self._loop = loop
        self._boot = boot
        self._done = done
        self._open: dict[str, _Terminal] = {}

    def open(self, stream: Stream, asked: Frame) -> None:
        """Boot a sandbox with a terminal. The first `job_bytes` of the stream are its job, what follows is typed."""
        if sys.platform != "linux":
            raise Refused("terminal_failed", "There are no terminals on this system: use the engine `docker`")
        try:
            self._open[stream.id] = _Terminal(stream, asked, self._loop, self._boot, self._forget)
        except OSError as error:
            raise Refused("terminal_failed", f"The terminal's sandbox could not be started: {error.strerror}") from None

    def resize(self, stream: Stream, asked: Frame) -> None:
        """Tell a terminal its size; one that has ended is left alone."""
        if (terminal := self._open.get(asked["terminal"])) is not None:
            terminal.resize(asked["cols"], asked["rows"])
        stream.close()

    def _forget(self, terminal: "_Terminal") -> None:
        self._open = {sid: other for sid, other in self._open.items() if other is not terminal}
        self._done(terminal.launcher)


class _Terminal:
    """One terminal: the stream on one side, the pseudo-terminal with the sandbox on the other.

    The far side stays open here too: a program that closes its own does not end the terminal, only its end does.
    """

    def __init__(
        self,
        stream: Stream,
        asked: Frame,
        loop: Loop,
        boot: Callable[[tuple[str, ...]], Sandbox],
        done: Callable[["_Terminal"], None],
    ) -> None:
        self._stream = stream
        self._loop = loop
        self._done = done
        self._job = bytearray()
        self._job_bytes: int = asked["job_bytes"]
        self._out = bytearray()
        self._said = b""
        self._given_up = False
        self._ended: End | None = None
        self._pace = Pace(loop)
        self._fd, self._far_fd = os.openpty()
        try:
            self.resize(asked["cols"], asked["rows"])
            self._name = os.ttyname(self._far_fd)
            self.launcher = boot((self._name, CONTROLLING))
        except OSError:
            os.close(self._fd)
            os.close(self._far_fd)
            raise
        os.set_blocking(self._fd, False)
        self._inlet = Inlet(loop, os.dup(self._fd))
        self._inlet.on_taken = stream.grant
        self.launcher.program.on_output = self._on_output
        self.launcher.program.stdin.end()
        self.launcher.on_end = self._on_end
        stream.on_data, stream.on_writable, stream.on_close = self._take_job, self._send, self._give_up
        self._watched = False
        self._watch()

    def resize(self, cols: int, rows: int) -> None:
        """Set the size; the kernel tells the programs in the foreground (SIGWINCH)."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def _take_job(self, data: bytes) -> None:
        missing = self._job_bytes - len(self._job)
        self._job += data[:missing]
        self._stream.grant(len(data[:missing]))
        if len(self._job) == self._job_bytes:
            self._stream.on_data = self._inlet.write
            self._start()
            self._inlet.write(data[missing:])

    def _start(self) -> None:
        job = decode(bytes(self._job)) or {}
        code = f"{Path(__file__).with_name('shell.py').read_text()}\n\nhandler = lambda event: become(**event)\n"
        self.launcher.start(
            {
                "code": code,
                "argv": None,
                "args": [],
                "handler": None,
                "event": {"tty": self._name, "argv": job["argv"]},
                "context": {},
                "env": job["env"],
                "timeout_s": None,  # its session's life ends it
                "deadline": 0.0,
            }
        )

    def _on_output(self, _name: str, data: bytes) -> None:
        """Keep what the sandbox says beside its terminal: why it did not come to it."""
        self._said = (self._said + data)[:SAID_LIMIT]

    # --- from the terminal to the stream

    def _read(self) -> None:
        while len(self._out) < CHUNK and (data := self._read_once()):
            self._out += data
        if self._out:
            self._unwatch()  # until this is on its way
            self._stream.want()

    def _read_once(self) -> bytes:
        try:
            return os.read(self._fd, CHUNK)
        except OSError:  # nothing is there now; or, at the end, ever
            return b""

    def _send(self) -> None:
        if self._out:
            piece = bytes(self._out[: self._stream.room])
            del self._out[: len(piece)]
            self._stream.send(piece)
            if len(piece) >= SMALL or self._ended is not None or self._out:
                return
            self._stream.rest()
            self._watch()
            if self._pace.is_spent():
                self._pace.rest(self._fd, self._read)
        elif self._ended is not None:
            self._settle(self._ended)
        else:
            self._stream.rest()
            self._watch()

    def _watch(self) -> None:
        if not self._watched:
            self._watched = True
            self._loop.add(self._fd, self._read)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._pace.wake(self._fd)
            self._loop.remove(self._fd)

    # --- end

    def _give_up(self) -> None:
        self._given_up = True
        if self._ended is None:
            self.launcher.kill()

    def _on_end(self, end: End) -> None:
        self._ended = end
        self._unwatch()
        os.close(self._far_fd)
        while data := self._read_once():  # what was written last; the kernel bounds it
            self._out += data
        self._inlet.close()
        os.close(self._fd)
        self._done(self)
        if not self._given_up:
            self._stream.want()

    def _settle(self, end: End) -> None:
        if end.exit_code is None or self._said:
            said = (self._said.decode(errors="replace").strip() or end.message)[:1000]
            self._stream.refuse(Refused("terminal_failed", f"The terminal's sandbox did not start: {said}"))
        else:
            self._stream.finish()
            self._stream.close(exit_code=end.exit_code, signal=end.signal)
