"""The agent: process of a container that turns frames into executions, each in its own sandbox."""

import base64
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from archive import Archives
from canary import CANARY
from cell import Cell
from channel import Channel
from contexts import Contexts
from execution import Execution
from files import Files
from frames import Frame, decode, split
from languages import PYTHON
from launcher import Launcher, prepare_process
from limits import Limits
from loop import Loop
from outlet import Outlet
from proc import read_proc
from sandboxes import Sandboxes, Unfit
from seatbelt import Seatbelt
from stock import BOOT_RETRY_S, Stock
from streams import Streams
from sweeps import Sweeps
from terminal import Terminals

VERSION = 12
UNFIT = "The agent in the image does not fit this orchestrator: build the image anew"
UNCONFIGURED = "The agent was never told its limits: its orchestrator ended before that"
REFILL_S = 0.003  # an execution that runs longer does not keep the next sandbox waiting


@dataclass(slots=True, frozen=True)
class Queued:
    """An execution that waits for its turn; `at` is when it came."""

    job: Frame
    note: Frame
    at: float

    def summary(self, eid: str, now: float) -> Frame:
        """Return what a newly attached orchestrator must know of it."""
        return {"id": eid, "seq": 0, "done": False, "queued": True, "note": self.note, "age_s": now - self.at}


class Agent:
    """Executions by id, and the stock of sandboxes that wait for the next ones.

    An execution stays here, with its numbered output, until the orchestrator acknowledges its result. One in the `queue`
    is not begun: its job waits here so that it outlives the orchestrator, which says when its turn has come.
    """

    def __init__(self, scratch: Path, workspace: Path) -> None:
        self._scratch = scratch
        self._workspace = workspace
        self._loop = Loop()
        self._channel = Channel(self._loop, self._receive)
        self._send = self._channel.send
        self._session: str | None = None
        self._kept: Frame | None = None
        self._kept_at = time.monotonic()
        self._canary: Any = None
        self._hello: Frame | None = None
        self._executions: dict[str, Execution] = {}
        self._queue: dict[str, Queued] = {}
        self._parts: dict[str, list[bytes]] = {}
        self._sweeps = Sweeps(self._loop)
        self._streams = Streams(self._loop, self._send, lambda: self._channel.waiting)
        self._channel.on_written = self._streams.resume
        self._outlet = Outlet(self._loop, self._streams)
        self._files = Files(workspace, self._sweeps.add)
        archives = Archives(self._take, self._leave, self._files.clear)
        self._contexts = Contexts(self._loop, self._boot_context, self._leave, self._send)
        self._streams.openers = self._files.openers() | {"pack": archives.pack, "unpack": archives.unpack}
        terminals = Terminals(self._loop, self._boot_terminal, self._leave)
        self._streams.openers |= {"terminal": terminals.open, "resize": terminals.resize}

    def run(self) -> None:
        """Serve the channel until it closes or falls silent."""
        self._channel.open()
        prepare_process()
        self._loop.run()

    # --- frames

    def _receive(self, frame: Frame) -> None:
        for eid in frame.get("acks", ()):
            if (execution := self._executions.get(eid)) and execution.result is not None:
                del self._executions[eid]
        handle = getattr(self, f"_on_{frame.get('type')}", None)
        if handle is not None:
            handle(frame)

    def _on_hello(self, frame: Frame) -> None:
        self._hello = frame
        self._streams.drop()
        self._outlet.listen(None)  # until the new one says what the session may
        self._parts.clear()  # of a dead client: the new one says all of it
        if self._canary is not None:
            self._greet()
        elif not hasattr(self, "_sandboxes"):
            if frame.get("version") != VERSION:  # it may name limits that are unknown here
                self._fail(UNFIT)
            if not frame["limits"]:  # who adopts names none: it takes us for configured
                self._fail(UNCONFIGURED)
            self._configure(frame["limits"])

    def _on_ping(self, frame: Frame) -> None:
        self._send({"type": "pong", "number": frame["number"]})

    def _on_bind(self, frame: Frame) -> None:
        if self._session in (None, frame["session"]):
            self._session, self._kept, self._kept_at = frame["session"], frame.get("kept"), time.monotonic()
        self._send({"type": "bound", "session": self._session})

    def _on_part(self, frame: Frame) -> None:
        self._parts.setdefault(frame["id"], []).append(base64.b64decode(frame["data"]))

    def _job_of(self, frame: Frame) -> Frame | None:
        """Return the job that comes with a frame, or came in parts before it."""
        job: Frame | None = frame.get("job") or (decode(b"".join(self._parts.pop(frame["id"], []))) or {}).get("job")
        return job

    def _on_queue(self, frame: Frame) -> None:
        if (job := self._job_of(frame)) is not None:
            self._queue[frame["id"]] = Queued(job, frame["note"], time.monotonic())

    def _on_execute(self, frame: Frame) -> None:
        queued = self._queue.pop(frame["id"], None)
        job, note = self._job_of(frame), frame.get("note") or {}
        if job is None and queued is not None:
            job, note = queued.job, queued.note
        if frame["id"] in self._executions or job is None:
            return
        kind = Cell if "context_id" in job else Execution
        execution = kind(frame["id"], job, note, self._sandboxes.limits, self._loop, self._send, self._done)
        execution.changed = self._files.changed
        self._executions[frame["id"]] = execution
        if isinstance(execution, Cell):
            self._contexts.run(job["context_id"], execution)
            return
        self._begin(execution)
        self._loop.call_later(REFILL_S, self._stock.refill)

    def _on_open_context(self, frame: Frame) -> None:
        self._contexts.open(frame)

    def _on_close_context(self, frame: Frame) -> None:
        self._contexts.close(frame)

    def _on_stdin(self, frame: Frame) -> None:
        execution = self._executions.get(frame["id"])
        data = b"".join([*self._parts.pop(f"stdin{frame['number']}", []), base64.b64decode(frame["data"])])
        result = "closed" if execution is None else execution.feed(data, close=frame["close"])
        self._send({"type": "stdin_taken", "number": frame["number"], "result": result})

    def _on_cancel(self, frame: Frame) -> None:
        self._queue.pop(frame["id"], None)
        if execution := self._executions.get(frame["id"]):
            execution.stop("cancelled")

    def _on_resync(self, frame: Frame) -> None:
        if execution := self._executions.get(frame["id"]):
            execution.resend(frame["seq"])

    def _on_network(self, frame: Frame) -> None:
        self._outlet.listen(frame["port"])

    def _on_open(self, frame: Frame) -> None:
        self._streams.take(frame)

    _on_data = _on_credit = _on_finish = _on_close = _on_open

    # --- executions

    def _begin(self, execution: Execution) -> None:
        """Give the execution the sandbox that was booted first; boot one when there is none."""
        if execution.result is not None:
            return
        try:
            launcher = self._stock.take(execution.home)
        except OSError:  # no process or memory left for it just now; the execution's timeout ends the waiting
            self._loop.call_later(BOOT_RETRY_S, lambda: self._begin(execution))
            return
        execution.start(launcher)

    def _done(self, execution: Execution) -> None:
        if execution.launcher is not None:
            self._leave(execution.launcher)
        else:
            self._loop.call_later(0, self._stock.refill)

    def _take(self) -> Launcher | Seatbelt:
        """Return the sandbox of Python that was booted first, or boot one; OSError when that fails."""
        return self._stock.take(PYTHON)

    def _leave(self, launcher: Launcher | Seatbelt) -> None:
        """Clean up after a sandbox that has ended."""
        self._sweeps.add(self._sandboxes.layout.remove_scratch(launcher.scratch))
        self._stock.forget(launcher)
        self._loop.call_later(0, self._stock.refill)

    def _boot_context(self) -> Launcher:
        return self._sandboxes.boot_context()

    def _boot_terminal(self, devices: tuple[str, ...]) -> Launcher | Seatbelt:
        return self._sandboxes.boot(PYTHON, devices)

    # --- self-test

    def _configure(self, limits: Frame) -> None:
        """Prepare the layout of all sandboxes, then send the canary through the full path."""
        try:
            self._sandboxes = made = Sandboxes(self._loop, self._scratch, self._workspace, Limits(**limits))
        except Unfit as reason:
            self._fail(str(reason))
        wanted = {name: count for name, count in made.limits.preboot.items() if name in made.languages}
        self._stock = Stock(self._loop, wanted, made.boot, self._leave)
        job: Frame = {"code": CANARY, "handler": "canary", "timeout_s": 20.0}
        execution = Execution("canary", job, {}, made.limits, self._loop, untold, self._judge)
        try:
            execution.start(made.boot(PYTHON))
        except OSError as error:
            self._fail(f"bubblewrap could not be started: {error}")

    def _judge(self, execution: Execution) -> None:
        """The canary came back: keep its findings for the orchestrator, which decides on them."""
        report = decode(execution.text("value"))
        if report is None or "value" not in report:
            said = execution.message or execution.text("stderr").decode(errors="replace")
            self._fail(f"the self-test did not run: {said.strip() or execution.result}")
        own = read_proc(os.getpid(), "status").partition(b"Seccomp_filters:")[2].split()
        self._canary = report["value"] | {"agent_uid": os.getuid(), "agent_seccomp": int(own[0]) if own else None}
        self._done(execution)
        self._loop.call_later(0, self._greet)

    def _fail(self, message: str) -> NoReturn:
        self._send({"type": "fault", "message": message})
        sys.exit(message)

    def _greet(self) -> None:
        assert self._hello is not None
        now = time.monotonic()
        executions = [execution.summary() for execution in self._executions.values()]
        executions += [queued.summary(eid, now) for eid, queued in self._queue.items()]
        for part in split(
            {
                "type": "hello",
                "version": VERSION,
                "nonce": self._hello["nonce"],
                "session": self._session,
                "kept": self._kept,
                "kept_age_s": now - self._kept_at,
                "canary": self._canary,
                "languages": {name: {"handlers": bool(row.harness)} for name, row in self._sandboxes.languages.items()},
                "wheels": self._sandboxes.has_wheels,
                "executions": executions,
                "contexts": self._contexts.known(),
            }
        ):
            self._send(part)


def untold(frame: Frame | None, *, more: bool = False) -> None:
    """Send nothing: the canary is between the agent and itself."""


def main() -> None:
    """Run the agent; `argv` may name the scratch and workspace directories."""
    scratch, workspace = (sys.argv[1:] + ["/scratch", "/workspace"][len(sys.argv) - 1 :])[:2]
    os.umask(0o077)
    Agent(Path(scratch), Path(workspace)).run()
