"""Text on its way to the stdin of the executions of one container."""

import asyncio
from collections.abc import Callable

from orchestrator import frames
from orchestrator.channel import NOT_ASKED, Channel, give_up
from orchestrator.errors import ContainerLost, SandboxError, Unavailable
from orchestrator.frames import StdinResult


class Feeds:
    """What was sent, by number, until the agent says what became of it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._waiting: dict[int, asyncio.Future[StdinResult]] = {}
        self._count = 0

    async def send(self, eid: str, data: bytes, *, close: bool) -> StdinResult:
        """Send all of the data, or nothing: what became of it. ContainerLost when the answer is lost."""
        self._count += 1
        number = self._count
        result: asyncio.Future[StdinResult] = asyncio.get_running_loop().create_future()
        self._waiting[number] = result
        for line in frames.encode_stdin(eid, number, data, close=close):
            self._channel.send(line)
        await self._channel.drain()
        try:
            return await result
        except Unavailable:  # not to be tried again by itself: it may have been taken
            raise ContainerLost(
                "The stream to the container broke: whether its stdin took the text is unknown"
            ) from None

    def take(self, frame: frames.StdinTaken) -> None:
        """Take an answer. ContainerLost when nobody asked."""
        if (result := self._waiting.pop(frame.number, None)) is None:
            raise ContainerLost(NOT_ASKED)
        if not result.done():  # else who asked went away
            result.set_result(frame.result)

    def fail(self, reason: Callable[[], SandboxError]) -> None:
        """Wait no longer, for this reason."""
        for result in self._waiting.values():
            give_up(result, reason())
        self._waiting.clear()
