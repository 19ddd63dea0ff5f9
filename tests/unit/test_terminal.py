"""The terminal over its WebSocket, on the local engine: a shell as its user has it, and clients of every sort."""

import asyncio
import base64
import hashlib
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed

from tests.live import Live, serve
from tests.terminals import SOON_S, are_running, refusal, resident_kb, running, sit, start_session

KEY = "a-key-of-sixteen-letters"
MIB = 1 << 20
EVERY_BYTE = bytes(range(256))


@pytest.fixture
def sid(local_service: Live) -> Iterator[str]:
    sid = start_session(local_service)
    yield sid
    local_service.client.delete(f"/v1/sessions/{sid}")


async def test_a_shell_has_a_controlling_terminal_of_the_size_that_was_asked_for(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid, cols=100, rows=30) as seat:
        assert (await seat.run("tty")).startswith(b"/dev/pts/")
        assert await seat.run("stty size") == b"30 100\r\n"
        assert await seat.run("echo $TERM; echo hi > /dev/tty") == b"xterm-256color\r\nhi\r\n"


async def test_a_new_size_reaches_the_program_in_the_foreground(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid) as seat:
        await seat.run("trap 'stty size' WINCH")
        await seat.control(type="resize", cols=61, rows=17)
        await seat.until(b"17 61\r\n")


async def test_the_keys_of_job_control_interrupt_and_stop(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid) as seat:
        goes_on = "signal.signal(signal.SIGCONT, lambda *_: print(6 * 9))"  # bash has given it the terminal by then
        await seat.type(f"python3 -u -c 'import signal, time; {goes_on}; print(6 * 7); time.sleep(99)'\n".encode())
        await seat.until(b"42\r\n")
        await seat.type(b"\x1a")
        await seat.until(b"Stopped")
        await seat.type(b"fg\n")
        await seat.until(b"54\r\n")
        await seat.type(b"\x03")
        await seat.until(b"KeyboardInterrupt")
        assert await seat.run("echo $?") == b"130\r\n"


async def test_python_can_be_used_interactively(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid, command="python3 -q") as seat:
        await seat.until(b">>> ")
        await seat.type(b"6 * 7\n")
        await seat.until(b"42\r\n")
        await seat.type(b"exit(5)\n")
        assert (await seat.end())[2] == [{"type": "exit", "exit_code": 5, "signal": None}]


@pytest.mark.parametrize(
    ("command", "code", "signal"),
    [("exit 7", 7, None), ("kill -9 $$", 137, 9), ("exec >&- 2>&- <&-; sleep 0.1; exit 6", 6, None)],
)
async def test_the_end_of_the_program_is_told(
    local_service: Live, sid: str, command: str, code: int, signal: int | None
) -> None:
    async with sit(local_service, sid, command=command) as seat:
        assert await seat.end() == (1000, "", [{"type": "exit", "exit_code": code, "signal": signal}])


async def test_environment_and_kind_of_terminal_are_the_sessions_and_the_clients(local_service: Live) -> None:
    sid = start_session(local_service, env={"COLOUR": "blue", "PS1": "mine> "})
    async with sit(local_service, sid, term="vt100") as seat:
        await seat.until(b"mine> ")
        assert (await seat.run("echo $TERM $COLOUR $HOME")).endswith(b"vt100 blue /workspace\r\n")
    local_service.client.delete(f"/v1/sessions/{sid}")


async def test_a_terminal_shares_the_workspace_of_its_session(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid) as seat:
        await seat.run("echo kept > note")
    assert local_service.client.get(f"/v1/sessions/{sid}/files/note").text == "kept\n"


async def test_not_a_byte_is_lost_either_way(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid, command="stty raw -echo; echo go; head -c 1024000 | md5sum") as seat:
        await seat.until(b"go")
        for _ in range(10):
            await seat.type(EVERY_BYTE * 400)
        assert (await seat.until(b"  -")).endswith(hashlib.md5(EVERY_BYTE * 4000).hexdigest().encode())
    async with sit(local_service, sid, command="head -c 3000000 /dev/zero | tr '\\0' x") as seat:
        await seat.end()
        assert seat.seen == b"x" * 3_000_000


@pytest.mark.parametrize(
    "query",
    [{"cols": 0}, {"rows": -1}, {"cols": 1001}, {"rows": "x"}, {"term": "a/b"}, {"term": ""}, {"command": ""}],
    ids=str,
)
async def test_a_handshake_that_makes_no_sense_is_refused_with_a_problem(
    local_service: Live, sid: str, query: dict[str, Any]
) -> None:
    problem = await refusal(local_service, sid, **query)
    assert (problem.status, problem.code) == (400, "invalid_request")
    assert next(iter(query)) in problem.detail


async def test_a_session_that_is_unknown_is_refused_with_a_problem(local_service: Live) -> None:
    assert (await refusal(local_service, "nobody")).code == "session_not_found"
    assert (await refusal(local_service, "no/thing")).code == "not_found"
    assert local_service.client.get("/v1/sessions/nobody/terminal").status_code in (404, 405)


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost.evil.example"])
async def test_a_page_of_another_site_is_refused(local_service: Live, sid: str, origin: str) -> None:
    assert (await refusal(local_service, sid, origin=origin)).code == "unauthorized"


async def test_a_page_of_this_site_is_served(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid, origin=local_service.url, command="exit") as seat:
        assert (await seat.end())[0] == 1000


async def test_a_name_that_a_stranger_chose_for_this_machine_is_refused(local_service: Live, sid: str) -> None:
    problem = await refusal(local_service, sid, headers={"Host": "evil.example"}, origin="http://evil.example")
    assert problem.code == "unauthorized"


async def test_a_key_travels_as_a_header_or_for_browsers_as_a_subprotocol(state_dir: Path) -> None:
    encoded = base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")
    with serve(state_dir, instance="terminal-keys", engine="local", api_keys=f"me:{KEY}", pool_size="1") as live:
        live.client.headers["X-API-Key"] = KEY
        sid = start_session(live)
        for given in (
            {"headers": {"Authorization": f"Bearer {KEY}"}},
            {"headers": {"X-API-Key": KEY}},
            {"subprotocols": ["terminal", f"bearer.{encoded}"]},
        ):
            async with sit(live, sid, command="exit", **given) as seat:
                assert (await seat.end())[0] == 1000
        assert seat.socket.subprotocol == "terminal", "never the one with the key"
        for given in ({}, {"subprotocols": ["terminal", "bearer.A"]}, {"headers": {"Authorization": "Bearer x"}}):
            assert (await refusal(live, sid, **given)).status == 401
        assert KEY not in live.log
        assert encoded not in live.log


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "resize", "cols": 0, "rows": 1}',
        '{"type": "resize", "cols": 99999, "rows": 1}',
        '{"type": "resize", "cols": 1}',
        '{"type": "resize", "cols": 1, "rows": 1, "more": 1}',
        '{"type": "exit"}',
        "resize",
        "",
        "[" * 50_000,
    ],
    ids=lambda text: text[:20],
)
async def test_control_that_makes_no_sense_is_answered_and_changes_nothing(
    local_service: Live, sid: str, text: str
) -> None:
    async with sit(local_service, sid, cols=70) as seat:
        await seat.socket.send(text)
        assert (await seat.complaint())["code"] == "invalid_request"
        assert (await seat.run("stty size")).endswith(b"24 70\r\n")


async def test_a_message_that_is_too_long_ends_the_terminal_and_nothing_else(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid) as seat:
        await seat.flood(b"x" * MIB, for_s=SOON_S)
        assert (await seat.end())[0] in (1009, 1006), "the latter when the close itself was lost behind what was sent"
    assert execute(local_service, sid)["outcome"] == "ok"


async def test_a_message_of_very_many_pieces_ends_the_terminal_and_nothing_else(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid) as seat:
        await seat.type(b"ec")
        await seat.socket.send([b"ho ", *[b""] * 100, b"pie", b"ces\n"])
        await seat.until(b"pieces")
        with suppress(ConnectionClosed):
            await seat.socket.send([b""] * 5000)
        assert (await seat.end())[0] in (1009, 1006)
    assert execute(local_service, sid)["outcome"] == "ok"


async def test_of_one_session_a_few_terminals_are_open_at_once(local_service: Live, sid: str) -> None:
    async with (
        sit(local_service, sid) as first,
        sit(local_service, sid),
        sit(local_service, sid),
        sit(local_service, sid),
    ):
        problem = await refusal(local_service, sid)
        assert (problem.status, problem.code, problem.retry_after_s) == (429, "too_many_requests", 1)
        await first.type(b"exit\n")
        assert (await first.end())[0] == 1000
        async with sit(local_service, sid) as seat:
            await seat.run("true")


async def test_a_client_that_goes_away_leaves_no_process(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid) as seat:
        await seat.run("(trap '' HUP TERM INT; exec sleep 4711.25) & sleep 4711.25 & true")
        await are_running("4711.25", 2)
        seat.socket.transport.abort()
        await are_running("4711.25", 0)
    assert execute(local_service, sid)["outcome"] == "ok"


async def test_with_its_session_a_terminal_ends(local_service: Live) -> None:
    sid = start_session(local_service)
    async with sit(local_service, sid) as seat:
        await seat.run("sleep 4712.25 & true")
        local_service.client.delete(f"/v1/sessions/{sid}")
        code, reason, texts = await seat.end()
        assert (code, reason, texts[-1]["problem"]["code"]) == (4404, "session_not_found", "session_not_found")
        await are_running("4712.25", 0)


async def test_an_open_terminal_is_no_silence_but_prolongs_no_life(local_service: Live) -> None:
    sid = start_session(local_service, ttl_s=4, idle_timeout_s=1.5)
    begun = time.monotonic()
    async with sit(local_service, sid) as seat:
        code, reason, _ = await seat.end()
    assert (code, reason) == (4410, "session_ended")
    assert time.monotonic() - begun > 3


async def test_a_client_that_never_reads_stops_its_program_and_nothing_else(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid, command="yes") as seat:
        await seat.until(b"y\r\n")
        seat.socket.transport.pause_reading()
        processes = await holders(local_service)
        before_kb = memory_kb(processes)
        end_at = time.monotonic() + 2
        while time.monotonic() < end_at:
            assert execute(local_service, sid)["outcome"] == "ok"
        assert memory_kb(processes) - before_kb < 8192
        seat.socket.transport.abort()
    async with sit(local_service, sid) as seat:
        await seat.run("true")


async def test_a_program_that_never_reads_stops_its_client_and_can_be_left(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid, command="stty raw -echo; echo go; exec sleep 4713.25") as seat:
        await seat.until(b"go")
        processes = await holders(local_service)
        before_kb = memory_kb(processes)
        await seat.flood(b"x" * 32768, for_s=2)
        assert memory_kb(processes) - before_kb < 8192
        assert execute(local_service, sid)["outcome"] == "ok"
        local_service.client.delete(f"/v1/sessions/{sid}")
        await are_running("4713.25", 0)


async def test_a_client_that_leaves_a_program_that_never_reads_leaves_no_process(local_service: Live, sid: str) -> None:
    async with sit(local_service, sid, command="stty raw -echo; echo go; exec sleep 4714.25") as seat:
        await seat.until(b"go")
        await seat.type(b"x" * 100_000)
        seat.socket.transport.abort()
        await are_running("4714.25", 0)


async def test_when_the_service_ends_its_terminals_are_told(state_dir: Path) -> None:
    with serve(state_dir, instance="terminal-end", engine="local", pool_size="1") as live:
        async with sit(live, start_session(live)) as seat:
            await seat.run("true")
            ending = asyncio.create_task(asyncio.to_thread(live.terminate))
            assert (await seat.end())[0] == 1012
            assert await ending == 0


def execute(live: Live, sid: str) -> dict[str, Any]:
    return dict(live.client.post(f"/v1/sessions/{sid}/executions", json={"code": "print(1)"}).json())


async def holders(live: Live) -> list[int]:
    """Return the service and its agents, once none of them just starts."""
    async with asyncio.timeout(SOON_S):
        while any(pool["ready"] < pool["target"] for pool in live.client.get("/v1/pool").json()["pools"]):
            await asyncio.sleep(0.02)
    return [live.process.pid, *running(f"/{live.instance}/")]


def memory_kb(processes: list[int]) -> int:
    """Return what the processes hold resident."""
    return sum(map(resident_kb, processes))
