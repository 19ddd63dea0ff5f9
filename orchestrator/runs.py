"""The executions of one container: handed over, waited for; what may be said of them, which results may be forgotten."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import get_args

from orchestrator import frames, traces
from orchestrator.channel import Channel, give_up
from orchestrator.errors import ContainerLost, Unavailable
from orchestrator.frames import Result
from orchestrator.models import Stream

ARTIFACT_BYTES = 256 * 1024  # that the agent may use to name the artifacts of one execution
CATCH_UP_S = 2.0  # what was held back has arrived so long after an attach
CANCEL_S = 60.0  # for a cancelled execution without a timeout to end
OVERDUE_STEP_S = 0.1
HELD = 8  # results that the agent of one container holds beyond their arrival
FORGOTTEN = "the agent has forgotten the execution"
Sink = Callable[[Stream, bytes], None]
Words = Callable[[], Iterator[bytes]]


class Run:
    """An execution that the agent works on; `seq` counts the output frames that arrived.

    `is_sent` once the whole job is; a cancel before that comes too early for the agent, and is said again. `words` are the
    lines of the job, for when they did not arrive.
    """

    __slots__ = (
        "deadline_s",
        "done",
        "is_cancelled",
        "is_sent",
        "overdue_at",
        "seq",
        "sink",
        "sizes",
        "timer",
        "words",
    )

    def __init__(self, sink: Sink, deadline_s: float | None, words: Words | None) -> None:
        self.done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.sink = sink
        self.deadline_s = deadline_s
        self.words = words
        self.seq = 0
        self.sizes: Counter[Stream] = Counter()
        self.is_sent = False
        self.is_cancelled = False
        self.overdue_at: float | None = None
        self.timer: asyncio.TimerHandle | None = None


class Runs:
    """Runs by id. Of an `adopted` execution the agent may speak before, after and twice: it may be catching up.

    `queued` are those whose jobs wait at the agent for us to say that their turn has come.
    """

    def __init__(
        self, channel: Channel, *, output_limit: int, display_limit: int, on_overdue: Callable[[float], bool]
    ) -> None:
        """`on_overdue` is told since when a result is overdue, and whether that is the end it returns."""
        self.active: dict[str, Run] = {}
        self.queued: set[str] = set()
        self._channel = channel
        self._on_overdue = on_overdue
        self._output_limits = dict.fromkeys(get_args(Stream), output_limit) | {"artifact": ARTIFACT_BYTES}
        self._output_limits["display"] = display_limit
        self._adopted: set[str] = set()
        self._acks: list[str] = []
        self._told: set[str] = set()  # acknowledged since the last answer to a ping
        self._held: deque[str] = deque()

    def adopt(self, eids: Iterable[str], *, queued: Iterable[str] = ()) -> None:
        """Expect that the agent speaks of these; some of them are queued."""
        self._adopted.update(eids)
        self.queued.update(queued)

    def queue(self, eid: str, lines: Iterable[bytes]) -> None:
        """Say these lines, by which the agent gets a job to keep."""
        self.queued.add(eid)
        for line in lines:
            self._channel.send(line)

    def call_off(self, eid: str) -> None:
        """Have the agent forget a job that it keeps."""
        if eid in self.queued:
            self.queued.remove(eid)
            if not (self._channel.is_waited_for or self._channel.closed):
                self._channel.send(frames.encode("cancel", id=eid))

    async def work(
        self,
        eid: str,
        lines: Iterator[bytes],
        deadline_s: float | None,
        sink: Sink,
        *,
        hold: bool,
        words: Words | None = None,
    ) -> Result:
        """Say these lines, hand the output that follows to `sink`, return the result; the agent is to `hold` that.

        With `words`, these are said should the stream break before the lines had arrived.
        """
        run = self.active[eid] = Run(sink, deadline_s, words)
        self.queued.discard(eid)
        self._wait_for(eid, run)
        try:
            with traces.span("channel"), suppress(Unavailable):  # then they are said once it is whole again
                for line in lines:
                    self._channel.send(line)
                    await self._channel.drain()
            run.is_sent = True
            if run.is_cancelled:
                self.cancel(eid)
            result = await run.done
            traces.ran(launch_s=result.launch_s, wall_s=result.wall_s)
        finally:
            del self.active[eid]
            if run.timer is not None:
                run.timer.cancel()
        self._arrived(eid, hold=hold)
        return result

    def cancel(self, eid: str) -> None:
        """Ask the agent to kill an execution, once it has all of it; its result follows."""
        if (run := self.active.get(eid)) is not None:
            run.is_cancelled = True
            if run.timer is None:
                run.timer = asyncio.get_running_loop().call_later(CANCEL_S, self._overdue, eid)
            if run.is_sent and not (self._channel.is_waited_for or self._channel.closed):
                self._channel.send(frames.encode("cancel", id=eid))

    def acks(self) -> list[str]:
        """Return the results that the agent may forget, to be sent at once."""
        acks, self._acks = self._acks, []
        self._told.update(acks)
        return acks

    def answered(self) -> None:
        """Learn that what was sent so far has reached the agent."""
        self._told.clear()

    def take(self, frame: frames.Output | Result) -> None:
        """Take output or a result. ContainerLost when the agent may not say that now."""
        run = self.active.get(frame.id)
        if run is None or run.done.done():
            if frame.id not in self._adopted:
                raise ContainerLost("the agent spoke of an execution that does not run")
            return
        expected = run.seq + 1 if isinstance(frame, frames.Output) else run.seq
        if frame.seq != expected:
            if frame.id not in self._adopted:
                raise ContainerLost("the agent sent its frames out of order")
            return  # what is sent again crosses what is sent anew
        if isinstance(frame, Result):
            run.done.set_result(frame)
            return
        run.sizes[frame.stream] += len(frame.data)
        run.seq += 1
        if run.sizes[frame.stream] > self._output_limits[frame.stream]:
            raise ContainerLost("the agent sent output above the limit")
        run.sink(frame.stream, frame.data)

    def catch_up(self, known: Mapping[str, frames.Known]) -> Iterator[bytes]:
        """Yield what to say to an agent that was attached to again, and knows these executions."""
        settled_at = time.monotonic() + CATCH_UP_S
        for eid, run in self.active.items():
            if run.overdue_at is not None:
                run.overdue_at = settled_at
            if eid in known:
                if known[eid].queued:  # that its turn has come did not arrive
                    yield frames.encode("execute", id=eid)
                yield frames.encode("resync", id=eid, seq=run.seq)
            elif run.words is not None:  # the agent keeps all that arrived: this has not run
                yield from run.words()
                self._wait_for(eid, run)
            else:
                give_up(run.done, ContainerLost(FORGOTTEN))
            if run.is_cancelled:
                yield frames.encode("cancel", id=eid)
        for eid in known.keys() - self.active.keys() - self.queued:
            if known[eid].queued:  # nor that it was called off
                yield frames.encode("cancel", id=eid)
        self._acks += sorted(self._told & known.keys())  # said to a stream that may have been broken by then
        self._told.clear()

    def fail(self, reason: str) -> None:
        """Wait for no result any more."""
        for run in self.active.values():
            give_up(run.done, ContainerLost(reason))

    def _wait_for(self, eid: str, run: Run) -> None:
        """Wait for the result until the deadline, from now on."""
        if run.deadline_s is not None:
            if run.timer is not None:
                run.timer.cancel()
            run.overdue_at = None
            run.timer = asyncio.get_running_loop().call_later(run.deadline_s, self._overdue, eid)

    def _arrived(self, eid: str, *, hold: bool) -> None:
        """Note that a result arrived; the agent is to hold the last ones of those that are to be held."""
        # Acknowledged with the next frame: a write of its own would cost as much as the job's.
        if hold:
            self._held.append(eid)
        if not hold or len(self._held) > HELD:
            self._acks.append(self._held.popleft() if hold else eid)

    def _overdue(self, eid: str) -> None:
        run = self.active[eid]
        if run.overdue_at is None:
            run.overdue_at = time.monotonic()
        if not self._on_overdue(run.overdue_at):
            run.timer = asyncio.get_running_loop().call_later(OVERDUE_STEP_S, self._overdue, eid)
