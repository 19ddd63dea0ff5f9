"""Tar archives of the workspace, packed and unpacked inside a sandbox by `packing.py`."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path

from frames import Frame, decode
from launcher import End, Launcher
from seatbelt import Seatbelt
from streams import Refused, Stream

TIMEOUT_S = 300.0  # of CPU; a stream whose client stalls is given up by the orchestrator
REPORT_LIMIT = 64 * 1024  # bytes
CODES = {"Refusal": "invalid_archive", "FileNotFoundError": "file_not_found", "OSError": "workspace_full"}
Sandbox = Launcher | Seatbelt


class Archives:
    """Opens the streams `pack` and `unpack`: each runs in a sandbox of its own, killed when the stream is given up.

    `clear` removes a directory of the workspace: what a killed sandbox had unpacked until then.
    """

    def __init__(
        self, take: Callable[[], Sandbox], done: Callable[[Sandbox], None], clear: Callable[[str], None]
    ) -> None:
        self._take = take
        self._done = done
        self._clear = clear

    def pack(self, stream: Stream, asked: Frame) -> None:
        """Send a tar of the directory `path`."""
        self._start(
            stream, "handler = lambda event: pack(event['path'])", asked, self._done
        ).launcher.program.stdin.end()

    def unpack(self, stream: Stream, asked: Frame) -> None:
        """Take a tar, unpack it in the directory `path`; it may hold `limit` bytes."""
        staged = f".{secrets.token_hex(8)}.part"

        def done(launcher: Sandbox) -> None:
            self._done(launcher)
            self._clear(staged)

        event = asked | {"staged": staged}
        inlet = self._start(stream, "handler = lambda event: unpack(**event)", event, done).launcher.program.stdin
        inlet.on_taken = stream.grant
        stream.on_data, stream.on_finish = inlet.write, inlet.end

    def _start(self, stream: Stream, handler: str, event: Frame, done: Callable[[Sandbox], None]) -> "_Transfer":
        code = f"{Path(__file__).with_name('packing.py').read_text()}\n\n{handler}\n"
        return _Transfer(stream, self._take(), code, event, done)


class _Transfer:
    """One archive on its way: the stream on one side, the sandbox on the other."""

    def __init__(
        self, stream: Stream, launcher: Sandbox, code: str, event: Frame, done: Callable[[Sandbox], None]
    ) -> None:
        self.launcher = launcher
        self._stream = stream
        self._done = done
        self._out = bytearray()
        self._report = b""
        self._given_up = False
        self._ended: End | None = None
        launcher.program.on_output = self._on_output
        launcher.on_end = self._on_end
        stream.on_close, stream.on_writable = self._give_up, self._send
        launcher.start(
            {
                "code": code,
                "argv": None,
                "args": [],
                "handler": None,
                "event": event,
                "context": {},
                "env": {},
                "timeout_s": TIMEOUT_S,
                "deadline": time.monotonic() + TIMEOUT_S,
            }
        )

    def _on_output(self, name: str, data: bytes) -> None:
        if name == "stdout":
            self._out += data
            self.launcher.program.pause("stdout")  # until this piece is on its way
            self._stream.want()
        elif name == "value":
            self._report = (self._report + data)[:REPORT_LIMIT]

    def _send(self) -> None:
        if self._out:
            piece = bytes(self._out[: self._stream.room])
            del self._out[: len(piece)]
            self._stream.send(piece)
        elif self._ended is not None:
            self._settle(self._ended)
        else:
            self._stream.rest()
            self.launcher.program.resume("stdout")

    def _give_up(self) -> None:
        self._given_up = True
        if self._ended is None:
            self.launcher.kill()

    def _on_end(self, end: End) -> None:
        self._ended = end
        self._done(self.launcher)
        if not self._given_up:
            self._stream.want()

    def _settle(self, end: End) -> None:
        report = decode(self._report) or {}
        if (error := report.get("error")) is not None:
            code = CODES.get(error["type"], "archive_failed")
            self._stream.refuse(Refused(code, str(error["message"])[:1000]))
        elif end.exit_code != 0:
            self._stream.refuse(Refused("archive_failed", f"The archive could not be handled: {end.message or end}"))
        else:
            self._stream.finish()
            self._stream.close(**(report.get("value") or {}))
