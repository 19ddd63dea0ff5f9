"""The executions that the agent of one container works on: what may be said of them, and which results it may forget."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import get_args

from orchestrator import frames
from orchestrator.errors import ContainerLost
from orchestrator.frames import Result
from orchestrator.models import Stream

ARTIFACT_BYTES = 256 * 1024  # that the agent may use to name the artifacts of one execution
CATCH_UP_S = 2.0  # what was held back has arrived so long after an attach
HELD = 8  # results that the agent of one container holds beyond their arrival
NOT_ARRIVED = "The stream to the container broke before the job had arrived: send it again"
Sink = Callable[[Stream, bytes], None]


class Run:
    """An execution that the agent works on; `seq` counts the output frames that arrived.

    `is_sent` once the whole job is; a cancel before that comes too early for the agent, and is said again.
    """

    __slots__ = ("done", "is_cancelled", "is_sent", "overdue_at", "seq", "sink", "sizes", "timer")

    def __init__(self, sink: Sink) -> None:
        self.done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.sink = sink
        self.seq = 0
        self.sizes: Counter[Stream] = Counter()
        self.is_sent = False
        self.is_cancelled = False
        self.overdue_at: float | None = None
        self.timer: asyncio.TimerHandle | None = None


class Runs:
    """Runs by id. Of an `adopted` execution the agent may speak before, after and twice: it may be catching up."""

    def __init__(self, *, output_limit: int, display_limit: int) -> None:
        self.active: dict[str, Run] = {}
        self._output_limits = dict.fromkeys(get_args(Stream), output_limit) | {"artifact": ARTIFACT_BYTES}
        self._output_limits["display"] = display_limit
        self._adopted: set[str] = set()
        self._acks: list[str] = []
        self._told: set[str] = set()  # acknowledged since the last answer to a ping
        self._held: deque[str] = deque()

    def adopt(self, eids: Iterable[str]) -> None:
        """Expect that the agent speaks of these."""
        self._adopted.update(eids)

    def begin(self, eid: str, sink: Sink) -> Run:
        """Take a run in."""
        run = self.active[eid] = Run(sink)
        return run

    def end(self, eid: str) -> None:
        """Forget a run, however it ended."""
        if (timer := self.active.pop(eid).timer) is not None:
            timer.cancel()

    def arrived(self, eid: str, *, hold: bool) -> None:
        """Note that a result arrived; the agent is to hold the last ones of those that are to be held."""
        # Acknowledged with the next frame: a write of its own would cost as much as the job's.
        if hold:
            self._held.append(eid)
        if not hold or len(self._held) > HELD:
            self._acks.append(self._held.popleft() if hold else eid)

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

    def catch_up(self, known: Mapping[str, object]) -> Iterator[bytes]:
        """Yield what to say to an agent that was attached to again, and knows these executions."""
        settled_at = time.monotonic() + CATCH_UP_S
        for eid, run in self.active.items():
            if run.overdue_at is not None:
                run.overdue_at = settled_at
            if eid in known:
                yield frames.encode("resync", id=eid, seq=run.seq)
                if run.is_cancelled:
                    yield frames.encode("cancel", id=eid)
            elif not run.done.done():
                run.done.set_exception(ContainerLost(NOT_ARRIVED))
        self._acks += sorted(self._told & known.keys())  # said to a stream that may have been broken by then
        self._told.clear()
