"""One container with a living agent: start, bind, execute, heartbeat. It serves one session, ever."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from orchestrator import frames, isolation
from orchestrator.channel import AGAIN_S, Channel, being_attached
from orchestrator.contexts import Contexts
from orchestrator.engine import Engine, Spec
from orchestrator.errors import ContainerLost, IsolationError, SandboxError, Unavailable
from orchestrator.feeds import Feeds
from orchestrator.frames import Result, StdinResult
from orchestrator.greeting import Greeting
from orchestrator.heartbeat import Heartbeat
from orchestrator.languages import Languages
from orchestrator.runs import Runs, Sink
from orchestrator.streams import Streams

T = TypeVar("T")
ANSWER_S = 60.0  # for what an agent answers at once


class Container:
    """A started container. `lost_reason` is set once, when it or its agent vanished or lied.

    `broken_at` is set while its stream is broken and it may be attached again; only who gives `on_broken` has that done.
    `broken_reason` says why it broke last, `tries` how often attaching again was in vain since.
    `blames_agent` tells of a time whether silence since then is the agent's doing, and not the engine's.
    """

    def __init__(
        self,
        spec: Spec,
        template: str,
        *,
        output_limit: int,
        display_limit: int = 0,
        on_lost: Callable[["Container"], None],
        on_broken: Callable[["Container"], None] | None = None,
        blames_agent: Callable[[float], bool] = lambda _: True,
    ) -> None:
        self.name = spec.name
        self.template = template
        self.spec = spec
        self.layers: dict[str, bool] = {}
        self.canary: dict[str, Any] = {}
        self.languages: Languages = {}
        self.has_wheels = False
        self.lost_reason: str | None = None
        self.ready_at = 0.0
        self.broken_at: float | None = None
        self.broken_reason = ""
        self.tries = 0
        self._on_lost = on_lost
        self._on_broken = on_broken
        self._blames_agent = blames_agent
        self._whole = asyncio.Event()
        self._whole.set()
        self._closed = False
        self._channel = Channel(self._on_frame, self.lose, self._break)
        self._runs = Runs(
            self._channel, output_limit=output_limit, display_limit=display_limit, on_overdue=self._overdue
        )
        self.streams = Streams(self._channel)
        self.contexts = Contexts(self._channel)
        self._greeting = Greeting(self._channel)
        self._feeds = Feeds(self._channel)
        self.heartbeat = Heartbeat(self._channel)
        self._session: str | None = None
        self._network_port: int | None = None

    async def start(self, engine: Engine, limits: dict[str, Any]) -> None:
        """Start it and judge its self-test. IsolationError when a required layer was not observed."""
        self._channel.open(await engine.start(self.spec, self._channel))
        hello = await self._greeting.greet(limits)
        self._judge(engine, hello)

    async def adopt(self, engine: Engine) -> frames.Hello:
        """Attach to a running container of an earlier orchestrator; return what its agent holds."""
        self._channel.in_step = False
        self._channel.open(await engine.attach(self.name, self._channel))
        hello = await self._greeting.greet({})
        executions = hello.executions
        self._runs.adopt((one.id for one in executions), queued=(one.id for one in executions if one.queued))
        self._session = hello.session
        self.contexts.adopt(hello.contexts)
        self._channel.in_step = True
        self._judge(engine, hello)
        return hello

    async def attach_again(self, engine: Engine) -> None:
        """Attach anew after the stream broke, and catch up with what runs. SandboxError when it failed this time."""
        if self._closed or self.lost_reason is not None:
            return
        self._runs.adopt(self._runs.active)  # what comes again of them is told from what is new by its number
        self._channel.reopen()
        try:
            self._channel.open(await engine.attach(self.name, self._channel))
            hello = await self._greeting.greet({})
            if self._channel.closed:  # it broke again after the answer had come
                raise being_attached()
        except BaseException:  # cancelled as well: nobody listens to half a try
            self._channel.close()
            raise
        if hello.session != self._session:
            self.lose("the agent is bound to another session")
        else:
            self._channel.in_step = True
            self._catch_up({known.id: known for known in hello.executions})
            self.contexts.catch_up({known.id: known for known in hello.contexts})

    async def bind(self, session: str, kept: dict[str, Any]) -> None:
        """Tell the agent its session, once, and what it is to keep for who adopts it. Unavailable without an answer."""
        self.require()
        self._session = await self._greeting.bind(session, kept)
        if self._session != session:
            self.lose("the agent is bound to another session")
            raise ContainerLost("The container belongs to another session")

    def keep(self, session: str, kept: dict[str, Any]) -> None:
        """Replace what the agent keeps. Unavailable while its stream is broken."""
        self.require()
        self._channel.send(frames.encode("bind", session=session, kept=kept))

    def open_network(self, port: int | None) -> None:
        """Have the agent listen on a port of the loopback, or, with None, on none."""
        self._network_port = port
        if self.is_usable and not self._channel.closed:
            self._channel.send(frames.encode("network", port=port))

    async def execute(
        self,
        eid: str,
        job: dict[str, Any] | None,
        *,
        note: dict[str, Any],
        deadline_s: float | None,
        sink: Sink,
        hold: bool,
    ) -> Result:
        """Run a job, or without one that which the agent keeps in its queue.

        Hand its output to `sink` as it comes, return its result; the agent is to `hold` that.
        ContainerLost when the container vanishes, or when there is no result after `deadline_s`, if there is one.
        """
        words = None if job is None else partial(frames.encode_job, "execute", eid, job, note=note, acks=[])
        lines = frames.encode_job("execute", eid, job, note=note, acks=self._runs.acks())
        await self._be_whole()
        return await self._runs.work(eid, lines, deadline_s, sink, hold=hold, words=words)

    def queue(self, eid: str, job: dict[str, Any], *, note: dict[str, Any]) -> None:
        """Have the agent keep a job that waits for its turn, for the orchestrator that may come after this one."""
        if self.is_usable and not self._channel.closed:
            self._runs.queue(eid, frames.encode_job("queue", eid, job, note=note, acks=self._runs.acks()))

    def call_off(self, eid: str) -> None:
        """Have the agent forget a job that waited for its turn."""
        self._runs.call_off(eid)

    async def resume(self, eid: str, *, deadline_s: float | None, sink: Sink, hold: bool) -> Result:
        """Follow an execution that was begun by an earlier orchestrator, from its first output on."""
        await self._be_whole()
        lines = iter([frames.encode("resync", id=eid, seq=0)])
        return await self._runs.work(eid, lines, deadline_s, sink, hold=hold)

    async def _be_whole(self) -> None:
        """Wait while the stream is broken. ContainerLost when the container is."""
        if not self.is_usable:
            await self._whole.wait()
        if self.lost_reason is not None:
            raise ContainerLost(self.lost_reason)

    def cancel(self, eid: str) -> None:
        """Ask the agent to kill an execution, once it has all of it; its result follows."""
        self._runs.cancel(eid)

    async def feed(self, eid: str, data: bytes, *, close: bool) -> StdinResult:
        """Send all of the data to the stdin of an execution, or nothing: what became of it.

        Unavailable when nothing can be sent now, ContainerLost when the answer is lost.
        """
        self.require()
        run = self._runs.active.get(eid)
        if run is None or run.done.done():
            return "closed"
        if not run.is_sent:  # its job is on the way: later it may be
            return "full"
        return await self.answered(self._feeds.send(eid, data, close=close), "a text for stdin")

    async def answered(self, answer: Awaitable[T], about: str) -> T:
        """Wait for what an agent answers at once. ContainerLost when it has not within ANSWER_S.

        One that answers pings and this not is broken, and is lost, unless the engine passes nothing on.
        """
        since = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_S):
                return await answer
        except TimeoutError:
            reason = f"the agent did not answer about {about} in time"
            if self._blames_agent(since):
                self.lose(reason)
            raise ContainerLost(reason) from None

    def beat(self) -> bool:
        """Ping the agent. Return whether the ping before was answered; one that is being removed is not asked."""
        if self._channel.closed or self.broken_at is not None:
            return True
        if answered := self.heartbeat.look():
            self.heartbeat.ping(self._runs.acks())
        return answered

    def lose(self, reason: str) -> None:
        """Count the container as lost. The first reason stays."""
        if self.lost_reason is None:
            said = self._channel.said_text.strip()
            self.lost_reason = f"{reason}: {said}" if said and said not in reason else reason
            self._channel.close()
            self._fail(self.lost_reason)
            self._on_lost(self)

    @property
    def is_usable(self) -> bool:
        """Whether it can be talked to."""
        return self.lost_reason is None and self.broken_at is None

    def require(self) -> None:
        """Refuse what would need its agent now. Unavailable while its stream is broken."""
        if self.broken_at is not None and self.lost_reason is None:
            raise being_attached()

    def close(self, reason: str) -> None:
        """Detach; executions that run end with ContainerLost."""
        self._closed = True
        self._channel.close()
        self._fail(reason)

    def _judge(self, engine: Engine, hello: frames.Hello) -> None:
        self.canary = hello.canary
        self.languages = hello.languages
        self.has_wheels = hello.wheels
        self.layers = isolation.judge(hello.canary, engine=engine.name, uid=self.spec.uid)
        missing = {layer for layer in engine.required_layers if not self.layers.get(layer)}
        if missing:
            raise IsolationError(isolation.explain(missing))
        self.ready_at = time.monotonic()

    def _on_frame(self, frame: frames.AnyAgentFrame) -> None:
        match frame:
            case frames.Output() | Result():
                self._runs.take(frame)
            case frames.Open() | frames.Data() | frames.Credit() | frames.Finish() | frames.Close():
                self.streams.take(frame)
            case frames.StdinTaken():
                self._feeds.take(frame)
            case frames.Context():
                self.contexts.take(frame)
            case frames.Pong():
                self.heartbeat.take(frame)
                self._runs.answered()
            case frames.Hello() | frames.Part() | frames.Bound():
                self._greeting.take(frame)
            case frames.Fault():  # the last word, in step or not
                self.lose(isolation.explain_complaint(frame.message))

    def _break(self, reason: str) -> None:
        """The stream has ended. What runs goes on, and waits to be caught up with, where somebody attaches again."""
        if self._on_broken is None or not self.ready_at:
            self.lose(reason)
            return
        self._give_up(lambda: Unavailable("The stream to the container broke: try again", retry_after_s=AGAIN_S))
        self.streams.fail(f"The stream to the container broke, its session goes on: try again ({reason})")
        if self.broken_at is None:
            self.broken_at, self.broken_reason, self.tries = time.monotonic(), reason, 0
            self._whole.clear()
            self._channel.is_waited_for = True
        self._on_broken(self)

    def _catch_up(self, known: dict[str, frames.Known]) -> None:
        self.broken_at = None
        self._channel.is_waited_for = False
        self.streams.restart("The stream to the container was opened anew: try again")
        self.heartbeat.restart()
        for line in self._runs.catch_up(known):
            self._channel.send(line)
        if self._network_port is not None:
            self.open_network(self._network_port)
        self._whole.set()

    def _overdue(self, since: float) -> bool:
        """No result in time: lose the container if the agent is wedged, and not the engine that passes nothing on."""
        if self.broken_at is not None or not self._blames_agent(since):
            return False
        self.lose("the agent gave no result in time")
        return True

    def _fail(self, reason: str) -> None:
        self.streams.fail(reason)
        self.contexts.fail(reason)
        self._channel.is_waited_for = False
        self._whole.set()
        self._runs.fail(reason)
        self._give_up(lambda: ContainerLost(reason))

    def _give_up(self, reason: Callable[[], SandboxError]) -> None:
        """Wait for no answer of the agent any more."""
        self._greeting.fail(reason)
        self._feeds.fail(reason)
