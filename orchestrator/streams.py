"""Byte streams of one container beside its executions: many over the one channel, each with credit.

The agent's side is `images/agent/streams.py`. A side sends as many bytes as the other granted: so what waits here is
bounded by WINDOW for each stream, however slow its reader is.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from orchestrator import frames
from orchestrator.channel import Channel
from orchestrator.errors import ContainerLost, Unavailable

WINDOW = 256 * 1024
FIRST_WINDOW = 32 * 1024  # of a stream that the agent opened, until it is welcome
LIMIT = 256  # streams that an agent may have opened at once


class StreamRefused(Exception):
    """The agent ended a stream without having done what it was opened for; `code` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Stream:
    """One stream. Every wait ends with ContainerLost when the container is lost."""

    def __init__(
        self, streams: "Streams", sid: str, kind: str, facts: dict[str, Any], *, credit: int, window: int = WINDOW
    ) -> None:
        self.id = sid
        self.kind = kind
        self.facts = facts
        self._streams = streams
        self._credit = credit
        self._window = window
        self._granted = window
        self._taken = 0
        self._pieces: deque[bytes] = deque()
        self._finished = False
        self._end: frames.Close | None = None
        self._lost: str | None = None
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        """Return the next bytes, empty at the end. StreamRefused when the agent ended it for a reason."""
        if not (data := await self.receive()):
            await self.outcome()
        return data

    async def receive(self) -> bytes:
        """Return the next bytes, empty once no more come: the other direction may go on. StreamRefused as `read`."""
        while not self._pieces:
            if self._finished or self._end is not None:
                self._check()
                return b""
            await self._change()
        data = self._pieces.popleft()
        self._taken += len(data)
        if self._taken >= self._window // 2:
            self._grant(self._taken)
            self._taken = 0
        return data

    def widen(self) -> None:
        """Welcome a stream that the agent opened: it may send ahead as much as any other."""
        more, self._window = WINDOW - self._window, WINDOW
        self._grant(more)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while data := await self.read():
            yield data

    async def write(self, data: bytes) -> None:
        """Send bytes as the agent takes them. StreamRefused when it has ended the stream."""
        view = memoryview(data)
        while view:
            while not self._credit:
                self._check_open()
                await self._change()
            self._check_open()
            piece = view[: min(frames.PART, self._credit)]
            view = view[len(piece) :]
            self._credit -= len(piece)
            self._streams.send(frames.encode("data", id=self.id, data=piece))
            await self._streams.drain()

    def finish(self) -> None:
        """Say that no more bytes come from here."""
        if self._end is None and self._lost is None:
            self._streams.send(frames.encode("finish", id=self.id))

    async def outcome(self) -> dict[str, Any]:
        """Wait for the agent's end of the stream, return what came of it. StreamRefused when nothing did."""
        while self._end is None:
            await self._change()
        self._check()
        return self._end.facts

    def close(self) -> None:
        """Give the stream up; one that has ended is left alone."""
        self._streams.forget(self)

    def take(self, frame: frames.AnyStreamFrame) -> None:
        """Take a frame of the agent. ContainerLost when it breaks the protocol."""
        match frame:
            case frames.Data():
                self._granted -= len(frame.data)
                if self._granted < 0 or self._finished or not frame.data:
                    raise ContainerLost("the agent sent bytes of a stream that nobody granted")
                self._pieces.append(frame.data)
            case frames.Credit():
                self._credit += frame.count
            case frames.Finish():
                self._finished = True
            case frames.Close():
                self._end = frame
        self._changed.set()

    def lose(self, reason: str) -> None:
        """End every wait: the container is gone."""
        self._lost = reason
        self._changed.set()

    def _grant(self, count: int) -> None:
        if count and not self._finished and self._end is None and self._lost is None:
            self._granted += count
            self._streams.send(frames.encode("credit", id=self.id, count=count))

    async def _change(self) -> None:
        if self._lost is not None:
            raise ContainerLost(self._lost)
        self._changed.clear()
        await self._changed.wait()

    def _check(self) -> None:
        if self._lost is not None:
            raise ContainerLost(self._lost)
        if self._end is not None and self._end.code is not None:
            raise StreamRefused(self._end.code, self._end.message)

    def _check_open(self) -> None:
        self._check()
        if self._end is not None:
            raise StreamRefused("stream_ended", "The agent has ended the stream")


class Streams:
    """The open streams of one container by id.

    `on_open` takes those that the agent opens; without it the agent may open none.
    """

    def __init__(self, channel: Channel) -> None:
        self.on_open: Callable[[Stream], None] | None = None
        self.send = channel.send
        self.drain = channel.drain
        self._open: dict[str, Stream] = {}
        self._numbers = 0
        self._agents_numbers = 0

    def open(self, kind: str, **facts: Any) -> Stream:
        """Open a stream; its fate shows when it is used. ContainerLost when the container is gone."""
        self._numbers += 1
        sid = f"o{self._numbers}"
        self.send(frames.encode("open", id=sid, kind=kind, credit=WINDOW, facts=facts))
        stream = self._open[sid] = Stream(self, sid, kind, facts, credit=0)
        stream.take(frames.Credit(id=sid, count=WINDOW))
        return stream

    def take(self, frame: frames.AnyStreamFrame) -> None:
        """Take a frame of the agent. ContainerLost when it breaks the protocol."""
        if isinstance(frame, frames.Open):
            self._opened(frame)
            return
        stream = self._open.get(frame.id)
        if stream is None:
            if not self._was_known(frame.id):
                raise ContainerLost("the agent spoke of a stream that was never opened")
            return  # it crossed our end of the stream
        stream.take(frame)
        if isinstance(frame, frames.Close):
            del self._open[frame.id]

    def forget(self, stream: Stream) -> None:
        """Give a stream up."""
        if self._open.pop(stream.id, None) is not None:
            stream.lose("the stream was closed")
            try:
                self.send(frames.encode("close", id=stream.id))
            except (ContainerLost, Unavailable):
                return

    def fail(self, reason: str) -> None:
        """End all: the container is gone."""
        for stream in self._open.values():
            stream.lose(reason)
        self._open.clear()

    def restart(self, reason: str) -> None:
        """End all, and count from the beginning, as the agent does for who attaches anew."""
        self.fail(reason)
        self._agents_numbers = 0

    def __len__(self) -> int:
        return len(self._open)

    def _opened(self, frame: frames.Open) -> None:
        opened = sum(sid.startswith("a") for sid in self._open)
        if self.on_open is None or frame.id != f"a{self._agents_numbers + 1}" or opened >= LIMIT:
            raise ContainerLost("the agent opened a stream that nobody allowed")
        self._agents_numbers += 1
        stream = self._open[frame.id] = Stream(
            self, frame.id, frame.kind, frame.facts, credit=frame.credit, window=FIRST_WINDOW
        )
        self.send(frames.encode("credit", id=frame.id, count=FIRST_WINDOW))
        self.on_open(stream)

    def _was_known(self, sid: str) -> bool:
        owner, number = sid[:1], sid[1:]
        known = {"o": self._numbers, "a": self._agents_numbers}.get(owner, 0)
        return number.isdecimal() and number.isascii() and 0 < int(number) <= known
