"""All contexts of one agent, by id."""

import py_compile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cell import Cell
from context import Context
from frames import Frame
from launcher import Launcher
from loop import Loop

# What runs in a context's sandbox: a directory that Python takes for a program, of which `__main__` runs.
PROGRAM = {"__main__": "cells.py", "interactive": "interactive.py", "records": "records.py"}


class Contexts:
    """Contexts are opened, restarted and deleted when the orchestrator says so; it is told of every change."""

    def __init__(
        self, loop: Loop, boot: Callable[[], Launcher], leave: Callable[[Any], None], send: Callable[[Frame], None]
    ) -> None:
        self._loop = loop
        self._boot = boot
        self._leave = leave
        self._send = send
        self._held: dict[str, Context] = {}

    def open(self, frame: Frame) -> None:
        """Start a context, or start one anew that there is."""
        cid, number = frame["id"], frame["number"]
        if (context := self._held.get(cid)) is not None:
            context.restart(number)
            return
        context = self._held[cid] = Context(
            cid, number, frame["language"], self._boot, self._loop, self._leave, self._report
        )
        context.start()

    def close(self, frame: Frame) -> None:
        """Delete a context."""
        if (context := self._held.pop(frame["id"], None)) is not None:
            context.close()

    def run(self, cid: str, cell: Cell) -> None:
        """Run a cell in its context."""
        if (context := self._held.get(cid)) is None:
            cell.refuse("The context was deleted")
        else:
            context.run(cell)

    def known(self) -> list[Frame]:
        """Return what a newly attached orchestrator must know."""
        return [context.known() for context in self._held.values()]

    def _report(self, context: Context) -> None:
        facts = {"id": context.id, "number": context.number, "state": context.state, "message": context.message}
        self._send({"type": "context", **facts})


def compile_cells(target: Path) -> None:
    """Put what runs in a context's sandbox where sandboxes find it, the first time that one is wanted."""
    for module, source in PROGRAM.items():
        compiled = target / f"{module}.pyc"
        if not compiled.exists():
            py_compile.compile(str(Path(__file__).with_name(source)), cfile=str(compiled), doraise=True)
