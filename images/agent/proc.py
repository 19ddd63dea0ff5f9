"""What the kernel tells of processes: who lives, what they used, how they ended."""

import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

READ_SIZE = 64 * 1024
OOM_COUNTERS = ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")
SHELL_SIGNALS = 128  # a shell, and bwrap, report death by signal N as exit code 128 + N
PIDFD_INFO_SIZE, PIDFD_INFO_EXIT = 64, 1 << 3  # linux/pidfd.h: the first version of struct pidfd_info
PIDFD_GET_INFO = 3 << 30 | PIDFD_INFO_SIZE << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)


def signal_of(program_fd: int, exit_code: int) -> int | None:
    """Return the signal that killed a process; its exit code alone does not tell `exit(137)` from SIGKILL."""
    info = bytearray(PIDFD_INFO_SIZE)
    info[0] = PIDFD_INFO_EXIT
    try:
        fcntl.ioctl(program_fd, PIDFD_GET_INFO, info)
        if info[0] & PIDFD_INFO_EXIT:
            status = int.from_bytes(info[-4:], sys.byteorder)
            return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    except (OSError, ValueError):  # before Linux 6.15; or the sandbox ended before its program was there
        pass
    return exit_code - SHELL_SIGNALS if SHELL_SIGNALS < exit_code < SHELL_SIGNALS + signal.NSIG else None


def wait(pid: int | None) -> tuple[float, int]:
    """Reap a dead process if it is ours: CPU seconds and peak resident bytes of it and of what it reaped."""
    if pid is None:
        return 0.0, 0
    try:
        _, _, facts = os.wait4(pid, 0)
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


def spent(pids: list[int]) -> float:
    """Return the CPU seconds of these processes: their main threads' to the microsecond, the rest in ticks."""
    return sum(max(usage(pid)[0], running_s(pid)) for pid in pids)


def forget_peaks(pids: list[int]) -> None:
    """Let the peaks of resident memory begin anew."""
    for pid in pids:
        with suppress(OSError):  # it is gone; or the kernel does not let us, then the peak is that of its life
            write(f"/proc/{pid}/clear_refs", b"5")


def is_read(pipe: str, init: int, likely: int) -> bool:
    """Tell whether anything below a sandbox's init has a pipe open; `likely` is looked at first, most often alone.

    What hands the pipe on while it is looked for may be missed: none has it only when twice none had.
    """
    if has_open(likely, pipe) or any(has_open(pid, pipe) for pid in below(init)):
        return True
    return any(has_open(pid, pipe) for pid in below(init))


def below(pid: int) -> Iterator[int]:
    """Yield the pids of all living processes below one, also of those that another thread than the main one began."""
    with suppress(OSError):  # it has just ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            for child in map(int, read_proc(pid, f"task/{thread}/children").split()):
                yield child
                yield from below(child)


def has_open(pid: int, pipe: str) -> bool:
    """Tell whether a process has a pipe open, or may have: one can forbid to look."""
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):  # it has just ended
        try:
            for name in os.listdir(folder):
                with suppress(FileNotFoundError):  # closed by now
                    if os.readlink(f"{folder}/{name}") == pipe:
                        return True
        except PermissionError:
            # Nor can it be seen of the dead, whose other threads may live.
            return b"\nState:\tZ" not in read_proc(pid, "status") or len(os.listdir(f"/proc/{pid}/task")) > 1
    return False


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


def write(path: str, data: bytes) -> None:
    """Write a file that exists, in one call."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def oom_kills() -> int:
    """Return how many processes of this container the kernel's OOM killer has killed."""
    _, _, rest = os.pread(oom_counter(), 4096, 0).partition(b"oom_kill ")
    return int(rest.split(None, 1)[0]) if rest else 0


@cache
def oom_counter() -> int:
    """Return a descriptor of the cgroup's count of OOM kills; an empty file where there is none."""
    for path in OOM_COUNTERS:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
