"""The attached stream of a container: Docker's upgraded connection, in any chunks, refused, and cut off."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.engine.attach import Attachment, attach
from orchestrator.errors import EngineError

UPGRADED = (
    b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\n"
    b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n"
)
OLD = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n"
REFUSED = b'HTTP/1.1 404 Not Found\r\nContent-Length: 34\r\n\r\n{"message":"No such container: c"}'


class Tape:
    """A receiver with what it heard, joined for each stream: blocks are not frames."""

    def __init__(self) -> None:
        self.stdout = b""
        self.stderr = b""
        self.reasons: list[str] = []
        self.ended = asyncio.Event()

    def received(self, data: bytes) -> None:
        self.stdout += data

    def said(self, text: bytes) -> None:
        self.stderr += text

    def lost(self, reason: str) -> None:
        self.reasons.append(reason)
        self.ended.set()


class Line(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def abort(self) -> None:
        self.aborted = True


def block(stream: int, data: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


def joined(blocks: list[tuple[int, bytes]], stream: int) -> bytes:
    return b"".join(data for number, data in blocks if number == stream)


@given(
    head=st.sampled_from([UPGRADED, OLD]),
    blocks=st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40)), max_size=12),
    sizes=st.lists(st.integers(1, 50), max_size=60),
)
async def test_stdout_and_stderr_come_apart_however_the_stream_is_cut(
    head: bytes, blocks: list[tuple[int, bytes]], sizes: list[int]
) -> None:
    tape = Tape()
    attachment = Attachment(b"POST", tape)
    attachment.connection_made(Line())
    stream = head + b"".join(block(number, data) for number, data in blocks)
    at = 0
    for size in [*sizes, len(stream)]:
        if chunk := stream[at : at + size]:
            attachment.data_received(chunk)
        at += size
    assert attachment.opened.done()
    assert (tape.stdout, tape.stderr) == (joined(blocks, 1), joined(blocks, 2))


async def test_half_a_block_is_not_handed_on() -> None:
    tape = Tape()
    attachment = Attachment(b"POST", tape)
    attachment.connection_made(Line())
    attachment.data_received(UPGRADED + block(1, b"hello")[:-1])
    assert tape.stdout == b""
    attachment.data_received(b"o")
    assert tape.stdout == b"hello"


async def test_closing_aborts_the_connection_and_writing_goes_into_it() -> None:
    line = Line()
    attachment = Attachment(b"POST", Tape())
    attachment.connection_made(line)
    attachment.write(b"{}\n")
    attachment.close()
    assert line.written == b"POST{}\n"
    assert line.aborted


async def test_who_drains_waits_while_the_engine_takes_nothing_and_no_longer_than_the_connection() -> None:
    attachment = Attachment(b"POST", Tape())
    attachment.connection_made(Line())
    await attachment.drain()
    for resume in (attachment.resume_writing, lambda: attachment.connection_lost(None)):
        attachment.pause_writing()
        waiting = asyncio.create_task(attachment.drain())
        await asyncio.sleep(0)
        assert not waiting.done()
        resume()
        await waiting
    with pytest.raises(EngineError):
        attachment.opened.result()


# --- against a server on a socket

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Daemon:
    """A server that answers each connection as told."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[bytes] = []


@asynccontextmanager
async def daemon(answer: Answer) -> AsyncIterator[Daemon]:
    with tempfile.TemporaryDirectory() as folder:
        made = Daemon(f"unix://{folder}/docker.sock")

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            made.requests.append(await reader.readuntil(b"\r\n\r\n"))
            try:
                await answer(reader, writer)
            finally:
                writer.close()

        async with await asyncio.start_unix_server(serve, Path(folder, "docker.sock")):
            yield made


def saying(*chunks: bytes) -> Answer:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()

    return answer


async def test_it_asks_for_stdin_stdout_and_stderr_of_the_container() -> None:
    async with daemon(saying(UPGRADED)) as engine:
        tape = Tape()
        (await attach(engine.url, "1.41", "a b", tape, tls=None)).close()
    head, *_ = engine.requests[0].split(b"\r\n")
    assert head == b"POST /v1.41/containers/a%20b/attach?stream=1&stdin=1&stdout=1&stderr=1 HTTP/1.1"


async def test_bytes_go_both_ways_until_the_engine_ends_the_stream() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(UPGRADED + block(1, b"first "))
        writer.write(block(1, await reader.readline()) + block(2, b"warning"))
        await writer.drain()

    async with daemon(echo) as engine:
        tape = Tape()
        wire = await attach(engine.url, "1.41", "c", tape, tls=None)
        wire.write(b"ping\n")
        await tape.ended.wait()
    assert (tape.stdout, tape.stderr) == (b"first ping\n", b"warning")
    assert tape.reasons == ["the attached stream ended: closed by the engine"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        pytest.param(saying(REFUSED), "No such container: c", id="refused"),
        pytest.param(saying(REFUSED[:10], REFUSED[10:]), "No such container: c", id="refused in pieces"),
        pytest.param(saying(b"HTTP/1.1 500 Internal Server Error\r\n\r\n"), "500 Internal", id="no reason given"),
        pytest.param(saying(b"SSH-2.0-OpenSSH\r\n\r\n"), "SSH-2.0", id="no HTTP"),
        pytest.param(saying(), "closed by the engine", id="closed at once"),
        pytest.param(saying(UPGRADED[:20]), "closed by the engine", id="closed in the head"),
    ],
)
async def test_a_refusal_is_an_engine_error_with_its_reason(answer: Answer, reason: str) -> None:
    async with daemon(answer) as engine:
        with pytest.raises(EngineError, match=reason):
            await attach(engine.url, "1.41", "c", Tape(), tls=None)


async def test_without_a_daemon_it_is_the_operating_systems_error() -> None:
    with pytest.raises(FileNotFoundError):
        await attach("unix:///nowhere/docker.sock", "1.41", "c", Tape(), tls=None)


async def test_it_reaches_a_daemon_by_tcp_as_well() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(UPGRADED + block(1, b"here"))
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = cast(int, server.sockets[0].getsockname()[1])
        tape = Tape()
        await attach(f"tcp://127.0.0.1:{port}", "1.41", "c", tape, tls=None)
        await tape.ended.wait()
    assert tape.stdout == b"here"
