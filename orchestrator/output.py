"""What an execution has put out: pieces of its streams, in the order in which they came."""

from array import array
from typing import get_args

from orchestrator.models import Stream

STREAMS: tuple[Stream, ...] = get_args(Stream)


class Output:
    """Pieces, numbered from 1, each of one stream.

    Streams are kept joined, and of a piece only its stream and where it ends there: five bytes, however many come.
    """

    def __init__(self) -> None:
        self._streams: dict[Stream, bytearray] = {}
        self._kinds = bytearray()
        self._ends = array("I")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, stream: Stream, data: bytes) -> None:
        """Take the next piece."""
        joined = self._streams.setdefault(stream, bytearray())
        joined += data
        self._kinds.append(STREAMS.index(stream))
        self._ends.append(len(joined))

    def whole(self, stream: Stream) -> bytearray:
        """Return all of one stream that came until now."""
        return self._streams.get(stream, bytearray())

    def printed(self) -> bytes:
        """Return stdout and stderr as one, in the order in which they came."""
        pieces = map(self.piece, range(1, len(self) + 1))
        return b"".join(
            self.whole(stream)[start:end] for stream, start, end in pieces if stream in ("stdout", "stderr")
        )

    def piece(self, number: int) -> tuple[Stream, int, int]:
        """Return a piece: its stream, and where it begins and ends in it."""
        stream = STREAMS[self._kinds[number - 1]]
        return stream, self.size_after(stream, number - 1), self._ends[number - 1]

    def size_after(self, stream: Stream, number: int) -> int:
        """Return how many bytes of a stream the pieces up to this number hold."""
        last = self._kinds.rfind(STREAMS.index(stream), 0, number)
        return 0 if last < 0 else self._ends[last]
