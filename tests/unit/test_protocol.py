"""Bounds on a client: how large a request's head may be, how long it may take to arrive, and its answer to be read."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
import uvicorn

from orchestrator.api import protocol
from orchestrator.api.protocol import HEAD_LIMIT, Protocol

HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"
BODY = HEAD + b"Content-Length: 1000\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
READER_S = 5.0
LONG, PIECE = 32 << 20, 1 << 16  # more than the machine's own buffers hold


async def app(scope: dict[str, object], receive: Callable[..., object], send: Callable[..., object]) -> None:
    """Read the body, unless the path says otherwise; answer with its size."""
    if scope["path"] == "/long":
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[misc]
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})  # type: ignore[misc]
        return
    size = 0
    while scope["path"] != "/early":
        message = await receive()  # type: ignore[misc]
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    if scope["path"] == "/long":
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[misc]
        for number in range(LONG // PIECE):
            await send({"type": "http.response.body", "body": b"x" * PIECE, "more_body": number + 1 < LONG // PIECE})  # type: ignore[misc]
        return
    headers = [(b"content-length", str(len(str(size))).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})  # type: ignore[misc]
    await send({"type": "http.response.body", "body": str(size).encode()})  # type: ignore[misc]


@pytest.fixture
async def port(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[int]:
    """A server with little patience; yields its port."""
    monkeypatch.setattr(protocol, "PATIENCE_S", 0.3)
    monkeypatch.setattr(protocol, "LOOK_S", 0.05)
    monkeypatch.setattr(protocol, "LEAST_RATE", 1 << 20)
    monkeypatch.setattr(protocol, "STALLED_S", 0.3)
    config = uvicorn.Config(app, port=0, http=Protocol, ws="none", lifespan="off", log_config=None)
    config.load()
    server = uvicorn.Server(config)
    loop = asyncio.get_running_loop()
    made = await loop.create_server(lambda: Protocol(config, server.server_state, {}), "127.0.0.1", 0)
    yield made.sockets[0].getsockname()[1]
    made.close()
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    await asyncio.sleep(0)


async def answer(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Send pieces with pauses between them; return all that comes back up to the connection's end, or b"" if it breaks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        async with asyncio.timeout(READER_S):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_a_request_in_time_is_answered(port: int) -> None:
    assert (await answer(port, HEAD + b"Connection: close\r\nContent-Length: 3\r\n\r\n", b"abc")).endswith(b"\r\n\r\n3")


@pytest.mark.parametrize("sent", [b"G", HEAD, HEAD + b"X: ", BODY, BODY + b"x", CHUNKED, CHUNKED + b"1\r\nx\r\n"])
async def test_a_request_that_does_not_end_is_refused_in_time(port: int, sent: bytes) -> None:
    assert (await answer(port, sent)).startswith(b"HTTP/1.1 408 ")


async def test_a_client_that_stops_reading_is_cut_off(port: int) -> None:
    """By a reset, so that the kernel keeps nothing for it either."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", port))
        await loop.sock_sendall(connection, b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await loop.sock_recv(connection, 100)
        async with asyncio.timeout(READER_S):
            while not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                await asyncio.sleep(0.05)


async def test_a_client_that_says_nothing_is_left(port: int) -> None:
    assert await answer(port) == b""


@pytest.mark.parametrize("head", [HEAD + b"X: ", BODY])
async def test_a_byte_now_and_then_buys_no_time(port: int, head: bytes) -> None:
    begun = asyncio.get_running_loop().time()
    await answer(port, head, *[b"x"] * 100, pause_s=0.05)
    assert asyncio.get_running_loop().time() - begun < READER_S


async def test_a_slow_request_has_the_time_that_its_size_allows(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LEAST_RATE", 1000)
    head = HEAD + b"Connection: close\r\nContent-Length: 2000\r\n\r\n"
    assert (await answer(port, head, *[b"x" * 200] * 10, pause_s=0.1)).endswith(b"\r\n\r\n2000")


@pytest.mark.parametrize(
    "pieces",
    [
        [HEAD + b"X: ", *[b"x" * 16384] * 100],
        [HEAD, *[b"X-%d: y\r\n" % number * 100 for number in range(200)]],
        [b"GET /" + b"x" * 16384, *[b"x" * 16384] * 100],
        [CHUNKED + b"1\r\nx\r\n0\r\nX: ", *[b"x" * 16384] * 100],
        [CHUNKED + b"1;", *[b"x" * 16384] * 100],
    ],
    ids=["one header", "many headers", "the path", "a trailer", "a chunk's extension"],
)
async def test_what_is_not_body_is_refused_above_its_limit(port: int, pieces: list[bytes]) -> None:
    said = await answer(port, *pieces)
    assert said == b"" or said.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


async def test_a_body_in_tiny_chunks_is_no_head(port: int) -> None:
    chunks = b"1\r\nx\r\n" * HEAD_LIMIT + b"0\r\n\r\n"
    assert (await answer(port, HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n", chunks)).endswith(
        str(HEAD_LIMIT).encode()
    )


async def test_who_goes_on_sending_after_the_answer_is_left(port: int) -> None:
    early = BODY.replace(b"POST /", b"POST /early").replace(b"1000", b"100000000")
    begun = asyncio.get_running_loop().time()
    await answer(port, early, *[b"x" * 1000] * 100, pause_s=0.05)
    assert asyncio.get_running_loop().time() - begun < READER_S


async def test_requests_one_after_the_other_each_have_their_time(port: int) -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    last = request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    said = await answer(port, *[request] * 5, last, pause_s=0.15)
    assert said.count(b"HTTP/1.1 200 ") == 6


@pytest.mark.parametrize("is_slow", [False, True], ids=["not at all", "slowly"])
async def test_a_client_that_reads_nothing_is_left_and_one_that_reads_slowly_is_not(
    port: int, *, is_slow: bool
) -> None:
    loop = asyncio.get_running_loop()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, b"GET /long HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = 0
        until = loop.time() + 1.5  # it is left in 0.3
        while loop.time() < until:
            if is_slow:
                received += len(await loop.sock_recv(client, 200_000))
            await asyncio.sleep(0.02)
        with suppress(ConnectionError):
            while data := await loop.sock_recv(client, 1 << 20):
                received += len(data)
    assert (received > LONG) == is_slow
