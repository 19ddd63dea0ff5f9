"""The attached stream of a container: Docker's upgraded HTTP connection, demultiplexed.

Spoken here and not through docker-py: its client may read the first bytes of the stream into a
buffer that it then throws away, and it hands out a blocking socket.
"""

import asyncio
import re
import ssl
import urllib.parse
from typing import cast

from orchestrator.engine import Receiver
from orchestrator.errors import EngineError

STDOUT = 1
DOCKER_PORT = 2375
HEADER = 8  # bytes before each block: stream, three zeros, length; Docker's API, "Stream format"


class Attachment(asyncio.Protocol):
    """One connection. `opened` is done once Docker has switched to the stream."""

    def __init__(self, request: bytes, receiver: Receiver) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._receiver = receiver
        self._rest = b""
        self._streaming = False
        self._writable = asyncio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data if self._rest else data
        if not self._streaming:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._rest = head
                return
            if not self._accept(head, data):
                return
        at = 0
        while len(data) - at >= HEADER:
            end_at = at + HEADER + int.from_bytes(data[at + 4 : at + HEADER], "big")
            if len(data) < end_at:
                break
            block = data[at + HEADER : end_at]
            if data[at] == STDOUT:
                self._receiver.received(block)
            else:
                self._receiver.said(block)
            at = end_at
        self._rest = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        reason = f"the attached stream ended: {exc or 'closed by the engine'}"
        if not self.opened.done():
            self.opened.set_exception(EngineError(reason))
        self._writable.set()
        self._receiver.lost(reason)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def write(self, data: bytes) -> None:
        """Queue bytes for the container's stdin."""
        self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the queue is short again."""
        await self._writable.wait()

    def close(self) -> None:
        """Detach at once."""
        self._transport.abort()

    def _accept(self, head: bytes, body: bytes) -> bool:
        status = re.match(rb"HTTP/1\.[01] (\d+)", head)
        if status is None or int(status[1]) not in (101, 200):
            text = (body or head).decode(errors="replace").strip()
            self.opened.set_exception(EngineError(f"The engine refused to attach: {text}"))
            self._transport.abort()
            return False
        self._streaming = True
        self.opened.set_result(None)
        return True


async def attach(
    base_url: str, version: str, name: str, receiver: Receiver, *, tls: ssl.SSLContext | None
) -> Attachment:
    """Attach to a container's stdin, stdout and stderr. OSError or EngineError when that fails."""
    path = f"/v{version}/containers/{urllib.parse.quote(name)}/attach?stream=1&stdin=1&stdout=1&stderr=1"
    request = (
        f"POST {path} HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    where = urllib.parse.urlsplit(base_url)

    def protocol() -> Attachment:
        return Attachment(request.encode(), receiver)

    if where.scheme in ("unix", "http+unix"):
        _, attachment = await loop.create_unix_connection(protocol, urllib.parse.unquote(where.path))
    else:
        address = (where.hostname or "localhost", where.port or DOCKER_PORT)
        _, attachment = await loop.create_connection(protocol, *address, ssl=tls)
    try:
        await attachment.opened
    except BaseException:  # cancelled as well: no connection is left behind
        attachment.close()
        raise
    return attachment
