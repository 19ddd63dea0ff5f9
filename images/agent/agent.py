"""The agent: process of a container that turns frames into executions, each in its own sandbox."""

import base64
import fcntl
import os
import py_compile
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import seccomp
from archive import Archives
from canary import CANARY
from context import Cell
from contexts import Contexts, compile_cells
from dialogue import Dialogue
from execution import Execution
from files import Files
from frames import Frame, Lines, decode, encode
from languages import CELLS, LANGUAGES, PYTHON, find_languages
from launcher import Launcher, prepare_process
from layout import Layout, make_etc
from limits import Limits
from loop import WRITE, Loop
from outlet import Outlet
from proc import read_proc
from seatbelt import Seatbelt
from stock import BOOT_RETRY_S, Stock
from streams import Streams
from terminal import Terminals

VERSION = 10
BAKED_WHEELS = "/opt/sandbox/wheels"  # of an image that brings packages for pip
SANDBOX_EXEC = "/usr/bin/sandbox-exec"
SILENCE_S = 600.0  # without an orchestrator for so long, the agent ends itself
REFILL_S = 0.003  # an execution that runs longer does not keep the next sandbox waiting
CHANNEL_FD = 900  # the channel's descriptors live out of the way of everything that is inherited


class Agent:
    """Executions by id, and the stock of sandboxes that wait for the next ones.

    An execution stays here, with its numbered output, until the orchestrator acknowledges its result.
    """

    def __init__(self, scratch: Path, workspace: Path) -> None:
        self._scratch = scratch
        self._workspace = workspace
        self._loop = Loop()
        self._lines = Lines()
        self._out = bytearray()
        self._writing = False
        self._heard_at = time.monotonic()
        self._session: str | None = None
        self._kept: Frame | None = None
        self._kept_at = self._heard_at
        self._canary: Any = None
        self._hello: Frame | None = None
        self._executions: dict[str, Execution] = {}
        self._parts: dict[str, list[bytes]] = {}
        self._sweeps: list[Iterator[None]] = []
        self._streams = Streams(self._loop, self._send, lambda: len(self._out))
        self._outlet = Outlet(self._loop, self._streams)
        self._files = Files(workspace, self._sweep)
        archives = Archives(self._take, self._leave)
        self._contexts = Contexts(self._loop, self._boot_context, self._leave, self._send)
        self._streams.openers = self._files.openers() | {"pack": archives.pack, "unpack": archives.unpack}
        terminals = Terminals(self._loop, lambda devices: self._boot("python", devices), self._leave)
        self._streams.openers |= {"terminal": terminals.open, "resize": terminals.resize}

    def run(self) -> None:
        """Serve the channel until it closes or falls silent."""
        self._in_fd = fcntl.fcntl(0, fcntl.F_DUPFD_CLOEXEC, CHANNEL_FD)
        self._out_fd = fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, CHANNEL_FD)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.close(null)
        os.set_blocking(self._in_fd, False)
        os.set_blocking(self._out_fd, False)
        prepare_process()
        self._loop.add(self._in_fd, self._receive)
        self._loop.call_later(SILENCE_S / 10, self._watch_silence)
        self._loop.run()

    # --- channel

    def _receive(self) -> None:
        data = os.read(self._in_fd, 65536)
        if not data:
            sys.exit(0)
        self._heard_at = time.monotonic()
        for line in self._lines.feed(data):
            if (frame := decode(line)) is not None:
                for eid in frame.get("acks", ()):
                    if (execution := self._executions.get(eid)) and execution.result is not None:
                        del self._executions[eid]
                handle = getattr(self, f"_on_{frame.get('type')}", None)
                if handle is not None:
                    handle(frame)

    def _send(self, frame: Frame | None, *, more: bool = False) -> None:
        """Send a frame; one that is followed by `more` at once waits for those, and goes with them."""
        if frame is not None:
            self._out += encode(frame)
        if not (more or self._writing):
            self._write()

    def _write(self) -> None:
        try:
            while self._out:
                del self._out[: os.write(self._out_fd, self._out)]
        except BlockingIOError:
            pass
        if self._writing != bool(self._out):
            self._writing = not self._writing
            if self._writing:
                self._loop.add(self._out_fd, self._write, WRITE)
            else:
                self._loop.remove(self._out_fd)
        self._streams.resume()

    def _watch_silence(self) -> None:
        if time.monotonic() - self._heard_at > SILENCE_S:
            sys.exit("no orchestrator spoke for 10 minutes")
        self._loop.call_later(SILENCE_S / 10, self._watch_silence)

    # --- frames

    def _on_hello(self, frame: Frame) -> None:
        self._hello = frame
        self._streams.drop()
        self._outlet.listen(None)  # until the new one says what the session may
        self._parts.clear()  # of a dead client: the new one says all of it
        if self._canary is not None:
            self._greet()
        elif not hasattr(self, "_limits"):
            self._configure(frame["limits"])

    def _on_ping(self, frame: Frame) -> None:
        self._send({"type": "pong", "number": frame["number"]})

    def _on_bind(self, frame: Frame) -> None:
        if self._session in (None, frame["session"]):
            self._session, self._kept, self._kept_at = frame["session"], frame.get("kept"), time.monotonic()
        self._send({"type": "bound", "session": self._session})

    def _on_part(self, frame: Frame) -> None:
        self._parts.setdefault(frame["id"], []).append(base64.b64decode(frame["data"]))

    def _on_execute(self, frame: Frame) -> None:
        job = frame.get("job")
        if job is None:
            job = (decode(b"".join(self._parts.pop(frame["id"], []))) or {}).get("job")
        if frame["id"] in self._executions or job is None:
            return
        kind = Cell if "context_id" in job else Execution
        execution = kind(frame["id"], job, frame.get("note") or {}, self._limits, self._loop, self._send, self._done)
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
        self._sweep(self._layout.remove_scratch(launcher.scratch))
        self._stock.forget(launcher)
        self._loop.call_later(0, self._stock.refill)

    def _boot(self, language: str, devices: tuple[str, ...] = ()) -> Launcher | Seatbelt:
        if sys.platform == "darwin":
            limits = self._limits
            return Seatbelt(
                self._loop, self._layout, files=limits.open_files, file_bytes=limits.file_bytes, command=SANDBOX_EXEC
            )
        return Launcher(
            self._loop,
            self._layout,
            LANGUAGES[language],
            self._filter,
            self._rlimits,
            bwrap=self._bwrap,
            devices=devices,
        )

    def _boot_context(self) -> Launcher:
        if sys.platform == "darwin":
            raise OSError("contexts need bubblewrap, which macOS has not")
        compile_cells(self._scratch / CELLS.harness)
        return Launcher(
            self._loop, self._layout, CELLS, self._filter, self._rlimits, bwrap=self._bwrap, program=Dialogue
        )

    def _sweep(self, steps: Iterator[None]) -> None:
        self._sweeps.append(steps)
        if len(self._sweeps) == 1:
            self._loop.call_later(0, self._step_sweeps)

    def _step_sweeps(self) -> None:
        """Clean up after executions, a little at a time: frames come first."""
        try:
            next(self._sweeps[0])
        except StopIteration:
            self._sweeps.pop(0)
        except OSError as error:
            print(f"a directory was not removed: {error}", file=sys.stderr)
            self._sweeps.pop(0)
        if self._sweeps:
            self._loop.call_later(0, self._step_sweeps)

    # --- self-test

    def _configure(self, limits: Frame) -> None:
        """Prepare the layout of all sandboxes, then send the canary through the full path."""
        self._limits = Limits(**limits)
        self._bwrap = shutil.which("bwrap") or "/usr/bin/bwrap"
        self._filter = b"" if sys.platform == "darwin" else seccomp.program(os.uname().machine)
        self._wheels = Path(self._limits.wheels or BAKED_WHEELS)
        if self._limits.wheels is not None and not self._wheels.is_dir():
            self._fail(f"the image has no directory {self._wheels}, which the template names for `wheels`")
        has_wheels = self._wheels.is_dir()
        make_etc(self._scratch / "etc", wheels=has_wheels)
        own = Path(__file__).parent
        py_compile.compile(str(own / "bootstrap.py"), cfile=str(self._scratch / "bootstrap.pyc"), doraise=True)
        shutil.copyfile(own / "harness.js", self._scratch / "harness.js")
        alone = [name for _, name in socket.if_nameindex()] == ["lo"]
        self._rlimits = self._limits.rlimits()
        wheels = self._wheels if has_wheels else None
        self._layout = Layout(self._scratch, self._workspace, share_network=alone, wheels=wheels)
        self._languages = find_languages()
        wanted = {name: count for name, count in self._limits.preboot.items() if name in self._languages}
        self._stock = Stock(self._loop, wanted, self._boot, self._leave)
        job: Frame = {"code": CANARY, "handler": "canary", "timeout_s": 20.0}
        execution = Execution("canary", job, {}, self._limits, self._loop, untold, self._judge)
        try:
            execution.start(self._boot(PYTHON))
        except OSError as error:
            self._fail(f"bubblewrap could not be started: {error}")

    def _judge(self, execution: Execution) -> None:
        """The canary came back: keep its findings for the orchestrator, which decides on them."""
        report = decode(execution.text("value"))
        if report is None or "value" not in report:
            said = execution.message or execution.text("stderr").decode(errors="replace")
            self._fail(f"the self-test did not run: {said.strip() or execution.result}")
            return
        own = read_proc(os.getpid(), "status").partition(b"Seccomp_filters:")[2].split()
        self._canary = report["value"] | {"agent_uid": os.getuid(), "agent_seccomp": int(own[0]) if own else None}
        self._done(execution)
        self._loop.call_later(0, self._greet)

    def _fail(self, message: str) -> None:
        self._send({"type": "fault", "message": message})
        sys.exit(message)

    def _greet(self) -> None:
        assert self._hello is not None
        executions = [execution.summary() for execution in self._executions.values()]
        self._send(
            {
                "type": "hello",
                "version": VERSION,
                "nonce": self._hello["nonce"],
                "session": self._session,
                "kept": self._kept,
                "kept_age_s": time.monotonic() - self._kept_at,
                "canary": self._canary,
                "languages": {name: {"handlers": bool(row.harness)} for name, row in self._languages.items()},
                "wheels": self._wheels.is_dir(),
                "executions": executions,
                "contexts": self._contexts.known(),
            }
        )


def untold(frame: Frame | None, *, more: bool = False) -> None:
    """Send nothing: the canary is between the agent and itself."""


def main() -> None:
    """Run the agent; `argv` may name the scratch and workspace directories."""
    scratch, workspace = (sys.argv[1:] + ["/scratch", "/workspace"][len(sys.argv) - 1 :])[:2]
    os.umask(0o077)
    Agent(Path(scratch), Path(workspace)).run()
