"""An execution as server-sent events: each reader has a place of its own in what the record keeps.

`started` is number 0, a piece of output has its own number, `done` follows the last one. The numbers are the same for
every reader and every orchestrator, so that who was cut off goes on behind the last number that arrived.
"""

import asyncio
import codecs
from collections import Counter
from collections.abc import Iterator

import msgspec

from orchestrator.admission import Admission
from orchestrator.executions import TEXTS, Record
from orchestrator.frames import Described
from orchestrator.models import EventKind, EventText, Execution, Stream
from orchestrator.settings import Settings

BATCH = 64 * 1024  # bytes of events that are put together at once
NEVER = -1  # the number before the first
LONGEST_CHARACTER = 4  # bytes of UTF-8
OBJECTS: tuple[Stream, ...] = ("display", "artifact")
KNOWN_FIRST = ("id", "session_id", "started_at", "language", "background")
_described = msgspec.json.Decoder(Described).decode
_object = msgspec.json.Decoder(dict[str, object]).decode


class Reader:
    """A place in the events of one execution: `after` is the last number that its client has.

    It holds nothing but where it is; what it has not read yet lies in the record, which is bounded.
    """

    def __init__(self, record: Record, *, after: int = NEVER) -> None:
        self.record = record
        self.ended = False
        self.woken = asyncio.Event()
        self._next = after + 1
        self._decoders: dict[Stream, codecs.IncrementalDecoder] = {}
        record.watchers.add(self.woken.set)

    def close(self) -> None:
        """Watch no more."""
        self.record.watchers.discard(self.woken.set)

    def take(self) -> bytes:
        """Return the events that are due, as many as fit a batch; none when there is nothing new."""
        self.woken.clear()
        record, output = self.record, self.record.output
        is_over = record.facts.outcome is not None
        events = bytearray()
        if self._next == 0:
            self._next = 1
            facts = {name: getattr(record.facts, name) for name in KNOWN_FIRST}
            events += event_of(0, "started", Execution(**facts))
        while self._next <= len(output) and len(events) < BATCH:
            for event in self._piece(self._next):
                events += event
            self._next += 1
        if self._next > len(output):
            if is_over:
                events += b"".join(self._end())
            self.ended = is_over or record.left
        return bytes(events)

    def _piece(self, number: int) -> Iterator[bytes]:
        stream, start, end = self.record.output.piece(number)
        whole = self.record.output.whole(stream)
        if stream in TEXTS:
            if text := self._decoder(stream, start).decode(whole[start:end]):
                yield event_of(number, stream, EventText(text=text))
        elif stream in OBJECTS:
            for line in whole[whole.rfind(b"\n", 0, start) + 1 : end].split(b"\n")[:-1]:
                if (item := object_of(stream, line)) is not None:
                    yield event_of(number, stream, item)

    def _end(self) -> Iterator[bytes]:
        """Yield what is left of characters that never became whole, then `done`."""
        number = len(self.record.output)
        for stream in TEXTS:
            whole = self.record.output.whole(stream)
            if text := self._decoder(stream, len(whole)).decode(b"", final=True):
                number += 1
                if self._next <= number:
                    yield event_of(number, stream, EventText(text=text))
        if self._next <= number + 1:
            yield event_of(number + 1, "done", self.record.facts)
        self._next = number + 2

    def _decoder(self, stream: Stream, at: int) -> codecs.IncrementalDecoder:
        """Return the decoder of a stream that knows what an unfinished character before this place began with."""
        decoder = self._decoders.get(stream)
        if decoder is None:
            decoder = self._decoders[stream] = codecs.getincrementaldecoder("utf-8")("replace")
            decoder.decode(self.record.output.whole(stream)[max(0, at - LONGEST_CHARACTER + 1) : at])
        return decoder


class Streams:
    """How many streams of events are open, of each session and in all."""

    def __init__(self, settings: Settings, admission: Admission) -> None:
        self._settings = settings
        self._admission = admission
        self._open: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._open.total()

    def open(self, sid: str) -> None:
        """Count one more. TooManyRequests above the caps."""
        if self._open[sid] >= self._settings.session_streams or len(self) >= self._settings.max_streams:
            raise self._admission.refuse("streams", "Too many streams of events are open: close some first")
        self._open[sid] += 1

    def close(self, sid: str) -> None:
        """Count one less."""
        self._open[sid] -= 1
        if not self._open[sid]:
            del self._open[sid]


def event_of(number: int, kind: EventKind | Stream, data: object) -> bytes:
    """Return one event. Its data is JSON in one line, whatever line ends the sandbox put into its own."""
    text = msgspec.json.encode(data)
    if b"\n" in text or b"\r" in text:
        text = msgspec.json.format(text, indent=-1)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (number, kind.encode(), text)


def object_of(stream: Stream, line: bytes | bytearray) -> object:
    """Return what a line stands for; None when it makes no sense: it comes from the container."""
    try:
        if stream == "artifact":
            return _described(line).artifact()
        _object(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return msgspec.Raw(bytes(line))
