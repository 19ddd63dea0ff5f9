"""One container with a living agent: start, bind, execute, heartbeat. It serves one session, ever."""

import asyncio
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, get_args

from orchestrator import frames, isolation
from orchestrator.channel import Channel
from orchestrator.engine import Engine, Spec
from orchestrator.errors import ContainerLost, EngineError, IsolationError
from orchestrator.frames import Result, StdinResult
from orchestrator.models import Stream
from orchestrator.streams import Streams

AGENT_VERSION = 4
ARTIFACT_BYTES = 256 * 1024  # that the agent may use to name the artifacts of one execution
HELD = 8  # results that the agent of one container holds beyond their arrival
Sink = Callable[[Stream, bytes], None]


class _Run:
    """An execution that the agent works on; `seq` counts the output frames that arrived.

    `is_sent` once the whole job is; a cancel before that comes too early for the agent, and is said again.
    """

    __slots__ = ("done", "is_cancelled", "is_sent", "seq", "sink", "sizes")

    def __init__(self, sink: Sink) -> None:
        self.done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.sink = sink
        self.seq = 0
        self.sizes: Counter[Stream] = Counter()
        self.is_sent = False
        self.is_cancelled = False


class Container:
    """A started container. `lost_reason` is set once, when it or its agent vanished or lied."""

    def __init__(self, spec: Spec, template: str, *, output_limit: int, on_lost: Callable[["Container"], None]) -> None:
        self.name = spec.name
        self.template = template
        self.spec = spec
        self.layers: dict[str, bool] = {}
        self.canary: dict[str, Any] = {}
        self.lost_reason: str | None = None
        self.ready_at = 0.0
        self.missed_beats = 0
        self._on_lost = on_lost
        self._output_limits = dict.fromkeys(get_args(Stream), output_limit) | {"artifact": ARTIFACT_BYTES}
        self._channel = Channel(self._on_frame, self._lose)
        self.streams = Streams(self._channel)
        self._runs: dict[str, _Run] = {}
        self._adopted: frozenset[str] = frozenset()
        self._hello: asyncio.Future[frames.Hello] | None = None
        self._nonce = ""
        self._bound: asyncio.Future[str] | None = None
        self._acks: list[str] = []
        self._held: deque[str] = deque()
        self._feeding: dict[int, asyncio.Future[StdinResult]] = {}
        self._feeds = 0
        self._pings = 0
        self._pongs = 0

    async def start(self, engine: Engine, limits: dict[str, int]) -> None:
        """Start it and judge its self-test. IsolationError when a required layer was not observed."""
        self._channel.open(await engine.start(self.spec, self._channel))
        hello = await self._greet(limits)
        self._judge(engine, hello)

    async def adopt(self, engine: Engine) -> frames.Hello:
        """Attach to a running container of an earlier orchestrator; return what its agent holds."""
        self._channel.in_step = False
        self._channel.open(await engine.attach(self.name, self._channel))
        hello = await self._greet({})
        self._adopted = frozenset(known.id for known in hello.executions)
        self._channel.in_step = True
        self._judge(engine, hello)
        return hello

    async def bind(self, session: str, kept: dict[str, Any]) -> None:
        """Tell the agent its session, once, and what it is to keep for who adopts it."""
        self._bound = asyncio.get_running_loop().create_future()
        self._channel.send(frames.encode("bind", session=session, kept=kept))
        if await self._bound != session:
            self._lose("the agent is bound to another session")
            raise ContainerLost("The container belongs to another session")

    def keep(self, session: str, kept: dict[str, Any]) -> None:
        """Replace what the agent keeps."""
        self._channel.send(frames.encode("bind", session=session, kept=kept))

    async def execute(
        self, eid: str, job: dict[str, Any], *, note: dict[str, Any], deadline_s: float | None, sink: Sink, hold: bool
    ) -> Result:
        """Run a job, hand its output to `sink` as it comes, return its result; the agent is to `hold` that.

        ContainerLost when the container vanishes, or when there is no result after `deadline_s`, if there is one.
        """
        lines = frames.encode_execute(eid, job, note=note, acks=self._take_acks())
        return await self._work(eid, lines, deadline_s, sink, hold=hold)

    async def resume(self, eid: str, *, deadline_s: float | None, sink: Sink, hold: bool) -> Result:
        """Follow an execution that was begun by an earlier orchestrator, from its first output on."""
        return await self._work(eid, iter([frames.encode("resync", id=eid, seq=0)]), deadline_s, sink, hold=hold)

    async def _work(
        self, eid: str, lines: Iterator[bytes], deadline_s: float | None, sink: Sink, *, hold: bool
    ) -> Result:
        if self.lost_reason is not None:
            raise ContainerLost(self.lost_reason)
        run = self._runs[eid] = _Run(sink)
        try:
            async with asyncio.timeout(deadline_s):
                for line in lines:
                    self._channel.send(line)
                    await self._channel.drain()
                run.is_sent = True
                if run.is_cancelled:
                    self.cancel(eid)
                result = await run.done
        except TimeoutError:
            self._lose("the agent gave no result in time")
            raise ContainerLost("The container gave no result in time") from None
        finally:
            del self._runs[eid]
        # Acknowledged with the next frame: a write of its own would cost as much as the job's.
        if hold:
            self._held.append(eid)
        if not hold or len(self._held) > HELD:
            self._acks.append(self._held.popleft() if hold else eid)
        return result

    def cancel(self, eid: str) -> None:
        """Ask the agent to kill an execution, once it has all of it; its result follows."""
        run = self._runs.get(eid)
        if run is None or self._channel.closed:
            return
        run.is_cancelled = True
        if run.is_sent:
            self._channel.send(frames.encode("cancel", id=eid))

    async def feed(self, eid: str, data: bytes, *, close: bool) -> StdinResult:
        """Send all of the data to the stdin of an execution, or nothing: what became of it."""
        run = self._runs.get(eid)
        if run is None or run.done.done():
            return "closed"
        if not run.is_sent:  # its job is on the way: later it may be
            return "full"
        self._feeds += 1
        number = self._feeds
        result: asyncio.Future[StdinResult] = asyncio.get_running_loop().create_future()
        self._feeding[number] = result
        for line in frames.encode_stdin(eid, number, data, close=close):
            self._channel.send(line)
        await self._channel.drain()
        return await result

    def beat(self) -> bool:
        """Ping the agent. Return whether the ping before was answered; one that is being removed is not asked."""
        if self._channel.closed:
            return True
        answered = self._pongs == self._pings
        self.missed_beats = 0 if answered else self.missed_beats + 1
        if answered:
            self._pings += 1
            self._channel.send(frames.encode("ping", number=self._pings, acks=self._take_acks()))
        return answered

    def lose(self, reason: str) -> None:
        """Give the container up."""
        self._lose(reason)

    def close(self, reason: str) -> None:
        """Detach; executions that run end with ContainerLost."""
        self._channel.close()
        self._fail(reason)

    def _take_acks(self) -> list[str]:
        acks, self._acks = self._acks, []
        return acks

    async def _greet(self, limits: dict[str, int]) -> frames.Hello:
        self._hello = asyncio.get_running_loop().create_future()
        self._nonce = secrets.token_hex(8)
        self._channel.send(frames.encode("hello", nonce=self._nonce, limits=limits))
        hello = await self._hello
        if hello.nonce != self._nonce or hello.version != AGENT_VERSION:
            raise EngineError("The agent in the image does not fit this orchestrator: build the image anew")
        return hello

    def _judge(self, engine: Engine, hello: frames.Hello) -> None:
        self.canary = hello.canary
        self.layers = isolation.judge(hello.canary, engine=engine.name, uid=self.spec.uid)
        missing = {layer for layer in engine.required_layers if not self.layers.get(layer)}
        if missing:
            raise IsolationError(isolation.explain(missing))
        self.ready_at = time.monotonic()

    def _on_frame(self, frame: frames.AnyAgentFrame) -> None:
        match frame:
            case frames.Output():
                run = self._run(frame.id)
                if run is not None and self._is_next(frame, run.seq + 1):
                    run.sizes[frame.stream] += len(frame.data)
                    run.seq += 1
                    if run.sizes[frame.stream] > self._output_limits[frame.stream]:
                        raise ContainerLost("the agent sent output above the limit")
                    run.sink(frame.stream, frame.data)
            case frames.Result():
                run = self._run(frame.id)
                if run is not None and self._is_next(frame, run.seq):
                    run.done.set_result(frame)
            case frames.Open() | frames.Data() | frames.Credit() | frames.Finish() | frames.Close():
                self.streams.take(frame)
            case frames.StdinTaken() if (result := self._feeding.pop(frame.number, None)) is not None:
                if not result.done():  # else who asked went away
                    result.set_result(frame.result)
            case frames.Pong() if frame.number == self._pings:
                self._pongs = self._pings
            case frames.Hello() if self._hello is not None and not self._hello.done():
                if frame.nonce == self._nonce or self._channel.in_step:  # else the answer to who attached before
                    self._hello.set_result(frame)
            case frames.Bound() if self._bound is not None:
                if not self._bound.done():  # else the answer to `keep`
                    self._bound.set_result(frame.session)
            case frames.Fault():
                raise ContainerLost(isolation.explain_complaint(frame.message))
            case _:
                raise ContainerLost("the agent sent a frame that nobody asked for")

    def _run(self, eid: str) -> _Run | None:
        """Return the run that a frame belongs to. One that was adopted may be spoken of before and after its run."""
        run = self._runs.get(eid)
        if run is not None and not run.done.done():
            return run
        if eid not in self._adopted:
            raise ContainerLost("the agent spoke of an execution that does not run")
        return None

    def _is_next(self, frame: frames.Output | frames.Result, seq: int) -> bool:
        """Tell whether the frame is the expected one. What is sent again crosses what is sent anew: that is skipped."""
        if frame.seq != seq and frame.id not in self._adopted:
            raise ContainerLost("the agent sent its frames out of order")
        return frame.seq == seq

    def _lose(self, reason: str) -> None:
        if self.lost_reason is None:
            said = self._channel.said_text.strip()
            self.lost_reason = f"{reason}: {said}" if said and said not in reason else reason
            self._channel.close()
            self._fail(self.lost_reason)
            self._on_lost(self)

    def _fail(self, reason: str) -> None:
        self.streams.fail(reason)
        waiting: list[asyncio.Future[Any]] = [run.done for run in self._runs.values()]
        waiting += self._feeding.values()
        waiting += [future for future in (self._hello, self._bound) if future is not None]
        for future in waiting:
            if not future.done():
                future.set_exception(ContainerLost(reason))
