"""The first words with an agent: who it is, and whom it serves."""

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from orchestrator import frames
from orchestrator.channel import AGAIN_S, NOT_ASKED, Channel, give_up
from orchestrator.errors import ContainerLost, EngineError, SandboxError, Unavailable

AGENT_VERSION = 12
UNFIT = "The agent in the image does not fit this orchestrator: build the image anew"
# Of a hello in parts: a session keeps 60 kB, escaped three times that; at the highest settings a thousand executions wait in it,
# with a note of up to 1 kB each.
HELLO_BYTES = 4 << 20
BIND_S = 5.0  # an agent that takes longer has no CPU, or the engine passes nothing on


class Greeting:
    """What was asked of the agent after an attach, and is not answered yet."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._hello: asyncio.Future[frames.Hello] | None = None
        self._nonce = ""
        self._parts = bytearray()
        self._bound: asyncio.Future[str] | None = None

    async def greet(self, limits: dict[str, Any]) -> frames.Hello:
        """Greet the agent; one that is new prepares itself for these limits. EngineError for one of another version."""
        self._hello = asyncio.get_running_loop().create_future()
        self._nonce = secrets.token_hex(8)
        self._parts.clear()
        self._channel.send(frames.encode("hello", version=AGENT_VERSION, nonce=self._nonce, limits=limits))
        hello = await self._hello
        if hello.nonce != self._nonce or hello.version != AGENT_VERSION:
            raise EngineError(UNFIT)
        return hello

    async def bind(self, session: str, kept: dict[str, Any]) -> str:
        """Return the session that the agent is bound to from now on. Unavailable without an answer."""
        self._bound = asyncio.get_running_loop().create_future()
        self._channel.send(frames.encode("bind", session=session, kept=kept))
        try:
            async with asyncio.timeout(BIND_S):
                return await self._bound
        except TimeoutError:
            raise Unavailable("The container did not answer in time: try again", retry_after_s=AGAIN_S) from None

    def take(self, frame: frames.Hello | frames.Part | frames.Bound) -> None:
        """Take an answer. ContainerLost when nobody asked."""
        if isinstance(frame, frames.Bound):
            if self._bound is None:
                raise ContainerLost(NOT_ASKED)
            if not self._bound.done():  # else the answer to `keep`
                self._bound.set_result(frame.session)
        elif self._hello is None or self._hello.done():
            raise ContainerLost(NOT_ASKED)
        elif frame.nonce != self._nonce and not self._channel.in_step:
            pass  # the answer to who attached before
        elif isinstance(frame, frames.Hello):
            self._hello.set_result(frame)
        else:
            self._join(frame)

    def _join(self, part: frames.Part) -> None:
        """Take a part of a hello, and the hello once it is whole. ContainerLost when it is none, or too long."""
        self._parts += part.data
        if len(self._parts) > HELLO_BYTES:
            raise ContainerLost("the agent says hello without an end")
        if part.last:
            hello = frames.decode(self._parts)
            if not isinstance(hello, frames.Hello):
                raise ContainerLost("the agent sent in parts what is no hello")
            self.take(hello)

    def fail(self, reason: Callable[[], SandboxError]) -> None:
        """Wait no longer, for this reason."""
        give_up(self._hello, reason())
        give_up(self._bound, reason())
