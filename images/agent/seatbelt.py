"""The launcher of macOS, for the local engine alone: `sandbox-exec` and a process group instead of bubblewrap.

Weaker than bubblewrap: no namespaces and no second filter, and a process that leaves the group outlives
its execution. The profile was never tried on macOS; the tests drive the rest of it with a stand-in.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import End
from layout import Layout
from loop import Loop
from proc import SHELL_SIGNALS
from program import Program

PROFILE = """
(version 1)
(deny default)
(allow process-fork process-exec)
(allow signal (target same-sandbox))
(allow sysctl-read)
(allow ipc-posix-sem)
(allow file-read-metadata)
(allow file-read* (literal "/") (subpath "/usr") (subpath "/bin") (subpath "/System") (subpath "/Library/Frameworks")
    (subpath (param "PREFIX")) (subpath (param "SCRATCH")) (literal "/dev/null") (literal "/dev/zero")
    (literal "/dev/random") (literal "/dev/urandom") (subpath "/dev/fd"))
(allow file-read* file-write* (subpath (param "WORKSPACE")) (subpath (param "TMP")))
(allow file-write-data (literal "/dev/null") (literal "/dev/zero"))
(deny network*)
"""
# What macOS can limit for one process; `ulimit -f` counts blocks.
LIMITED = 'ulimit -c 0 && ulimit -n {files} && ulimit -f {blocks} && exec "$@"'
BLOCK = 512


class Seatbelt:
    """One sandboxed interpreter, booted ahead, given one job: used as a `Launcher` is."""

    def __init__(self, loop: Loop, layout: Layout, *, files: int, file_bytes: int, command: str) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self.on_end: Callable[[End], None] = lambda _end: None
        self.scratch = layout.make_scratch()
        self.program = Program(loop, self._become_ready)
        self._loop = loop
        self._order: dict[str, Any] | None = None
        limits = LIMITED.format(files=files, blocks=file_bytes // BLOCK)
        tmp = layout.scratch / str(self.scratch) / "tmp"
        self._spawn(["/bin/sh", "-c", limits, "sh", command, *confinement(layout, tmp)], layout.workspace, tmp)

    def start(self, job: dict[str, Any]) -> None:
        """Hand over the job; an interpreter that still boots gets it when it is ready."""
        self._order = job
        if self.program.ready:
            self.program.feed(job)

    def kill(self) -> None:
        """Kill the process group."""
        with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM for a group of dead processes
            os.killpg(self._pid, signal.SIGKILL)

    def reads_stdin(self) -> bool:
        """Tell whether stdin is open, as far as that is known: a pipe that nobody reads breaks by itself."""
        return True

    def _spawn(self, argv: list[str], workspace: Path, tmp: Path) -> None:
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(workspace), "TMPDIR": str(tmp)}
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in self.program.child_ends.items()]
        here = Path.cwd()
        os.chdir(workspace)  # posix_spawn has no working directory of its own
        try:
            self._pid = os.posix_spawn(argv[0], argv, environment, file_actions=actions, setpgroup=0)
        except OSError:
            self.program.abandon()
            raise
        finally:
            os.chdir(here)
        self.program.watch()
        self._ended_fd, report_fd = os.pipe()
        self._loop.add(self._ended_fd, self._finish)
        threading.Thread(target=self._wait, args=(report_fd,), daemon=True).start()

    def _wait(self, report_fd: int) -> None:
        """Wait in a thread: macOS has no descriptor of a process that `selectors` could watch."""
        _, self._status, self._usage = os.wait4(self._pid, 0)
        os.close(report_fd)

    def _become_ready(self) -> None:
        if self._order is not None:
            self.program.feed(self._order)
        self.on_ready()

    def _finish(self) -> None:
        """The interpreter is dead: kill what it left in its group, then collect."""
        ended_at = time.monotonic()
        self.kill()
        self._loop.remove(self._ended_fd)
        os.close(self._ended_fd)
        self.program.drain()
        killer = os.WTERMSIG(self._status) if os.WIFSIGNALED(self._status) else None
        self.on_end(
            End(
                exit_code=os.WEXITSTATUS(self._status) if killer is None else SHELL_SIGNALS + killer,
                signal=killer,
                wall_s=ended_at - (self.program.handed_at or ended_at),
                cpu_s=self._usage.ru_utime + self._usage.ru_stime,
                max_rss_bytes=self._usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
                message=self.program.boot_errors.decode(errors="replace").strip(),
            )
        )


def confinement(layout: Layout, tmp: Path) -> list[str]:
    """Return the arguments of `sandbox-exec` for one interpreter."""
    places = {"PREFIX": Path(sys.base_prefix), "SCRATCH": layout.scratch, "WORKSPACE": layout.workspace, "TMP": tmp}
    words = ["-p", PROFILE]
    for name, path in places.items():
        words += ["-D", f"{name}={path.resolve()}"]
    return [*words, sys.executable, "-I", "-S", "-u", str(layout.scratch / "bootstrap.pyc")]
