"""A context: one sandbox that stays, in which cells run one after the other. A cell is an execution of a context."""

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

from dialogue import Dialogue, Records
from execution import Execution, file_clock_ns
from frames import Frame
from launcher import End, Launcher
from loop import Loop, Timer
from proc import running_s, usage, write

GRACE_S = 2.0  # between the interrupt of a cell and its kill
SIGINT_EXIT = 130
MESSAGE_LIMIT = 500
REPORT_BYTES = 64  # of a value's limit, for what is around it
INTERRUPTED = "The cell was interrupted; the context lives, its variables are kept"
UNHEEDED = "The cell did not heed the interrupt and was killed with its context: restart the context"
RESTARTED = "The context was restarted or deleted while the cell ran"
DEAD = "The process of the context ended ({how}): restart the context"
REFUSED = "The context cannot run this cell: restart the context"

State = Literal["starting", "idle", "dead"]


class Cell(Execution):
    """An execution in a context. It is interrupted before it is killed; `survived` tells whether its context did."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.survived = False
        self._context: Context | None = None
        self._display_fits = False
        self._kind = b""

    @property
    def is_stopped(self) -> bool:
        """Whether it was interrupted, or killed, by us."""
        return self._cause is not None

    def enter(self, context: "Context") -> Frame:
        """Belong to a context from now on; return what its interpreter is to get."""
        self._context = context
        self._started = (file_clock_ns(), time.monotonic())
        job, self._job = self._job, {}
        return {"code": job["code"], "env": job["env"], "limit": self._limits.keep_bytes - REPORT_BYTES}

    def stop(self, cause: str) -> None:
        """Interrupt the cell for this cause; the first one counts."""
        if self.result is not None or self._cause is not None:
            return
        self._cause = cause
        if self._context is None:
            self.refuse(REFUSED)
        else:
            self._context.interrupt()

    def abandon(self) -> None:
        """Count as cancelled: the context is about to be killed."""
        self._cause = self._cause or "cancelled"

    def take(self, stream: str, data: bytes) -> None:
        """Take what was printed."""
        self._on_output(stream, data)

    def finish(self, end: End) -> None:
        """Report how the cell ended."""
        self._on_end(end)

    def refuse(self, message: str) -> None:
        """Report that the cell did not run."""
        self._started = (file_clock_ns(), time.monotonic())
        self._on_end(End(None, None, 0.0, 0.0, 0, message))

    def expect(self, kind: bytes, size: int) -> None:
        """Take note that so many bytes of a display or a report follow. A display is kept whole or not at all."""
        self._kind = kind
        self._display_fits = self._kept["display"] + size <= self._limits.display_bytes
        if kind == b"D" and not self._display_fits:
            self._seen["display"] += size
            if self._seen["display"] > self._limits.drain_bytes + self._limits.display_bytes:
                self.stop("output_limit")

    def take_body(self, data: bytes) -> None:
        """Take a piece of what was announced."""
        if self._kind == b"V":
            self._on_output("value", data)
        elif self._display_fits:
            self._on_output("display", data)

    def _outcome(self, end: End) -> tuple[str, int | None, int | None]:
        if not self.survived:
            outcome, code, killer = super()._outcome(end)
            return ("error" if outcome == "ok" else outcome), code, killer
        if self._cause is not None:
            return self._cause, SIGINT_EXIT, signal.SIGINT
        return ("ok" if end.exit_code == 0 else "error"), end.exit_code, None


class Context:
    """One sandbox and the cell that runs in it. `number` counts the sandboxes that this id has had.

    `report` is called whenever `state` has changed. Output that comes while no cell runs is dropped.
    """

    def __init__(
        self,
        cid: str,
        number: int,
        language: str,
        boot: Callable[[], Launcher],
        loop: Loop,
        leave: Callable[[Launcher], None],
        report: Callable[["Context"], None],
    ) -> None:
        self.id = cid
        self.number = number
        self.language = language
        self.state: State = "starting"
        self.message = ""
        self.cells = 0
        self._begun_at = time.monotonic()
        self._boot = boot
        self._loop = loop
        self._leave_sandbox = leave
        self._report = report
        self._cell: Cell | None = None
        self._launcher: Launcher | None = None
        self._records = Records(self._on_head, self._on_body, self._on_cell_end)
        self._then: Callable[[], None] | None = None
        self._timer: Timer | None = None
        self._booted_s = self._spent_s = 0.0

    def start(self) -> None:
        """Boot the sandbox; the state is then `idle`, or `dead` with a message."""
        try:
            launcher = self._boot()
        except OSError as error:
            self._change("dead", f"no sandbox could be started: {error}")
            return
        self._launcher = launcher
        launcher.on_ready = self._on_ready
        launcher.on_end = self._on_end
        launcher.program.on_output = self._on_output

    def run(self, cell: Cell) -> None:
        """Run a cell; the orchestrator sends one at a time, and to an idle context alone."""
        if self.state != "idle" or self._cell is not None or self._then is not None:
            if self.state == "dead":
                self._report(self)
            cell.refuse(REFUSED)
            return
        assert self._launcher is not None
        program = self._program
        program.catch_up()  # what was printed since the last cell is nobody's
        self._records = Records(self._on_head, self._on_body, self._on_cell_end)
        self._cell = cell
        self.cells += 1
        pids = self._launcher.pids()
        self._spent_s = spent(pids)
        forget_peaks(pids)
        self._run_at = time.monotonic()
        if not program.tell(cell.enter(self) | {"number": self.cells}):
            self._launcher.kill()

    def interrupt(self) -> None:
        """Interrupt the cell that runs, and kill the sandbox when that does not end it soon."""
        if self._launcher is not None:
            self._launcher.interrupt()
            self._timer = self._loop.call_later(GRACE_S, self._launcher.kill)

    def restart(self, number: int) -> None:
        """Kill the sandbox, then start another."""
        self.number, self.state, self.message = number, "starting", ""
        self.close(self.start)

    def close(self, then: Callable[[], None] = lambda: None) -> None:
        """Kill the sandbox; `then` is called when nothing of it is alive."""
        if self._cell is not None:
            self._cell.abandon()
        if self._launcher is None:
            then()
        else:
            self._then = then
            self._launcher.kill()

    def known(self) -> Frame:
        """Return what a newly attached orchestrator must know of this context."""
        facts = {"id": self.id, "number": self.number, "language": self.language, "cells": self.cells}
        return facts | {
            "state": self.state,
            "message": self.message,
            "age_s": time.monotonic() - self._begun_at,
        }

    # --- the sandbox

    @property
    def _program(self) -> Dialogue:
        assert self._launcher is not None
        assert isinstance(self._launcher.program, Dialogue)
        return self._launcher.program

    def _change(self, state: State, message: str = "") -> None:
        self.state, self.message = state, message[:MESSAGE_LIMIT]
        self._report(self)

    def _on_ready(self) -> None:
        if self._launcher is None or self._then is not None:
            return
        self._program.boot_errors = b""  # warnings of imports
        self._booted_s = spent(self._launcher.pids())
        self._change("idle")

    def _on_output(self, stream: str, data: bytes) -> None:
        if stream == "value":
            self._records.feed(data)
        elif self._cell is not None:
            self._cell.take(stream, data)

    def _on_head(self, kind: bytes, size: int) -> None:
        self._program.catch_up()  # what was printed before a display comes before it
        if self._cell is not None:
            self._cell.expect(kind, size)

    def _on_body(self, data: bytes) -> None:
        if self._cell is not None:
            self._cell.take_body(data)

    def _on_cell_end(self, code: int, number: int) -> None:
        if self._cell is None or number != self.cells or self._then is not None:
            return
        self._program.catch_up()
        assert self._launcher is not None
        self._cell.survived = True
        message = INTERRUPTED if self._cell.is_stopped else ""
        wall_s = time.monotonic() - self._run_at
        pids = self._launcher.pids()
        peak = max((usage(pid)[1] for pid in pids), default=0)
        self._leave(End(code, None, wall_s, max(0.0, spent(pids) - self._spent_s), peak, message))

    def _leave(self, end: End) -> None:
        cell, self._cell = self._cell, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if cell is not None:
            cell.finish(end)

    def _on_end(self, end: End) -> None:
        """Nothing of the sandbox is alive: the state is told before the cell's result, so that both agree."""
        assert self._launcher is not None
        self._leave_sandbox(self._launcher)
        self._launcher = None
        then, self._then = self._then, None
        said = end.message.rpartition("\n")[2]
        message = said or DEAD.format(how=how_it_ended(end))
        if then is None:
            self._change("dead", message)
        if self._cell is not None:
            if then is not None:
                message = RESTARTED
            elif self._cell.is_stopped:
                message = UNHEEDED
            cpu_s = max(0.0, end.cpu_s - (self._spent_s - self._booted_s))
            wall_s = time.monotonic() - self._run_at
            self._leave(End(end.exit_code, end.signal, wall_s, cpu_s, end.max_rss_bytes, message))
        if then is not None:
            then()


def how_it_ended(end: End) -> str:
    """Return in words how the process of a context ended."""
    if end.signal is not None:
        return f"signal {end.signal}, exit code {end.exit_code}"
    return "its sandbox vanished" if end.exit_code is None else f"exit code {end.exit_code}"


def spent(pids: list[int]) -> float:
    """Return the CPU seconds of these processes: their main threads' to the microsecond, the rest in ticks."""
    return sum(max(usage(pid)[0], running_s(pid)) for pid in pids)


def forget_peaks(pids: list[int]) -> None:
    """Let the peaks of resident memory begin anew."""
    for pid in pids:
        with suppress(OSError):  # it is gone; or the kernel does not let us, then the peak is that of its life
            write(f"/proc/{pid}/clear_refs", b"5")
