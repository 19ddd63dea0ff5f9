"""What the host tells of a process: its CPU time and its memory."""

import os
from pathlib import Path


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pss_mib(pid: int) -> float:
    """Return a process's proportional share of memory."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024


def memory_mib(pid: int, name: str = "VmRSS") -> float:
    """Return how much memory of a process is resident, or by another name of proc(5) another figure."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) / 1024


def forget_peak(pid: int) -> None:
    """Let VmHWM begin anew; proc(5)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
