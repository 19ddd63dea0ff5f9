"""The terminal in a real container: what its sandbox sees of terminals, and what hostile code makes of it."""

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.live import Live
from tests.terminals import sit, start_session

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
