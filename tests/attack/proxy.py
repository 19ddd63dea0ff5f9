"""A Docker socket between the service and the engine that hangs, cuts and refuses on command. The engine runs on."""

import asyncio
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.attack.cases import NotApplicable

ATTACH = re.compile(rb"POST \S*/attach")
REMOVE = re.compile(rb"DELETE \S*/containers/")
CREATE = re.compile(rb"POST \S*/containers/create")
LENGTH = re.compile(rb"(?i)content-length: *(\d+)")
BUSY = b'{"message":"container could not be removed: device or resource busy"}'
FULL_DISK = b'{"message":"write /var/lib/docker/tmp/x: no space left on device"}'
SOCKET = "/var/run/docker.sock"
PIECE = 65536


class Proxy:
    """What the service takes for the engine. The flags may be set while it serves.

    `hanging`: no call is answered, while streams go on. `cutting`: a create reaches the engine, its answer does not come back. `full`: a
    create is answered as an engine without disk space does. `refusing`: a removal is answered as one of a busy mount is. `creates` counts the create calls.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.hanging = self.cutting = self.full = self.refusing = False
        self.creates = 0
        self._upstream = upstream()

    async def serve(self, stop: asyncio.Event, started: threading.Event) -> None:
        """Serve until told to stop."""
        server = await asyncio.start_unix_server(self._connected, self.path)
        async with server:
            started.set()
            await stop.wait()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_unix_connection(self._upstream)
        cut, streaming = asyncio.Event(), asyncio.Event()
        tasks = [
            asyncio.create_task(self._ask(reader, ours, writer, cut, streaming)),
            asyncio.create_task(self._answer(theirs, writer, cut, streaming)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not cut.is_set():
                await asyncio.wait(tasks, timeout=1)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for side in (writer, ours):
                side.close()

    async def _ask(
        self,
        reader: asyncio.StreamReader,
        ours: asyncio.StreamWriter,
        writer: asyncio.StreamWriter,
        cut: asyncio.Event,
        streaming: asyncio.Event,
    ) -> None:
        while data := await reader.read(PIECE):
            await self._hang(streaming)
            if ATTACH.match(data):
                streaming.set()
            if CREATE.match(data):
                self.creates += 1
                if self.full:
                    await self._refuse(data, FULL_DISK, reader, writer)
                    continue
                if self.cutting:
                    cut.set()
            if self.refusing and REMOVE.match(data):
                await self._refuse(data, BUSY, reader, writer)
                continue
            ours.write(data)
            await ours.drain()
        if ours.can_write_eof():
            ours.write_eof()

    async def _answer(
        self, theirs: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: asyncio.Event, streaming: asyncio.Event
    ) -> None:
        while data := await theirs.read(PIECE):
            await self._hang(streaming)
            if cut.is_set():
                return
            writer.write(data)
            await writer.drain()

    async def _hang(self, streaming: asyncio.Event) -> None:
        while self.hanging and not streaming.is_set():
            await asyncio.sleep(0.05)

    async def _refuse(
        self, data: bytes, reason: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head, _, body = data.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        missing = int(length[1]) - len(body) if length is not None else 0
        if missing > 0:
            await reader.readexactly(missing)
        writer.write(b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: %d\r\n\r\n%s" % (len(reason), reason))
        await writer.drain()


def upstream() -> str:
    """Return the path of the engine's own socket; NotApplicable where the engine is reached in another way."""
    address = os.environ.get("DOCKER_HOST") or f"unix://{SOCKET}"
    if not address.startswith("unix://"):
        raise NotApplicable(f"the engine is not on a socket of this host: {address}")
    return address.removeprefix("unix://")


@contextmanager
def proxied(folder: Path) -> Iterator[Proxy]:
    """Run a proxy in a thread of its own."""
    proxy = Proxy(folder / "engine.sock")
    loop = asyncio.new_event_loop()
    stop, started = asyncio.Event(), threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(proxy.serve(stop, started)))
    thread.start()
    try:
        started.wait(10)
        yield proxy
    finally:
        proxy.hanging = False
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
