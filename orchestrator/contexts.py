"""The contexts of one container, as its agent tells of them: interpreters that stay, each with one cell at a time."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta

from orchestrator import frames, models
from orchestrator.channel import Channel
from orchestrator.errors import ContextDead, ContextExists, ContextFailed, ContextNotFound
from orchestrator.models import ContextLanguage, ContextRequest
from orchestrator.turns import Turns

BOOT_S = 60.0  # after which an adopted context that boots is not waited for any longer
DELETED = "The context was deleted"


class Context:
    """One context. `number` tells its sandbox from those that it had before; `settled` once that has booted, or failed."""

    def __init__(self, cid: str, language: ContextLanguage, number: int, *, cells: int = 0, age_s: float = 0.0) -> None:
        self.id = cid
        self.language = language
        self.number = number
        self.cells = cells
        self.created_at = datetime.now(UTC) - timedelta(seconds=age_s)
        self.state: frames.ContextState = "starting"
        self.message = ""
        self.settled = asyncio.Event()
        self.turns = Turns(1)

    def become(self, state: frames.ContextState, message: str) -> None:
        """Take what the agent says of it."""
        self.state, self.message = state, message
        if state == "starting":
            self.settled.clear()
        else:
            self.settled.set()

    def facts(self, session_id: str) -> models.Context:
        """Return what a client sees."""
        is_busy = self.state == "idle" and self.turns.all_taken
        return models.Context(
            id=self.id,
            session_id=session_id,
            language=self.language,
            state="busy" if is_busy else self.state,
            created_at=self.created_at,
            executions=self.cells,
            detail=self.message or None,
        )


class Contexts:
    """All contexts of one container, by id."""

    def __init__(self, channel: Channel) -> None:
        self.held: dict[str, Context] = {}
        self._channel = channel
        self._numbers = 0

    def get(self, cid: str) -> Context:
        """Return a context. ContextNotFound when there is none."""
        context = self.held.get(cid)
        if context is None:
            raise ContextNotFound(f"The session has no context {cid}: start one first")
        return context

    def living(self, cid: str) -> Context:
        """Return a context that takes cells. ContextDead for one that does not."""
        context = self.get(cid)
        if context.state == "dead":
            raise ContextDead(f"The context {cid} is dead: restart it ({context.message})")
        return context

    async def open(self, request: ContextRequest, *, deadline_s: float) -> Context:
        """Start a context and wait until it has booted. ContextExists, or ContextFailed when it cannot be."""
        cid = request.id or f"c{secrets.token_hex(10)}"
        if cid in self.held:
            raise ContextExists(f"There is a context {cid} already: choose another id, or delete it first")
        context = self.held[cid] = Context(cid, request.language, self._next())
        try:
            await self._boot(context, deadline_s)
        except BaseException:  # cancelled as well: none is left behind that did not boot
            if self.held.get(cid) is context and context.state != "idle":
                self.delete(cid)
            raise
        return context

    async def restart(self, cid: str, *, deadline_s: float) -> Context:
        """Give a context a fresh interpreter, and wait until that has booted. The cell that runs is cancelled."""
        context = self.get(cid)
        context.number = self._next()
        context.become("starting", "")
        await self._boot(context, deadline_s)
        return context

    def delete(self, cid: str) -> None:
        """Delete a context; the cell that runs is cancelled."""
        context = self.get(cid)
        del self.held[cid]
        context.become("dead", "it was deleted")
        if not self._channel.closed:
            self._channel.send(frames.encode("close_context", id=cid))

    @asynccontextmanager
    async def turn(self, cid: str, eid: str, *, begun: bool) -> AsyncIterator[str | None]:
        """Wait for the turn of a cell in its context; yield why it cannot run, if that is so.

        One that was called off meanwhile has no turn, and one that was `begun` before needs no idle context.
        """
        if (context := self.held.get(cid)) is None:
            yield DELETED
            return
        if not await context.turns.wait(eid):
            yield None
            return
        try:
            yield None if begun else await self._why_not(context)
        finally:
            context.turns.give_back()

    def is_busy(self, cid: str) -> bool:
        """Tell whether a cell that comes now has to wait for its turn, or for the context to boot."""
        context = self.held.get(cid)
        return context is not None and (context.turns.all_taken or context.state == "starting")

    def call_off(self, cid: str, eid: str) -> None:
        """Let a cell that waits for its turn wait no longer."""
        if (context := self.held.get(cid)) is not None:
            context.turns.call_off(eid)

    def count(self, cid: str) -> None:
        """Count a cell of a context."""
        if (context := self.held.get(cid)) is not None:
            context.cells += 1

    def adopt(self, known: list[frames.KnownContext]) -> None:
        """Take over the contexts of an agent that an earlier orchestrator started."""
        for one in known:
            self.held[one.id] = Context(one.id, one.language, one.number, cells=one.cells, age_s=one.age_s)
            self.held[one.id].become(one.state, one.message)
            self._numbers = max(self._numbers, one.number)

    def catch_up(self, known: dict[str, frames.KnownContext]) -> None:
        """Compare with what the agent says after an attach: what was said to the stream that broke may be lost."""
        for cid, context in self.held.items():
            if cid in known and known[cid].number == context.number:
                context.become(known[cid].state, known[cid].message)
            else:
                context.become("dead", "the stream to the container broke before it had booted")
        for cid in known.keys() - self.held.keys():
            self._channel.send(frames.encode("close_context", id=cid))

    def take(self, frame: frames.Context) -> None:
        """Take what the agent says of a context; of one that is no more, or had another sandbox then, nothing."""
        context = self.held.get(frame.id)
        if context is not None and context.number == frame.number:
            context.become(frame.state, frame.message)

    def fail(self, reason: str) -> None:
        """Count all as dead: the container is gone."""
        for context in self.held.values():
            context.become("dead", reason)

    async def _why_not(self, context: Context) -> str | None:
        """Wait until a context that boots has booted; return why it cannot run a cell, if that is so."""
        with suppress(TimeoutError):
            async with asyncio.timeout(BOOT_S):
                await context.settled.wait()
        return None if context.state == "idle" else f"The context is {context.state}: restart it ({context.message})"

    def _next(self) -> int:
        self._numbers += 1
        return self._numbers

    async def _boot(self, context: Context, deadline_s: float) -> None:
        number = context.number
        self._channel.send(frames.encode("open_context", id=context.id, number=number, language=context.language))
        try:
            async with asyncio.timeout(deadline_s):
                await context.settled.wait()
        except TimeoutError:
            if context.number == number:
                context.become("dead", "it did not boot in time")
        if context.state == "dead":
            raise ContextFailed(f"The context {context.id} did not start: {context.message}")
