"""Agents that answer pings and stand still otherwise: every wait for them ends, and the client's time is not theirs.

The clock is virtual: the minutes of the real bounds pass in milliseconds. A wait without a bound is an error of the loop.
"""

import asyncio
import base64
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from orchestrator import files
from orchestrator.container import ANSWER_S, Container
from orchestrator.engine.local import LocalEngine
from orchestrator.errors import ContainerLost
from orchestrator.files import ARCHIVE_S, MOVE_S, STEP, Workspace
from orchestrator.models import Resize
from orchestrator.runs import CANCEL_S
from orchestrator.streams import WINDOW
from orchestrator.terminal import open_terminal
from tests.fake_engine import Played, Stage
from tests.unit.test_agent import LIMITS
from tests.unit.test_files import tar_of
from tests.unit.test_frames_fuzz import SPEC
from tests.virtual import VirtualLoop

LIMIT = 1 << 30
FILE = {"path": "f", "type": "file", "size_bytes": 9, "modified_s": 0.0}
Play = Callable[[Container, Played], Coroutine[Any, Any, None]]


def play(scene: Play, *, is_blamed: bool = True) -> None:
    """Play a scene between a bound container and its agent, which the test speaks for."""

    async def begin() -> None:
        stage = Stage()
        container = Container(SPEC, "python", output_limit=1, on_lost=lambda _: None, blames_agent=lambda _: is_blamed)
        await container.start(stage, {})
        await container.bind("s", {})
        await scene(container, stage.agents[SPEC.name])

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(begin())


async def pieces(count: int, size: int = STEP, *, pause_s: float = 0.0) -> AsyncIterator[bytes]:
    """Yield pieces as a client sends them."""
    for _ in range(count):
        await asyncio.sleep(pause_s)
        yield bytes(size)


async def all_of(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


def say_data(agent: Played, sid: str, data: bytes) -> None:
    """Let the agent send bytes of a stream."""
    agent.say("data", id=sid, data=base64.b64encode(data).decode())


async def waited_s(work: Awaitable[Any], match: str) -> float:
    """Return how long it took to give the work up."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    with pytest.raises(ContainerLost, match=match):
        await work
    return loop.time() - begun


async def dribble(container: Container, agent: Played) -> None:
    """Move a byte a second each way while a stream is open."""
    await asyncio.sleep(0.5)
    while len(container.streams):
        say_data(agent, "o1", b"x")
        agent.say("credit", id="o1", count=1)
        await asyncio.sleep(1)


async def check_whole(container: Container, agent: Played) -> None:
    """Check that the agent was told to give everything up, that nothing is left of it here, and that the session goes on."""
    assert (agent.heard[-1], len(container.streams), container.lost_reason) == ("close", 0, None)
    result = await container.execute("e", {}, note={}, deadline_s=1, sink=lambda *_: None, hold=False)
    assert result.outcome == "ok"


@pytest.mark.parametrize(
    ("begin", "bound_s"),
    [
        pytest.param(lambda there: there.write("f", pieces(99), limit=LIMIT), MOVE_S, id="write, no credit"),
        pytest.param(lambda there: there.write("f", pieces(1), limit=LIMIT), MOVE_S, id="write, no end"),
        pytest.param(lambda there: there.unpack("", pieces(99), limit=LIMIT), ARCHIVE_S, id="unpack, no credit"),
        pytest.param(lambda there: there.unpack("", pieces(1), limit=LIMIT), ARCHIVE_S, id="unpack, no end"),
        pytest.param(lambda there: all_of(there.pack("")), ARCHIVE_S, id="pack"),
    ],
)
def test_a_transfer_that_stands_still_is_given_up_and_its_session_goes_on(
    begin: Callable[[Workspace], Awaitable[Any]], bound_s: float
) -> None:
    async def scene(container: Container, agent: Played) -> None:
        assert await waited_s(begin(Workspace(container)), "stands still") == pytest.approx(bound_s)
        await check_whole(container, agent)

    play(scene)


def test_a_download_that_stands_still_is_given_up_and_its_session_goes_on() -> None:
    async def scene(container: Container, agent: Played) -> None:
        opening = asyncio.create_task(Workspace(container).read("f"))
        say_data(agent, "o1", json.dumps(FILE).encode())
        download = await opening
        say_data(agent, "o1", b"123")
        assert await waited_s(all_of(download.chunks()), "stands still") == pytest.approx(MOVE_S)
        await check_whole(container, agent)

    play(scene)


@pytest.mark.parametrize(
    ("begin", "bound_s"),
    [
        pytest.param(lambda there: there.write("f", pieces(99), limit=LIMIT), MOVE_S, id="write"),
        pytest.param(lambda there: all_of(there.pack("")), ARCHIVE_S, id="pack"),
    ],
)
def test_an_agent_that_moves_a_byte_now_and_then_stands_still(
    begin: Callable[[Workspace], Awaitable[Any]], bound_s: float
) -> None:
    async def scene(container: Container, agent: Played) -> None:
        moving = asyncio.create_task(dribble(container, agent))
        assert await waited_s(begin(Workspace(container)), "stands still") == pytest.approx(bound_s)
        await check_whole(container, agent)
        await moving

    play(scene)


def test_the_time_that_a_client_takes_is_not_the_agents() -> None:
    async def scene(container: Container, agent: Played) -> None:
        async def grant() -> None:
            while "finish" not in agent.heard:
                await asyncio.sleep(MOVE_S * 0.9)
                agent.say("credit", id="o1", count=STEP)
            agent.say("close", id="o1", code=None, message="", facts=FILE)

        data = pieces(3, WINDOW, pause_s=MOVE_S * 3)
        written, _ = await asyncio.gather(Workspace(container).write("f", data, limit=LIMIT), grant())
        assert written.path == "f"
        opening = asyncio.create_task(Workspace(container).read("f"))
        say_data(agent, "o2", json.dumps(FILE).encode())
        chunks = (await opening).chunks()
        for _ in range(3):
            say_data(agent, "o2", b"123")
            assert await anext(chunks) == b"123"
            await asyncio.sleep(MOVE_S * 3)
        agent.say("close", id="o2", code=None, message="", facts={})
        assert await anext(chunks, b"") == b""

    play(scene)


def test_a_list_that_does_not_end_is_no_answer() -> None:
    async def scene(container: Container, agent: Played) -> None:
        moving = asyncio.create_task(dribble(container, agent))
        listing = Workspace(container).list("", recursive=False, limit=9, after=None)
        assert await waited_s(listing, "in time") == pytest.approx(ANSWER_S)
        await moving

    play(scene)


def test_what_an_agent_answers_at_once_has_a_deadline() -> None:
    async def stat(container: Container, agent: Played) -> None:
        assert await waited_s(Workspace(container).stat("f"), "in time") == pytest.approx(ANSWER_S)
        assert "in time" in str(container.lost_reason)

    async def stdin(container: Container, agent: Played) -> None:
        agent.holding = True
        running = asyncio.create_task(
            container.execute("e", {}, note={}, deadline_s=None, sink=lambda *_: None, hold=False)
        )
        await asyncio.sleep(1)
        agent.mute = True
        assert await waited_s(container.feed("e", b"x", close=False), "in time") == pytest.approx(ANSWER_S)
        with pytest.raises(ContainerLost):
            await running

    async def resize(container: Container, agent: Played) -> None:
        size = Resize(cols=80, rows=24)
        terminal = open_terminal(container, size=size, command=None, term="xterm", env={})
        assert await waited_s(terminal.resize(size), "in time") == pytest.approx(ANSWER_S)

    for scene in (stat, stdin, resize):
        play(scene)


def test_of_a_file_no_more_is_taken_than_its_agent_said_that_it_has() -> None:
    async def scene(container: Container, agent: Played) -> None:
        opening = asyncio.create_task(Workspace(container).read("f", start=2))
        say_data(agent, "o1", json.dumps(FILE).encode())
        download = await opening
        moving = asyncio.create_task(dribble(container, agent))
        assert await all_of(download.chunks()) == b"x" * 7
        await moving
        await check_whole(container, agent)

    play(scene)


def test_an_execution_without_a_timeout_has_a_deadline_once_it_is_cancelled() -> None:
    async def scene(container: Container, agent: Played) -> None:
        agent.holding = True
        running = container.execute("e", {}, note={}, deadline_s=None, sink=lambda *_: None, hold=False)
        waiting = asyncio.create_task(waited_s(running, "no result in time"))
        await asyncio.sleep(CANCEL_S * 2)
        agent.mute = True
        container.cancel("e")
        assert await waiting == pytest.approx(CANCEL_S * 3)

    play(scene)


def test_an_agent_is_not_lost_for_an_answer_that_a_silent_engine_may_hold_back() -> None:
    async def scene(container: Container, agent: Played) -> None:
        assert await waited_s(Workspace(container).stat("f"), "in time") == pytest.approx(ANSWER_S)
        await check_whole(container, agent)

    play(scene, is_blamed=False)


async def test_of_an_archive_that_is_given_up_a_real_agent_leaves_nothing(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ARCHIVE_S", 1.0)
    engine = LocalEngine(state_dir / "deadlines", record=lambda *_: None)
    container = Container(SPEC, "python", output_limit=1, on_lost=lambda _: None)
    await container.start(engine, LIMITS)
    await container.bind("s", {})
    there, agent = Workspace(container), engine._agents[SPEC.name]._process.get_pid()
    stopped = asyncio.Event()

    async def half_an_archive() -> AsyncIterator[bytes]:
        yield tar_of(a=bytes(WINDOW * 3))[: WINDOW * 2]
        while not (await there.list("", recursive=True, limit=9, after=None)).files:
            await asyncio.sleep(0.01)
        os.kill(agent, signal.SIGSTOP)
        stopped.set()
        yield bytes(WINDOW * 2)

    try:
        with pytest.raises(ContainerLost, match="stands still"):
            await there.unpack("", half_an_archive(), limit=LIMIT)
        assert stopped.is_set()
        os.kill(agent, signal.SIGCONT)
        async with asyncio.timeout(10):
            while (await there.list("", recursive=True, limit=9, after=None)).files:
                await asyncio.sleep(0.01)
        assert (len(container.streams), container.lost_reason) == (0, None)
        assert (await there.write("f", pieces(9), limit=LIMIT)).size_bytes == 9 * STEP
    finally:
        await engine.close()
