"""Starts and watches one bubblewrap sandbox: booted ahead, given one job, dead before it reports."""

import ctypes
import fcntl
import json
import marshal
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from layout import ARGS_FD, JOB_FD, SECCOMP_FD, STATUS_FD, Layout
from loop import WRITE, Loop

READ_SIZE = 64 * 1024
SHELL_SIGNALS = 128  # a shell, and bwrap, report death by signal N as exit code 128 + N
PIDFD_INFO_SIZE, PIDFD_INFO_EXIT = 64, 1 << 3  # linux/pidfd.h: the first version of struct pidfd_info
PIDFD_GET_INFO = 3 << 30 | PIDFD_INFO_SIZE << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
STREAMS = {1: "stdout", 2: "stderr", 3: "value"}
CLOSED = -1
CORE = 1  # bytes
RESERVED_FDS = 16  # descriptors below are a sandbox's own; see `reserve_descriptors`

OutputCallback = Callable[[str, bytes], None]


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
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    reserve_descriptors()


def reserve_descriptors() -> None:
    """Occupy the low descriptors, so that a source never equals a target of a child's dup2."""
    while (fd := os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)) < RESERVED_FDS:
        pass
    os.close(fd)


class Launcher:
    """One sandbox, from boot to the death of its last process.

    The owner sets `on_output` and `on_end` before `start`; `on_end` is called exactly once, when
    nothing of the sandbox is alive and all its output was delivered.
    """

    def __init__(self, loop: Loop, layout: Layout, seccomp: bytes, rlimits: dict[int, int], *, bwrap: str) -> None:
        self.on_output: OutputCallback = lambda _stream, _data: None
        self.on_end: Callable[[End], None] = lambda _end: None
        self.ready = False
        self.started_at: float | None = None
        self._loop = loop
        self._layout = layout
        self._rlimits = rlimits
        self._order: tuple[dict[str, Any], bytes] | None = None
        self._program_fd = CLOSED
        self._exit_code: int | None = None
        self._signal: int | None = None
        self._ended_at: float | None = None
        self._init_pid: int | None = None
        self._init_fd = CLOSED
        self._boot_cpu_s = 0.0
        self._killed_usage: list[tuple[float, int]] = []
        self._boot_errors = b""
        self._pending: dict[int, memoryview] = {}
        self._status = b""
        self._dying = False
        self.scratch = layout.make_scratch()
        self._spawn(bwrap, layout.arguments(self.scratch), seccomp)

    def start(self, job: dict[str, Any], stdin: bytes) -> None:
        """Hand over the job; a sandbox that still boots gets it when it is ready."""
        self.started_at = time.monotonic()
        self._order = (job, stdin)
        if self.ready:
            self._hand_over()

    def kill(self) -> None:
        """Kill the sandbox through the init of its pid namespace: with it dies every process in it."""
        if not self._dying:
            self._dying = True
            self._killed_usage = [usage(pid) for pid in descendants(self._init_pid)]
        try:
            if self._init_fd != CLOSED:
                signal.pidfd_send_signal(self._init_fd, signal.SIGKILL)
            elif self._init_pid is None:  # not cloned yet, or not reported: nothing of the user ran
                os.kill(self._pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    # --- boot

    def _spawn(self, bwrap: str, arguments: bytes, seccomp: bytes) -> None:
        """Start bwrap without environment; its arguments follow once it is first in line for the OOM killer."""
        inward = {fd: os.pipe() for fd in (0, JOB_FD, ARGS_FD, SECCOMP_FD)}
        outward = {fd: os.pipe() for fd in (1, 2, 3, STATUS_FD)}
        theirs = {fd: pair[0] for fd, pair in inward.items()} | {fd: pair[1] for fd, pair in outward.items()}
        argv = [bwrap, "--args", str(ARGS_FD), "--", *self._layout.program]
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in theirs.items()]
        try:
            self._pid = os.posix_spawn(bwrap, argv, {}, file_actions=actions, setsigdef=[signal.SIGPIPE])
        except OSError:
            for pair in (*inward.values(), *outward.values()):
                os.close(pair[0])
                os.close(pair[1])
            raise
        for fd in theirs.values():
            os.close(fd)
        ours = {fd: pair[1] for fd, pair in inward.items()} | {fd: pair[0] for fd, pair in outward.items()}
        adjust = os.open(f"/proc/{self._pid}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        os.write(adjust, b"1000")
        os.close(adjust)
        for target, data in ((ARGS_FD, arguments), (SECCOMP_FD, seccomp)):
            os.write(ours[target], data)  # both fit a pipe
            os.close(ours[target])
        self._stdin, self._job, self._status_fd = ours[0], ours[JOB_FD], ours[STATUS_FD]
        self._outputs = {fd: ours[fd] for fd in STREAMS}
        for fd in (self._stdin, self._job, self._status_fd, *self._outputs.values()):
            os.set_blocking(fd, False)
        self._loop.add(self._status_fd, self._read_status)
        for stream, fd in self._outputs.items():
            self._loop.add(fd, lambda stream=stream: self._read(stream))  # type: ignore[misc]

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

    def _become_ready(self) -> None:
        """Limit the sandbox from outside, before anything of the user is in it."""
        self.ready = True
        pids = list(descendants(self._init_pid))
        self._boot_cpu_s = sum(running_s(pid) for pid in (self._pid, self._init_pid, *pids))
        try:
            (self._program_pid,) = pids
            self._program_fd = os.pidfd_open(self._program_pid)
            self._limit(self._rlimits)
        except (OSError, ValueError) as error:
            self._boot_errors = f"the sandbox could not be limited: {error}".encode()
            self.kill()
            return
        if self._order is not None:
            self._hand_over()

    def _hand_over(self) -> None:
        assert self._order is not None
        job, stdin = self._order
        cpu_s = int(job["timeout_s"]) + 2  # should the kill at the timeout ever fail
        try:
            self._limit({resource.RLIMIT_CPU: cpu_s})
        except OSError:  # it died while it waited: its end follows
            return
        self._feed(self._job, marshal.dumps(job))
        self._feed(self._stdin, stdin)

    def _limit(self, rlimits: dict[int, int]) -> None:
        for limit, value in rlimits.items():
            resource.prlimit(self._program_pid, limit, (value, value))

    # --- streams

    def _feed(self, fd: int, data: bytes) -> None:
        """Write the data into a pipe of the sandbox, as far as it takes it, then close the pipe."""
        view = memoryview(data)
        try:
            view = view[os.write(fd, view) :] if view else view
        except BlockingIOError:
            pass
        except BrokenPipeError:
            view = memoryview(b"")
        if not view:
            self._close_inward(fd)
        else:
            if fd not in self._pending:
                self._loop.add(fd, lambda: self._feed(fd, self._pending[fd]), WRITE)  # type: ignore[arg-type]
            self._pending[fd] = view

    def _close_inward(self, fd: int) -> None:
        if self._pending.pop(fd, None) is not None:
            self._loop.remove(fd)
        os.close(fd)
        if fd == self._job:
            self._job = CLOSED
        else:
            self._stdin = CLOSED

    def _read(self, stream: int) -> None:
        data = read(self._outputs[stream])
        if data == b"":
            self._close_output(stream)
        elif data is not None:
            self._deliver(stream, data)

    def _deliver(self, stream: int, data: bytes) -> None:
        if self.ready:
            self.on_output(STREAMS[stream], data)
        elif stream == 3:
            self._become_ready()
            if data[1:]:
                self.on_output(STREAMS[stream], data[1:])
        else:
            self._boot_errors = (self._boot_errors + data)[:4096]

    def _close_output(self, stream: int) -> None:
        self._close(self._outputs.pop(stream))

    # --- end

    def _finish(self) -> None:
        ended_at = self._ended_at or time.monotonic()
        # bwrap's own peak is the agent's, from before its exec; the init and what it reaped tell the user's.
        cpu_s, peak = wait(self._pid)
        reaped = [*self._killed_usage, wait(self._init_pid)]
        for stream in list(self._outputs):
            while stream in self._outputs:  # every writer is dead: the end of the pipe is certain
                self._read(stream)
        for fd in (self._job, self._stdin):
            if fd != CLOSED:
                self._close_inward(fd)
        if self._program_fd != CLOSED:
            os.close(self._program_fd)
        self.on_end(
            End(
                exit_code=self._exit_code,
                signal=self._signal,
                wall_s=ended_at - (self.started_at or ended_at),
                cpu_s=max(0.0, cpu_s + sum(cpu for cpu, _ in reaped) - self._boot_cpu_s),
                max_rss_bytes=max(rss for _, rss in reaped) or peak,
                message=self._boot_errors.decode(errors="replace").strip(),
            )
        )


def signal_of(program_fd: int, exit_code: int) -> int | None:
    """Return the signal that killed a process; its exit code alone does not tell `exit(137)` from SIGKILL."""
    info = bytearray(PIDFD_INFO_SIZE)
    info[0] = PIDFD_INFO_EXIT
    try:
        fcntl.ioctl(program_fd, PIDFD_GET_INFO, info)
        if info[0] & PIDFD_INFO_EXIT:
            status = int.from_bytes(info[-4:], sys.byteorder)
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    except OSError:  # before Linux 6.15
        pass
    return exit_code - SHELL_SIGNALS if SHELL_SIGNALS < exit_code <= SHELL_SIGNALS + signal.NSIG else None


def read(fd: int) -> bytes | None:
    """Read what is there: None when nothing is, empty at the end."""
    try:
        return os.read(fd, READ_SIZE)
    except BlockingIOError:
        return None


def wait(pid: int | None) -> tuple[float, int]:
    """Reap a dead process if it is ours: CPU seconds and peak resident bytes of it and of what it reaped."""
    try:
        _, _, facts = os.wait4(pid or 0, 0)
    except ChildProcessError:
        return 0.0, 0
    return facts.ru_utime + facts.ru_stime, facts.ru_maxrss * 1024


def descendants(pid: int | None) -> Iterator[int]:
    """Yield the pids of all living processes below one."""
    for child in read_proc(pid, f"task/{pid}/children").split():
        yield int(child)
        yield from descendants(int(child))


def usage(pid: int) -> tuple[float, int]:
    """Return what a living process and the children that it reaped used: CPU seconds, peak resident bytes.

    A pid namespace that is killed takes the accounts of its processes with it, so they are read before.
    """
    fields = read_proc(pid, "stat").rpartition(b")")[2].split()
    peak = read_proc(pid, "status").partition(b"VmHWM:")[2].split()
    ticks = sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime; proc(5)
    return ticks / os.sysconf("SC_CLK_TCK"), int(peak[0]) * 1024 if peak else 0


def running_s(pid: int | None) -> float:
    """Return the CPU seconds of a process's main thread."""
    words = read_proc(pid, "schedstat").split()
    return int(words[0]) / 1e9 if words else 0.0


def read_proc(pid: int | None, name: str) -> bytes:
    """Read a file of /proc/PID; empty when the process is gone."""
    try:
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, READ_SIZE)
        finally:
            os.close(fd)
    except OSError:
        return b""
