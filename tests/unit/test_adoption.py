"""What an orchestrator takes over from an earlier one, and how it answers a request that is sent again."""

import asyncio
import base64
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

import frames
from orchestrator.adoption import adopt
from orchestrator.channel import Channel
from orchestrator.container import Container
from orchestrator.egress.border import Border
from orchestrator.egress.outlet import Outlet
from orchestrator.egress.policy import Denied, Policy
from orchestrator.engine import Spec
from orchestrator.errors import (
    ContainerLost,
    EngineError,
    ExecutionNotFound,
    InvalidRequest,
    KeyReused,
    SessionNotFound,
    Unavailable,
)
from orchestrator.executions import Installation, Record
from orchestrator.frames import LINE_LIMIT, AnyAgentFrame, Result
from orchestrator.greeting import AGENT_VERSION, HELLO_BYTES
from orchestrator.metrics import Metrics
from orchestrator.models import AllowedHost, Execution, ExecutionRequest, NetworkRules, SessionPatch, SessionRequest
from orchestrator.pool import Pool
from orchestrator.recipes import recipes
from orchestrator.reconciler import Reconciler
from orchestrator.runs import HELD
from orchestrator.session import HISTORY, Kept, Session
from orchestrator.sessions import Sessions
from orchestrator.settings import Settings
from tests.fake_engine import FakeEngine, Played, Stage
from tests.unit.test_reconciler import settle, until

SOON_S = 10.0
NEVER_S = 1000.0
SPEC = Spec(
    name="c", image="i", uid=50000, cpus=1, memory_bytes=1, workspace_bytes=1, scratch_bytes=1, labels={}, runtime=None
)
KEPT = Kept(source="warm", env={"A": "b"}, metadata={"team": "a"}, age_s=100.0, expires_in_s=500.0, idle_timeout_s=60.0)


def new_container() -> Container:
    return Container(SPEC, "python", output_limit=1000, on_lost=lambda lost: None)


def new_session(kept: Kept, **times: Any) -> Session:
    container = new_container()
    border = Border(Settings(engine="local"), Metrics(CollectorRegistry()))
    return Session("s", container, kept, Outlet(border, container, "s", Policy("none", border.bounds)), **times)


# --- what the agent keeps of a session


@pytest.mark.parametrize("told_ago_s", [0.0, 30.0, 900.0])
async def test_a_session_that_is_told_again_has_the_same_times_whenever_it_was_told(told_ago_s: float) -> None:
    before = time.monotonic()
    session = new_session(KEPT, limit=4, told_ago_s=told_ago_s)
    after = time.monotonic()
    assert before <= session.used <= after
    assert before <= session.created + 100.0 + told_ago_s <= after
    assert before <= session.expires - 500.0 + told_ago_s <= after
    told = msgspec.convert(session.kept(), Kept)
    again = new_session(told, limit=4, told_ago_s=0.0)
    assert session.created == pytest.approx(again.created, abs=0.1)
    assert session.expires == pytest.approx(again.expires, abs=0.1)
    assert (KEPT.env, KEPT.metadata, KEPT.idle_timeout_s) == (again.env, again.metadata, again.idle_timeout_s)


async def test_a_session_that_expired_while_nobody_looked_is_overdue_when_it_is_told() -> None:
    session = new_session(KEPT, limit=4, told_ago_s=501.0)
    assert session.overdue(time.monotonic()) == "expired"


# --- a channel that is not in step yet


class Tape:
    """A channel with what it heard."""

    def __init__(self, *, in_step: bool) -> None:
        self.frames: list[AnyAgentFrame] = []
        self.lost: list[str] = []
        self.channel = Channel(self.frames.append, self.lost.append)
        self.channel.in_step = in_step


PONG = b'{"type":"pong","number":1}\n'
TORN = [
    pytest.param(b'umber":7}\n', id="the end of a frame"),
    pytest.param(b'{"type":"pong","num\n', id="the beginning of one"),
    pytest.param(b'{"type":"output","id":"e1"{"type":"pong","number":1}\n', id="two in one line"),
    pytest.param(b"x" * (LINE_LIMIT + 1) + b"\n", id="a line that is too long"),
    pytest.param(b"\xff\n", id="no text"),
]


@pytest.mark.parametrize("size", [1 << 20, 7000, 1])
@pytest.mark.parametrize("torn", TORN)
def test_what_is_torn_is_dropped_until_the_channel_is_in_step_and_ends_it_from_then_on(torn: bytes, size: int) -> None:
    data = torn + PONG
    tape = Tape(in_step=False)
    for start in range(0, len(data), size):
        tape.channel.received(data[start : start + size])
    assert [type(frame).__name__ for frame in tape.frames] == ["Pong"]
    assert tape.lost == []
    tape.channel.in_step = True
    tape.channel.received(torn)
    assert len(tape.lost) == 1


def test_a_line_without_an_end_is_not_kept_while_the_channel_is_not_in_step() -> None:
    tape = Tape(in_step=False)
    for _ in range(64):
        tape.channel.received(b"x" * LINE_LIMIT)
    assert len(tape.channel._rest) <= LINE_LIMIT
    tape.channel.received(b"\n" + PONG)
    assert len(tape.frames) == 1


# --- an execution that is resumed while its frames cross


class Scene:
    """A container whose orchestrator died, and the one that adopts it."""

    def __init__(self) -> None:
        self.stage = Stage()
        self.stage.holding = True
        self.lost: list[str | None] = []
        self.taken: list[bytes] = []
        self.first = self._container()
        self.second = self._container()

    def _container(self) -> Container:
        return Container(
            SPEC, "python", output_limit=1000, on_lost=lambda container: self.lost.append(container.lost_reason)
        )

    @property
    def agent(self) -> Played:
        return self.stage.agents["c"]

    async def crash(self, *pieces: bytes, done: bool = False) -> None:
        """Have `e1` begun by the first orchestrator; it hears of nothing that the agent then sends."""
        await self.first.start(self.stage, {})
        await self.first.bind("s", {"n": 1})
        work = self.first.execute("e1", {}, note={"key": "k"}, deadline_s=NEVER_S, sink=lambda *_: None, hold=True)
        task = asyncio.create_task(work)
        await until(lambda: self.agent.executed)
        self.first.close("it died")
        with pytest.raises(ContainerLost):
            await task
        for piece in pieces:
            self.agent.output("e1", piece)
        if done:
            self.agent.finish("e1")
        await settle()

    def resume(self, *, hold: bool = False) -> asyncio.Task[Result]:
        def take(stream: str, data: bytes) -> None:
            self.taken.append(data)

        return asyncio.create_task(self.second.resume("e1", deadline_s=SOON_S, sink=take, hold=hold))


async def test_an_adopted_agent_tells_session_kept_facts_and_executions() -> None:
    scene = Scene()
    await scene.crash(b"one", b"two")
    hello = await scene.second.adopt(scene.stage)
    assert ("s", {"n": 1}) == (hello.session, hello.kept)
    [known] = hello.executions
    assert ("e1", 2, False, {"key": "k"}) == (known.id, known.seq, known.done, known.note)


async def test_a_resumed_execution_has_its_whole_output_and_its_result() -> None:
    scene = Scene()
    await scene.crash(b"one", b"two", done=True)
    await scene.second.adopt(scene.stage)
    assert (await scene.resume()).outcome == "ok"
    assert scene.taken == [b"one", b"two"]
    assert scene.agent.executed == ["e1"]


def end(agent: Played) -> None:
    """Send the last output and the result, unless that was done."""
    if not any(frame["type"] == "result" for frame in agent.said["e1"]):
        agent.output("e1", b"last")
        agent.finish("e1")


CROSSING: list[tuple[str, Callable[[Played], None]]] = [
    ("nothing", lambda agent: None),
    ("live output", lambda agent: agent.output("e1", b"three")),
    ("all of it again", lambda agent: agent.resend("e1")),
    ("the end of it again", lambda agent: agent.resend("e1", 1)),
    ("output and the result", end),
]


@pytest.mark.parametrize("during", [crossing for _, crossing in CROSSING], ids=[name for name, _ in CROSSING])
@pytest.mark.parametrize("before", [crossing for _, crossing in CROSSING], ids=[name for name, _ in CROSSING])
async def test_frames_that_cross_are_taken_once_and_in_order(
    before: Callable[[Played], None], during: Callable[[Played], None]
) -> None:
    """`before` is sent between hello and resync, `during` right behind the answer to the resync; then all is repeated."""
    scene = Scene()
    await scene.crash(b"one", b"two")
    await scene.second.adopt(scene.stage)
    before(scene.agent)
    task = scene.resume()
    await until(lambda: "resync" in scene.agent.heard)
    if not task.done():
        during(scene.agent)
    end(scene.agent)
    scene.agent.resend("e1")
    assert (await task).outcome == "ok"
    await settle()
    assert scene.taken == pieces(scene.agent)
    assert scene.lost == []


def pieces(agent: Played) -> list[bytes]:
    """Return the output of `e1` as the agent told it first."""
    told = [frame for frame in agent.said["e1"] if frame["type"] == "output"]
    assert [frame["seq"] for frame in told] == list(range(1, len(told) + 1))
    return [msgspec.convert(frame["data"], bytes) for frame in told]


async def test_an_execution_that_is_begun_after_an_adoption_is_judged_as_ever() -> None:
    scene = Scene()
    await scene.crash()
    await scene.second.adopt(scene.stage)
    work = scene.second.execute("e2", {}, note={}, deadline_s=SOON_S, sink=lambda *_: None, hold=False)
    task = asyncio.create_task(work)
    await until(lambda: "e2" in scene.agent.executed)
    scene.agent.output("e2", b"one")
    scene.agent.resend("e2")
    with pytest.raises(ContainerLost, match="out of order"):
        await task
    assert len(scene.lost) == 1


async def test_an_answer_to_an_orchestrator_that_died_meanwhile_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one before died with its hello unanswered: the agent answers it, and then ours."""
    scene = Scene()
    await scene.crash()
    answer = Played._on_hello

    def answer_both(agent: Played, frame: dict[str, Any]) -> None:
        answer(agent, frame | {"nonce": "of the one that died"})
        answer(agent, frame)

    monkeypatch.setattr(Played, "_on_hello", answer_both)
    assert (await scene.second.adopt(scene.stage)).session == "s"
    assert scene.lost == []


def say_in_parts(agent: Played, hello: frames.Frame, *, mark_last: bool = True) -> None:
    """Send a hello in two parts."""
    line = base64.b64encode(frames.encode(hello)).decode()
    half = len(line) // 8 * 4
    agent.say("part", nonce=hello["nonce"], data=line[:half], last=False)
    agent.say("part", nonce=hello["nonce"], data=line[half:], last=mark_last)


def say_without_end(agent: Played, hello: frames.Frame) -> None:
    """Send parts of a hello that is longer than any."""
    for _ in range(HELLO_BYTES // (1 << 15) + 1):
        say_in_parts(agent, hello | {"x": "y" * (1 << 15)}, mark_last=False)


async def test_parts_for_an_orchestrator_that_died_meanwhile_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    await scene.crash()
    answer = Played._on_hello

    def answer_both(agent: Played, frame: dict[str, Any]) -> None:
        say_in_parts(agent, {"type": "hello", "nonce": "of the one that died"}, mark_last=False)
        answer(agent, frame)

    monkeypatch.setattr(Played, "_on_hello", answer_both)
    assert (await scene.second.adopt(scene.stage)).session == "s"
    assert scene.lost == []


LIES: list[tuple[str, Callable[[Played, frames.Frame], None]]] = [
    ("is no hello", lambda agent, ours: say_in_parts(agent, ours | {"type": "part", "data": "", "last": True})),
    ("frame that is none", say_in_parts),
    ("without an end", say_without_end),
]


@pytest.mark.parametrize(("reason", "lie"), LIES, ids=[reason for reason, _ in LIES])
async def test_parts_that_make_no_hello_lose_a_new_container(
    reason: str, lie: Callable[[Played, frames.Frame], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(agent: Played, frame: frames.Frame) -> None:
        lie(agent, {"type": "hello", "nonce": frame["nonce"]})

    monkeypatch.setattr(Played, "_on_hello", answer)
    scene = Scene()
    with pytest.raises(ContainerLost, match=reason):
        await scene.first.start(scene.stage, {})


async def test_results_that_are_held_are_acknowledged_when_there_are_too_many() -> None:
    scene = Scene()
    scene.stage.holding = False
    await scene.first.start(scene.stage, {})
    await scene.first.bind("s", {})
    for number in range(HELD + 3):
        eid = f"e{number}"
        await scene.first.execute(eid, {}, note={}, deadline_s=SOON_S, sink=lambda *_: None, hold=True)
    scene.first.beat()
    assert [f"e{number}" for number in range(3, HELD + 3)] == list(scene.agent.said)


# --- sessions: adopted, and requests that are sent again


class House:
    """What one orchestrator puts together, on a stage that outlives it."""

    def __init__(self, stage: Stage | None = None, **settings: Any) -> None:
        given: dict[str, Any] = {"engine": "local", "pool_size": 1, "on_exit": "remove", "reconcile_seconds": NEVER_S}
        self.settings = Settings(**(given | {"heartbeat_seconds": NEVER_S} | settings))
        self.stage = stage or Stage()
        self.engine = FakeEngine(self.stage)
        self.metrics = Metrics(CollectorRegistry())
        self.pools = {name: Pool(recipe, self.wake) for name, recipe in recipes(self.settings).items()}
        self.reconciler = Reconciler(self.settings, self.engine, self.pools, self.metrics)
        self.sessions = Sessions(self.settings, self.pools, self.metrics, self.reconciler.discard)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["House"]:
        """Adopt, then reconcile inside this context. What it holds at the end stays on the stage, as after a crash."""
        await self.adopt()
        task = asyncio.create_task(self.reconciler.run(self.sessions))
        try:
            await until(lambda: self.pools["python"].ready)
            yield self
        finally:
            self.sessions.work.keeping = True  # a process that is killed cancels nothing
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for container in self.reconciler.known.values():
                container.close("it died")
            await settle()

    async def adopt(self) -> None:
        await adopt(self.settings, self.engine, recipes(self.settings), self.reconciler, self.sessions)

    def wake(self) -> None:
        self.reconciler.wake()

    async def create(self, sid: str = "s", **fields: Any) -> Session:
        return await self.sessions.create(SessionRequest(id=sid, **fields))

    def agent(self, sid: str = "s") -> Played:
        return self.stage.agents[self.sessions.held[sid].container.name]

    def execute(self, code: str = "", *, key: str | None = None) -> asyncio.Task[Execution]:
        request = ExecutionRequest(code=code, timeout_s=SOON_S)
        return asyncio.create_task(self.sessions.execute("s", request, key=key))


async def test_a_session_survives_its_orchestrator_with_all_that_the_client_gave_it() -> None:
    async with House().running() as first:
        old = await first.create(metadata={"team": "a"}, env={"A": "b"}, ttl_s=500, idle_timeout_s=60)
        first.sessions.patch("s", SessionPatch(metadata={"team": "b"}))
        before = old.facts()
    async with House(first.stage).running() as second:
        after = second.sessions.get("s").facts()
        assert (before.id, before.template, before.source) == (after.id, after.template, after.source)
        assert after.metadata == {"team": "b"}
        assert second.sessions.get("s").env == {"A": "b"}
        assert after.idle_timeout_s == 60
        assert abs((after.expires_at - before.expires_at).total_seconds()) < 1
        assert abs((after.created_at - before.created_at).total_seconds()) < 1
        assert len(second.stage.agents) == 2  # its container, and a new one that is ready


async def test_a_sessions_network_survives_and_its_agent_is_told_anew(tmp_path: Path) -> None:
    rules = NetworkRules(allow=["a.example", AllowedHost(host="b.example:80", headers={"X-Key": "secret"})])
    given: dict[str, Any] = {"engine": "docker", "state_dir": str(tmp_path)}
    async with House(**given).running() as first:
        old = await first.create(network=rules)
        agent = first.agent()
        await until(lambda: agent.port is not None)
        assert "secret" not in str(agent.kept)
    agent.port = None
    async with House(first.stage, **given).running() as second:
        found = second.sessions.get("s")
        assert found.facts().network == old.facts().network
        await until(lambda: agent.port is not None)
        with pytest.raises(Denied, match="PATCH"):
            found.outlet.policy.headers("b.example", 80)
        second.sessions.patch("s", SessionPatch(network=rules))
        assert found.outlet.policy.headers("b.example", 80) == {"X-Key": "secret"}


@pytest.mark.parametrize("forged", ["public", {"allow": ["*:*"], "deny": []}])
async def test_an_agent_cannot_give_its_session_another_network(forged: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"engine": "docker", "state_dir": str(tmp_path)}
    async with House(**given).running() as first:
        await first.create(network="none")
        await first.create("open", network=NetworkRules(allow=["a.example"]))
        for sid in ("s", "open"):
            kept = first.agent(sid).kept
            assert kept is not None
            kept["network"] = forged
    async with House(first.stage, **given).running() as second:
        assert second.sessions.get("s").facts().network == "none"
        assert second.sessions.get("open").facts().network == "none"


async def test_what_an_agent_could_not_keep_is_refused() -> None:
    async with House().running() as house:
        with pytest.raises(InvalidRequest, match="put long texts into files"):
            await house.create(env={f"A{number}": "x" * 30_000 for number in range(3)})
        session = await house.create(env={"A": "x" * 30_000, "B": "y" * 29_000})
        with pytest.raises(InvalidRequest, match="metadata"):
            house.sessions.patch("s", SessionPatch(metadata={f"m{n}": "z" * 512 for n in range(8)}))
        assert session.metadata == {}


async def test_what_is_without_a_session_is_removed_before_anything_is_served() -> None:
    async with House(pool_size=2).running() as first:
        await first.create("ended")
        first.sessions.end(first.sessions.get("ended"), "closed")
        await until(lambda: len(first.pools["python"].ready) == 2)
        left = set(first.stage.agents)
    second = House(first.stage)
    await second.adopt()
    assert left == set(second.engine.removed)
    assert second.stage.agents == {}
    with pytest.raises(SessionNotFound):
        second.sessions.get("ended")


MISFITS: list[tuple[str, dict[str, Any]]] = [
    ("an agent of another version", {"version": AGENT_VERSION + 1}),
    ("facts of another version", {"kept": {"origin": "warm"}}),
    ("no facts", {"kept": None}),
    ("no session", {"session": None}),
    ("a note of another version", {"executions": [{"id": "e", "seq": 0, "done": True, "note": {}, "age_s": 0.0}]}),
]


@pytest.mark.parametrize("change", [change for _, change in MISFITS], ids=[name for name, _ in MISFITS])
async def test_a_container_that_does_not_fit_is_removed_and_leaves_no_session(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with House(pool_size=1).running() as first:
        await first.create()
    say = Played.say

    def change_hello(agent: Played, type: str, **fields: Any) -> None:  # noqa: A002
        say(agent, type, **(fields | change if type == "hello" else fields))

    second = House(first.stage)
    with monkeypatch.context() as patch:
        patch.setattr(Played, "say", change_hello)
        await second.adopt()
    assert second.sessions.held == {}
    assert second.reconciler.known == {}
    assert second.stage.agents == {}


async def test_an_agent_that_is_silent_is_given_up_and_holds_no_other_up() -> None:
    async with House().running() as first:
        await first.create("silent")
        first.agent("silent").mute = True
        await until(lambda: first.pools["python"].ready)
        await first.create("well")
    second = House(first.stage, engine_timeout_seconds=0.05)
    await second.adopt()
    assert list(second.sessions.held) == ["well"]
    assert len(second.stage.agents) == 1


async def test_what_the_engine_does_not_remove_at_the_adoption_is_no_end_of_it() -> None:
    async with House().running() as first:
        await first.create()
    second = House(first.stage)
    second.engine.faults["remove"] = itertools.repeat(EngineError("busy"))
    await second.adopt()
    assert list(second.sessions.held) == ["s"]
    assert len(second.stage.agents) == 2, "what was not removed is found again, as an orphan"


async def test_a_running_execution_goes_on_and_is_read_in_full() -> None:
    async with House().running() as first:
        await first.create()
        first.agent().holding = True
        lost = first.execute(key="k")
        await until(lambda: first.agent().executed)
        agent = first.agent()
        [eid] = agent.executed
        agent.output(eid, b"one\n")
    await asyncio.gather(lost, return_exceptions=True)
    agent.output(eid, b"two\n")
    async with House(first.stage).running() as second:
        assert second.sessions.execution("s", eid).facts.outcome is None
        repeat = second.execute(key="k")
        agent.output(eid, b"three\n")
        agent.finish(eid)
        execution = await repeat
        assert (eid, "ok", "one\ntwo\nthree\n") == (execution.id, execution.outcome, execution.stdout)
        assert second.sessions.execution("s", eid).facts is execution
        assert agent.executed == [eid]


async def test_a_finished_execution_is_read_although_those_that_run_fill_the_session() -> None:
    async with House(session_executions=2).running() as first:
        await first.create()
        agent = first.agent()
        agent.holding = True
        running = first.execute(key="running")
        await until(lambda: agent.executed)
        agent.holding = False
        done = await first.execute(key="done")
        agent.holding = True
    await asyncio.gather(running, return_exceptions=True)
    async with House(first.stage, session_executions=1).running() as second:
        assert (await second.execute(key="done")).id == done.id
        waiting = second.execute()
        await settle()
        assert len(agent.executed) == 2, "what runs still counts"
        agent.finish(agent.executed[0])
        await until(lambda: len(agent.executed) == 3)
        agent.finish(agent.executed[2])
        assert (await waiting).outcome == "ok"


async def test_more_that_runs_than_may_run_now_can_still_be_read_and_cancelled() -> None:
    async with House(session_executions=2).running() as first:
        await first.create()
        agent = first.agent()
        agent.holding = True
        tasks = [first.execute() for _ in range(2)]
        await until(lambda: len(agent.executed) == 2)
    await asyncio.gather(*tasks, return_exceptions=True)
    async with House(first.stage, session_executions=1).running() as second:
        second.sessions.cancel("s", agent.executed[1])
        await until(lambda: second.sessions.execution("s", agent.executed[1]).facts.outcome == "cancelled")
        assert agent.heard.count("cancel") == 1
        assert second.sessions.execution("s", agent.executed[0]).facts.outcome is None


async def test_installations_that_run_and_wait_go_on_in_their_order() -> None:
    order = Installation(command=["pip"], timeout_s=SOON_S)
    async with House().running() as first:
        await first.create()
        agent = first.agent()
        agent.holding = True
        one, two = (first.sessions.start("s", order, stays=True).id for _ in range(2))
        await until(lambda: agent.executed == [one] and "queue" in agent.heard)
    async with House(first.stage).running() as second:
        three = second.sessions.start("s", order)
        for count, eid in enumerate((one, two, three.id)):
            await settle()
            assert agent.executed[count:] == [eid]
            agent.finish(eid)
            await settle()
        assert await second.sessions.ended(three)


# --- keys


async def test_a_session_that_keeps_much_in_another_script_survives() -> None:
    """What it keeps is within its limit, and the agent's hello is not within a line."""
    metadata = {f"m{number}": "北" * 500 for number in range(16)}
    env = {f"A{number}": "京" * 1000 for number in range(10)}
    async with House().running() as first:
        await first.create(metadata=metadata, env=env)
        agent = first.agent()
        assert len(frames.encode({"kept": agent.kept})) > LINE_LIMIT
    async with House(first.stage).running() as second:
        found = second.sessions.get("s")
        assert (found.metadata, found.own_env) == (metadata, env)


# --- executions that wait for their turn


def begin(house: House, key: str | None = None, *, stays: bool = False) -> Record:
    request = ExecutionRequest(code="", timeout_s=SOON_S)
    return house.sessions.start("s", request, key=key, stays=stays)


async def test_what_waits_for_its_turn_outlives_the_orchestrator_and_runs_once_in_order() -> None:
    async with House(session_executions=1).running() as first:
        await first.create()
        agent = first.agent()
        agent.holding = True
        ran = [begin(first, "a"), begin(first, "b"), begin(first, stays=True)]
        unattended = begin(first)
        await until(lambda: len(agent.queue) == 2)
        assert agent.executed == [ran[0].id]
    async with House(first.stage, session_executions=1).running() as second:
        repeat = second.execute(key="b")
        await settle()
        assert agent.executed == [ran[0].id], "it is not its turn yet"
        for number, record in enumerate(ran):
            await until(lambda: len(agent.executed) == number + 1)  # noqa: B023
            agent.finish(record.id)
        assert ((await repeat).id, (await repeat).outcome) == (ran[1].id, "ok")
        await until(lambda: second.sessions.execution("s", ran[2].id).facts.outcome == "ok")
        assert agent.executed == [record.id for record in ran], "each ran once, and in order"
        assert agent.queue == {}
        with pytest.raises(ExecutionNotFound):
            second.sessions.execution("s", unattended.id)


@pytest.mark.parametrize("crashed", [False, True])
async def test_what_was_cancelled_while_it_waited_does_not_run_after_a_crash(crashed: bool) -> None:
    async with House(session_executions=1).running() as first:
        await first.create()
        agent = first.agent()
        agent.holding = True
        running, waiting = begin(first, "a"), begin(first, "b")
        await until(lambda: agent.queue)
        if not crashed:
            first.sessions.cancel("s", waiting.id)
            await until(lambda: waiting.facts.outcome and not agent.queue)
    async with House(first.stage, session_executions=1).running() as second:
        if crashed:
            second.sessions.cancel("s", waiting.id)
            await until(lambda: second.sessions.execution("s", waiting.id).facts.outcome == "cancelled")
        agent.finish(running.id)
        await until(lambda: second.sessions.in_flight == 0)
        assert (agent.executed, agent.queue) == ([running.id], {})


async def test_at_an_upgrade_what_waits_is_left_to_the_next() -> None:
    async with House(session_executions=1, on_exit="keep").running() as first:
        await first.create()
        agent = first.agent()
        agent.holding = True
        running, waiting = begin(first, stays=True), begin(first, stays=True)
        await until(lambda: agent.queue)
        await first.sessions.drain(0.01)
    async with House(first.stage, session_executions=1).running() as second:
        agent.finish(running.id)
        await until(lambda: len(agent.executed) == 2)
        agent.finish(waiting.id)
        await until(lambda: second.sessions.execution("s", waiting.id).facts.outcome == "ok")


async def test_the_same_request_with_the_same_key_is_run_once() -> None:
    async with House().running() as house:
        await house.create()
        first = await house.execute("1", key="k")
        assert await house.execute("1", key="k") is first
        assert house.agent().executed == [first.id]
        other = await house.execute("1", key="other")
        without = await house.execute("1")
        assert house.agent().executed == [first.id, other.id, without.id]


async def test_another_request_with_the_same_key_is_refused_and_does_not_run() -> None:
    async with House().running() as house:
        await house.create()
        first = await house.execute("1", key="k")
        with pytest.raises(KeyReused, match="was used for another request"):
            await house.execute("2", key="k")
        assert house.agent().executed == [first.id]


async def test_repeats_while_it_runs_wait_for_its_one_result() -> None:
    async with House().running() as house:
        await house.create()
        agent = house.agent()
        agent.holding = True
        tasks = [house.execute("1", key="k") for _ in range(5)]
        await until(lambda: agent.executed)
        with pytest.raises(KeyReused):
            await house.execute("2", key="k")
        tasks[1].cancel()
        await settle()
        assert not tasks[0].done()
        agent.finish(agent.executed[0])
        found = await asyncio.gather(*tasks[:1], *tasks[2:])
        assert {agent.executed[0]} == {execution.id for execution in found}
        assert len(agent.executed) == 1
        assert agent.heard.count("cancel") == 0


async def test_who_stops_waiting_for_a_request_with_a_key_does_not_cancel_it() -> None:
    async with House().running() as house:
        await house.create()
        agent = house.agent()
        agent.holding = True
        given_up = house.execute(key="k")
        await until(lambda: agent.executed)
        given_up.cancel()
        await settle()
        again = house.execute(key="k")
        await settle()
        agent.finish(agent.executed[0])
        assert ((await again).id, (await again).outcome) == (agent.executed[0], "ok")
        assert agent.heard.count("cancel") == 0


async def test_a_key_is_forgotten_with_its_execution() -> None:
    async with House().running() as house:
        session = await house.create()
        first = await house.execute("1", key="k")
        for _ in range(HISTORY):
            await house.execute()
        with pytest.raises(ExecutionNotFound):
            house.sessions.execution("s", first.id)
        assert session.keys == {}
        assert (await house.execute("2", key="k")).id != first.id


async def test_a_key_belongs_to_its_session() -> None:
    async with House().running() as house:
        for sid in ("one", "two"):
            await until(lambda: house.pools["python"].ready)
            await house.create(sid)
        request = ExecutionRequest(code="1")
        one, two = [await house.sessions.execute(sid, request, key="k") for sid in ("one", "two")]
        assert one.id != two.id


# --- the end of a service that keeps its sessions


async def test_who_waits_is_told_to_ask_again_and_what_runs_is_left_to_the_next() -> None:
    async with House(on_exit="keep", session_executions=1).running() as first:
        session = await first.create()
        agent = first.agent()
        agent.holding = True
        tasks = [first.execute("1", key="k"), first.execute("1", key="k"), first.execute("2")]
        await until(lambda: len(session.records) == 2 and agent.executed)
        [eid] = agent.executed
        await first.sessions.drain(0.01)
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(answer, Unavailable)
            assert answer.retry_after_s is not None
        agent.output(eid, b"said to nobody\n")
        await settle()
        assert session.container.lost_reason is None
        assert session.records[eid].facts.outcome is None
        assert session.overdue(time.monotonic() + NEVER_S**2) is None, "what goes on keeps its session"
        assert agent.heard.count("cancel") == 0
        assert agent.executed == [eid], "what had waited for its turn never gets it"
        assert (
            first.metrics.value(
                "sandbox_execution_duration_seconds_count", template="python", language="python", outcome="lost"
            )
            == 0
        )
        await first.reconciler.clear(keep=[session.container])
        assert list(first.stage.agents) == [session.container.name]
    async with House(first.stage).running() as second:
        repeat = second.execute("1", key="k")
        await settle()
        agent.finish(eid)
        assert ((await repeat).id, (await repeat).stdout) == (eid, "said to nobody\n")


async def test_what_ends_in_time_is_answered_although_the_service_ends() -> None:
    async with House(on_exit="keep").running() as house:
        await house.create()
        agent = house.agent()
        agent.holding = True
        running = house.execute()
        await until(lambda: agent.executed)
        draining = asyncio.create_task(house.sessions.drain(SOON_S))
        await settle()
        agent.finish(agent.executed[0])
        await draining
        assert (await running).outcome == "ok"
