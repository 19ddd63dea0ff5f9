"""Engines under a test's control: agents that are played in this process, and faults at the engine's seam."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import frames

from orchestrator.container import AGENT_VERSION
from orchestrator.engine import Engine, Receiver, Seen, Spec, Wire
from orchestrator.errors import EngineError


class Played:
    """The wire to an agent that is played here. It answers by itself; a test may also speak for it.

    While `mute` it hears and says nothing. While `holding` an execution runs until `finish` or `cancel`.
    """

    def __init__(self, spec: Spec, receiver: Receiver, *, holding: bool) -> None:
        self.spec = spec
        self.created_at = time.time()
        self.running = True
        self.mute = False
        self.holding = holding
        self.session: str | None = None
        self.executed: list[str] = []
        self.heard: list[str] = []
        self._receiver = receiver
        self._lines = frames.Lines()
        self._parts: list[str] = []

    def write(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            if (frame := frames.decode(line)) is not None and not self.mute:
                self.heard.append(frame["type"])
                getattr(self, f"_on_{frame['type']}")(frame)

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        pass

    def say(self, kind: str, **fields: Any) -> None:
        """Send a frame as the agent would, after what the loop has to do now."""
        asyncio.get_running_loop().call_soon(self._receiver.received, frames.encode({"type": kind, **fields}))

    def vanish(self, reason: str = "the attached stream ended") -> None:
        """End the container behind the orchestrator's back."""
        self.running = False
        self._receiver.lost(reason)

    def finish(self, eid: str, outcome: str = "ok", exit_code: int = 0, **facts: Any) -> None:
        """Report an execution's result."""
        spent: dict[str, Any] = {
            "wall_s": 0.001,
            "cpu_s": 0.001,
            "max_rss_bytes": 1,
            "truncated": [],
            "seq": 0,
            "message": "",
        }
        spent["signal"] = exit_code - 128 if exit_code > 128 else None
        self.say("result", id=eid, outcome=outcome, exit_code=exit_code, **(spent | facts))

    def _on_hello(self, frame: frames.Frame) -> None:
        facts: dict[str, Any] = {"version": AGENT_VERSION, "session": self.session, "canary": {}, "executions": []}
        facts |= {"kept": None, "kept_age_s": 0.0}
        self.say("hello", nonce=frame["nonce"], **facts)

    def _on_bind(self, frame: frames.Frame) -> None:
        self.session = frame["session"]
        self.say("bound", session=self.session)

    def _on_ping(self, frame: frames.Frame) -> None:
        self.say("pong", number=frame["number"])

    def _on_execute(self, frame: frames.Frame) -> None:
        self.executed.append(frame["id"])
        if not self.holding:
            self.finish(frame["id"])

    def _on_part(self, frame: frames.Frame) -> None:
        self._parts.append(frame["data"])

    def _on_cancel(self, frame: frames.Frame) -> None:
        self.finish(frame["id"], "cancelled", 137)


class Stage:
    """An engine whose agents are played; `agents` are the containers that exist."""

    name = "local"
    required_layers: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.agents: dict[str, Played] = {}
        self.holding = False

    async def check(self) -> dict[str, Any]:
        return {"version": "played", "cpus": 1}

    async def start(self, spec: Spec, receiver: Receiver) -> Wire:
        self.agents[spec.name] = agent = Played(spec, receiver, holding=self.holding)
        await asyncio.sleep(0)
        return agent

    async def attach(self, name: str, receiver: Receiver) -> Wire:
        raise EngineError("a played agent cannot be attached to again")

    async def list(self) -> list[Seen]:
        return [
            Seen(name=name, running=agent.running, labels=agent.spec.labels, created_at=agent.created_at)
            for name, agent in self.agents.items()
        ]

    async def remove(self, name: str) -> None:
        self.agents.pop(name, None)

    async def close(self) -> None:
        self.agents.clear()


class FakeEngine:
    """Another engine with faults: what its calls raise, what holds them up, and what they did.

    `faults[call]` yields an error, or None for a success, for each next call of start, list or remove; `gates[call]` is
    waited for. A call in `answers_lost` does its work, then fails.
    """

    name = "local"
    required_layers: frozenset[str] = frozenset()

    def __init__(self, inner: Engine) -> None:
        self.inner = inner
        self.faults: dict[str, Iterator[Exception | None]] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.answers_lost: set[str] = set()
        self.started: list[str] = []
        self.removed: list[str] = []
        self.tried: list[str] = []  # names that a removal was asked for
        self.peak = 0  # containers that existed at once, at most
        self.extra: list[Seen] = []  # containers that the engine lists beside those of `inner`

    async def check(self) -> dict[str, Any]:
        return await self.inner.check()

    async def start(self, spec: Spec, receiver: Receiver) -> Wire:
        self.started.append(spec.name)
        self.peak = max(self.peak, len(self.started) - len(self.removed))
        await self._obstruct("start")
        wire = await self.inner.start(spec, receiver)
        self._answer("start")
        return wire

    async def attach(self, name: str, receiver: Receiver) -> Wire:
        return await self.inner.attach(name, receiver)

    async def list(self) -> list[Seen]:
        seen = [*await self.inner.list(), *self.extra]
        await self._obstruct("list")
        return seen

    async def remove(self, name: str) -> None:
        self.tried.append(name)
        await self._obstruct("remove")
        await self.inner.remove(name)
        self.removed.append(name)
        self.extra = [seen for seen in self.extra if seen.name != name]
        self._answer("remove")

    async def close(self) -> None:
        await self.inner.close()

    async def _obstruct(self, call: str) -> None:
        if (gate := self.gates.get(call)) is not None:
            await gate.wait()
        if call in self.faults and (error := next(self.faults[call], None)) is not None:
            raise error

    def _answer(self, call: str) -> None:
        if call in self.answers_lost:
            raise EngineError(f"The engine did not answer `{call}` in time")
