"""The turns of a session's executions: some run at once, the others wait in the order in which they came."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """At most `limit` turns are taken. Who waits gets its turn, or is told that it was called off."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: dict[str, asyncio.Future[bool]] = {}

    @property
    def all_taken(self) -> bool:
        """Whether who comes now has to wait."""
        return self._free == 0

    def take(self) -> bool:
        """Take a turn when one is free."""
        if self._free == 0:
            return False
        self._free -= 1
        return True

    async def wait(self, eid: str) -> bool:
        """Wait for a turn and take it; False when the execution was called off before."""
        if self.take():
            return True
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[eid] = turn
        try:
            return await turn
        except asyncio.CancelledError:
            if self._waiting.pop(eid, None) is None and not turn.cancelled() and turn.result():
                self.give_back()
            raise

    @asynccontextmanager
    async def turn(self, eid: str, *, begun: bool) -> AsyncIterator[None]:
        """Have a turn for the time of the context. One that was called off has none; one that was `begun` before never waits."""
        has_turn = self.take() if begun else await self.wait(eid)
        try:
            yield
        finally:
            if has_turn:
                self.give_back()

    def call_off(self, eid: str) -> None:
        """Let an execution that waits wait no longer."""
        if (turn := self._waiting.pop(eid, None)) is not None and not turn.done():
            turn.set_result(False)

    def give_back(self) -> None:
        """End a turn: the next in line has it."""
        while self._waiting:
            turn = self._waiting.pop(next(iter(self._waiting)))
            if not turn.done():  # else who waited has given up
                turn.set_result(True)
                return
        self._free += 1
