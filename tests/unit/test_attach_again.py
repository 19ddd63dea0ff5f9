"""Streams that break and silences that are the engine's: what lives goes on, what is gone is lost, in bounded time."""

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest

import frames
from orchestrator import attachments, greeting, observer, runs
from orchestrator.errors import ContainerLost, EngineAway, SessionEnded, Unavailable
from orchestrator.models import ExecutionRequest, OneShotRequest, SessionPatch
from tests.fake_engine import FakeEngine, Played
from tests.unit.test_reconciler import NEVER_S, House, settle, until

AWAY = EngineAway("The engine could not be asked to `list`: connection refused")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses."""
    for module, name, value in (
        (observer, "TROUBLED_S", 0.01),
        (observer, "SETTLE_S", 0.05),
        (attachments, "PAUSE_S", 0.01),
        (attachments, "ATTACH_S", 0.1),
        (runs, "CATCH_UP_S", 0.05),
        (runs, "OVERDUE_STEP_S", 0.01),
    ):
        monkeypatch.setattr(module, name, value)


def house_of(**settings: Any) -> House:
    """Return a house whose engine lets containers be attached again."""
    house = House(**settings)
    house.engine.reattaches = True
    return house


def be_away(engine: FakeEngine) -> None:
    for call in ("list", "attach", "start", "remove"):
        engine.faults[call] = itertools.repeat(AWAY)


def stdout_of(house: House, sid: str = "s") -> str:
    (record,) = house.sessions.held[sid].records.values()
    return bytes(record.output.whole("stdout")).decode()


async def test_a_stream_that_breaks_again_right_after_the_agents_answer_is_attached_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer has come, and who waited for it has not run on yet."""
    async with house_of().running() as house:
        session = await house.create("s")
        agent, answer = house.agent(session), Played._on_hello

        def answer_and_break(agent: Played, frame: frames.Frame) -> None:
            answer(agent, frame)
            if len(house.engine.attached) == 1:
                asyncio.get_running_loop().call_soon(agent.cut)

        monkeypatch.setattr(Played, "_on_hello", answer_and_break)
        agent.cut()
        await until(lambda: house.engine.attached and session.container.is_usable)
        assert (await house.execute("s")).outcome == "ok"


async def test_an_execution_goes_on_over_a_broken_stream_and_nothing_of_it_is_lost_or_doubled() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        running = await house.begin(session)
        (eid,) = agent.executed
        agent.output(eid, b"one ")
        await until(lambda: stdout_of(house) == "one ")
        be_away(house.engine)
        agent.cut()
        agent.output(eid, b"two ")
        await until(lambda: len(house.engine.attached) == 0 and house.reconciler.faults())
        house.engine.faults.clear()
        await until(lambda: session.container.is_usable)
        agent.output(eid, b"three")
        agent.finish(eid)
        execution = await running
        assert (execution.outcome, execution.stdout) == ("ok", "one two three")
        assert agent.executed == [eid], "it ran once"
        assert house.metrics.value("sandbox_containers_attached_again_total") == 1


async def test_what_ended_while_the_stream_was_broken_has_its_result() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        running = await house.begin(session)
        agent.cut()
        agent.output(agent.executed[0], b"all of it")
        agent.finish(agent.executed[0], "error", 3)
        execution = await running
        assert (execution.outcome, execution.exit_code, execution.stdout) == ("error", 3, "all of it")


@pytest.mark.parametrize("size", [10, 200_000], ids=["in one line", "in parts"])
async def test_a_job_that_did_not_arrive_is_sent_again_and_runs_once(size: int) -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.is_cut = True  # bytes are taken, and go nowhere
        running = house.execute("s", code="#" * size)
        await settle()
        agent.cut()
        assert (await running).outcome == "ok"
        assert agent.executed == [(await running).id]


async def test_a_job_whose_stream_breaks_between_two_of_its_parts_runs_once() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        running = house.execute("s", code="#" * 200_000)
        await until(lambda: "part" in agent.heard)
        assert agent.executed == []
        agent.cut()
        assert (await running).outcome == "ok"
        assert agent.executed == [(await running).id]


async def test_a_job_that_did_not_arrive_has_all_of_its_time_when_it_does() -> None:
    async with house_of(grace_seconds=0).running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = agent.is_cut = True
        running = house.execute("s", timeout_s=1.0)
        await asyncio.sleep(0.8)
        agent.cut()
        await until(lambda: agent.executed)
        await asyncio.sleep(0.4)
        agent.finish(agent.executed[0])
        assert (await running).outcome == "ok"


async def test_a_job_that_did_not_arrive_may_be_cancelled_meanwhile() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = agent.is_cut = True
        running = house.execute("s")
        await settle()
        be_away(house.engine)
        agent.cut()
        house.sessions.cancel("s", next(iter(session.running)))
        house.engine.faults.clear()
        assert (await running).outcome == "cancelled"


async def test_a_cancel_that_comes_while_the_stream_is_broken_is_said_afterwards() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        running = await house.begin(session)
        be_away(house.engine)
        agent.cut()
        house.sessions.cancel("s", agent.executed[0])
        house.engine.faults.clear()
        assert (await running).outcome == "cancelled"


async def test_acknowledgements_that_went_into_a_broken_stream_are_said_again() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        await house.execute("s")
        agent.is_cut = True
        lost = house.execute("s")  # its frame carries the acknowledgement of the first
        await settle()
        assert len(agent.said) == 1
        agent.cut()
        await lost
        await house.execute("s")
        await house.execute("s")
        assert len(agent.said) == 1, "all but the last are forgotten"


async def test_while_a_stream_is_broken_what_would_need_it_is_refused_and_may_come_again() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        be_away(house.engine)
        house.agent(session).cut()
        with pytest.raises(Unavailable, match="attached again") as refusal:
            await house.execute("s")
        assert refusal.value.retry_after_s is not None
        with pytest.raises(Unavailable):
            house.sessions.patch("s", SessionPatch(metadata={"a": "b"}))
        assert session.metadata == {}
        assert house.sessions.get("s") is session, "it is listed all the time"
        house.engine.faults.clear()
        await until(lambda: session.container.is_usable)
        assert (await house.execute("s")).outcome == "ok"
        house.sessions.patch("s", SessionPatch(metadata={"a": "b"}))


async def test_text_for_stdin_is_refused_while_a_stream_is_broken_and_never_sent_twice() -> None:
    """What was on its way when the stream broke may have been taken: nobody is told to try that again."""
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        running = await house.begin(session)
        (eid,) = agent.executed
        assert await session.container.feed(eid, b"one", close=False) == "taken"
        agent.mute = True
        on_its_way = asyncio.create_task(session.container.feed(eid, b"two", close=False))
        await settle()
        be_away(house.engine)
        agent.mute = False
        agent.cut()
        with pytest.raises(ContainerLost, match="unknown"):
            await on_its_way
        with pytest.raises(Unavailable, match="attached again"):
            await session.container.feed(eid, b"three", close=False)
        house.engine.faults.clear()
        await until(lambda: session.container.is_usable)
        assert await session.container.feed(eid, b"three", close=False) == "taken"
        agent.finish(eid)
        assert (await running).outcome == "ok"
        assert await session.container.feed(eid, b"four", close=False) == "closed"


async def test_what_waits_for_its_turn_when_the_stream_breaks_has_it_afterwards() -> None:
    async with house_of(session_executions=1).running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = True
        first, second = house.execute("s"), house.execute("s")
        await until(lambda: agent.executed)
        agent.holding = False
        be_away(house.engine)
        agent.cut()
        agent.finish(agent.executed[0])
        house.engine.faults.clear()
        assert [(await task).outcome for task in (first, second)] == ["ok", "ok"]


async def test_words_on_what_waits_that_went_into_a_broken_stream_are_said_again() -> None:
    """That its turn has come, and that it was called off."""
    async with house_of(session_executions=1).running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        agent.holding = True
        request = ExecutionRequest(code="", timeout_s=500)
        first, second, third = (house.sessions.start("s", request, key=key) for key in "abc")
        await until(lambda: len(agent.queue) == 2)
        agent.finish(first.id)
        agent.is_cut = True  # bytes are taken, and go nowhere
        house.sessions.cancel("s", third.id)
        await until(lambda: second.sent and third.facts.outcome)
        agent.cut()
        await until(lambda: len(agent.executed) == 2)
        agent.finish(second.id)
        await until(lambda: second.facts.outcome)
        assert (second.facts.outcome, third.facts.outcome) == ("ok", "cancelled")
        assert (agent.executed, agent.queue) == ([first.id, second.id], {})


async def test_a_container_that_is_gone_is_lost_at_once_with_its_session_and_execution() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        running = await house.begin(session)
        agent.vanish("the attached stream ended: killed")
        execution = await running
        assert execution.outcome == "lost"
        assert execution.error is not None
        assert "killed" in execution.error.message
        await until(lambda: "s" not in house.sessions.held)
        assert house.engine.attached == []


async def test_a_one_shot_goes_on_as_well() -> None:
    house = house_of()
    house.stage.holding = True
    async with house.running():
        once = asyncio.create_task(house.sessions.execute_once(OneShotRequest(code="")))
        await until(lambda: any(agent.executed for agent in house.stage.agents.values()))
        agent = next(agent for agent in house.stage.agents.values() if agent.executed)
        agent.cut()
        await until(lambda: not agent.is_cut)
        agent.finish(agent.executed[0])
        assert (await once).outcome == "ok"


async def test_an_engine_that_stays_away_is_waited_for_no_longer_than_the_setting_says() -> None:
    async with house_of(reattach_seconds=0.2, reconcile_seconds=0.01).running() as house:
        session = await house.create("s")
        be_away(house.engine)
        house.agent(session).cut()
        begun = time.monotonic()
        await until(lambda: "s" not in house.sessions.held)
        assert time.monotonic() - begun >= 0.15
        with pytest.raises(SessionEnded, match="lost"):
            house.sessions.get("s")
        house.engine.faults.clear()
        await until(lambda: session.container.name in house.engine.removed)


async def test_an_agent_that_does_not_answer_to_a_new_stream_is_given_up_after_some_tries() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        house.agent(session).mute = True
        house.agent(session).cut()
        await until(lambda: "s" not in house.sessions.held)
        assert house.engine.attached == [session.container.name] * attachments.TRIES


async def test_an_agent_that_says_it_serves_another_session_is_lost() -> None:
    async with house_of().running() as house:
        session = await house.create("s")
        house.agent(session).session = "another"
        house.agent(session).cut()
        await until(lambda: "s" not in house.sessions.held)
        assert "bound to another session" in str(session.container.lost_reason)


@pytest.mark.parametrize("change", ["closed", "expired"])
async def test_a_session_may_end_while_its_stream_is_broken(change: str) -> None:
    async with house_of().running() as house:
        session = await house.create("s", ttl_s=0.1 if change == "expired" else NEVER_S)
        be_away(house.engine)
        house.agent(session).cut()
        if change == "closed":
            house.sessions.end(session, "closed")
        await until(lambda: "s" not in house.sessions.held)
        house.engine.faults.clear()
        await until(lambda: session.container.name in house.engine.removed)
        assert house.engine.attached == []


async def test_ready_containers_are_kept_over_a_break_and_not_handed_out_meanwhile() -> None:
    house = house_of(pool_size=2, acquire_timeout_seconds=5.0)
    async with house.running():
        before = {container.name for container in house.pool.ready}
        be_away(house.engine)
        for container in list(house.pool.ready):
            house.stage.agents[container.name].cut()
        waiting = asyncio.create_task(house.create("s"))
        await until(house.reconciler.faults)
        assert any("no container is ready" in fault for fault in house.reconciler.faults())
        assert not waiting.done()
        house.engine.faults.clear()
        session = await waiting
        assert session.container.name in before
        await house.until_full()
        await settle()
        assert len(house.pool.ready) == 2
        assert house.removed("lost") == 0


async def test_a_start_that_failed_is_no_reason_any_more_once_the_pool_is_full_without_it() -> None:
    async with house_of(pool_size=1, acquire_timeout_seconds=0.05).running() as house:
        agent = house.stage.agents[house.pool.ready[0].name]
        be_away(house.engine)
        agent.cut()
        with pytest.raises(Unavailable):
            await house.create("s")
        await until(lambda: house.reconciler.starts.fault)
        house.engine.faults.clear()
        await until(lambda: house.reconciler.faults() == [])
        assert len(house.pool.ready) == 1


# --- silences


def silence(house: House) -> Callable[[], None]:
    """Let the engine answer nothing; return what ends that."""
    gate = house.engine.gates["list"] = asyncio.Event()
    return gate.set


async def test_missed_heartbeats_are_not_held_against_an_agent_while_the_engine_is_silent_too() -> None:
    async with house_of(heartbeat_seconds=0.01, heartbeat_misses=2, reconcile_seconds=0.02).running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        end = silence(house)
        agent.mute = True
        await until(lambda: session.container.heartbeat.missed > 10)
        assert house.sessions.get("s") is session
        end()
        agent.mute = False
        agent.say("pong", number=session.container.heartbeat._pings)
        await until(lambda: session.container.heartbeat.missed == 0)
        assert (await house.execute("s")).outcome == "ok"
        agent.mute = True
        await until(lambda: "s" not in house.sessions.held)
        assert "heartbeats" in str(session.container.lost_reason)


async def test_a_result_may_be_late_by_as_long_as_the_engine_passed_nothing_on() -> None:
    async with house_of(grace_seconds=0.02).running() as house:
        session = await house.create("s")
        agent = house.agent(session)
        running = await house.begin(session, timeout_s=0.01)
        end = silence(house)
        house.look()
        await settle()
        (run,) = session.container._runs.active.values()
        await until(lambda: run.overdue_at is not None and time.monotonic() > run.overdue_at + 0.2)
        end()
        agent.finish(agent.executed[0])
        assert (await running).outcome == "ok"


async def test_patience_with_a_silent_engine_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "PATIENCE_S", 0.2)
    async with house_of(grace_seconds=0.02).running() as house:
        session = await house.create("s")
        running = await house.begin(session, timeout_s=0.01)
        silence(house)
        assert (await running).outcome == "lost"


async def test_a_bind_that_is_not_answered_leaves_neither_session_nor_container(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(greeting, "BIND_S", 0.05)
    async with house_of().running() as house:
        chosen = house.pool.ready[0].name
        house.stage.agents[chosen].mute = True
        with pytest.raises(Unavailable) as refusal:
            await house.create("s")
        assert refusal.value.retry_after_s is not None
        await until(lambda: chosen in house.engine.removed)
        assert (await house.create("s")).id == "s"
