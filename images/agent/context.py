"""A context: one sandbox that stays, in which cells run one after the other."""

import time
from collections.abc import Callable
from typing import Literal

from cell import REFUSED, Cell
from dialogue import Dialogue, Records
from frames import Frame
from launcher import End, Launcher
from loop import Loop, Timer
from proc import forget_peaks, spent, usage

GRACE_S = 2.0  # between the interrupt of a cell and its kill
MESSAGE_LIMIT = 500
INTERRUPTED = "The cell was interrupted; the context lives, its variables are kept"
UNHEEDED = "The cell did not heed the interrupt and was killed with its context: restart the context"
RESTARTED = "The context was restarted or deleted while the cell ran"
DEAD = "The process of the context ended ({how}): restart the context"

State = Literal["starting", "idle", "dead"]


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
        if not program.tell(cell.enter(self.interrupt) | {"number": self.cells}):
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
