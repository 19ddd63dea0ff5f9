"""The Model Context Protocol's door as the package's own client speaks to it, in both generations of the protocol."""

import base64
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import pytest
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_types import CallToolResult, ImageContent, TextContent

from tests.contexts import has_ipython
from tests.live import Live, serve

KEY = "0123456789abcdef0123"
SESSION, STATELESS = "legacy", "2026-07-28"  # with MCP sessions, and without
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "0"}},
}
JSON = {"Accept": "application/json, text/event-stream", "X-API-Key": KEY}


@pytest.fixture(scope="module")
def live(state_dir: Path) -> Iterator[Live]:
    """A service with a key."""
    settings = {"api_keys": f"ci:{KEY}", "uid_base": "160600", "idle_timeout_seconds": "60"}
    with serve(state_dir, instance="test-mcp", engine="local", **settings) as live:
        yield live


@asynccontextmanager
async def connected(live: Live, mode: str = SESSION, *, key: str | None = KEY) -> AsyncIterator[Client]:
    """Connect the package's own client."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    async with (
        httpx2.AsyncClient(headers=headers, trust_env=False, timeout=30) as http,
        Client(streamable_http_client(f"{live.url}/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


def text_of(result: CallToolResult) -> str:
    return "\n".join(block.text for block in result.content if isinstance(block, TextContent))


async def call(client: Client, tool: str, **arguments: Any) -> CallToolResult:
    result = await client.call_tool(tool, arguments)
    assert isinstance(result, CallToolResult)
    return result


async def say(client: Client, tool: str, **arguments: Any) -> str:
    """Call a tool that succeeds; return its text."""
    result = await call(client, tool, **arguments)
    assert not result.is_error, result.content
    return text_of(result)


async def fail(client: Client, tool: str, **arguments: Any) -> str:
    """Call a tool that fails; return its text."""
    result = await call(client, tool, **arguments)
    assert result.is_error, result.content
    return text_of(result)


def sessions(live: Live) -> list[Any]:
    found: list[Any] = live.client.get("/v1/sessions", headers={"X-API-Key": KEY}).json()["sessions"]
    return found


@pytest.mark.parametrize("mode", [SESSION, STATELESS, "auto"])
async def test_the_tools_are_listed_with_what_they_take(live: Live, mode: str) -> None:
    async with connected(live, mode) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    expected = "run_cell run_code run_command read_file write_file list_files list_sessions end_session".split()
    assert list(tools) == expected
    assert tools["run_code"].input_schema["required"] == ["code"]
    assert tools["run_code"].input_schema["properties"]["language"]["enum"] == ["python", "javascript", "shell"]
    assert all(tool.description for tool in tools.values())


async def test_one_mcp_session_is_one_sandbox_session_and_ends_with_it(live: Live) -> None:
    async with connected(live) as client, connected(live) as other:
        assert sessions(live) == []
        await say(client, "write_file", path="notes/a.txt", content="mine")
        assert await say(client, "run_code", code="print(open('notes/a.txt').read())") == "mine"
        assert await say(client, "run_command", command="echo $((1 + 1)); cat notes/a.txt") == "2\nmine"
        assert await say(client, "list_files") == "notes  directory  0 bytes\nnotes/a.txt  file  4 bytes"
        assert await say(other, "list_files") == "there are no files"
        assert len(sessions(live)) == 2
    assert sessions(live) == []


async def test_without_mcp_sessions_a_result_names_the_session_to_go_on_with(live: Live) -> None:
    async with connected(live, STATELESS) as client:
        first = await call(client, "run_code", code="open('a', 'w').write('kept')")
        assert first.structured_content is not None
        sid = first.structured_content["session_id"]
        assert f"[session_id: {sid}]" in text_of(first)
        assert await say(client, "read_file", path="a", session_id=sid) == "kept"
        assert await say(client, "run_code", code="print(open('a').read())", session_id=sid) == "kept"
        assert "name one in `session_id`" in await fail(client, "read_file", path="a")
        assert "name one in `session_id`" in await fail(client, "end_session")
        assert [session["id"] for session in sessions(live)] == [sid]
        await say(client, "end_session", session_id=sid)
        assert sessions(live) == []
        assert "session_not_found" in await fail(client, "run_code", code="1", session_id=sid)


async def test_a_result_tells_outcome_error_value_and_files(live: Live) -> None:
    async with connected(live) as client:
        failed = await call(client, "run_code", code="print('before')\nopen('out.txt', 'w').write('x')\n1 / 0")
        said = text_of(failed)
        assert said.startswith("[outcome: error, exit code 1]\nbefore\n[stderr]\nTraceback")
        assert "ZeroDivisionError: division by zero" in said
        assert said.endswith("[files] out.txt (1 bytes)")
        assert failed.is_error
        assert failed.structured_content is not None
        assert failed.structured_content["error"] == "ZeroDivisionError"
        assert await say(client, "run_code", code="def handler(event): return {'n': 1}") == '[value] {"n":1}'
        assert await say(client, "run_code", code="1") == "[no output]"
        assert await say(client, "run_code", code="cat", language="shell", stdin="given") == "given"
        slow = await fail(client, "run_command", command="sleep 60", timeout_s=0.3)
        assert slow.startswith("[outcome: timeout, exit code 137]")
        long = await say(client, "run_code", code="print('a' * 100000 + 'end')")
        assert len(long) < 33_000
        assert "67235 characters are left out" in long
        assert long.endswith("end")


@pytest.mark.skipif(not has_ipython(), reason="the interpreter of the local engine has no IPython")
async def test_cells_keep_variables_and_show_images(live: Live) -> None:
    show = f"from IPython.display import Image, Markdown, display\nimport base64\npixel = base64.b64decode('{PIXEL}')\n"
    async with connected(live) as client:
        assert await say(client, "run_cell", code="x = 20") == "[no output]"
        assert await say(client, "run_cell", code="print('printed')\nx += 1\nx * 2") == "printed\n42"
        shown = await call(
            client, "run_cell", code=show + "display(Markdown('**bold**'))\ndisplay(Image(pixel))\n'last'"
        )
        image, text = shown.content
        assert isinstance(image, ImageContent)
        assert (image.mime_type, base64.b64decode(image.data)) == ("image/png", base64.b64decode(PIXEL))
        assert text_of(shown) == "**bold**\n'last'"
        assert isinstance(text, TextContent)
        large = await say(client, "run_cell", code="Image(pixel + bytes(900_000))")
        assert large == "[an image of 900070 bytes is left out: make it smaller]"
        said = await fail(client, "run_cell", code="1 / 0")
        assert "ZeroDivisionError: division by zero" in said
        assert "timeout" in await fail(client, "run_cell", code="import time\ntime.sleep(60)", timeout_s=0.5)
        assert await say(client, "run_cell", code="x") == "21"
        await fail(client, "run_cell", code="import os\nos._exit(3)")
        renewed = await say(client, "run_cell", code="'x' in globals()")
        assert renewed == "False\n[the interpreter had ended and was started anew: variables are gone]"


async def test_images_and_bytes_are_read_as_what_they_are(live: Live) -> None:
    async with connected(live) as client:
        await say(client, "write_file", path="dot.png", content=PIXEL, encoding="base64")
        await say(
            client, "write_file", path="raw.bin", content=base64.b64encode(b"\xff\x00").decode(), encoding="base64"
        )
        (image,) = (await call(client, "read_file", path="dot.png")).content
        assert isinstance(image, ImageContent)
        assert (image.mime_type, image.data) == ("image/png", PIXEL)
        assert await say(client, "read_file", path="raw.bin") == "/wA=\n[this is base64: the file is no text]"
        await say(client, "run_code", code="open('long', 'w').write('x' * (128 << 10) + 'rest')")
        part = await say(client, "read_file", path="long")
        assert part.endswith("x\n[4 bytes follow: read on at offset 131072]")
        assert await say(client, "read_file", path="long", offset=128 << 10) == "rest"


async def test_results_fit_an_event_whatever_they_are(live: Live) -> None:
    code = "import sys\nfor f in sys.stdout, sys.stderr: print(chr(1) * 900_000, file=f)\ndef handler(e): raise ValueError(chr(2) * 900_000)"
    async with connected(live) as client:
        await fail(client, "run_code", code=code)
        await say(client, "run_code", code="print('\U0001f600' * 200_000)\ndef handler(e): return chr(1) * 100_000")
        await say(
            client,
            "run_code",
            code="open('long', 'w').write(chr(1) * 900_000)\nopen('big.png', 'wb').write(bytes(900_000))",
        )
        await say(client, "read_file", path="long")
        await say(client, "read_file", path="big.png")


@pytest.mark.parametrize(
    ("tool", "arguments", "says"),
    [
        ("read_file", {"path": "nothing"}, "file_not_found"),
        ("read_file", {"path": "../etc/passwd"}, "invalid_path"),
        ("read_file", {"path": "/etc/passwd"}, "invalid_path"),
        ("write_file", {"path": "a", "content": "no base64!", "encoding": "base64"}, "no base64"),
        ("write_file", {"path": "../a", "content": ""}, "invalid_path"),
        ("run_code", {"code": "1", "timeout_s": 1e9}, "timeout_above_cap"),
        ("run_code", {"code": "1", "timeout_s": -1}, "greater than 0"),
        ("run_code", {"code": "1", "language": "cobol"}, "language"),
        ("run_code", {}, "code"),
        ("run_code", {"code": "1", "session_id": "nobody"}, "session_not_found"),
        ("end_session", {"session_id": "nobody"}, "session_not_found"),
        ("list_files", {"path": "nothing"}, "file_not_found"),
        ("nothing", {}, "nothing"),
    ],
)
async def test_bad_calls_are_told_so_and_the_session_goes_on(
    live: Live, tool: str, arguments: dict[str, Any], says: str
) -> None:
    async with connected(live) as client:
        try:
            said = await fail(client, tool, **arguments)
        except MCPError as error:  # what the package itself refuses
            said = str(error)
        assert says in said
        assert await say(client, "run_code", code="print(1)") == "1"


async def test_sessions_are_listed_and_may_be_used_by_name(live: Live) -> None:
    async with connected(live) as client, connected(live) as other:
        await say(client, "run_code", code="open('a', 'w').write('theirs')")
        listed = await call(other, "list_sessions")
        assert listed.structured_content is not None
        (facts,) = listed.structured_content["sessions"]
        assert text_of(listed) == f"{facts['id']}  template python, 1 executions"
        assert await say(other, "read_file", path="a", session_id=facts["id"]) == "theirs"


async def test_a_session_that_has_ended_is_replaced_and_that_is_said(live: Live) -> None:
    async with connected(live) as client:
        await say(client, "run_code", code="open('a', 'w').write('x')")
        await say(client, "end_session")
        assert await say(client, "list_files") == "there are no files"


async def test_calls_at_once_share_one_session(live: Live) -> None:
    async with connected(live) as client:
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(partial(say, client, "run_code", code="print(1)"))
        assert len(sessions(live)) == 1


async def test_a_call_that_is_cancelled_ends_its_execution(live: Live) -> None:
    async with connected(live) as client:
        await say(client, "run_code", code="print(1)")
        with anyio.move_on_after(0.5):
            await client.call_tool("run_command", {"command": "sleep 60"})
        (session,) = sessions(live)
        with anyio.fail_after(20):
            while True:
                path = f"/v1/sessions/{session['id']}/executions"
                executions = live.client.get(path, headers={"X-API-Key": KEY}).json()["executions"]
                if executions[-1]["outcome"] is not None:
                    break
                await anyio.sleep(0.02)
        assert executions[-1]["outcome"] == "cancelled"


# --- who may


@pytest.mark.parametrize("mode", [SESSION, STATELESS])
@pytest.mark.parametrize("key", [None, "x" * 20])
async def test_without_a_right_key_nothing_is_served(live: Live, mode: str, key: str | None) -> None:
    with pytest.raises((ExceptionGroup, MCPError)):
        async with connected(live, mode, key=key) as client:
            await client.list_tools()
    headers = JSON | {"X-API-Key": key or ""}
    assert live.client.post("/mcp", json=INITIALIZE, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://127.0.0.1.evil.example"]
)
def test_a_page_of_another_site_is_refused(live: Live, origin: str) -> None:
    answer = live.client.post("/mcp", json=INITIALIZE, headers=JSON | {"Origin": origin})
    assert (answer.status_code, answer.json()["code"]) == (403, "foreign_origin")
    assert live.client.post("/mcp", json=INITIALIZE, headers=JSON | {"Origin": live.url}).status_code == 200


def test_without_keys_a_foreign_host_is_refused(local_service: Live) -> None:
    answer = local_service.client.post("/mcp", json=INITIALIZE, headers=JSON | {"Host": "evil.example"})
    assert answer.status_code == 401
    assert local_service.client.post("/mcp", json=INITIALIZE, headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {"Content-Type": "application/json"}, 400),
        (b"[]", {"Content-Type": "application/json"}, 400),
        (b"{}", {"Content-Type": "application/json"}, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {"Content-Type": "application/json", "Accept": "text/html"}, 406),
        (b"{}", {"Content-Type": "application/json", "Mcp-Session-Id": "nobody"}, 404),
        (b"{}", {"Content-Type": "application/json", "Mcp-Protocol-Version": "1999-01-01"}, 400),
        (b" " * (9 << 20), {"Content-Type": "application/json"}, 413),
    ],
)
def test_what_is_no_message_is_refused(live: Live, content: bytes, headers: dict[str, str], status: int) -> None:
    assert live.client.post("/mcp", content=content, headers=JSON | headers).status_code == status


def test_there_is_no_stream_that_the_service_begins(live: Live) -> None:
    assert live.client.get("/mcp", headers=JSON).status_code == 405


def test_another_keys_holder_needs_the_id_of_an_mcp_session(live: Live) -> None:
    answer = live.client.post("/mcp", json=INITIALIZE, headers=JSON)
    number = answer.headers["Mcp-Session-Id"]
    assert all(number not in session["id"] for session in sessions(live))
    assert number not in live.log
    assert live.client.delete("/mcp", headers=JSON | {"Mcp-Session-Id": number}).status_code == 200
    assert live.client.delete("/mcp", headers=JSON | {"Mcp-Session-Id": number}).status_code == 404


async def test_the_end_of_the_service_ends_mcp_sessions(state_dir: Path) -> None:
    settings = {"api_keys": f"ci:{KEY}", "uid_base": "160700"}
    with serve(state_dir, instance="test-mcp-end", engine="local", **settings) as live:
        async with connected(live) as client:
            await say(client, "run_code", code="print(1)")
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(fail, client, "run_command", command="echo began > began; sleep 60"))
                with anyio.fail_after(20):
                    while "began" not in await say(client, "list_files"):
                        await anyio.sleep(0.02)
                live.process.terminate()
            assert await anyio.to_thread.run_sync(live.process.wait, 20) == 0
