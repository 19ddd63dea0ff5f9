"""The attached stream of one container, as frames. Everything that arrives is hostile input."""

import asyncio
from collections.abc import Callable
from typing import Any

import structlog

from orchestrator import frames
from orchestrator.engine import Wire
from orchestrator.errors import ContainerLost, SandboxError, Unavailable

log = structlog.get_logger()
AGAIN_S = 2  # Retry-After
NOT_ASKED = "the agent sent a frame that nobody asked for"
SAID_LIMIT = 2048  # bytes of an agent's stderr that are kept, to explain a failed start


def being_attached() -> Unavailable:
    """Return what to tell who wants something of a container whose stream broke."""
    return Unavailable("The container is being attached again: try again", retry_after_s=AGAIN_S)


def give_up(future: asyncio.Future[Any] | None, error: SandboxError) -> None:
    """Let a wait for the agent end with an error. Nobody may wait for it any more: that is no fault."""
    if future is not None and not future.done():
        future.set_exception(error)
        future.exception()


class Channel:
    """Lines in, frames out. Once lost it stays lost, and says so once: by `on_ended` when its wire came to an end.

    `in_step` is false from an attach to a running agent until its answer: what comes before may be torn.
    """

    def __init__(
        self,
        on_frame: Callable[[frames.AnyAgentFrame], None],
        on_lost: Callable[[str], None],
        on_ended: Callable[[str], None] | None = None,
    ) -> None:
        self.said_text = ""
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._on_ended = on_ended or on_lost
        self._wire: Wire | None = None
        self._rest = b""
        self.in_step = True
        self.closed = False
        self.is_waited_for = False

    def open(self, wire: Wire) -> None:
        """Use the wire. The first byte is a newline: it ends what a dead client left half said."""
        self._wire = wire
        wire.write(b"\n")

    def reopen(self) -> None:
        """Listen to another wire from now on; `open` follows. What the one before left half said is dropped."""
        self._wire, self._rest = None, b""
        self.in_step = self.closed = False

    def send(self, line: bytes) -> None:
        """Queue one line; ContainerLost when the channel is gone, Unavailable when it may come again."""
        if self._wire is None or self.closed:
            raise being_attached() if self.is_waited_for else ContainerLost("The channel to the container is closed")
        self._wire.write(line)

    async def drain(self) -> None:
        """Wait until the agent has taken most of what was sent."""
        if self._wire is not None:
            await self._wire.drain()

    def close(self) -> None:
        """Detach without a word."""
        self.closed = True
        if self._wire is not None:
            self._wire.close()

    def received(self, data: bytes) -> None:
        if self.closed:  # bytes may come until the wire has closed as well
            return
        *lines, self._rest = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        if len(self._rest) > frames.LINE_LIMIT:
            self._rest = b""
            if self.in_step:
                self._break("the agent sent a frame that is too long")
        for line in lines:
            try:
                if len(line) > frames.LINE_LIMIT:
                    raise ContainerLost("the agent sent a frame that is too long")
                if line and not self.closed:
                    self._on_frame(frames.decode(line))
            except ContainerLost as error:
                if self.in_step:
                    self._break(error.detail)

    def said(self, text: bytes) -> None:
        if len(self.said_text) < SAID_LIMIT:
            self.said_text += text.decode(errors="replace")[:SAID_LIMIT]

    def lost(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self._on_ended(reason)

    def _break(self, reason: str) -> None:
        if not self.closed:
            self.close()
            self._on_lost(reason)
