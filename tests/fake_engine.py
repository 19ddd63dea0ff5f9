"""Engines under a test's control: agents that are played in this process, and faults at the engine's seam."""

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import frames
from orchestrator.engine import Engine, Receiver, Seen, Spec, Wire
from orchestrator.errors import EngineError
from orchestrator.greeting import AGENT_VERSION

LANGUAGES = {"python": {"handlers": True}, "shell": {"handlers": False}}


class Played:
    """The wire to an agent that is played here. It answers by itself; a test may also speak for it.

    While `mute` it hears and says nothing. While `holding` an execution runs until `finish` or `cancel`.
    `said` has the frames of every execution that is not acknowledged, `notes` what came with it, `queue` what came with
    those that are not begun.
    """

    def __init__(self, spec: Spec, receiver: Receiver, *, holding: bool) -> None:
        self.spec = spec
        self.running = True
        self.mute = False
        self.is_cut = False
        self.holding = holding
        self.session: str | None = None
        self.port: int | None = None
        self.kept: frames.Frame | None = None
        self.kept_age_s = 0.0
        self.notes: dict[str, frames.Frame] = {}
        self.said: dict[str, list[frames.Frame]] = {}
        self.queue: dict[str, frames.Frame] = {}
        self.executed: list[str] = []
        self.heard: list[str] = []
        self._receiver = receiver
        self._lines = frames.Lines()
        self._parts: list[str] = []

    def write(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            if (frame := frames.decode(line)) is not None and not (self.mute or self.is_cut):
                self.heard.append(frame["type"])
                for eid in frame.get("acks", ()):
                    self.said.pop(eid, None)
                getattr(self, f"_on_{frame['type']}")(frame)

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        pass

    def say(self, type: str, **fields: Any) -> None:  # noqa: A002 - as the frame's field
        """Send a frame as the agent would, after what the loop has to do now."""
        if not self.is_cut:
            asyncio.get_running_loop().call_soon(self._receiver.received, frames.encode({"type": type, **fields}))

    def attach(self, receiver: Receiver) -> None:
        """Speak to another client from now on; the one before hears no more."""
        self._receiver = receiver
        self.is_cut = False

    def output(self, eid: str, data: bytes, stream: str = "stdout") -> None:
        """Send the next piece of an execution's output."""
        self._tell(eid, "output", seq=self._seq(eid) + 1, stream=stream, data=base64.b64encode(data).decode())

    def resend(self, eid: str, seq: int = 0) -> None:
        """Send again what follows this number, and the result."""
        for frame in self.said.get(eid, []):
            if frame["seq"] > seq or frame["type"] == "result":
                self.say(**frame)

    def cut(self, reason: str = "the attached stream ended") -> None:
        """Break the stream, as an engine does that is restarted; the container goes on."""
        self.is_cut = True
        self._receiver.lost(reason)

    def vanish(self, reason: str = "the attached stream ended") -> None:
        """End the container behind the orchestrator's back."""
        self.running = False
        self._receiver.lost(reason)

    def finish(self, eid: str, outcome: str = "ok", exit_code: int = 0, **facts: Any) -> None:
        """Report an execution's result."""
        spent: dict[str, Any] = {
            "launch_s": 0.001,
            "wall_s": 0.001,
            "cpu_s": 0.001,
            "max_rss_bytes": 1,
            "truncated": [],
            "seq": self._seq(eid),
            "message": "",
        }
        spent["signal"] = exit_code - 128 if exit_code > 128 else None
        self._tell(eid, "result", outcome=outcome, exit_code=exit_code, **(spent | facts))

    def _seq(self, eid: str) -> int:
        return sum(frame["type"] == "output" for frame in self.said.get(eid, []))

    def _tell(self, eid: str, kind: str, **fields: Any) -> None:
        self.said.setdefault(eid, []).append({"type": kind, "id": eid, **fields})
        self.say(kind, id=eid, **fields)

    def _on_open(self, frame: dict[str, Any]) -> None:
        """Hear of a stream; what comes of it the test says."""

    _on_data = _on_credit = _on_finish = _on_close = _on_open

    def _on_hello(self, frame: frames.Frame) -> None:
        executions: list[frames.Frame] = [
            {
                "id": eid,
                "seq": self._seq(eid),
                "done": any(frame["type"] == "result" for frame in said),
                "note": self.notes.get(eid, {}),
                "age_s": 0.0,
            }
            for eid, said in self.said.items()
        ]
        executions += [
            {"id": eid, "seq": 0, "done": False, "queued": True, "note": note, "age_s": 0.0}
            for eid, note in self.queue.items()
        ]
        hello = {
            "type": "hello",
            "version": AGENT_VERSION,
            "nonce": frame["nonce"],
            "canary": {},
            "languages": LANGUAGES,
        }
        kept = {"session": self.session, "kept": self.kept, "kept_age_s": self.kept_age_s, "executions": executions}
        for part in frames.split(hello | kept):
            self.say(**part)

    def _on_bind(self, frame: frames.Frame) -> None:
        self.session, self.kept = frame["session"], frame["kept"]
        self.say("bound", session=self.session)

    def _on_network(self, frame: frames.Frame) -> None:
        self.port = frame["port"]

    def _on_ping(self, frame: frames.Frame) -> None:
        self.say("pong", number=frame["number"])

    def _on_execute(self, frame: frames.Frame) -> None:
        note = self.queue.pop(frame["id"], {})
        if frame["id"] in self.said:
            return
        self.executed.append(frame["id"])
        self.notes[frame["id"]] = frame.get("note") or note
        self.said[frame["id"]] = []
        if not self.holding:
            self.finish(frame["id"])

    def _on_part(self, frame: frames.Frame) -> None:
        self._parts.append(frame["data"])

    def _on_stdin(self, frame: frames.Frame) -> None:
        self.say("stdin_taken", number=frame["number"], result="taken")

    def _on_queue(self, frame: frames.Frame) -> None:
        self.queue[frame["id"]] = frame["note"]

    def _on_cancel(self, frame: frames.Frame) -> None:
        if self.queue.pop(frame["id"], None) is not None:
            return
        self.finish(frame["id"], "cancelled", 137)

    def _on_resync(self, frame: frames.Frame) -> None:
        self.resend(frame["id"], frame["seq"])


class Stage:
    """An engine whose agents are played; `agents` are the containers that exist."""

    name = "local"
    host = None
    reattaches = False
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
        if name not in self.agents:
            raise EngineError("There is no such container")
        self.agents[name].attach(receiver)
        await asyncio.sleep(0)
        return self.agents[name]

    async def find(self, name: str) -> Seen | None:
        return next((seen for seen in await self.list() if seen.name == name), None)

    async def hold(self, name: str, image: str, command: list[str], labels: dict[str, str], receiver: Receiver) -> Wire:
        raise NotImplementedError

    async def list(self) -> list[Seen]:
        return [Seen(name=name, running=agent.running, labels=agent.spec.labels) for name, agent in self.agents.items()]

    async def remove(self, name: str) -> None:
        self.agents.pop(name, None)

    async def close(self) -> None:
        self.agents.clear()


class FakeEngine:
    """Another engine with faults: what its calls raise, what holds them up, and what they did.

    `faults[call]` yields an error, or None for a success, for each next call of start, attach, list or remove; `gates[call]` is
    waited for. A call in `answers_lost` does its work, then fails.
    """

    name = "local"
    host = None
    required_layers: frozenset[str] = frozenset()

    def __init__(self, inner: Engine, *, reattaches: bool = False) -> None:
        self.inner = inner
        self.reattaches = reattaches
        self.faults: dict[str, Iterator[Exception | None]] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.answers_lost: set[str] = set()
        self.started: list[str] = []
        self.attached: list[str] = []
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
        self.attached.append(name)
        await self._obstruct("attach")
        return await self.inner.attach(name, receiver)

    async def find(self, name: str) -> Seen | None:
        return await self.inner.find(name)

    async def hold(self, name: str, image: str, command: list[str], labels: dict[str, str], receiver: Receiver) -> Wire:
        return await self.inner.hold(name, image, command, labels, receiver)

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
