"""One cell: an execution in a context."""

import signal
import time
from collections.abc import Callable
from typing import Any

from execution import Execution, file_clock_ns
from frames import Frame
from launcher import End

SIGINT_EXIT = 130
REPORT_BYTES = 64  # of a value's limit, for what is around it
REFUSED = "The context cannot run this cell: restart the context"


class Cell(Execution):
    """An execution in a context. It is interrupted before it is killed; `survived` tells whether its context did."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.survived = False
        self._interrupt: Callable[[], None] | None = None
        self._display_fits = False
        self._kind = b""

    @property
    def is_stopped(self) -> bool:
        """Whether it was interrupted, or killed, by us."""
        return self._cause is not None

    def enter(self, interrupt: Callable[[], None]) -> Frame:
        """Run from now on in a context that can be interrupted; return what its interpreter is to get."""
        self._interrupt = interrupt
        self._started = (file_clock_ns(), time.monotonic())
        job, self._job = self._job, {}
        return {"code": job["code"], "env": job["env"], "limit": self._limits.keep_bytes - REPORT_BYTES}

    def stop(self, cause: str) -> None:
        """Interrupt the cell for this cause; the first one counts."""
        if self.result is not None or self._cause is not None:
            return
        self._cause = cause
        if self._interrupt is None:
            self.refuse(REFUSED)
        else:
            self._interrupt()

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
