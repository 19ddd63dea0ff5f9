"""Starts and watches one bubblewrap sandbox: booted ahead, given one job, dead before it reports."""

import ctypes
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from inlet import CLOSED
from languages import Language
from layout import ARGS_FD, SECCOMP_FD, STATUS_FD, Layout
from loop import Loop
from proc import descendants, is_read, running_s, signal_of, usage, wait, write
from program import Program, read

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
CORE = 1  # bytes
RESERVED_FDS = 16  # descriptors below are a sandbox's own; see `reserve_descriptors`
CPU_MARGIN_S = 2  # CPU time beyond the timeout, should the kill at the timeout ever fail
NICE = 5  # of the code, above the agent's own


@dataclass(slots=True, frozen=True)
class End:
    """How a sandbox ended. `exit_code` is None when bwrap reported none: the user's code did not end it.

    `signal` is what killed its program: the kernel's word where it gives it, else a shell's reading of the exit code.
    """

    exit_code: int | None
    signal: int | None
    wall_s: float
    cpu_s: float
    max_rss_bytes: int
    message: str


def prepare_process() -> None:
    """Make this process the reaper of every orphan below it, so that their usage can be read.

    No core is dumped below it; a limit of 1 keeps dumps from a handler that the host pipes them to, core(5).
    """
    with suppress(ValueError):  # the hard limit is 0: as good
        resource.setrlimit(resource.RLIMIT_CORE, (CORE, CORE))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reserve_descriptors()


def reserve_descriptors() -> None:
    """Occupy the low descriptors, so that a source never equals a target of a child's dup2."""
    while (fd := os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) < RESERVED_FDS:
        pass
    os.close(fd)


class Launcher:
    """One sandbox, from boot to the death of its last process.

    The owner sets `program.on_output` and `on_end` before `start`; `on_end` is called exactly once,
    when nothing of the sandbox is alive and all its output was delivered.
    """

    def __init__(
        self,
        loop: Loop,
        layout: Layout,
        language: Language,
        seccomp: bytes,
        rlimits: dict[int, int],
        *,
        bwrap: str,
        devices: tuple[str, ...] = (),
        program: type[Program] = Program,
    ) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self.on_end: Callable[[End], None] = lambda _end: None
        self.scratch = layout.make_scratch()
        self.program = program(loop, self._become_ready, pack=language.pack)
        self._loop = loop
        self._layout = layout
        self._rlimits = rlimits
        self._order: dict[str, Any] | None = None
        self._ended_at: float | None = None
        self._exit_code: int | None = None
        self._signal: int | None = None
        self._pid: int | None = None
        self._init_pid: int | None = None
        self._init_fd = self._status_fd = self._program_fd = CLOSED
        self._boot_cpu_s = 0.0
        self._killed_usage: list[tuple[float, int]] = []
        self._status = b""
        self._dying = False
        command = [bwrap, "--args", str(ARGS_FD), "--", *language.command(rlimits[resource.RLIMIT_DATA])]
        self._spawn(command, layout.arguments(self.scratch, language.harness, devices), seccomp)

    def start(self, job: dict[str, Any]) -> None:
        """Hand over the job; a sandbox that still boots gets it when it is ready."""
        self._order = job
        if self.program.ready:
            self._hand_over()

    def kill(self) -> None:
        """Kill the sandbox through the init of its pid namespace: with it dies every process in it."""
        if not self._dying:
            self._dying = True
            self._killed_usage = [usage(pid) for pid in descendants(self._init_pid)]
        # An init that was not reported yet is killed when it is: it would survive bwrap, which it then waits for, forever.
        if self._init_fd != CLOSED:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._init_fd, signal.SIGKILL)

    def interrupt(self) -> None:
        """Interrupt the program, and it alone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._program_fd, signal.SIGINT)

    def pids(self) -> list[int]:
        """Return the sandbox's init and all living processes below it."""
        return [] if self._init_pid is None else [self._init_pid, *descendants(self._init_pid)]

    def reads_stdin(self) -> bool:
        """Tell whether anything in the sandbox has its stdin open. bwrap has it always: the pipe does not break."""
        if self._init_pid is None or self._program_fd == CLOSED:
            return True
        return is_read(self.program.stdin.name, self._init_pid, self._program_pid)

    # --- boot

    def _spawn(self, command: list[str], arguments: bytes, seccomp: bytes) -> None:
        """Start bwrap without environment; its arguments follow once it is first in line for the OOM killer."""
        args_fd, our_args = os.pipe()
        seccomp_fd, our_seccomp = os.pipe()
        self._status_fd, status_fd = os.pipe()
        own = {ARGS_FD: args_fd, SECCOMP_FD: seccomp_fd, STATUS_FD: status_fd}
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in (self.program.child_ends | own).items()]
        try:
            self._pid = os.posix_spawn(command[0], command, {}, file_actions=actions, setsigdef=[signal.SIGPIPE])
            write(f"/proc/{self._pid}/oom_score_adj", b"1000")
            os.write(our_args, arguments)  # it fits a pipe, and so does the filter
            os.write(our_seccomp, seccomp)
        except OSError:
            self.program.abandon()
            os.close(self._status_fd)
            if self._pid is not None:  # it waits for its arguments: nothing is below it
                os.kill(self._pid, signal.SIGKILL)
                wait(self._pid)
            self._layout.unmake_scratch(self.scratch)
            raise
        finally:
            for fd in (*own.values(), our_args, our_seccomp):
                os.close(fd)
        self.program.watch()
        os.set_blocking(self._status_fd, False)
        self._loop.add(self._status_fd, self._read_status)

    def _read_status(self) -> None:
        """Read bwrap's reports: the pid of the sandbox's init, later the exit code of its program."""
        data = read(self._status_fd)
        self._status += data or b""
        *lines, self._status = self._status.split(b"\n")
        for line in lines:
            facts = json.loads(line)
            if "child-pid" in facts:
                self._hold_init(int(facts["child-pid"]))
            if "exit-code" in facts:
                self._exit_code = int(facts["exit-code"])
                self._ended_at = time.monotonic()
                self._signal = signal_of(self._program_fd, self._exit_code)
                self.kill()
        if data == b"":  # bwrap is gone
            self._status_fd = self._close(self._status_fd)
            self._settle()

    def _hold_init(self, pid: int) -> None:
        try:
            self._init_fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        self._init_pid = pid
        self._loop.add(self._init_fd, self._init_died)
        if self._dying:
            self.kill()

    def _become_ready(self) -> None:
        """Limit the sandbox from outside, before anything of the user is in it."""
        pids = list(descendants(self._init_pid))
        self._boot_cpu_s = sum(running_s(pid) for pid in (self._pid, self._init_pid, *pids))
        try:
            (self._program_pid,) = pids
            self._program_fd = os.pidfd_open(self._program_pid)
            self._limit(self._rlimits)
            self._step_back()
        except (OSError, ValueError) as error:
            self.program.boot_errors = f"the sandbox could not be limited: {error}".encode()
            self.kill()
            return
        if self._order is not None:
            self._hand_over()
        self.on_ready()

    def _hand_over(self) -> None:
        assert self._order is not None
        with suppress(ProcessLookupError):  # it died while it waited: its end follows
            if (timeout_s := self._order["timeout_s"]) is not None:
                self._limit({resource.RLIMIT_CPU: int(timeout_s) + CPU_MARGIN_S})
            try:
                self.program.feed(self._order)
            except (ValueError, RecursionError) as error:  # nested deeper than what packs it goes
                self.program.boot_errors = f"the job cannot be handed over: {error}".encode()
                self.kill()

    def _limit(self, rlimits: dict[int, int]) -> None:
        for limit, value in rlimits.items():
            resource.prlimit(self._program_pid, limit, (value, value))

    def _step_back(self) -> None:
        """Let the agent and bubblewrap go before the code.

        The kernel lets one process of the host at a time wait for what taking a mount namespace apart waits for. One that
        has its turn, and waits for the CPU behind a fork bomb of its own container, keeps the boots of all containers waiting.
        """
        nice = os.getpriority(os.PRIO_PROCESS, 0) + NICE
        for thread in os.listdir(f"/proc/{self._program_pid}/task"):
            with suppress(ProcessLookupError):  # a thread of node's that has just ended
                os.setpriority(os.PRIO_PROCESS, int(thread), nice)

    # --- end

    def _init_died(self) -> None:
        self._init_fd = self._close(self._init_fd)
        self._settle()

    def _close(self, fd: int) -> int:
        self._loop.remove(fd)
        os.close(fd)
        return CLOSED

    def _settle(self) -> None:
        """Finish once both are gone: bwrap, which has told all it knows, and the init, and so all below it."""
        if self._status_fd == CLOSED and self._init_fd == CLOSED:
            self._finish()

    def _finish(self) -> None:
        ended_at = self._ended_at or time.monotonic()
        # bwrap's own peak is the agent's, from before its exec; the init and what it reaped tell the user's.
        cpu_s, peak = wait(self._pid)
        reaped = [*self._killed_usage, wait(self._init_pid)]
        self.program.drain()
        if self._program_fd != CLOSED:
            os.close(self._program_fd)
        self.on_end(
            End(
                exit_code=self._exit_code,
                signal=self._signal,
                wall_s=ended_at - (self.program.handed_at or ended_at),
                cpu_s=max(0.0, cpu_s + sum(cpu for cpu, _ in reaped) - self._boot_cpu_s),
                max_rss_bytes=max(rss for _, rss in reaped) or peak,
                message=self.program.boot_errors.decode(errors="replace").strip(),
            )
        )
