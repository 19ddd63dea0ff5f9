"""Pool, sessions and reconciler on an engine that fails, waits, forgets and kills at random: what must always hold.

The clock is virtual: hours pass in milliseconds, and a program of steps always comes to the same. SANDBOX_TEST_STEPS sets
how many steps are taken in all. A run that fails is shrunk and printed as a program; the line with `reproduce_failure`
above it plays it again.
"""

import asyncio
import itertools
import os
import secrets
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator import observer
from orchestrator.engine import Receiver, Seen, Spec, Wire
from orchestrator.errors import EngineAway, EngineError, SandboxError
from orchestrator.models import Execution, ExecutionRequest, OneShotRequest
from orchestrator.session import Session
from tests.fake_engine import Played, Stage
from tests.unit.test_reconciler import House
from tests.virtual import VirtualLoop

T = TypeVar("T")
STEPS = int(os.environ.get("SANDBOX_TEST_STEPS", "1000"))  # `make chaos` takes more
STEPS_A_RUN = 50
CAP = 6
STEPS_OF_A_START = 50  # of the loop, in which time stands still: enough for a start that nothing holds up
CALL_S = 15.0  # the deadline of a call to the engine
RECOVERY_S = 150.0  # an orphan's minute, the longest pause between two tries, and some
CALLS = ("start", "attach", "list", "remove")
MOODS = ("fine", "fine", "slow", "refuses", "away", "hangs", "forgets")
SLOW_S = 4.0
WAITS = st.sampled_from([0.0, 0.01, 0.5, 4.0, 20.0, 70.0])
WHICH = st.integers(0, 9)


class Moody(Stage):
    """A stage whose engine has a mood for each call. What it forgets to answer, it does; a start that hangs, perhaps later.

    `hurt` names the containers that were killed, frozen or removed: only what they held may be lost.
    """

    reattaches = True

    def __init__(self) -> None:
        super().__init__()
        self.moods = dict.fromkeys(CALLS, "fine")
        self.hurt: set[str] = set()
        self.late: list[tuple[Spec, Receiver]] = []
        self._changed = asyncio.Event()

    def change(self, call: str, mood: str) -> None:
        self.moods[call] = mood
        self._changed.set()
        self._changed = asyncio.Event()

    async def make_late(self) -> None:
        """Make the containers whose starts were given up."""
        while self.late:
            await super().start(*self.late.pop())

    async def start(self, spec: Spec, receiver: Receiver) -> Wire:
        if self.moods["start"] == "hangs":
            self.late.append((spec, receiver))
        await self._suffer("start")
        self.late = [late for late in self.late if late[0].name != spec.name]
        wire = await super().start(spec, receiver)
        self._forget("start")
        return wire

    async def attach(self, name: str, receiver: Receiver) -> Wire:
        if self.moods["attach"] != "fine":  # to a container that runs, an engine that is there attaches
            raise EngineAway("The engine could not be asked to `attach`: connection reset")
        return await super().attach(name, receiver)

    async def list(self) -> list[Seen]:
        seen = await super().list()
        await self._suffer("list")
        return seen

    async def remove(self, name: str) -> None:
        await self._suffer("remove")
        if (agent := self.agents.get(name)) is not None and agent.running:
            agent.vanish()
        await super().remove(name)
        self._forget("remove")

    async def _suffer(self, call: str) -> None:
        match self.moods[call]:
            case "refuses":
                raise EngineError(f"The engine failed to `{call}`: device or resource busy")
            case "away":
                raise EngineAway(f"The engine could not be asked to `{call}`: connection refused")
            case "slow":
                await asyncio.sleep(SLOW_S)
            case "hangs":
                try:
                    async with asyncio.timeout(CALL_S):
                        await self._changed.wait()
                except TimeoutError:
                    raise EngineAway(f"The engine did not answer `{call}` in time") from None

    def _forget(self, call: str) -> None:
        if self.moods[call] == "forgets":
            raise EngineAway(f"The engine did not answer `{call}` in time")


class World(RuleBasedStateMachine):
    """Clients that come and go, containers that are hurt, an engine with moods; time passes only in the steps."""

    @initialize(pool_size=st.integers(0, 3))
    def begin(self, pool_size: int) -> None:
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        names = itertools.count(1)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(time, "monotonic", self.runner.get_loop().time)
        self.patch.setattr(secrets, "token_hex", lambda size: f"{next(names):0{2 * size}x}")
        self.patch.setattr(observer, "PATIENCE_S", 1e9)  # its end is tested elsewhere
        self.pool_size = pool_size
        self.numbers = itertools.count()
        self.do(self._begin())

    async def _begin(self) -> None:
        self.stage = Moody()
        self.house = House(
            self.stage,
            pool_size=self.pool_size,
            max_containers=CAP,
            session_executions=2,  # so that some wait for their turn
            reconcile_seconds=5,
            heartbeat_seconds=5,
            idle_timeout_seconds=1e9,
            max_ttl_seconds=1e9,
            ttl_seconds=1e9,
            max_age_seconds=1e9,
            reattach_seconds=1e9,
            bare=True,
        )
        self.care = asyncio.create_task(self.house.reconciler.run(self.house.sessions))
        self.created: dict[str, Session] = {}
        self.running: list[tuple[Session, asyncio.Task[Execution]]] = []
        self.once: list[asyncio.Task[Execution]] = []
        self.asked: list[asyncio.Task[None]] = []

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    # --- what clients do

    @rule(patient=st.booleans(), clients=st.sampled_from([1, 1, 3]))
    def create(self, patient: bool, clients: int = 1) -> None:
        async def act() -> None:
            self.asked += [asyncio.create_task(self._ask()) for _ in range(clients)]
            if patient:
                await asyncio.wait(self.asked[-clients:])

        self.do(act())

    async def _ask(self) -> None:
        try:
            session = await self.house.create(f"s{next(self.numbers)}")
        except SandboxError as error:
            if error.status not in (429, 502, 503):
                raise
        else:
            self.created[session.id] = session

    @rule()
    def create_from_a_frozen_one(self) -> None:
        """The container that is next has just frozen: nobody knows yet."""

        async def freeze() -> None:
            for container in list(self.house.pool.ready)[:1]:
                self.stage.hurt.add(container.name)
                if (agent := self.stage.agents.get(container.name)) is not None:
                    agent.mute = True

        self.do(freeze())
        self.create(patient=True)

    @rule()
    def give_up(self) -> None:
        """Clients that wait go away."""

        async def act() -> None:
            await self._give_up()

        self.do(act())

    @rule(once=st.booleans(), later=st.sampled_from([0, 0, 1, 2, 3, 5]))
    def give_up_when_served(self, once: bool, later: int) -> None:
        """Clients ask until one has to wait, and go away when it is served: before it can run on, or a little later."""
        self.be_well(for_s=40.0)

        async def act() -> None:
            house, pool = self.house, self.house.pool
            while len(house.sessions.held) + self.pool_size >= CAP:
                house.sessions.end(next(iter(house.sessions.held.values())), "closed")
            while not pool.waiting and house.reconciler.occupied < CAP:
                if once:
                    self._ask_once()
                else:
                    self.asked.append(asyncio.create_task(self._ask()))
                await asyncio.sleep(0)
            waiting = list(pool.waiting)
            for _ in range(STEPS_OF_A_START):
                if any(future.done() for future in waiting):
                    break
                await asyncio.sleep(0)
            for _ in range(later):
                await asyncio.sleep(0)
            await self._give_up()

        self.do(act())

    async def _give_up(self) -> None:
        for task in (*self.asked, *self.once):
            task.cancel()
        await asyncio.sleep(0)

    def choose(self, which: int) -> Session | None:
        """Return a session that lives; None when none does."""
        held = list(self.house.sessions.held.values())
        return held[which % len(held)] if held else None

    @rule(which=WHICH)
    def end(self, which: int) -> None:
        async def act() -> None:
            if (session := self.choose(which)) is not None:
                self.house.sessions.end(session, "closed")

        self.do(act())

    @rule(which=WHICH, holding=st.booleans())
    def execute(self, which: int, holding: bool) -> None:
        async def act() -> None:
            if (session := self.choose(which)) is None:
                return
            if (agent := self.stage.agents.get(session.container.name)) is not None:
                agent.holding = holding
            request = ExecutionRequest(code="", timeout_s=500)
            self.running.append((session, asyncio.create_task(self.house.sessions.execute(session.id, request))))
            await asyncio.sleep(0)

        self.do(act())

    @rule()
    def finish(self) -> None:
        async def act() -> None:
            for agent in self.stage.agents.values():
                self.finish_all(agent)

        self.do(act())

    @rule()
    def execute_once(self) -> None:
        async def act() -> None:
            self._ask_once()
            await asyncio.sleep(0)

        self.do(act())

    def _ask_once(self) -> None:
        request = OneShotRequest(code="", timeout_s=500)
        self.once.append(asyncio.create_task(self.house.sessions.execute_once(request)))

    # --- what goes wrong

    @rule(call=st.sampled_from(CALLS), mood=st.sampled_from(MOODS), for_s=WAITS)
    def change_mood(self, call: str, mood: str, for_s: float) -> None:
        async def act() -> None:
            self.stage.change(call, mood)
            await asyncio.sleep(for_s)

        self.do(act())

    @rule(which=WHICH, how=st.sampled_from(["killed", "removed", "frozen", "cut", "cut"]))
    def hurt(self, which: int, how: str) -> None:
        async def act() -> None:
            if not self.stage.agents:
                return
            held = {session.container.name for session in self.house.sessions.held.values()}
            names = [*(name for name in self.stage.agents if name in held), *self.stage.agents]  # those twice as often
            name = names[which % len(names)]
            agent = self.stage.agents[name]
            if how != "cut":
                self.stage.hurt.add(name)
            if how == "frozen":
                agent.mute = True
            elif agent.running and how == "cut":
                if not agent.is_cut:
                    agent.cut()
            elif agent.running:
                agent.vanish()
            if how == "removed":
                del self.stage.agents[name]

        self.do(act())

    @rule(for_s=st.sampled_from([1.0, 40.0]))
    def be_well(self, for_s: float) -> None:
        """The engine is well for a while, so that there is something to hurt."""

        async def act() -> None:
            for call in CALLS:
                self.stage.change(call, "fine")
            await asyncio.sleep(for_s)

        self.do(act())

    @rule(times=st.integers(1, 2))
    def restart_the_engine(self, times: int) -> None:
        """All streams break at once; containers go on."""

        async def act() -> None:
            for _ in range(times):
                for agent in self.stage.agents.values():
                    if agent.running and not agent.is_cut:
                        agent.cut()
                await asyncio.sleep(0.5)

        self.do(act())

    @rule()
    def make_late(self) -> None:
        self.do(self.stage.make_late())

    @rule()
    def give_a_start_up(self) -> None:
        """The pool is drained of one, the next start hangs until nobody waits for it; then it is carried out."""

        async def act() -> None:
            self.stage.change("start", "hangs")
            if (session := self.choose(0)) is not None:
                self.house.sessions.end(session, "closed")
            for container in list(self.house.pool.ready)[:1]:
                self.stage.hurt.add(container.name)
                if (agent := self.stage.agents.pop(container.name, None)) is not None and agent.running:
                    agent.vanish()
            await asyncio.sleep(2 * CALL_S)
            await self.stage.make_late()

        self.do(act())

    @rule(mood=st.sampled_from(["refuses", "hangs"]))
    def end_all_and_remove_none(self, mood: str) -> None:
        """All sessions end, and their containers stay for a while; others ask for containers meanwhile."""

        async def act() -> None:
            self.stage.change("remove", mood)
            for session in list(self.house.sessions.held.values()):
                self.house.sessions.end(session, "closed")
            self.asked += [asyncio.create_task(self._ask()) for _ in range(CAP)]
            await asyncio.sleep(2 * CALL_S)

        self.do(act())

    @rule(for_s=WAITS)
    def wait(self, for_s: float) -> None:
        self.do(asyncio.sleep(for_s))

    # --- what must hold

    @invariant()
    def the_reconciler_lives(self) -> None:
        assert not self.care.done(), self.care

    @invariant()
    def every_container_has_one_owner(self) -> None:
        house = self.house
        holders = [session.container.name for session in house.sessions.held.values()]
        holders += [container.name for container in house.pool.ready]
        holders += house.pool.starting
        assert len(holders) == len(set(holders)), f"held twice: {holders}"
        assert set(holders) <= house.reconciler.known.keys(), "held, and not known"
        ours = house.reconciler.known.keys() | house.reconciler.removals.reasons.keys()
        late = set(house.reconciler.starts.given_up)
        assert set(self.stage.agents) <= ours | late, "without an owner"

    @invariant()
    def none_is_forgotten(self) -> None:
        """What is known is held, ready, starting, being removed, or in the hands of a client that just gets it."""
        house = self.house
        homes = {session.container.name for session in house.sessions.held.values()}
        homes |= {container.name for container in house.pool.ready} | house.pool.starting
        forgotten = house.reconciler.known.keys() - homes - house.reconciler.removals.reasons.keys()
        hands = len(house.sessions._opening) + len(house.sessions.one_shots)
        hands -= len(house.pool.waiting)
        assert len(forgotten) <= hands, f"forgotten: {sorted(forgotten)}"

    @invariant()
    def caps_hold(self) -> None:
        house = self.house
        late = set(house.reconciler.starts.given_up)
        assert len(self.stage.agents.keys() - late) <= CAP
        assert house.reconciler.occupied <= CAP + len(house.reconciler.removals.reasons.keys() & late)
        assert house.reconciler.removals.quarantined.keys() <= house.reconciler.removals.reasons.keys()
        users = {name: agent.spec.uid for name, agent in self.stage.agents.items() if name not in late}
        users |= {name: container.spec.uid for name, container in house.reconciler.known.items()}
        uids = list(users.values())
        assert len(uids) == len(set(uids)), "two containers of one user"

    @invariant()
    def what_lives_is_not_lost(self) -> None:
        for sid, session in self.created.items():
            if self.house.sessions._ended.get(sid) == "lost":
                assert session.container.name in self.stage.hurt, session.container.lost_reason

    @invariant()
    def readiness_is_true(self) -> None:
        if self.house.reconciler.faults() == []:
            assert self.pool_size == 0 or any(container.is_usable for container in self.house.pool.ready)

    def teardown(self) -> None:
        if not hasattr(self, "runner"):
            return
        try:
            self.do(self._recover())
        finally:
            self.runner.close()
            self.patch.undo()

    async def _recover(self) -> None:
        """The engine is well again: everything is, in bounded time, and nothing is left over."""
        house, stage = self.house, self.stage
        try:
            await stage.make_late()
            for call in CALLS:
                stage.change(call, "fine")
            begun = time.monotonic()
            while not self.is_well() and time.monotonic() - begun < RECOVERY_S:
                await asyncio.sleep(0.1)
            assert self.is_well(), f"not well after {RECOVERY_S:g} s: {self.told()}"
            self.caps_hold()
            self.what_lives_is_not_lost()
            for session, task in self.running:
                self.judge(task, hurt=session.container.name in stage.hurt or session.id not in house.sessions.held)
            for task in self.once:
                if not task.cancelled():
                    self.judge(task, hurt=True)
            for sid in house.sessions.held:
                async with asyncio.timeout(RECOVERY_S):
                    assert (await house.execute(sid)).outcome == "ok", "a session that is there does not work"
        finally:
            self.care.cancel()
            tasks = [*self.once, *(task for _, task in self.running), *self.asked]
            await asyncio.gather(self.care, *tasks, return_exceptions=True)

    def is_well(self) -> bool:
        """Tell whether all that was asked for is done, and containers are sessions and pool, no more and no less."""
        house, stage = self.house, self.stage
        for agent in stage.agents.values():
            agent.holding = False
            self.finish_all(agent)
        held = {session.container.name for session in house.sessions.held.values()}
        ready = {container.name for container in house.pool.ready if container.is_usable}
        tasks = [*self.once, *(task for _, task in self.running), *self.asked]
        return (
            stage.agents.keys() == held | ready == house.reconciler.known.keys()
            and len(ready) == min(self.pool_size, CAP - len(held))
            and not house.reconciler.removals.reasons
            and not (house.sessions._opening or house.sessions.one_shots or house.pool.waiting)
            and not any(agent.mute for agent in stage.agents.values())
            and all(task.done() for task in tasks)
            and all(session.container.is_usable for session in house.sessions.held.values())
        )

    def told(self) -> dict[str, object]:
        """Return what there is, for a message."""
        house = self.house
        return {
            "engine": sorted(self.stage.agents),
            "known": sorted(house.reconciler.known),
            "ready": [container.name for container in house.pool.ready],
            "starting": sorted(house.pool.starting),
            "removing": house.reconciler.removals.reasons,
            "sessions": {sid: session.container.name for sid, session in house.sessions.held.items()},
            "faults": house.reconciler.faults(),
            "open": [task for task in (*self.once, *(t for _, t in self.running), *self.asked) if not task.done()],
        }

    @staticmethod
    def finish_all(agent: Played) -> None:
        """End what the agent holds."""
        for eid in list(agent.said):
            if not any(frame["type"] == "result" for frame in agent.said[eid]):
                agent.finish(eid)

    @staticmethod
    def judge(task: asyncio.Task[Execution], *, hurt: bool) -> None:
        """An execution ends by a result, or is refused so that it may be sent again; in a healthy session it runs."""
        error = task.exception()
        if error is not None:
            assert isinstance(error, SandboxError), error
            assert error.status in (404, 410, 429, 502, 503), error
            return
        execution = task.result()
        assert hurt or execution.outcome == "ok", execution


World.TestCase.settings = settings(
    max_examples=max(1, STEPS // STEPS_A_RUN),
    stateful_step_count=STEPS_A_RUN,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
TestWorld = World.TestCase
