"""What orchestrator and agent say to each other: newline-delimited JSON frames of at most 64 KiB.

The agent's own side is `images/agent/frames.py` (it has the standard library only). What it sends
is hostile input: a frame that does not fit these structs ends its container.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from orchestrator.errors import ContainerLost
from orchestrator.models import ID_PATTERN, Artifact, ContextLanguage, File, Language, Outcome, Stream

LINE_LIMIT = 64 * 1024
PART = 32 * 1024  # raw bytes in one part frame; base64 keeps it below LINE_LIMIT
Count = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0)]
Sid = Annotated[str, Meta(max_length=16)]  # of a stream
StdinResult = Literal["taken", "full", "closed"]
Eid = Annotated[str, Meta(max_length=64)]
ContextState = Literal["starting", "idle", "dead"]
Sentence = Annotated[str, Meta(max_length=4096)]


class AgentFrame(msgspec.Struct, frozen=True, tag_field="type", tag=str.lower, forbid_unknown_fields=True):
    """A frame from the agent; its `type` is the struct's name in lower case."""


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An execution that the agent holds: `seq` counts its output frames, `note` came with it `age_s` ago.

    One that is `queued` is not begun.
    """

    id: Eid
    seq: Count
    done: bool
    note: dict[str, Any]
    age_s: Amount
    queued: bool = False


class Support(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an image can do in one language."""

    handlers: bool


class KnownContext(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A context that the agent holds, opened `age_s` ago; it has run `cells`."""

    id: Annotated[str, Meta(pattern=ID_PATTERN)]
    number: Count
    language: ContextLanguage
    state: ContextState
    message: Sentence
    cells: Count
    age_s: Amount


class Hello(AgentFrame, frozen=True):
    """The agent is ready, and answers with what it is bound to and still holds; `kept` came `kept_age_s` ago."""

    version: int
    nonce: str
    session: str | None
    kept: dict[str, Any] | None
    kept_age_s: Amount
    canary: dict[str, Any]
    executions: list[Known]
    languages: dict[Language, Support] = {}
    wheels: bool = False
    contexts: Annotated[list[KnownContext], Meta(max_length=64)] = []


class Part(AgentFrame, frozen=True):
    """A piece of a hello that is too long for a line: all of them, up to the `last`, are its line."""

    nonce: str
    data: bytes
    last: bool


class Bound(AgentFrame, frozen=True):
    """The session that the agent serves."""

    session: str


class Output(AgentFrame, frozen=True):
    """A piece of one stream; `data` is base64, `seq` counts the execution's pieces from 1."""

    id: Eid
    seq: Count
    stream: Stream
    data: bytes


class Result(AgentFrame, frozen=True):
    """How an execution ended; nothing of it is alive. `launch_s` passed before its code ran, `wall_s` while it did."""

    id: Eid
    seq: Count
    outcome: Outcome
    exit_code: Annotated[int, Meta(ge=0, le=255)] | None
    signal: Annotated[int, Meta(ge=1, le=64)] | None
    message: str
    launch_s: Amount
    wall_s: Amount
    cpu_s: Amount
    max_rss_bytes: Count
    truncated: list[Stream]


class StdinTaken(AgentFrame, frozen=True, tag="stdin_taken"):
    """What became of the text that was sent to an execution's stdin."""

    number: Count
    result: StdinResult


class Context(AgentFrame, frozen=True):
    """What became of a context; `number` tells which of its sandboxes."""

    id: Eid
    number: Count
    state: ContextState
    message: Sentence


class Pong(AgentFrame, frozen=True):
    """The answer to a ping."""

    number: int


class Fault(AgentFrame, frozen=True):
    """The agent cannot serve, and ends."""

    message: str


class Open(AgentFrame, frozen=True):
    """The agent opens a byte stream, and grants `credit` bytes of it."""

    id: Sid
    kind: Annotated[str, Meta(max_length=32)]
    credit: Count
    facts: dict[str, Any]


class Data(AgentFrame, frozen=True):
    """Bytes of a stream; `data` is base64."""

    id: Sid
    data: bytes


class Credit(AgentFrame, frozen=True):
    """The agent takes so many bytes more of a stream."""

    id: Sid
    count: Count


class Finish(AgentFrame, frozen=True):
    """No more bytes of a stream come from the agent."""

    id: Sid


class Close(AgentFrame, frozen=True):
    """The end of a stream: what came of it; or a `code` and a sentence for why nothing did."""

    id: Sid
    code: Annotated[str, Meta(max_length=64)] | None
    message: Annotated[str, Meta(max_length=4096)]
    facts: dict[str, Any]


class Described(msgspec.Struct, frozen=True):
    """A file as the agent describes it."""

    path: str
    type: Literal["file", "directory", "link", "other"]
    size_bytes: Count
    modified_s: Annotated[float, Meta(ge=0, le=1e11)]

    @property
    def modified_at(self) -> datetime:
        """When its content was last changed."""
        return datetime.fromtimestamp(self.modified_s, UTC)

    def file(self) -> File:
        """Return what a client sees."""
        return File(path=self.path, type=self.type, size_bytes=self.size_bytes, modified_at=self.modified_at)

    def artifact(self) -> Artifact:
        """Return what a client sees of a file that an execution made or changed."""
        return Artifact(path=self.path, size_bytes=self.size_bytes, modified_at=self.modified_at)


AnyStreamFrame = Open | Data | Credit | Finish | Close
AnyAgentFrame = (
    Hello | Part | Bound | Output | Result | StdinTaken | Context | Pong | Fault | Open | Data | Credit | Finish | Close
)
_decoder = msgspec.json.Decoder(AnyAgentFrame)
_encoder = msgspec.json.Encoder()


def decode(line: bytes | bytearray) -> AnyAgentFrame:
    """Return the frame of a line; ContainerLost when it is none."""
    try:
        frame: AnyAgentFrame = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContainerLost(f"The agent sent a frame that is none: {error}") from None
    return frame


def encode(kind: str, /, **fields: Any) -> bytes:
    """Return a frame to the agent as a line."""
    return _encoder.encode({"type": kind, **fields}) + b"\n"


def encode_job(
    kind: Literal["execute", "queue"], eid: str, job: dict[str, Any] | None, *, note: dict[str, Any], acks: list[str]
) -> Iterator[bytes]:
    """Yield the lines that hand over a job, to be executed or queued: one, or parts before it when the job is long.

    Without a job, the one that was queued is executed.
    `note` is kept by the agent and said again to who adopts the execution. `acks` names executions whose
    results have arrived, so that the agent may forget them.
    """
    line = encode(kind, id=eid, job=job, note=note, acks=acks)
    if len(line) <= LINE_LIMIT:
        yield line
        return
    body = _encoder.encode({"job": job})
    for start in range(0, len(body), PART):
        yield encode("part", id=eid, data=body[start : start + PART])
    yield encode(kind, id=eid, note=note, acks=acks)


def encode_stdin(eid: str, number: int, data: bytes, *, close: bool) -> Iterator[bytes]:
    """Yield the lines that send text to an execution's stdin; the agent takes all of it, or nothing."""
    while len(data) > PART:
        yield encode("part", id=f"stdin{number}", data=data[:PART])
        data = data[PART:]
    yield encode("stdin", id=eid, number=number, data=data, close=close)
