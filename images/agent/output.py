"""What an execution has put out, as the orchestrator is told it: numbered pieces of its streams."""

from array import array
from collections.abc import Iterator

from frames import CHUNK

OBJECTS = ("display", "artifact")  # streams of JSON objects, one a line: no piece has the ends of two


class Output:
    """Pieces, numbered from 1, each of one stream.

    Streams are kept joined, and of a piece only its stream and where it ends there: five bytes, however many come.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._streams: list[bytearray] = []
        self._kinds = bytearray()
        self._ends = array("I")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, stream: str, data: bytes) -> None:
        """Take the next piece."""
        if stream not in self._names:
            self._names.append(stream)
            self._streams.append(bytearray())
        kind = self._names.index(stream)
        self._streams[kind] += data
        self._kinds.append(kind)
        self._ends.append(len(self._streams[kind]))

    def whole(self, stream: str) -> bytes:
        """Return all of one stream."""
        return bytes(self._streams[self._names.index(stream)]) if stream in self._names else b""

    def piece(self, number: int) -> tuple[str, bytes]:
        """Return a piece: its stream and its data."""
        kind = self._kinds[number - 1]
        last = self._kinds.rfind(kind, 0, number - 1)
        start = 0 if last < 0 else self._ends[last]
        return self._names[kind], bytes(self._streams[kind][start : self._ends[number - 1]])


def cut(stream: str, data: bytes) -> Iterator[bytes]:
    """Yield what was read of a stream in pieces that fit a frame."""
    parts = data.split(b"\n") if stream in OBJECTS else [data]
    parts[:-1] = [part + b"\n" for part in parts[:-1]]
    for part in parts:
        for start in range(0, len(part), CHUNK):
            yield part[start : start + CHUNK]
