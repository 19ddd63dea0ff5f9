"""Bytes between a stream of the agent and a connection of ours, counted, and within the connection's time."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol

from orchestrator.errors import ContainerLost
from orchestrator.streams import Stream, StreamRefused

PIECE = 64 * 1024
LINGER_S = 5.0  # for a program to read the last bytes and to end its side


class Ended(Exception):
    """Why a connection ends before its time: `idle`, `total`, `bytes`, `reset` or `lost`."""


class Meter(Protocol):
    """Who counts a connection's bytes; each may raise Ended."""

    def sent(self, count: int) -> None:
        """Count bytes that went to the host."""

    def received(self, count: int) -> None:
        """Count bytes that came from the host."""


class Patience:
    """The time that a connection has: silence ends it, and so does its whole life."""

    def __init__(self, idle_s: float, total_s: float) -> None:
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time() + total_s
        self._timer: asyncio.Timeout | None = None
        self._moved_at = 0.0

    def moved(self) -> None:
        """Note that something moved."""
        now = self._loop.time()
        if self._timer is not None and now - self._moved_at > self._idle_s / 100:
            self._moved_at = now
            self._timer.reschedule(min(self._last, now + self._idle_s))

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Have it end what happens inside. Ended says which time was up, or that a side broke off."""
        try:
            async with asyncio.timeout_at(min(self._last, self._loop.time() + self._idle_s)) as self._timer:
                yield
        except StreamRefused:
            raise Ended("reset") from None
        except ContainerLost:
            raise Ended("lost") from None
        except TimeoutError:
            if self._timer is None or not self._timer.expired():
                raise Ended("reset") from None  # the host's system gave up
            raise Ended("total" if self._loop.time() >= self._last else "idle") from None
        except OSError:
            raise Ended("reset") from None
        finally:
            self._timer = None


class Upstream:
    """Our connection to a host: reads and writes are counted and tell the patience that something moved."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, meter: Meter, patience: Patience
    ) -> None:
        self.patience = patience
        self._reader = reader
        self._writer = writer
        self._meter = meter

    async def read(self) -> bytes:
        """Return what came, empty at the end."""
        data = await self._reader.read(PIECE)
        self._meter.received(len(data))
        self.patience.moved()
        return data

    async def write(self, data: bytes) -> None:
        """Send, as fast as the host takes it."""
        self._meter.sent(len(data))
        self._writer.write(data)
        await self._writer.drain()
        self.patience.moved()

    def finish(self) -> None:
        """Say that no more bytes come from here."""
        if self._writer.can_write_eof():
            self._writer.write_eof()

    def close(self) -> None:
        """Close the connection at once."""
        self._writer.transport.abort()


async def relay(stream: Stream, first: bytes, upstream: Upstream) -> None:
    """Move bytes both ways until both have ended. Ended when it ends otherwise."""

    async def outward() -> None:
        if first:
            await upstream.write(first)
        while data := await stream.receive():
            await upstream.write(data)
        upstream.finish()

    async def inward() -> None:
        while data := await upstream.read():
            await stream.write(data)
            upstream.patience.moved()
        stream.finish()

    async with upstream.patience.kept():
        await both(outward(), inward())
        await stream.outcome()


async def both(*works: Coroutine[Any, Any, None]) -> None:
    """Do all, or cancel the others at the first that fails."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def say_last(stream: Stream, data: bytes) -> None:
    """Send the last bytes of a stream, and let its program read them; what it still sends is of no interest."""
    try:
        async with asyncio.timeout(LINGER_S):
            await stream.write(data)
            stream.finish()
            while await stream.receive():
                pass
            await stream.outcome()
    except (TimeoutError, StreamRefused, ContainerLost):
        return
