"""Reconciler, pools and sessions together, on an engine that fails, waits and forgets as told."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from orchestrator import backoff as module
from orchestrator import observer, reconciler
from orchestrator.admission import QUEUE_FACTOR
from orchestrator.adoption import adopt
from orchestrator.backoff import Backoff
from orchestrator.egress.outlet import PORT
from orchestrator.engine import Engine, Receiver, Seen, Wire
from orchestrator.engine.local import LocalEngine
from orchestrator.errors import (
    ContainerLost,
    EngineAway,
    EngineError,
    ExecutionNotFound,
    SessionEnded,
    SessionExists,
    SessionNotFound,
    TooManyRequests,
    Unavailable,
)
from orchestrator.metrics import Metrics
from orchestrator.models import Execution, ExecutionRequest, OneShotRequest, SessionPatch, SessionRequest
from orchestrator.pool import Pool
from orchestrator.recipes import Recipe, recipes, spec_of
from orchestrator.reconciler import Reconciler
from orchestrator.removals import REFUSALS
from orchestrator.session import HISTORY, Session
from orchestrator.sessions import Sessions
from orchestrator.settings import Settings
from tests.fake_engine import FakeEngine, Played, Stage

SOON_S = 10.0
NEVER_S = 1000.0
QUIET: dict[str, Any] = {
    "engine": "local",
    "instance": "test",
    "uid_base": 53000,
    "pool_size": 2,
    "on_exit": "remove",
    "reconcile_seconds": NEVER_S,  # a test that passes did not need the clock
    "heartbeat_seconds": NEVER_S,
    "max_timeout_seconds": NEVER_S,
}
REFUSED = EngineError("The engine failed to `start`: no")


class House:
    """What `Orchestrator` puts together, on another engine."""

    def __init__(
        self,
        inner: Engine | None = None,
        *,
        more: dict[str, Recipe] | None = None,
        bare: bool = False,
        **settings: Any,
    ) -> None:
        self.settings = Settings(**(QUIET | settings))
        self.stage = Stage()
        self.engine = FakeEngine(inner or self.stage)
        self.metrics = Metrics(CollectorRegistry())
        self.recipes = recipes(self.settings) | (more or {})
        self.pools = {name: Pool(recipe, self.wake) for name, recipe in self.recipes.items()}
        engine = inner if inner is not None and bare else self.engine  # bare: without faults before it
        self.reconciler = Reconciler(self.settings, engine, self.pools, self.metrics)
        self.sessions = Sessions(self.settings, self.pools, self.metrics, self.reconciler.discard)

    @property
    def pool(self) -> Pool:
        return self.pools["python"]

    def wake(self) -> None:
        self.reconciler.wake()

    @property
    def looks(self) -> float:
        """How often the engine answered."""
        return self.metrics.value("sandbox_reconcile_seconds_count", result="ok")

    def look(self) -> None:
        """Have the engine asked at once."""
        self.reconciler.observer.hurry()

    def agent(self, session: Session) -> Played:
        return self.stage.agents[session.container.name]

    async def create(self, sid: str | None = None, **fields: Any) -> Session:
        return await self.sessions.create(SessionRequest(id=sid, **fields))

    def execute(self, sid: str, **fields: Any) -> asyncio.Task[Execution]:
        what = {} if "command" in fields else {"code": ""}
        request = ExecutionRequest(**(what | {"timeout_s": 100.0} | fields))
        return asyncio.create_task(self.sessions.execute(sid, request))

    async def begin(self, session: Session, **fields: Any) -> asyncio.Task[Execution]:
        """Begin an execution; its agent has it, and holds it."""
        agent = self.agent(session)
        agent.holding = True
        running = self.execute(session.id, **fields)
        await until(lambda: agent.executed)
        return running

    async def until_full(self) -> None:
        await until(lambda: len(self.pool.ready) == self.settings.pool_size)

    def removed(self, reason: str) -> float:
        return self.metrics.value("sandbox_containers_removed_total", reason=reason)

    @asynccontextmanager
    async def running(self, *, full: bool = True) -> AsyncIterator["House"]:
        """Reconcile inside this context. A reconciler that ended by itself is an error."""
        task = asyncio.create_task(self.reconciler.run(self.sessions))
        try:
            if full:
                await self.until_full()
            yield self
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], Any]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Let everything that is due now happen."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses after failures; one test has the real ones."""
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "LAST_PAUSE_S", 0.02)


# --- the pool


async def test_at_the_start_the_pool_is_filled_in_parallel() -> None:
    house = House(pool_size=3)
    house.engine.gates["start"] = asyncio.Event()
    async with house.running(full=False):
        await until(lambda: len(house.engine.started) == 3)
        assert len(house.pool.starting) == 3
        house.engine.gates["start"].set()
        await house.until_full()
    assert len(house.engine.started) == 3


async def test_what_is_taken_is_replaced_at_once() -> None:
    async with House().running() as house:
        for number in range(3):
            session = await house.create()
            assert session.source == "warm"
            await house.until_full()
            assert len(house.engine.started) == 3 + number


async def test_an_empty_pool_starts_what_is_waited_for_and_no_more() -> None:
    async with House(pool_size=0).running() as house:
        session = await house.create()
        assert session.source == "cold"
        await settle()
        assert len(house.engine.started) == 1


async def test_every_container_has_a_name_and_a_user_of_its_own() -> None:
    async with House(pool_size=4).running() as house:
        await house.create()
        await house.until_full()
        specs = [container.spec for container in house.reconciler.known.values()]
    assert sorted(spec.uid for spec in specs) == list(range(53000, 53005))
    assert len({spec.name for spec in specs}) == 5


async def test_a_container_that_is_ready_too_long_is_replaced() -> None:
    async with House(pool_size=1, max_age_seconds=0.05, reconcile_seconds=0.02).running() as house:
        first = house.pool.ready[0].name
        await until(lambda: first in house.engine.removed)
        await house.until_full()
        assert house.removed("max_age") >= 1


async def test_a_ready_container_that_vanishes_is_replaced() -> None:
    async with House().running() as house:
        gone = house.pool.ready[0].name
        house.stage.agents[gone].vanish()
        await until(lambda: gone in house.engine.removed)
        await house.until_full()
        assert house.removed("lost") == 1


async def test_a_ready_container_that_only_the_engine_knows_to_be_gone_is_replaced() -> None:
    async with House().running() as house:
        gone = house.pool.ready[0].name
        house.stage.agents[gone].running = False
        house.look()
        await until(lambda: gone in house.engine.removed)
        await house.until_full()


async def test_a_lost_container_that_acquire_passed_over_is_removed() -> None:
    """It is lost and asked for in one step, before the reconciler could see it."""
    async with House().running() as house:
        gone = house.pool.ready[0]
        house.stage.agents[gone.name].vanish()
        session = await house.create()
        assert session.container is not gone
        await until(lambda: gone.name in house.engine.removed)
        assert gone.name not in house.reconciler.known


async def test_a_container_that_becomes_ready_while_the_engine_is_asked_does_not_count_as_missing() -> None:
    house = House(pool_size=1)
    house.engine.gates["list"] = asyncio.Event()
    async with house.running(full=False):
        house.engine.gates["list"].set()
        await house.until_full()
        house.engine.gates["start"] = asyncio.Event()
        await house.create()
        await until(lambda: house.pool.starting)
        house.engine.gates["list"] = asyncio.Event()  # the engine takes its time, and meanwhile the start ends
        house.look()
        await settle()
        house.engine.gates["start"].set()
        await house.until_full()
        house.engine.gates["list"].set()
        await settle()
        await house.until_full()
        assert len(house.engine.started) == 2
        assert house.removed("surplus") == 0


# --- starts that fail


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_starts_that_fail_are_fewer_than_ten_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(module, "LAST_PAUSE_S", 30.0)
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    backoff = Backoff()
    starts = []
    while clock.now < 600:
        for _ in range(backoff.may_start(clock.now)):
            starts.append(clock.now)
            backoff.failed()
        clock.now += 0.1
    assert max(sum(begin <= start < begin + 60 for start in starts) for begin in range(540)) < 10
    assert max(after - before for before, after in itertools.pairwise(starts)) < 40


def test_after_a_failure_a_single_start_probes_and_a_success_ends_the_caution(monkeypatch: pytest.MonkeyPatch) -> None:
    backoff = Backoff()
    now = time.monotonic()
    assert backoff.may_start(now) == module.PARALLEL_STARTS
    pause_s = backoff.failed()
    assert backoff.may_start(now) == 0
    assert backoff.may_start(now + pause_s + 1) == 1
    backoff.succeeded()
    assert backoff.may_start(now) == module.PARALLEL_STARTS


def test_what_failed_for_an_engine_that_was_away_is_tried_when_it_is_back() -> None:
    away, broken = Backoff(), Backoff()
    away.failed(away=True)
    broken.failed()
    for backoff in (away, broken):
        backoff.returned()
    assert [backoff.may_start(time.monotonic()) for backoff in (away, broken)] == [1, 0]


async def test_failing_starts_are_tried_again_until_one_works_and_are_told_meanwhile() -> None:
    house = House()
    house.engine.faults["start"] = iter([REFUSED] * 5)
    async with house.running(full=False):
        await until(lambda: house.reconciler.starts.fault)
        assert house.reconciler.starts.fault == f"no container of template python starts: {REFUSED.detail}"
        assert house.reconciler.starts.fault in house.reconciler.faults()
        await house.until_full()
        assert house.reconciler.faults() == []
        await until(lambda: len(house.reconciler.known) == 2)
        assert house.removed("start_failed") == 5


async def test_a_container_whose_start_has_no_answer_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(pool_size=1)
    house.engine.answers_lost.add("start")
    async with house.running(full=False):
        await until(lambda: house.engine.removed)
        assert house.engine.started[0] not in house.stage.agents
        house.engine.answers_lost.clear()
        await house.until_full()
    assert set(house.stage.agents) == {house.pool.ready[0].name}


async def test_a_start_that_hangs_is_given_up() -> None:
    house = House(pool_size=1, start_timeout_seconds=0.05)
    house.engine.gates["start"] = asyncio.Event()
    async with house.running(full=False):
        await until(lambda: house.reconciler.starts.fault)
        assert "no sign of life in time" in str(house.reconciler.starts.fault)
        house.engine.gates["start"].set()
        await house.until_full()


async def test_a_template_that_fails_does_not_hold_up_another() -> None:
    broken = msgspec.structs.replace(recipes(Settings())["python"].template, name="broken", image="nix", pool_size=2)
    house = House(more={"broken": Recipe(template=broken, preboot={"python": 1}, runtime=None)})
    real_start = house.stage.start

    async def start(spec: Any, receiver: Any) -> Any:
        if spec.image == "nix":
            raise REFUSED
        return await real_start(spec, receiver)

    house.stage.start = start  # type: ignore[method-assign]
    async with house.running():
        for _ in range(5):
            assert (await house.create()).source == "warm"
            await house.until_full()


@pytest.mark.parametrize("call", ["start", "list", "remove"])
async def test_an_error_that_nobody_expected_does_not_end_the_reconciler(call: str) -> None:
    house = House(reconcile_seconds=0.02)
    async with house.running():
        house.engine.faults[call] = iter([OSError("No space left on device")] * 2)
        session = await house.create("s")
        house.sessions.end(session, "closed")
        await until(lambda: next(house.engine.faults[call], None) is None)
        await house.until_full()
        assert (await house.create("s")).source == "warm"
        await until(lambda: session.container.name in house.engine.removed)


# --- removals, orphans, an engine that is silent


async def test_a_removal_that_fails_is_tried_again_and_the_container_counts_until_it_is_gone() -> None:
    async with House().running() as house:
        session = await house.create()
        await house.until_full()
        house.engine.faults["remove"] = iter([EngineError("busy")] * 3)
        house.sessions.end(session, "closed")
        name = session.container.name
        await until(lambda: name in house.engine.tried)
        assert name in house.reconciler.known
        await until(lambda: name not in house.reconciler.known)
        assert house.engine.tried == [name] * 4
        assert house.engine.removed == [name]
        assert house.removed("ended") == 1


async def test_a_container_is_removed_once_however_often_it_is_discarded() -> None:
    async with House().running() as house:
        session = await house.create()
        house.engine.gates["remove"] = asyncio.Event()
        for reason in ("ended", "lost", "ended"):
            house.reconciler.discard(session.container, reason)
        await settle()
        house.engine.gates["remove"].set()
        await until(lambda: house.engine.removed)
        await settle()
        assert house.engine.tried == [session.container.name]


async def test_what_the_engine_refuses_to_remove_is_in_quarantine_until_it_is_gone() -> None:
    async with House(max_containers=4).running() as house:
        session = await house.create()
        await house.until_full()
        name = session.container.name
        house.engine.faults["remove"] = itertools.repeat(EngineError("device or resource busy"))
        house.sessions.end(session, "closed")
        await until(lambda: name in house.reconciler.removals.quarantined)
        assert house.engine.tried.count(name) == REFUSALS
        assert house.reconciler.occupied == 3, "it counts"
        assert house.reconciler.faults() == [], "others are served"
        await until(lambda: house.engine.tried.count(name) > REFUSALS + 2)
        house.engine.faults.clear()
        await until(lambda: name not in house.reconciler.known)
        assert house.reconciler.removals.quarantined == {}
        assert house.removed("ended") == 1


async def test_a_quarantine_that_takes_up_the_room_is_told() -> None:
    async with House(pool_size=1, max_containers=2).running() as house:
        house.engine.faults["remove"] = itertools.repeat(EngineError("device or resource busy"))
        for _ in range(2):
            session = await house.create()
            house.sessions.end(session, "closed")
        await until(lambda: len(house.reconciler.removals.quarantined) == 2)
        assert house.reconciler.faults() == [
            "no container is ready",
            "2 containers that the engine refuses to remove take up the room",
        ]
        assert house.engine.peak <= 2
        house.engine.faults.clear()
        await house.until_full()
        assert house.reconciler.faults() == []


async def test_an_engine_that_is_away_refuses_nothing() -> None:
    async with House().running() as house:
        session = await house.create()
        house.engine.faults["remove"] = itertools.repeat(EngineAway("connection refused"))
        house.sessions.end(session, "closed")
        await until(lambda: house.engine.tried.count(session.container.name) > REFUSALS + 1)
        assert house.reconciler.removals.quarantined == {}
        house.engine.faults.clear()
        await until(lambda: session.container.name not in house.reconciler.known)


def stranger(name: str) -> Seen:
    return Seen(name=name, running=True, labels={})


async def test_what_nobody_knows_is_removed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async with House(reconcile_seconds=0.01).running() as house:
        house.engine.extra = [stranger("unknown")]
        looks = house.looks
        await until(lambda: house.looks > looks + 2)
        assert house.engine.tried == []
        monkeypatch.setattr(reconciler, "ORPHAN_AGE_S", 0.02)
        await until(lambda: "unknown" in house.engine.removed)
        assert house.engine.tried == ["unknown"]
        assert house.removed("orphan") == 1


async def test_a_container_that_is_made_after_its_start_was_given_up_is_removed_at_the_next_look() -> None:
    house = House(pool_size=1)
    house.engine.faults["start"] = iter([REFUSED])
    async with house.running():
        late = house.engine.started[0]
        await until(lambda: late not in house.reconciler.known)
        house.engine.extra = [stranger(late)]
        house.look()
        await until(lambda: house.engine.tried.count(late) == 2)
        assert house.removed("orphan") == 1


async def test_plans_are_made_and_sessions_end_in_time_while_the_engine_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(observer, "SLOW_S", 0.05)
    async with House(reconcile_seconds=0.01).running() as house:
        house.engine.gates["list"] = asyncio.Event()
        await until(house.reconciler.faults)
        assert "has not answered for" in house.reconciler.faults()[0]
        session = await house.create("s", ttl_s=0.05)
        await until(lambda: session.container.name in house.engine.removed)
        await house.until_full()
        house.engine.gates["list"].set()
        await until(lambda: house.reconciler.faults() == [])


async def test_what_an_earlier_life_left_is_cleared() -> None:
    house = House()
    house.engine.extra = [stranger("left")]
    await house.reconciler.clear()
    assert house.engine.removed == ["left"]


async def test_clearing_removes_what_it_can_although_one_removal_fails() -> None:
    house = House()
    house.engine.extra = [stranger(name) for name in ("one", "two", "three")]
    house.engine.faults["remove"] = iter([EngineError("busy")])
    await house.reconciler.clear()
    assert len(house.engine.removed) == 2


async def test_while_the_engine_is_silent_nothing_is_concluded() -> None:
    async with House(reconcile_seconds=0.01).running() as house:
        await house.create("s")
        await house.until_full()
        house.engine.faults["list"] = itertools.repeat(EngineError("The engine did not answer `list` within 15 s"))
        await until(lambda: house.reconciler.observer.fault)
        tried = house.metrics.value("sandbox_reconcile_seconds_count", result="error")
        await until(lambda: house.metrics.value("sandbox_reconcile_seconds_count", result="error") > tried + 3)
        assert list(house.sessions.held) == ["s"]
        assert len(house.pool.ready) == 2
        assert house.engine.tried == []
        assert house.reconciler.faults() == ["The engine did not answer `list` within 15 s"]
        house.engine.faults.clear()
        await until(lambda: house.reconciler.faults() == [])


# --- caps


async def test_five_hundred_creates_at_once_never_exceed_the_containers_that_are_allowed() -> None:
    house = House(max_containers=8, acquire_timeout_seconds=2.0)
    async with house.running():
        results = await asyncio.gather(*(house.create(f"s{n}") for n in range(500)), return_exceptions=True)
        made = [result for result in results if isinstance(result, Session)]
        assert {type(result) for result in results} <= {Session, TooManyRequests, Unavailable}
        assert len(made) == 8
        assert len(house.sessions.held) == 8
        assert house.engine.peak <= 8
        for session in made:
            house.sessions.end(session, "closed")
        await until(lambda: len(house.engine.removed) >= 8)
        await house.until_full()
        assert (await house.create("again")).source == "warm"
    assert house.engine.peak <= 8


async def test_without_room_a_session_waits_for_one_that_ends() -> None:
    async with House(max_containers=2, pool_size=0, acquire_timeout_seconds=5.0).running() as house:
        first = await house.create()
        await house.create()
        with pytest.raises(TooManyRequests, match="All containers are in use"):
            await house.create()
        house.sessions.end(first, "closed")
        assert (await house.create()).source == "cold"
    assert house.engine.peak <= 2


async def test_who_waits_too_long_is_told_to_come_again() -> None:
    house = House(pool_size=0, acquire_timeout_seconds=0.05)
    house.engine.gates["start"] = asyncio.Event()
    async with house.running(full=False):
        with pytest.raises(Unavailable, match="in time"):
            await house.create("s")
        house.engine.gates["start"].set()
        await until(lambda: not house.pool.starting)
        assert (await house.create("s")).id == "s"


async def test_who_gives_up_a_create_leaves_id_and_container_to_others() -> None:
    house = House(pool_size=0)
    house.engine.gates["start"] = asyncio.Event()
    async with house.running(full=False):
        task = asyncio.create_task(house.create("s"))
        await until(lambda: house.pool.starting)
        task.cancel()
        await settle()
        assert task.cancelled()
        house.engine.gates["start"].set()
        assert (await house.create("s")).id == "s"


# --- sessions


async def test_an_id_is_given_once() -> None:
    house = House(pool_size=0)
    house.engine.gates["start"] = asyncio.Event()
    async with house.running(full=False):
        first = asyncio.create_task(house.create("s"))
        await settle()
        with pytest.raises(SessionExists):
            await house.create("s")
        house.engine.gates["start"].set()
        await first
        with pytest.raises(SessionExists):
            await house.create("s")


async def test_a_session_whose_container_cannot_be_bound_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with House().running() as house:
        chosen = house.pool.ready[0].name

        def vanish(agent: Played, frame: object) -> None:
            agent.vanish()

        with monkeypatch.context() as patch:
            patch.setattr(Played, "_on_bind", vanish)
            with pytest.raises(ContainerLost):
                await house.create("s")
        await until(lambda: chosen in house.engine.removed)
        assert (await house.create("s")).id == "s"


@pytest.mark.parametrize("once", [False, True], ids=["session", "one-shot"])
async def test_a_container_whose_stream_breaks_when_its_agent_is_to_listen_is_given_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, once: bool
) -> None:
    async with House(engine="docker", state_dir=str(tmp_path)).running() as house:
        chosen = house.pool.ready[0].name

        def break_off(agent: Played, frame: object) -> None:
            agent.vanish()
            raise RuntimeError("the transport is closed")  # as some transports say

        with monkeypatch.context() as patch:
            patch.setattr(Played, "_on_network", break_off)
            with pytest.raises(RuntimeError, match="closed"):
                await (house.sessions.execute_once(OneShotRequest(code="")) if once else house.create("s"))
        await until(lambda: chosen in house.engine.removed)
        assert chosen not in house.reconciler.known
        assert house.agent(await house.create("s")).port == PORT


async def test_a_session_ends_with_its_container_and_says_so() -> None:
    async with House().running() as house:
        session = await house.create("s")
        house.stage.holding = True
        running = await house.begin(session)
        house.agent(session).vanish("the attached stream ended")
        execution = await running
        assert (execution.outcome, execution.exit_code) == ("lost", None)
        assert execution.error is not None
        assert execution.error.type == "Sandbox.Lost"
        await until(lambda: "s" not in house.sessions.held)
        with pytest.raises(SessionEnded, match="has ended \\(lost\\)"):
            house.sessions.get("s")
        await until(lambda: session.container.name in house.engine.removed)
        assert house.metrics.value("sandbox_sessions_ended_total", template="python", reason="lost") == 1
        assert (
            house.metrics.value(
                "sandbox_execution_duration_seconds_count", template="python", language="python", outcome="lost"
            )
            == 1
        )


async def test_an_agent_without_a_heartbeat_is_lost_with_its_session_and_execution() -> None:
    async with House(heartbeat_seconds=0.02, heartbeat_misses=2).running() as house:
        session = await house.create("s")
        running = await house.begin(session)
        house.agent(session).mute = True
        assert (await running).outcome == "lost"
        await until(lambda: "s" not in house.sessions.held)
        assert "heartbeats" in str(session.container.lost_reason)
        assert house.metrics.value("sandbox_heartbeats_missed_total") >= 2
        await until(lambda: session.container.name in house.engine.removed)


async def test_heartbeats_go_on_while_containers_are_being_removed() -> None:
    async with House(heartbeat_seconds=0.01, heartbeat_misses=2).running() as house:
        house.engine.gates["remove"] = asyncio.Event()
        house.sessions.end(await house.create(), "closed")
        await house.until_full()
        other = house.stage.agents[house.pool.ready[0].name]
        heard = other.heard.count("ping")
        await until(lambda: other.heard.count("ping") > heard + 3)
        house.engine.gates["remove"].set()
        await until(lambda: house.engine.removed)


@pytest.mark.parametrize(
    ("fields", "reason"), [({"ttl_s": 0.05}, "expired"), ({"idle_timeout_s": 0.05}, "idle")], ids=["ttl", "idle"]
)
async def test_a_session_ends_by_time_but_never_under_a_running_execution(fields: dict[str, Any], reason: str) -> None:
    async with House(reconcile_seconds=0.01).running() as house:
        session = await house.create("s", **fields)
        running = await house.begin(session)
        quiet_until = min(session.expires, session.used + session.idle_timeout_s)
        await until(lambda: time.monotonic() > quiet_until + 0.05)
        looks = house.metrics.value("sandbox_reconcile_seconds_count", result="ok")
        await until(lambda: house.metrics.value("sandbox_reconcile_seconds_count", result="ok") > looks + 2)
        assert house.sessions.get("s") is session
        house.agent(session).finish(house.agent(session).executed[0])
        assert (await running).outcome == "ok"
        await until(lambda: "s" not in house.sessions.held)
        with pytest.raises(SessionEnded, match=reason):
            house.sessions.get("s")
        await until(lambda: session.container.name in house.engine.removed)


async def test_a_session_that_is_overdue_is_not_served_even_before_the_reconciler_ends_it() -> None:
    async with House().running() as house:
        session = await house.create("s", ttl_s=0.01)
        await until(lambda: time.monotonic() > session.due)
        with pytest.raises(SessionEnded, match="expired"):
            house.sessions.get("s")
        with pytest.raises(SessionEnded):
            await house.execute("s")


async def test_a_patch_extends_a_session() -> None:
    async with House(reconcile_seconds=0.01).running() as house:
        session = await house.create("s", ttl_s=0.2, idle_timeout_s=0.2)
        first_due = session.due
        house.sessions.patch("s", SessionPatch(ttl_s=100, idle_timeout_s=100, metadata={"a": "b"}))
        await until(lambda: time.monotonic() > first_due + 0.05)
        assert house.sessions.get("s").metadata == {"a": "b"}


async def test_a_session_that_the_client_ended_is_unknown_and_its_id_free() -> None:
    async with House().running() as house:
        house.sessions.end(await house.create("s"), "closed")
        with pytest.raises(SessionNotFound):
            house.sessions.get("s")
        assert (await house.create("s")).id == "s"


async def test_who_ends_a_session_that_has_ended_leaves_the_one_that_has_its_id_now() -> None:
    async with House().running() as house:
        old = await house.create("s")
        house.sessions.end(old, "closed")
        new = await house.create("s")
        house.sessions.end(old, "closed")
        assert house.sessions.get("s") is new
        assert house.metrics.value("sandbox_sessions_ended_total", template="python", reason="closed") == 1


async def test_a_new_session_is_not_mistaken_for_the_one_that_had_its_id() -> None:
    """The old one's container is gone from the engine's list, which was asked for before the new one began."""
    async with House().running() as house:
        old = await house.create("s")
        await house.until_full()
        house.engine.gates["list"] = asyncio.Event()
        house.look()
        await settle()
        house.sessions.end(old, "closed")
        new = await house.create("s")
        await until(lambda: old.container.name in house.engine.removed)
        house.engine.gates["list"].set()
        await settle()
        assert house.sessions.get("s") is new
        assert house.metrics.value("sandbox_sessions_ended_total", template="python", reason="lost") == 0


# --- executions


async def test_executions_beyond_the_limit_wait_for_their_turn() -> None:
    async with House(session_executions=2).running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = True
        tasks = [house.execute("s") for _ in range(5)]
        await until(lambda: len(agent.executed) == 2)
        await settle()
        assert len(agent.executed) == 2
        for number in range(5):
            await until(lambda: len(agent.executed) > number)  # noqa: B023 - awaited here
            agent.finish(agent.executed[number])
        assert [execution.outcome for execution in await asyncio.gather(*tasks)] == ["ok"] * 5


async def test_a_session_refuses_a_queue_without_end() -> None:
    async with House(session_executions=1, max_executions=1000).running() as house:
        session = await house.create("s")
        house.agent(session).holding = True
        tasks = [house.execute("s") for _ in range(1 + QUEUE_FACTOR)]
        await settle()
        with pytest.raises(TooManyRequests, match="This session"):
            await house.execute("s")
        house.sessions.end(session, "closed")
        assert {execution.outcome for execution in await asyncio.gather(*tasks)} == {"lost"}


async def test_the_service_refuses_more_executions_than_it_may_run() -> None:
    async with House(max_executions=2).running() as house:
        session = await house.create("s")
        house.agent(session).holding = True
        tasks = [house.execute("s") for _ in range(2)]
        await settle()
        with pytest.raises(TooManyRequests, match="Too many executions"):
            await house.execute("s")
        house.sessions.end(session, "closed")
        await asyncio.gather(*tasks)
        assert house.metrics.value("sandbox_refusals_total", reason="executions") == 1


async def test_a_queued_execution_that_is_cancelled_never_reaches_the_agent() -> None:
    async with House(session_executions=1).running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = True
        first, second = house.execute("s"), house.execute("s")
        await until(lambda: len(session.records) == 2 and agent.executed)
        house.sessions.cancel("s", list(session.records)[1])
        agent.finish(agent.executed[0])
        assert [(await task).outcome for task in (first, second)] == ["ok", "cancelled"]
        assert len(agent.executed) == 1
        count = house.metrics.value
        assert (
            count("sandbox_execution_duration_seconds_count", template="python", language="python", outcome="cancelled")
            == 1
        )


async def test_a_running_execution_is_cancelled_by_its_id_and_by_who_stops_waiting() -> None:
    async with House().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = True
        by_id, by_caller = house.execute("s"), house.execute("s")
        await until(lambda: len(agent.executed) == 2)
        house.sessions.cancel("s", agent.executed[0])
        assert ((await by_id).outcome, (await by_id).exit_code) == ("cancelled", 137)
        by_caller.cancel()
        await until(lambda: not session.running)
        assert session.records[agent.executed[1]].facts.outcome == "cancelled"
        assert agent.heard.count("cancel") == 2


async def test_finished_executions_are_forgotten_in_time_and_running_ones_never() -> None:
    async with House(session_executions=4).running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = True
        long = house.execute("s")
        await until(lambda: agent.executed)
        agent.holding = False
        for _ in range(HISTORY + 5):
            await house.execute("s")
        assert len(session.records) == HISTORY + 1
        assert house.sessions.execution("s", agent.executed[0]).facts.outcome is None
        with pytest.raises(ExecutionNotFound):
            house.sessions.execution("s", agent.executed[1])
        house.sessions.cancel("s", agent.executed[0])
        assert (await long).outcome == "cancelled"


async def test_the_container_is_destroyed_when_the_agent_gives_no_result_in_time() -> None:
    async with House(grace_seconds=0.05).running() as house:
        session = await house.create("s")
        house.agent(session).holding = True
        execution = await house.execute("s", timeout_s=0.01)
        assert execution.outcome == "lost"
        await until(lambda: session.container.name in house.engine.removed)


async def test_a_one_shot_has_a_container_of_its_own_which_is_gone_afterwards() -> None:
    async with House().running() as house:
        for number in range(3):
            execution = await house.sessions.execute_once(OneShotRequest(code=""))
            assert execution.outcome == "ok"
            await until(lambda: len(house.engine.removed) > number)  # noqa: B023 - awaited here
            await house.until_full()
        assert len(set(house.engine.removed)) == 3
        assert house.sessions.held == {}
        assert not house.sessions.one_shots
        assert len(house.stage.agents) == 2


async def test_a_one_shot_that_is_given_up_or_lost_leaves_no_container() -> None:
    house = House()
    house.stage.holding = True
    async with house.running():
        once = asyncio.create_task(house.sessions.execute_once(OneShotRequest(code="")))
        await until(lambda: any(agent.executed for agent in house.stage.agents.values()))
        once.cancel()
        await until(lambda: len(house.engine.removed) == 1)
        await house.until_full()
        once = asyncio.create_task(house.sessions.execute_once(OneShotRequest(code="")))
        await until(lambda: any(agent.executed for agent in house.stage.agents.values()))
        next(agent for agent in house.stage.agents.values() if agent.executed).vanish()
        assert (await once).outcome == "lost"
        await until(lambda: len(house.engine.removed) == 2)
        assert not house.sessions.one_shots


# --- the end


async def test_draining_admits_nothing_new_and_lets_what_runs_finish() -> None:
    async with House().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        running = await house.begin(session)
        draining = asyncio.create_task(house.sessions.drain(SOON_S))
        await settle()
        with pytest.raises(Unavailable, match="ending"):
            await house.create()
        with pytest.raises(Unavailable, match="ending"):
            await house.execute("s")
        with pytest.raises(Unavailable, match="ending"):
            await house.sessions.execute_once(OneShotRequest(code=""))
        assert not draining.done()
        agent.finish(agent.executed[0])
        assert (await running).outcome == "ok"
        await draining
        assert house.sessions.held == {}
        assert house.metrics.value("sandbox_sessions_ended_total", template="python", reason="drained") == 1


async def test_draining_ends_what_does_not_finish_in_time() -> None:
    async with House().running() as house:
        session = await house.create("s")
        running = await house.begin(session)
        await house.sessions.drain(0.05)
        assert (await running).outcome == "cancelled"
        assert house.sessions.held == {}


async def test_a_draining_pool_is_emptied_and_not_refilled() -> None:
    async with House().running() as house:
        await house.sessions.drain(0.01)
        house.wake()
        await until(lambda: len(house.engine.removed) == 2)
        await settle()
        assert len(house.engine.started) == 2


# --- real agents behind the same seam


@pytest.fixture
async def real(state_dir: Path) -> AsyncIterator[House]:
    inner = LocalEngine(state_dir / "reconciler", record=lambda *_: None)
    house = House(inner, pool_size=1, heartbeat_seconds=0.1, heartbeat_misses=3, uid_base=54000)
    async with house.running():
        yield house
        await house.sessions.drain(0.01)
    await house.reconciler.clear()
    assert await inner.list() == []
    await inner.close()


class Lasting(LocalEngine):
    """A local engine whose agents outlive their orchestrator: the next one attaches to them."""

    async def attach(self, name: str, receiver: Receiver) -> Wire:
        agent = self._agents[name]
        agent._receiver = receiver
        return agent


async def test_a_real_agent_whose_orchestrator_ended_before_it_said_the_limits_says_so_and_is_removed(
    state_dir: Path,
) -> None:
    inner = Lasting(state_dir / "unconfigured", record=lambda *_: None)
    house = House(inner)
    for uid in (55000, 55001):
        spec = spec_of(house.settings, house.recipes["python"], uid=uid)
        container = house.reconciler.enlist(spec, "python")
        await inner.start(spec, container._channel)
    house.reconciler.known.clear()
    with pytest.raises(ContainerLost) as caught:
        await container.adopt(inner)
    assert caught.value.detail == "The agent was never told its limits: its orchestrator ended before that"
    await adopt(house.settings, house.engine, house.recipes, house.reconciler, house.sessions)
    assert (await inner.list(), house.reconciler.known) == ([], {})
    await inner.close()


def agent_pid(house: House, session: Session) -> int:
    inner = house.engine.inner
    assert isinstance(inner, LocalEngine)
    return inner._agents[session.container.name]._process.get_pid()


async def started(session: Session) -> None:
    """Wait until the code of the session's execution runs."""
    await until(lambda: any(record.output.whole("stdout") for record in session.records.values()))


@pytest.mark.parametrize(
    ("number", "reason"), [(signal.SIGKILL, "output ended"), (signal.SIGSTOP, "heartbeats")], ids=["killed", "stopped"]
)
async def test_a_real_agent_that_is_gone_ends_its_session_and_execution_as_lost(
    real: House, number: int, reason: str
) -> None:
    session = await real.create("s")
    running = real.execute("s", code="import os, time\nos.write(1, b'here')\ntime.sleep(60)")
    await started(session)
    os.kill(agent_pid(real, session), number)
    execution = await running
    assert (execution.outcome, execution.stdout) == ("lost", "here")
    assert execution.error is not None
    assert reason in execution.error.message
    await until(lambda: session.container.name in real.engine.removed)
    with pytest.raises(SessionEnded):
        real.sessions.get("s")
    assert (await real.sessions.execute_once(OneShotRequest(code="print(1)"))).stdout == "1\n"


async def test_a_real_session_keeps_its_files_and_another_has_its_own(real: House) -> None:
    first, second = await real.create("one"), await real.create("two")
    assert (await real.execute("one", command="echo mine > file")).outcome == "ok"
    assert (await real.execute("one", command="cat file")).stdout == "mine\n"
    assert (await real.execute("two", command="ls")).stdout == ""
    assert first.container.spec.uid != second.container.spec.uid
