"""The agent's side of the channel: newline-delimited JSON frames."""

import base64
import json
from collections.abc import Iterator
from typing import Any

Frame = dict[str, Any]

LINE_LIMIT = 64 * 1024  # bytes of one frame, newline included
CHUNK = 32 * 1024  # raw bytes that one frame carries; base64 keeps it below LINE_LIMIT

_encode = json.JSONEncoder(separators=(",", ":")).encode


def encode(frame: Frame) -> bytes:
    """Return one frame as a line."""
    return _encode(frame).encode() + b"\n"


def split(frame: Frame) -> Iterator[Frame]:
    """Yield a frame with a nonce; one that is too long for a line as parts, which together are its line."""
    line = encode(frame)
    if len(line) < LINE_LIMIT:
        yield frame
        return
    for start in range(0, len(line), CHUNK):
        data = base64.b64encode(line[start : start + CHUNK]).decode()
        yield {"type": "part", "nonce": frame["nonce"], "data": data, "last": start + CHUNK >= len(line)}


def decode(line: bytes) -> Frame | None:
    """Return the frame of a line, or None for an empty line or the torn line of a dead client."""
    try:
        frame = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return frame if isinstance(frame, dict) else None


class Lines:
    """Bytes of the channel cut into lines. A line longer than LINE_LIMIT is dropped whole."""

    def __init__(self) -> None:
        self._rest = b""
        self._dropping = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take the bytes read, return the lines that they complete."""
        first, *others = data.split(b"\n")
        if not others:
            self._keep(first)
            return []
        *whole, last = others
        lines = [] if self._dropping else [self._rest + first]
        self._rest, self._dropping = b"", False
        self._keep(last)
        return [line for line in lines + whole if len(line) < LINE_LIMIT]

    def _keep(self, piece: bytes) -> None:
        if self._dropping or len(self._rest) + len(piece) >= LINE_LIMIT:
            self._rest, self._dropping = b"", True
        else:
            self._rest += piece
