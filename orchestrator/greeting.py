"""The first words with an agent: who it is, and whom it serves."""

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

from orchestrator import frames
from orchestrator.channel import AGAIN_S, NOT_ASKED, Channel, give_up
from orchestrator.errors import ContainerLost, EngineError, SandboxError, Unavailable

AGENT_VERSION = 11
UNFIT = "The agent in the image does not fit this orchestrator: build the image anew"
BIND_S = 5.0  # an agent that takes longer has no CPU, or the engine passes nothing on


class Greeting:
    """What was asked of the agent after an attach, and is not answered yet."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._hello: asyncio.Future[frames.Hello] | None = None
        self._nonce = ""
        self._bound: asyncio.Future[str] | None = None

    async def greet(self, limits: dict[str, Any]) -> frames.Hello:
        """Greet the agent; one that is new prepares itself for these limits. EngineError for one of another version."""
        self._hello = asyncio.get_running_loop().create_future()
        self._nonce = secrets.token_hex(8)
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

    def take(self, frame: frames.Hello | frames.Bound) -> None:
        """Take an answer. ContainerLost when nobody asked."""
        if isinstance(frame, frames.Bound):
            if self._bound is None:
                raise ContainerLost(NOT_ASKED)
            if not self._bound.done():  # else the answer to `keep`
                self._bound.set_result(frame.session)
        elif self._hello is None or self._hello.done():
            raise ContainerLost(NOT_ASKED)
        elif frame.nonce == self._nonce or self._channel.in_step:  # else the answer to who attached before
            self._hello.set_result(frame)

    def fail(self, reason: Callable[[], SandboxError]) -> None:
        """Wait no longer, for this reason."""
        give_up(self._hello, reason())
        give_up(self._bound, reason())
