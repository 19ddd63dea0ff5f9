"""The terminal in a real container: what its sandbox sees of terminals, and what hostile code makes of it."""

import os
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.live import Live, serve
from tests.screen import Screen
from tests.terminals import are_running, sit, start_session

REFUSED = ("TIOCSTI", "TIOCLINUX", "TIOCCONS", "TIOCSETD")
PUSH = f"""
import errno, fcntl, sys, termios
for name, number in zip({REFUSED!r}, (0x5412, 0x541C, 0x541D, 0x5423)):
    try:
        fcntl.ioctl(0, number, b"\\0" * 8)
        print(name, "done")
    except OSError as error:
        print(name, errno.errorcode[error.errno])
"""
MAKE = """
import errno, os
for act in (os.openpty, lambda: os.mknod("/tmp/ptmx", 0o20666, os.makedev(5, 2)), lambda: os.open("/dev/pts/ptmx", 2)):
    try:
        print("done", act())
    except OSError as error:
        print(errno.errorcode[error.errno])
"""

PAINT = """
import curses
def paint(screen):
    screen.addstr(7, 30, "here")
    while screen.getch() == curses.KEY_RESIZE:
        screen.clear()
        screen.addstr(2, 3, "{} by {}".format(*screen.getmaxyx()))
curses.wrapper(paint)
"""


@pytest.fixture
def sid(docker_service: Live) -> Iterator[str]:
    sid = start_session(docker_service)
    yield sid
    docker_service.client.delete(f"/v1/sessions/{sid}")


def put(live: Live, sid: str, name: str, text: str) -> None:
    live.client.put(f"/v1/sessions/{sid}/files/{name}", content=text).raise_for_status()


async def test_a_sandbox_with_a_terminal_has_one_node_and_can_make_no_other(docker_service: Live, sid: str) -> None:
    put(docker_service, sid, "make.py", MAKE)
    async with AsyncExitStack() as stack:
        seats = [await stack.enter_async_context(sit(docker_service, sid)) for _ in range(4)]
        for number, seat in enumerate(seats):
            assert await seat.run("tty; ls /dev/pts") == f"/dev/pts/{number}\r\n{number}\r\n".encode()
            assert await seat.run("python3 make.py") == b"ENOENT\r\nEPERM\r\nENOENT\r\n"
    seen = docker_service.client.post(
        f"/v1/sessions/{sid}/executions", json={"command": "ls /dev; cat /dev/tty"}
    ).json()
    assert not {"tty", "pts", "ptmx"} & set(seen["stdout"].split())
    assert seen["outcome"] == "error"


async def test_its_terminal_is_not_the_hosts(docker_service: Live, sid: str) -> None:
    hosts = Path("/dev/pts").stat().st_dev  # noqa: ASYNC240 - it takes no time
    async with sit(docker_service, sid) as seat:
        assert int(await seat.run("stat -c %d $(tty)")) != hosts


async def test_nothing_can_be_pushed_into_a_terminal(docker_service: Live, sid: str) -> None:
    put(docker_service, sid, "push.py", PUSH)
    async with sit(docker_service, sid) as seat:
        shown = (await seat.run("python3 push.py")).split()
    assert shown == [word.encode() for name in REFUSED for word in (name, "EPERM")]


async def test_terminals_come_and_go_without_end(docker_service: Live, sid: str) -> None:
    for _ in range(20):
        async with sit(docker_service, sid, command="tty") as seat:
            assert (await seat.end())[2] == [{"type": "exit", "exit_code": 0, "signal": None}]
            assert seat.seen == b"/dev/pts/0\r\n", "the one before is gone"


async def test_a_fork_bomb_on_a_terminal_ends_with_it(docker_service: Live, sid: str) -> None:
    async with sit(docker_service, sid) as seat:
        await seat.type(b"b() { b | b & }; b 2>/dev/tty\n")
        await seat.until(b"Resource temporarily unavailable")
        seat.socket.transport.abort()
    answer = docker_service.client.post(f"/v1/sessions/{sid}/executions", json={"code": "print(1)"}).json()
    assert (answer["outcome"], answer["stdout"]) == ("ok", "1\n")


async def test_memory_that_runs_out_ends_the_program_and_not_the_container(docker_service: Live, sid: str) -> None:
    async with sit(
        docker_service, sid, command="for i in 1 2 3 4 5; do tail /dev/zero & done; wait; echo over"
    ) as seat:
        await seat.until(b"over")
    async with sit(docker_service, sid, command="echo again") as seat:
        await seat.until(b"again")


async def test_after_a_crash_of_the_service_its_terminals_are_gone_and_the_session_is_not(
    real_engine: None, state_dir: Path
) -> None:
    life = {"instance": f"terminal-crash-{os.getpid()}", "engine": "docker", "uid_base": "51100", "pool_size": "0"}
    with serve(state_dir, **life) as first:
        sid = start_session(first)
        async with sit(first, sid, command="trap '' HUP; sleep 4721.25") as seat:
            await are_running("sleep\x004721.25", 1)
            first.process.kill()
            assert (await seat.end())[0] == 1006
    await are_running("sleep\x004721.25", 1)
    with serve(state_dir, **life) as second:
        await are_running("sleep\x004721.25", 0)
        async with sit(second, sid, command="echo again") as seat:
            await seat.until(b"again")


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_a_person_at_a_terminal_emulator(docker_service: Live, sid: str) -> None:
    put(docker_service, sid, "paint.py", PAINT)
    screen = Screen(docker_service.url, sid, cols=90, rows=25)
    screen.until("sandbox:~$")
    screen.type("stty size\r")
    screen.until("25 90")
    screen.resize(100, 40)
    screen.type("clear; stty size\r")
    screen.until("40 100")
    screen.type("sleep 1000\r")
    screen.until("$ sleep 1000")
    screen.type("\x03")
    screen.until("^C")
    screen.type("echo code $?\r")
    screen.until("code 130")
    screen.type("python3 -q\r")
    screen.until(">>>")
    screen.type("6 * 7\r")
    screen.until("42")
    screen.type("exit()\r")
    screen.type("python3 paint.py\r")
    screen.until("here")
    assert screen.at(7, 30, 4) == "here"
    screen.resize(70, 20)
    screen.until("20 by 70")
    screen.type("q")
    screen.until("sandbox:~$")
    screen.type("exit 9\r")
    assert screen.exit_code() == 9
    assert "logout" in screen.lines


@pytest.mark.filterwarnings("ignore:.*forkpty.*:DeprecationWarning")
def test_a_person_can_leave_what_hangs(docker_service: Live, sid: str) -> None:
    screen = Screen(docker_service.url, sid, "--command", "trap '' INT; echo on; exec sleep 1000", cols=80, rows=24)
    screen.until("on")
    screen.type("\x03")
    screen.type("\x1d")
    assert screen.exit_code() == 0
