"""HTTP by hand: requests that a well-behaved client refuses to send, and very many at once."""

import asyncio
import contextlib
import select
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.attack.cases import Failed
from tests.attack.live import KEY, Live, bearer

TIMEOUT_S = 30.0


@dataclass
class Answer:
    """What came back; `status` is 0 when the connection just ended. `sent` counts the request's bytes."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    sent: int = 0


def request(method: str, target: str, *headers: str, body: bytes | None = None, key: str | None = KEY) -> bytes:
    """Return a request as bytes; nothing in it is checked or escaped."""
    lines = [f"{method} {target} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
    lines += [f"{name}: {value}" for name, value in bearer(key).items()]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + (body or b"")


def chunked(pieces: Iterable[bytes]) -> Iterable[bytes]:
    """Frame the pieces for a request without a length."""
    for piece in pieces:
        yield b"%x\r\n%s\r\n" % (len(piece), piece)
    yield b"0\r\n\r\n"


def exchange(port: int, pieces: Iterable[bytes], *, timeout_s: float = TIMEOUT_S) -> Answer:
    """Send the pieces until an answer comes or they end, then read the answer. Failed when none comes in time."""
    end_at = time.monotonic() + timeout_s
    sent, received = 0, b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setblocking(False)
        for piece in pieces:
            view = memoryview(piece)
            while view and not received:
                readable, writable, _ = select.select([connection], [connection], [], left(end_at))
                try:
                    if readable:
                        received = connection.recv(65536)
                        break
                    if writable:
                        count = connection.send(view)
                        sent, view = sent + count, view[count:]
                except ConnectionError:
                    return parse(received + rest(connection, end_at), sent)
            if received or view:
                break
        return parse(received + rest(connection, end_at), sent)


def left(end_at: float) -> float:
    """Return the seconds left; Failed when there are none."""
    if (left_s := end_at - time.monotonic()) <= 0:
        raise Failed("no answer in time")
    return left_s


def rest(connection: socket.socket, end_at: float) -> bytes:
    """Read up to the connection's end."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while True:
            select.select([connection], [], [], left(end_at))
            piece = connection.recv(65536)
            if not piece:
                break
            data += piece
    return data


def parse(data: bytes, sent: int) -> Answer:
    """Take an answer apart."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(status, headers, body, sent)


def parallel(live: Live, requests: Sequence[tuple[str, str, Any]], *, timeout_s: float = 120) -> list[httpx.Response]:
    """Send all requests at once, each on a connection of its own; return the answers in the requests' order."""

    async def send() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=len(requests), max_keepalive_connections=0)
        url = f"http://127.0.0.1:{live.port}"
        async with httpx.AsyncClient(
            base_url=url, limits=limits, timeout=timeout_s, headers=bearer(live.key), trust_env=False
        ) as client:
            return await asyncio.gather(*(client.request(method, path, json=body) for method, path, body in requests))

    return asyncio.run(send())
