"""One execution as the agent sees it: its job, its numbered output, its result until acknowledged."""

import base64
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

from frames import Frame
from languages import LANGUAGES, PYTHON, home_of
from launcher import End, Launcher
from limits import Limits
from loop import Loop
from output import Output, cut
from proc import oom_kills
from seatbelt import Seatbelt

SIGKILL_EXIT = 137
ARTIFACTS, ARTIFACT_BYTES = 1000, 256 * 1024  # of one execution that are named, and what their names may take
CLOCK_REALTIME_COARSE = 5  # linux/time.h: the clock that files are stamped with; Python has no name for it
STDIN_LIMIT = 1 << 20  # bytes that may wait for the code to read them
NO_TIMEOUT_S = 10 * 365 * 86400.0  # what the code is told of a timeout that there is not


class Send(Protocol):
    """How frames leave; see `Channel.send`."""

    def __call__(self, frame: Frame | None, *, more: bool = False) -> None: ...


class Execution:
    """One job in one sandbox. `result` is None while it runs."""

    def __init__(
        self,
        eid: str,
        job: dict[str, Any],
        note: dict[str, Any],
        limits: Limits,
        loop: Loop,
        send: Send,
        done: Callable[["Execution"], None],
    ) -> None:
        self.id = eid
        self.launcher: Launcher | Seatbelt | None = None
        self.result: Frame | None = None
        self.message = ""
        self.home = home_of(job)
        self._job = job
        self._note = note
        self._begun_at = time.monotonic()
        self._limits = limits
        self._send = send
        self._done = done
        self.changed: Callable[[int, float], Iterator[dict[str, Any]]] = lambda _since_ns, _begun: iter(())
        self._started = (0, 0.0)
        self._output = Output()
        self._value = bytearray()  # nobody needs it before the result: it comes with that, in one write
        self._early_stdin = bytearray(job.get("stdin", "").encode("utf-8", "surrogatepass"))
        self._stdin_open = bool(job.get("stdin_open"))
        self._kept: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()
        self._cause: str | None = None
        self._ooms = oom_kills()
        self._timeout_s: float | None = job["timeout_s"]
        self._deadline = time.monotonic() + (NO_TIMEOUT_S if self._timeout_s is None else self._timeout_s)
        self._timer = None
        if self._timeout_s is not None:
            self._timer = loop.call_later(self._timeout_s, lambda: self.stop("timeout"))

    def start(self, launcher: Launcher | Seatbelt) -> None:
        """Hand the job to a sandbox."""
        job = self._job
        self.launcher = launcher
        self._started = (file_clock_ns(), time.monotonic())
        launcher.program.on_output = self._on_output
        launcher.on_end = self._on_end
        launcher.start(
            {
                "code": job.get("code"),
                "argv": argv_of(job),
                "args": job.get("args", []),
                "handler": job.get("handler"),
                "event": job.get("event"),
                "context": job.get("context", {}),
                "env": job.get("env", {}),
                "timeout_s": self._timeout_s,
                "deadline": self._deadline,
            }
        )
        launcher.program.stdin.write(bytes(self._early_stdin))
        if not self._stdin_open:
            launcher.program.stdin.end()
        self._job = {}
        self._early_stdin.clear()

    def feed(self, data: bytes, *, close: bool) -> str:
        """Send all of the data to the code's stdin, or nothing: `taken`, `full` or `closed`."""
        stdin = None if self.launcher is None else self.launcher.program.stdin
        if self.result is not None or not self._stdin_open or (stdin is not None and stdin.ended):
            return "closed"
        if data and self.launcher is not None and not self.launcher.reads_stdin():
            return "closed"
        if data and len(data) + (len(self._early_stdin) if stdin is None else stdin.waiting) > STDIN_LIMIT:
            return "full"
        self._stdin_open = not close
        if stdin is None:  # no sandbox could be booted yet
            self._early_stdin += data
            return "taken"
        stdin.write(data)
        if close:
            stdin.end()
        return "taken"

    def stop(self, cause: str) -> None:
        """Kill the sandbox for this cause; the first one counts."""
        if self.result is not None or self._cause is not None:
            return
        self._cause = cause
        if self.launcher is None:
            self._on_end(End(None, None, 0.0, 0.0, 0, "the sandbox could not be started"))
        else:
            self.launcher.kill()

    def text(self, stream: str) -> bytes:
        """Return what was kept of one stream."""
        return self._output.whole(stream)

    def summary(self) -> Frame:
        """Return what a newly attached orchestrator must know of this execution."""
        return {
            "id": self.id,
            "seq": len(self._output),
            "done": self.result is not None,
            "note": self._note,
            "age_s": time.monotonic() - self._begun_at,
        }

    def resend(self, seq: int) -> None:
        """Send again what follows the numbered output frame `seq`."""
        for number in range(seq + 1, len(self._output) + 1):
            self._send_output(number, *self._output.piece(number), more=True)
        if self.result is not None:
            self._send(self.result)
        else:
            self._send(None)

    def _on_output(self, stream: str, data: bytes) -> None:
        self._seen[stream] += len(data)
        if self._seen[stream] > self._limits.drain_bytes:
            self.stop("output_limit")
        if room := self._limits.room(stream) - self._kept[stream]:
            self._kept[stream] += min(room, len(data))
            if stream == "value":
                self._value += data[:room]
            else:
                self._add_output(stream, data[:room])

    def _tell_artifacts(self) -> None:
        """Name the files that were made or changed since the start, as JSON lines on a stream of their own."""
        lines = b""
        for artifact in islice(self.changed(*self._started), ARTIFACTS + 1):
            line = json.dumps(artifact).encode() + b"\n"
            self._seen["artifact"] += len(line)
            if len(lines) + len(line) <= ARTIFACT_BYTES and lines.count(b"\n") < ARTIFACTS:
                lines += line
        self._kept["artifact"] = len(lines)
        self._add_output("artifact", lines, more=True)

    def _add_output(self, stream: str, data: bytes, *, more: bool = False) -> None:
        for piece in cut(stream, data):
            self._output.add(stream, piece)
            self._send_output(len(self._output), stream, piece, more=more)

    def _send_output(self, number: int, stream: str, data: bytes, *, more: bool) -> None:
        text = base64.b64encode(data).decode()
        self._send({"type": "output", "id": self.id, "seq": number, "stream": stream, "data": text}, more=more)

    def _on_end(self, end: End) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.message = end.message
        self._add_output("value", bytes(self._value), more=True)
        self._tell_artifacts()
        outcome, code, killer = self._outcome(end)
        self.result = {
            "type": "result",
            "id": self.id,
            "seq": len(self._output),
            "outcome": outcome,
            "exit_code": code,
            "signal": killer,
            "message": end.message,
            "launch_s": self._launch_s(end.wall_s),
            "wall_s": end.wall_s,
            "cpu_s": end.cpu_s,
            "max_rss_bytes": end.max_rss_bytes,
            "truncated": [name for name in self._seen if self._seen[name] > self._kept[name]],
        }
        self._send(self.result)
        self._done(self)

    def _launch_s(self, wall_s: float) -> float:
        """Return how long the job was here before a sandbox got it: one that still boots gets it later."""
        handed_at = None if self.launcher is None else self.launcher.program.handed_at
        if handed_at is None:  # a cell of a context; or no sandbox got it
            handed_at = max(self._begun_at, time.monotonic() - wall_s)
        return handed_at - self._begun_at

    def _outcome(self, end: End) -> tuple[str, int | None, int | None]:
        """Return outcome, exit code and signal.

        Judged by evidence: our own kill, the kernel's count of OOM kills, its word on the signal, bwrap's on the code.
        """
        if self._cause is not None:
            return self._cause, SIGKILL_EXIT, signal.SIGKILL
        if end.exit_code is None:
            return "killed", None, None
        if end.signal == signal.SIGKILL and oom_kills() > self._ooms:
            return "oom", end.exit_code, end.signal
        return ("ok" if end.exit_code == 0 else "error"), end.exit_code, end.signal


def file_clock_ns() -> int:
    """Return now as the change time of a file would say it."""
    return time.clock_gettime_ns(CLOCK_REALTIME_COARSE) if sys.platform == "linux" else time.time_ns()


def argv_of(job: dict[str, Any]) -> list[str] | None:
    """Return the command that the job is, None for code that a harness runs."""
    language = LANGUAGES[job.get("language", PYTHON)]
    if "argv" in job or language.harness:
        return job.get("argv")
    return language.argv(job["code"], job.get("args", []))
