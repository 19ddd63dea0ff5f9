"""Terminals from the client's side: the SDK, the command line, and an agent that lies about one."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import (
    ConnectionFailed,
    ContainerLost,
    InvalidRequest,
    NoAnswer,
    SessionNotFound,
    TerminalFailed,
    TooManyRequests,
    Unavailable,
)
from orchestrator.models import Exit, Resize
from orchestrator.remote import RemoteTerminal
from orchestrator.sdk import SandboxClient
from orchestrator.terminal import Terminal, open_terminal
from tests.live import Live, environment, free_port, serve
from tests.screen import Screen
from tests.terminals import start_session
from tests.unit.test_frames import Scene

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sid(local_service: Live) -> Iterator[str]:
    sid = start_session(local_service)
    yield sid
    local_service.client.delete(f"/v1/sessions/{sid}")


async def shown(terminal: RemoteTerminal, until: bytes = b"\0") -> bytes:
    """Return what is shown until a text, or until the end."""
    text = b""
    async for data in terminal:
        text += data
        if until in text:
            break
    return text


# --- the SDK


async def test_a_terminal_of_the_sdk_is_typed_to_iterated_and_resized(local_service: Live, sid: str) -> None:
    async with SandboxClient(local_service.url) as client, client.terminal(sid, cols=99, rows=33) as terminal:
        await terminal.send(b"stty size\n")
        assert b"33 99" in await shown(terminal, b"33 99")
        await terminal.resize(cols=44, rows=22)
        await terminal.send(b"stty size; exit 3\n")
        assert b"22 44" in await shown(terminal)
        assert terminal.exit == Exit(exit_code=3, signal=None)
        await terminal.send(b"nobody reads this")


async def test_much_can_be_typed_at_once(local_service: Live, sid: str) -> None:
    command = "stty raw -echo; echo go; head -c 1000000 | wc -c"
    async with SandboxClient(local_service.url) as client, client.terminal(sid, command=command) as terminal:
        assert b"go" in await shown(terminal, b"go")
        await terminal.send(b"x" * 1_000_000)
        assert b"1000000" in await shown(terminal)


async def test_what_keeps_a_terminal_from_opening_is_an_error_of_the_tree(local_service: Live, sid: str) -> None:
    client = SandboxClient(local_service.url)
    with pytest.raises(SessionNotFound, match="nobody"):
        async with client.terminal("nobody"):
            pass
    with pytest.raises(InvalidRequest, match="cols"):
        async with client.terminal(sid, cols=0):
            pass
    with pytest.raises(ConnectionFailed):
        async with SandboxClient(f"http://127.0.0.1:{free_port()}").terminal(sid):
            pass


async def test_what_ends_a_terminal_is_an_error_of_the_tree(local_service: Live, sid: str) -> None:
    async with SandboxClient(local_service.url) as client, client.terminal(sid) as terminal:
        assert await shown(terminal, b"$ ")
        await client.end_session(sid)
        with pytest.raises(SessionNotFound, match=sid):
            await shown(terminal)


async def test_a_service_that_ends_or_dies_is_told(state_dir: Path) -> None:
    with serve(state_dir, instance="remote-end", engine="local", pool_size="1") as live:
        async with SandboxClient(live.url) as client, client.terminal(start_session(live)) as terminal:
            assert await shown(terminal, b"$ ")
            ending = asyncio.create_task(asyncio.to_thread(live.terminate))
            with pytest.raises(Unavailable):
                await shown(terminal)
            await ending
    with serve(state_dir, instance="remote-end", engine="local", pool_size="1") as live:
        async with SandboxClient(live.url) as client, client.terminal(start_session(live)) as terminal:
            assert await shown(terminal, b"$ ")
            live.process.kill()
            with pytest.raises(NoAnswer):
                await shown(terminal)


# --- the command line


def run(live: Live, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `orchestrator terminal` with a pipe for stdin."""
    command = [sys.executable, "-m", "orchestrator", "terminal", *words]
    variables = environment(url=live.url)
    return subprocess.run(
        command, input=stdin, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("stdin", "line", "code", "output"),
    [
        ("", "exit 6", 6, ""),
        ("one\ntwo\n", "stty -echo; wc -l", 0, "2\n"),
        ("one\ntwo", "stty -echo; wc -c", 0, "7\n"),
        ("", "kill -TERM $$", 143, ""),
    ],
)
def test_the_command_line_passes_a_pipe_on_and_exits_as_the_program(
    local_service: Live, sid: str, stdin: str, line: str, code: int, output: str
) -> None:
    ended = run(local_service, sid, "--command", line, stdin=stdin)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert ended.stdout.endswith(output)


def test_the_command_line_says_why_there_is_no_terminal(local_service: Live) -> None:
    ended = run(local_service, "nobody")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert ended.stderr == "orchestrator: There is no session nobody: start one first\n"


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_a_person_at_a_terminal_emulator(local_service: Live, sid: str) -> None:
    screen = Screen(local_service.url, sid, cols=90, rows=25)
    screen.until("sandbox:~$")
    screen.resize(100, 40)
    screen.type("stty size\r")
    screen.until("40 100")
    screen.type("exit 9\r")
    assert screen.exit_code() == 9


# --- an agent that lies

CLOSED: dict[str, Any] = {"id": "o1", "code": None, "message": "", "facts": {}}


@pytest.fixture
async def scene() -> Scene:
    made = Scene()
    await made.start()
    return made


def opened(scene: Scene) -> Terminal:
    return open_terminal(scene.container, size=Resize(cols=80, rows=24), command=None, term="dumb", env={})


@pytest.mark.parametrize(
    "facts",
    [{}, {"exit_code": None, "signal": None}, {"exit_code": 256, "signal": None}, {"exit_code": 0, "signal": 65}, {"exit_code": 0, "signal": None, "x": 1}],
    ids=str,
)  # fmt: skip
async def test_an_end_that_cannot_be_loses_the_container(scene: Scene, facts: dict[str, Any]) -> None:
    terminal = opened(scene)
    scene.agent.say("close", **CLOSED | {"facts": facts})
    with pytest.raises(ContainerLost, match="impossible"):
        await terminal.end()
    assert len(scene.lost) == 1


async def test_what_the_agent_refuses_is_said_and_loses_nothing(scene: Scene) -> None:
    terminal = opened(scene)
    scene.agent.say("close", **CLOSED | {"code": "terminal_failed", "message": "no room"})
    with pytest.raises(TerminalFailed, match="no room"):
        await terminal.end()
    await terminal.write(b"typed too late")
    terminal = opened(scene)
    scene.agent.say("close", **CLOSED | {"id": "o2", "code": "too_many_streams", "message": "end some"})
    with pytest.raises(TooManyRequests, match="end some"):
        await terminal.end()
    assert scene.lost == []


async def test_more_bytes_than_were_granted_lose_the_container(scene: Scene) -> None:
    terminal = opened(scene)
    for _ in range(9):
        scene.agent.say("data", id="o1", data="A" * 43688)
    with pytest.raises(ContainerLost, match="granted"):
        await terminal.end()
