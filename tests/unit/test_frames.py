"""What orchestrator and agent say to each other, in any chunks; and an agent that lies."""

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import frames as agent_frames
from orchestrator import frames
from orchestrator.channel import Channel
from orchestrator.container import Container
from orchestrator.engine import Spec
from orchestrator.errors import ContainerLost, EngineError
from orchestrator.frames import AnyAgentFrame, Bound, Fault, Hello, Known, Output, Pong, Result, StdinTaken
from orchestrator.greeting import AGENT_VERSION
from orchestrator.output import STREAMS
from tests.fake_engine import Played, Stage

SPEC = Spec(
    name="c", image="i", uid=50000, cpus=1, memory_bytes=1, workspace_bytes=1, scratch_bytes=1, labels={}, runtime=None
)
OUTPUT_LIMIT = 1000
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut the data into chunks of these sizes, and what remains."""
    chunks, at = [], 0
    for size in sizes:
        chunks.append(data[at : at + size])
        at += size
    return [*chunks, data[at:]]


# --- a job on its way to the agent


class Listener:
    """What an agent makes of the bytes: the jobs that they hand over."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self._lines = agent_frames.Lines()
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            assert len(line) < agent_frames.LINE_LIMIT
            frame = agent_frames.decode(line)
            assert frame is not None
            if frame["type"] == "part":
                self._parts.append(base64.b64decode(frame["data"]))
            else:
                self.jobs.append(frame.get("job") or json.loads(b"".join(self._parts))["job"])


@given(code=TEXT, event=JSON_VALUES, repeat=st.integers(1, 3000), sizes=st.lists(st.integers(1, 70_000), max_size=20))
def test_a_job_arrives_as_it_was_sent_whatever_its_length_and_however_the_stream_is_cut(
    code: str, event: object, repeat: int, sizes: list[int]
) -> None:
    job = {"code": code * repeat, "event": event, "timeout_s": 1.5}
    listener = Listener()
    for chunk in cut(b"".join(frames.encode_job("execute", "e1", job, note={}, acks=["e0"])), sizes):
        listener.feed(chunk)
    assert listener.jobs == [job]


@pytest.mark.parametrize("spare", [-1, 0, 1, 2])
def test_a_job_goes_in_parts_exactly_when_its_line_would_be_too_long(spare: int) -> None:
    empty = len(frames.encode("execute", id="e1", job={"code": ""}, note={}, acks=[]))
    lines = list(
        frames.encode_job("execute", "e1", {"code": "x" * (frames.LINE_LIMIT - empty + spare)}, note={}, acks=[])
    )
    assert [len(line) <= frames.LINE_LIMIT for line in lines] == [True] * len(lines)
    assert (len(lines) > 1) == (spare > 0)


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b"-"))),
    sizes=st.lists(st.integers(0, 9)),
)
def test_the_agent_cuts_the_same_lines_from_any_chunks_and_drops_those_that_are_too_long(
    lines: list[bytes], sizes: list[int]
) -> None:
    limit = 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_frames, "LINE_LIMIT", limit)
        reader = agent_frames.Lines()
        found = [line for chunk in cut(b"".join(line + b"\n" for line in lines), sizes) for line in reader.feed(chunk)]
    assert found == [line for line in lines if len(line) < limit]


@pytest.mark.parametrize("line", [b"", b"{", b'{"type":"ping"', b"[]", b"5", b"null", b"\xff", b"[" * 100_000])
def test_the_agent_takes_a_torn_line_for_none(line: bytes) -> None:
    assert agent_frames.decode(line) is None


# --- frames of the agent

HELLO = Hello(
    version=AGENT_VERSION,
    nonce="n",
    session=None,
    kept=None,
    kept_age_s=0.0,
    canary={"uid": 1000},
    executions=[Known(id="e1", seq=2, done=True, note={}, age_s=1.0)],
)
RESULT = Result(
    id="e1",
    seq=0,
    outcome="ok",
    exit_code=0,
    signal=None,
    message="",
    launch_s=0.1,
    wall_s=0.1,
    cpu_s=0.2,
    max_rss_bytes=3,
    truncated=["stdout"],
)
FRAMES: list[AnyAgentFrame] = [
    HELLO,
    Bound(session="s1"),
    Output(id="e1", seq=1, stream="stdout", data=b"\xff\n"),
    RESULT,
    Pong(number=1),
    Fault(message="why"),
    StdinTaken(number=1, result="full"),
]
LIES: list[tuple[str, dict[str, Any]]] = [
    ("unknown type", {"type": "exec", "id": "e1"}),
    ("no type", {"id": "e1"}),
    ("type of another kind", {"type": 5}),
    ("missing field", {"type": "pong"}),
    ("unknown field", {"type": "pong", "number": 1, "more": 1}),
    ("number as text", {"type": "pong", "number": "1"}),
    ("unknown stream", {"type": "output", "id": "e1", "seq": 1, "stream": "stdin", "data": ""}),
    ("no base64", {"type": "output", "id": "e1", "seq": 1, "stream": "stdout", "data": "*"}),
    ("negative seq", {"type": "output", "id": "e1", "seq": -1, "stream": "stdout", "data": ""}),
    ("id too long", {"type": "output", "id": "e" * 65, "seq": 1, "stream": "stdout", "data": ""}),
]
RESULT_LIES: list[tuple[str, dict[str, Any]]] = [
    ("unknown outcome", {"outcome": "fine"}),
    ("exit code above 255", {"exit_code": 256}),
    ("negative exit code", {"exit_code": -1}),
    ("negative time", {"wall_s": -0.1}),
    ("negative memory", {"max_rss_bytes": -1}),
    ("text for time", {"cpu_s": "0"}),
    ("unknown stream", {"truncated": ["stdin"]}),
]
NO_FRAMES = [
    ("no JSON", b"hello"),
    ("half a frame", b'{"type":"pong","number":'),
    ("two frames", b'{"type":"pong","number":1}{"type":"pong","number":2}'),
    ("a list", b"[]"),
    ("no UTF-8", b'{"type":"fault","message":"\xff"}'),
    ("lone surrogate", b'{"type":"fault","message":"\\ud800"}'),
    ("NaN", b'{"type":"pong","number":NaN}'),
    ("deep", b'{"type":"fault","message":' + b"[" * 100_000),
]


def encode(frame: AnyAgentFrame) -> bytes:
    return frames._encoder.encode(frame)


def as_dict(frame: AnyAgentFrame) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encode(frame))
    return found


@pytest.mark.parametrize("frame", FRAMES, ids=lambda frame: type(frame).__name__)
def test_every_frame_of_the_agent_is_read(frame: AnyAgentFrame) -> None:
    assert frames.decode(encode(frame)) == frame


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, id=name) for name, line in NO_FRAMES]
    + [pytest.param(json.dumps(lie).encode(), id=name) for name, lie in LIES]
    + [pytest.param(json.dumps(as_dict(RESULT) | lie).encode(), id=name) for name, lie in RESULT_LIES],
)
def test_a_line_that_is_no_frame_is_refused(line: bytes) -> None:
    with pytest.raises(ContainerLost, match="a frame that is none"):
        frames.decode(line)


class Tape:
    """A channel with what it heard."""

    def __init__(self) -> None:
        self.frames: list[AnyAgentFrame] = []
        self.lost: list[str] = []
        self.channel = Channel(self.frames.append, self.lost.append)


@given(chosen=st.lists(st.sampled_from(FRAMES), max_size=8), sizes=st.lists(st.integers(0, 60), max_size=40))
def test_the_channel_reads_the_same_frames_from_any_chunks(chosen: list[AnyAgentFrame], sizes: list[int]) -> None:
    tape = Tape()
    for chunk in cut(b"".join(encode(frame) + b"\n" for frame in chosen), sizes):
        tape.channel.received(chunk)
    assert tape.frames == chosen
    assert tape.lost == []


@given(sizes=st.lists(st.integers(1, 100_000), max_size=5))
def test_the_channel_is_lost_at_a_line_that_is_too_long_and_hears_nothing_after_it(sizes: list[int]) -> None:
    tape = Tape()
    for chunk in cut(b"x" * (frames.LINE_LIMIT + 1) + b"\n" + encode(FRAMES[4]) + b"\n", sizes):
        tape.channel.received(chunk)
    assert tape.frames == []
    assert tape.lost == ["the agent sent a frame that is too long"]


def test_the_channel_keeps_the_beginning_of_what_the_agent_says_on_stderr() -> None:
    tape = Tape()
    for _ in range(100):
        tape.channel.said(b"x" * 1000)
    assert 2048 <= len(tape.channel.said_text) < 2 * 2048


# --- an agent that lies: its container is lost, and nothing else happens


class Scene:
    """One container whose agent the test plays."""

    def __init__(self) -> None:
        self.stage = Stage()
        self.stage.holding = True
        self.lost: list[str | None] = []
        self.taken: list[tuple[str, bytes]] = []
        self.container = Container(
            SPEC,
            "python",
            output_limit=OUTPUT_LIMIT,
            on_lost=lambda container: self.lost.append(container.lost_reason),
        )

    @property
    def agent(self) -> Played:
        return self.stage.agents["c"]

    async def start(self) -> None:
        await self.container.start(self.stage, {})
        await self.container.bind("s1", {})

    def execute(self, eid: str = "e1", deadline_s: float = 30) -> asyncio.Task[Result]:
        def take(stream: str, data: bytes) -> None:
            self.taken.append((stream, data))

        work = self.container.execute(eid, {"code": ""}, note={}, deadline_s=deadline_s, sink=take, hold=False)
        return asyncio.create_task(work)

    async def until_executed(self) -> None:
        async with asyncio.timeout(5):
            while not self.agent.executed:
                await asyncio.sleep(0)


@pytest.fixture
async def scene() -> Scene:
    made = Scene()
    await made.start()
    return made


def output(seq: int = 1, data: bytes = b"x", eid: str = "e1") -> dict[str, Any]:
    return {"type": "output", "id": eid, "seq": seq, "stream": "stdout", "data": base64.b64encode(data).decode()}


ENDED = as_dict(RESULT)
LYING: list[tuple[str, list[dict[str, Any]], str]] = [
    ("output of an unknown execution", [output(eid="e2")], "an execution that does not run"),
    ("output that skips a number", [output(seq=2)], "out of order"),
    ("output twice", [output(), output()], "out of order"),
    ("more output than allowed", [output(data=b"x" * (len(STREAMS) * OUTPUT_LIMIT + 1))], "above the limit"),
    ("too much in pieces", [output(seq, b"x" * OUTPUT_LIMIT) for seq in range(1, len(STREAMS) + 2)], "above the limit"),
    ("a result before its output", [ENDED | {"seq": 1}], "out of order"),
    ("a result of an unknown execution", [ENDED | {"id": "e2"}], "an execution that does not run"),
    ("output after the result", [ENDED, output()], "an execution that does not run"),
    ("a second result", [ENDED, ENDED], "an execution that does not run"),
    ("a pong without a ping", [{"type": "pong", "number": 7}], "nobody asked for"),
    ("an answer about stdin", [{"type": "stdin_taken", "number": 1, "result": "taken"}], "nobody asked for"),
    ("a second hello", [as_dict(HELLO)], "nobody asked for"),
    ("a fault", [{"type": "fault", "message": "it burns"}], "it burns"),
]


async def test_a_cancel_waits_until_the_agent_has_all_of_the_job(scene: Scene) -> None:
    """Said earlier, it would find no execution, and the job would run."""
    work = scene.container.execute(
        "e1", {"code": "x" * 200_000}, note={}, deadline_s=30, sink=lambda *_: None, hold=False
    )
    execution = asyncio.create_task(work)
    async with asyncio.timeout(5):
        while "part" not in scene.agent.heard:
            await asyncio.sleep(0)
    scene.container.cancel("e1")
    assert (await execution).outcome == "cancelled"
    assert scene.agent.heard[-3:] == ["part", "execute", "cancel"]
    assert scene.agent.heard.count("cancel") == 1


@pytest.mark.parametrize(("said", "reason"), [pytest.param(said, why, id=name) for name, said, why in LYING])
async def test_an_agent_that_breaks_the_order_loses_its_container(
    scene: Scene, said: list[dict[str, Any]], reason: str
) -> None:
    execution = scene.execute()
    await scene.until_executed()
    for frame in said:
        scene.agent.say(frame["type"], **{name: value for name, value in frame.items() if name != "type"})
    if said[0] is ENDED:  # what came before the lie counts
        assert await execution == RESULT
    else:
        with pytest.raises(ContainerLost, match=reason):
            await execution
    assert len(scene.lost) == 1
    assert reason in str(scene.lost[0])


async def test_a_result_counts_although_the_container_vanished_right_behind_it(scene: Scene) -> None:
    execution = scene.execute()
    await scene.until_executed()
    scene.agent.say("output", **{name: value for name, value in output().items() if name != "type"})
    scene.agent.finish("e1", seq=1)
    asyncio.get_running_loop().call_soon(scene.agent.vanish)
    assert (await execution).outcome == "ok"
    assert scene.taken == [("stdout", b"x")]


async def test_an_execution_ends_as_lost_when_the_container_vanishes(scene: Scene) -> None:
    execution = scene.execute()
    await scene.until_executed()
    scene.agent.vanish("the attached stream ended")
    with pytest.raises(ContainerLost, match="the attached stream ended"):
        await execution
    with pytest.raises(ContainerLost):
        await scene.execute("e2")


async def test_an_agent_without_an_answer_loses_its_container_at_the_deadline(scene: Scene) -> None:
    with pytest.raises(ContainerLost, match="no result in time"):
        await scene.execute(deadline_s=0.01)
    assert len(scene.lost) == 1


async def test_a_container_is_lost_once_and_says_what_its_agent_said(scene: Scene) -> None:
    scene.agent._receiver.said(b"out of memory\n")
    scene.agent.vanish("the agent's output ended")
    scene.agent.vanish("the agent's output ended")
    scene.container.lose("again")
    assert scene.lost == ["the agent's output ended: out of memory"]


async def test_the_first_byte_after_attaching_is_a_newline() -> None:
    scene = Scene()
    heard: list[bytes] = []
    write = Played.write

    def record(agent: Played, data: bytes) -> None:
        heard.append(data)
        write(agent, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Played, "write", record)
        await scene.start()
    assert heard[0] == b"\n"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        pytest.param({"nonce": "another"}, EngineError, id="another nonce"),
        pytest.param({"version": AGENT_VERSION + 1}, EngineError, id="another version"),
    ],
)
async def test_an_agent_of_another_build_is_refused(
    change: dict[str, Any], error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(agent: Played, frame: dict[str, Any]) -> None:
        facts = as_dict(HELLO) | {"nonce": frame["nonce"]} | change
        agent.say("hello", **{name: value for name, value in facts.items() if name != "type"})

    monkeypatch.setattr(Played, "_on_hello", answer)
    with pytest.raises(error, match="build the image anew"):
        await Scene().start()


async def test_a_container_that_is_bound_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def bind(agent: Played, frame: dict[str, Any]) -> None:
        agent.say("bound", session="another")

    scene = Scene()
    monkeypatch.setattr(Played, "_on_bind", bind)
    with pytest.raises(ContainerLost, match="another session"):
        await scene.start()
    assert scene.lost == ["the agent is bound to another session"]


async def test_a_bound_that_nobody_asked_for_loses_the_container() -> None:
    scene = Scene()
    await scene.container.start(scene.stage, {})
    scene.agent.say("bound", session="s1")
    await asyncio.sleep(0)
    assert scene.lost == ["the agent sent a frame that nobody asked for"]


async def test_heartbeats_are_counted_and_one_ping_is_out_at_a_time(scene: Scene) -> None:
    settle: Callable[[], Any] = lambda: asyncio.sleep(0.001)  # noqa: E731
    assert scene.container.beat()
    await settle()
    assert scene.container.beat()
    scene.agent.mute = True
    await settle()
    assert scene.container.beat()
    assert [scene.container.beat() for _ in range(2)] == [False, False]
    assert scene.container.heartbeat.missed == 2
    assert scene.agent.heard.count("ping") == 2


async def test_a_container_that_was_closed_is_not_asked_for_a_heartbeat(scene: Scene) -> None:
    scene.container.close("the container was removed (ended)")
    assert scene.container.beat()
