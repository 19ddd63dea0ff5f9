"""Hostile bytes on the channel: whatever an agent sends, nothing raises, one container is lost at most, memory stays."""

import asyncio
import base64
import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import frames as agent_frames
from orchestrator import frames
from orchestrator.channel import Channel
from orchestrator.container import Container
from orchestrator.engine import Receiver, Spec, Wire
from orchestrator.errors import ContainerLost, SandboxError
from orchestrator.files import Workspace
from orchestrator.models import File, FilePage, Stream
from tests.fake_engine import Stage

LIMIT = frames.LINE_LIMIT
OUTPUT_LIMIT = 100
READ_SIZE = 65536
MEMORY = 8 << 20
SPEC = Spec(
    name="c", image="i", uid=50000, cpus=1, memory_bytes=1, workspace_bytes=1, scratch_bytes=1, labels={}, runtime=None
)
RUNNING = ("e1", "e2")
IDS = st.sampled_from([*RUNNING, "e3", "", "x" * 64, "x" * 65, "../e1"])
STREAM_IDS = st.sampled_from(["o1", "o2", "o3", "o0", "a1", "a2", "", "o", "o1x", "x" * 17])
SEQS = st.integers(-1, 4) | st.integers()
STREAMS = st.sampled_from(["stdout", "stderr", "value", "stdin", ""])
PIECES = st.binary(max_size=60).map(lambda data: base64.b64encode(data).decode()) | st.text(max_size=8)
OUTCOMES = st.sampled_from(["ok", "error", "timeout", "oom", "lost", "fine"])
NUMBERS = st.integers() | st.floats()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
RESULT: dict[str, st.SearchStrategy[Any]] = {
    field.encode_name: st.none() for field in msgspec.structs.fields(frames.Result)
}
FRAMES = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("output"), "id": IDS, "seq": SEQS, "stream": STREAMS, "data": PIECES},
    ),
    st.fixed_dictionaries(
        RESULT
        | {
            "type": st.just("result"),
            "id": IDS,
            "seq": SEQS,
            "outcome": OUTCOMES,
            "exit_code": st.none() | st.integers(-1, 256),
            "message": st.text(max_size=8),
            "launch_s": NUMBERS,
            "wall_s": NUMBERS,
            "cpu_s": NUMBERS,
            "max_rss_bytes": st.integers(),
            "truncated": st.lists(STREAMS, max_size=2),
        }
    ),
    st.fixed_dictionaries({"type": st.just("data"), "id": STREAM_IDS, "data": PIECES}),
    st.fixed_dictionaries({"type": st.just("credit"), "id": STREAM_IDS, "count": st.integers(-1, 9) | st.integers()}),
    st.fixed_dictionaries({"type": st.just("finish"), "id": STREAM_IDS}),
    st.fixed_dictionaries(
        {
            "type": st.just("close"),
            "id": STREAM_IDS,
            "code": st.none() | st.sampled_from(["file_not_found", "odd"]),
            "message": st.text(max_size=8),
            "facts": st.dictionaries(st.sampled_from(["path", "type", "size_bytes", "next"]), JSON, max_size=4),
        }
    ),
    st.fixed_dictionaries(
        {
            "type": st.just("open"),
            "id": STREAM_IDS,
            "kind": st.text(max_size=8),
            "credit": st.integers(-1, 9) | st.integers(),
            "facts": st.dictionaries(st.text(max_size=8), JSON, max_size=2),
        }
    ),
    st.fixed_dictionaries({"type": st.just("pong"), "number": st.integers(0, 2) | st.integers()}),
    st.fixed_dictionaries({"type": st.just("bound"), "session": st.text(max_size=8)}),
    st.fixed_dictionaries({"type": st.just("fault"), "message": st.text(max_size=8)}),
    st.fixed_dictionaries(
        {
            "type": st.just("hello"),
            "version": st.integers(),
            "nonce": st.text(max_size=8),
            "session": st.none() | st.text(max_size=8),
            "canary": st.dictionaries(st.text(max_size=8), JSON, max_size=3),
            "executions": st.lists(st.fixed_dictionaries({"id": IDS, "seq": SEQS, "done": st.booleans()}), max_size=2),
        }
    ),
)


@st.composite
def spoilt(draw: st.DrawFn) -> dict[str, Any]:
    """A frame in which one field is missing, of another type, or one too many."""
    frame = dict(draw(FRAMES))
    name = draw(st.sampled_from([*frame, "surplus"]))
    if draw(st.booleans()):
        frame.pop(name, None)
    else:
        frame[name] = draw(JSON)
    return frame


LINES = (
    FRAMES.map(lambda frame: json.dumps(frame).encode())
    | spoilt().map(lambda frame: json.dumps(frame).encode())
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=40)
)
CHUNKS = st.lists(st.integers(0, 90), max_size=30)


class Ear:
    """Whom a channel tells what it hears: frames, and that it is lost."""

    def __init__(self) -> None:
        self.frames = 0
        self.reasons: list[str] = []
        self.channel = Channel(self._on_frame, self.reasons.append)

    def _on_frame(self, frame: frames.AnyAgentFrame) -> None:
        assert not self.reasons, "a frame after the end"
        self.frames += 1


def cut(data: bytes, sizes: list[int]) -> Iterator[bytes]:
    """Yield the data in chunks of these sizes, then the rest."""
    for size in sizes:
        yield data[:size]
        data = data[size:]
    yield data


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Check that what happens inside allocates no more than this at any moment."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


# --- the channel


@given(chunks=st.lists(st.binary(max_size=200), max_size=30))
def test_no_bytes_make_the_channel_raise(chunks: list[bytes]) -> None:
    ear = Ear()
    for chunk in chunks:
        ear.channel.received(chunk)
        ear.channel.said(chunk)
    assert len(ear.reasons) <= 1
    assert ear.channel.closed == bool(ear.reasons)


@given(lines=st.lists(LINES, max_size=12), sizes=CHUNKS)
def test_the_end_of_a_channel_does_not_depend_on_how_its_stream_is_cut(lines: list[bytes], sizes: list[int]) -> None:
    data = b"\n".join([*lines, b""])
    whole, pieces = Ear(), Ear()
    whole.channel.received(data)
    for chunk in cut(data, sizes):
        pieces.channel.received(chunk)
    assert (whole.frames, whole.reasons) == (pieces.frames, pieces.reasons)


@given(line=LINES, at=st.integers(0, 200), byte=st.integers(0, 255), drop=st.booleans())
def test_one_wrong_byte_raises_nothing(line: bytes, at: int, byte: int, drop: bool) -> None:
    at = min(at, len(line))
    ear = Ear()
    ear.channel.received(line[:at] + (b"" if drop else bytes([byte])) + line[at + 1 :] + b"\n")
    assert len(ear.reasons) <= 1


@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("head", [b"", b'{"type":"fault","message":"'])
def test_a_line_without_end_costs_no_more_than_its_limit(head: bytes, end: bytes) -> None:
    ear = Ear()
    piece = b"x" * READ_SIZE
    with memory_below(MEMORY):
        ear.channel.received(head)
        for _ in range(4096):  # 256 MiB
            ear.channel.received(piece)
        ear.channel.received(end)
    assert ear.reasons == ["the agent sent a frame that is too long"]


def test_a_line_without_end_costs_no_more_before_the_channel_is_in_step() -> None:
    ear = Ear()
    ear.channel.in_step = False
    piece = b"x" * READ_SIZE
    with memory_below(MEMORY):
        for _ in range(256):
            ear.channel.received(piece)
    ear.channel.received(b'\n{"type":"pong","number":1}\n')
    assert (ear.frames, ear.reasons) == (1, [])


@pytest.mark.parametrize(
    ("line", "count"),
    [
        pytest.param(b"\n", 0, id="empty"),
        pytest.param(b"{}\n", 0, id="no frames"),
        pytest.param(b'{"type":"pong","number":0}\n', 1_000_000, id="frames"),
    ],
)
def test_a_million_tiny_lines_cost_no_more_than_one_read(line: bytes, count: int) -> None:
    ear = Ear()
    piece = line * (READ_SIZE // len(line))
    full, rest = divmod(1_000_000 * len(line), len(piece))
    with memory_below(MEMORY):
        for _ in range(full):
            ear.channel.received(piece)
        ear.channel.received(piece[:rest])
    assert ear.frames == count


def test_a_lost_channel_keeps_nothing_of_what_still_comes() -> None:
    ear = Ear()
    ear.channel.lost("gone")
    piece = b"x" * READ_SIZE
    with memory_below(MEMORY):
        for _ in range(4096):
            ear.channel.received(piece)
            ear.channel.said(piece)
    assert (ear.frames, ear.reasons) == (0, ["gone"])


@pytest.mark.parametrize("depth", [100, 1000, 30_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_deep_nesting_raises_nothing(depth: int, opening: str, closing: str) -> None:
    ear = Ear()
    depth = min(depth, LIMIT // 2 // (len(opening) + len(closing)))
    canary = '{"a":' + opening * depth + "1" + closing * depth + "}"
    text = f'{{"type":"hello","version":1,"nonce":"","session":null,"executions":[],"canary":{canary}}}'
    ear.channel.received(text.encode() + b"\n")
    assert ear.frames + len(ear.reasons) == 1


@pytest.mark.parametrize(
    "number", ["9" * 60_000, "-" + "9" * 60_000, "1e400", "-1e400", "1e-400", "NaN", "Infinity", "-0"]
)
def test_numbers_beyond_reason_raise_nothing(number: str) -> None:
    ear = Ear()
    ear.channel.received(f'{{"type":"pong","number":{number}}}\n'.encode())
    assert ear.frames + len(ear.reasons) == 1


# --- the container


class Tapped(Stage):
    """A played engine whose agent the test may speak for, byte by byte."""

    async def start(self, spec: Spec, receiver: Receiver) -> Wire:
        self.receiver = receiver
        return await super().start(spec, receiver)


class Scene:
    """A container with two executions, whose agent is the test."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.output: dict[str, bytes] = dict.fromkeys(RUNNING, b"")
        self.container = Container(SPEC, "python", output_limit=OUTPUT_LIMIT, on_lost=self._lost)
        self.stage = Tapped()
        self.stage.holding = True

    def _lost(self, container: Container) -> None:
        assert container is self.container
        assert container.lost_reason is not None
        self.losses.append(container.lost_reason)

    def sink(self, eid: str) -> Callable[[Stream, bytes], None]:
        """Return where an execution's output goes."""

        def take(stream: Stream, data: bytes) -> None:
            assert not self.losses, "output after the end"
            self.output[eid] += data

        return take

    async def hear(self, chunks: Iterator[bytes]) -> None:
        """Start, execute, then receive the chunks in place of what the agent would say."""
        await self.container.start(self.stage, {})
        agent = self.stage.agents[SPEC.name]
        await self.container.bind("s", {})
        tasks = [
            asyncio.create_task(
                self.container.execute(eid, {}, note={}, deadline_s=30, sink=self.sink(eid), hold=False)
            )
            for eid in RUNNING
        ]
        workspace = Workspace(self.container)
        asked = [
            asyncio.create_task(workspace.stat("f")),
            asyncio.create_task(workspace.list("", recursive=False, limit=9, after=None)),
        ]
        while len(agent.executed) < len(RUNNING):
            await asyncio.sleep(0)
        agent.mute = True
        self.container.beat()
        for chunk in chunks:
            self.stage.receiver.received(chunk)
            await asyncio.sleep(0)
        self.container.close("the test is over")
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, frames.Result | ContainerLost)
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(answer, File | FilePage | SandboxError)
        assert len(self.losses) <= 1
        assert all(len(data) <= 3 * OUTPUT_LIMIT for data in self.output.values())
        self.container.beat()
        self.container.cancel("e1")
        with pytest.raises(SandboxError):
            await self.container.execute("e9", {}, note={}, deadline_s=30, sink=self.sink("e1"), hold=False)


@given(lines=st.lists(LINES, max_size=10), sizes=CHUNKS)
def test_no_frames_in_any_order_make_a_container_raise_or_be_lost_twice(lines: list[bytes], sizes: list[int]) -> None:
    asyncio.run(Scene().hear(cut(b"\n".join([*lines, b""]), sizes)))


@given(order=st.permutations(["o1", "o2", "r1", "o1", "r2"]), again=st.booleans())
def test_honest_frames_in_the_wrong_order_lose_the_container_once(order: list[str], again: bool) -> None:
    """Right order: every output numbered, before its execution's one result. In any other, what came first counts."""
    honest = dict.fromkeys(RESULT) | {"outcome": "ok", "exit_code": 0, "message": "", "truncated": []}
    honest |= {"launch_s": 0, "wall_s": 0, "cpu_s": 0, "max_rss_bytes": 0}
    counts = dict.fromkeys("12", 0)
    lines = []
    for word in [*order, "r1"] if again else order:
        kind, number = word[0], word[1]
        counts[number] += kind == "o"
        seq = {"id": f"e{number}", "seq": counts[number]}
        output = {"type": "output", "stream": "stdout", "data": ""}
        told = (honest | {"type": "result"} if kind == "r" else output) | seq
        lines.append(json.dumps(told).encode() + b"\n")
    scene = Scene()
    asyncio.run(scene.hear(iter(lines)))
    ended: set[str] = set()
    wrong = again
    for word in order:
        kind, number = word[0], word[1]
        wrong |= number in ended
        ended |= {number} if kind == "r" else set()
    assert len(scene.losses) == wrong


# --- the agent's side


@given(
    lengths=st.lists(st.integers(0, 40) | st.integers(LIMIT - 3, LIMIT + 3) | st.just(3 * LIMIT), max_size=6),
    sizes=st.lists(st.integers(0, 70_000), max_size=20),
    last=st.integers(0, LIMIT + 1),
)
def test_the_agent_drops_the_same_long_lines_however_the_stream_is_cut(
    lengths: list[int], sizes: list[int], last: int
) -> None:
    data = b"".join(b"%d" % (number % 10) * length + b"\n" for number, length in enumerate(lengths)) + b"x" * last
    whole, pieces = agent_frames.Lines(), agent_frames.Lines()
    expected = whole.feed(data)
    assert expected == [line for chunk in cut(data, sizes) for line in pieces.feed(chunk)]
    assert expected == [line for line in data.split(b"\n")[:-1] if len(line) < agent_frames.LINE_LIMIT]


def test_the_agent_keeps_no_line_that_is_too_long() -> None:
    lines = agent_frames.Lines()
    with memory_below(MEMORY):
        for _ in range(4096):
            assert lines.feed(b"x" * READ_SIZE) == []
    assert lines.feed(b'\n{"type":"ping"}\n') == [b'{"type":"ping"}']
