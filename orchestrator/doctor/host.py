"""What this host can isolate, judged by what its kernel and its programs say."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from orchestrator.doctor.report import Finding, Status

FILES = {
    "clone": "/proc/sys/kernel/unprivileged_userns_clone",
    "namespaces": "/proc/sys/user/max_user_namespaces",
    "apparmor": "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "actions": "/proc/sys/kernel/seccomp/actions_avail",
    "status": "/proc/self/status",
    "mounts": "/proc/self/mounts",
    "core_pattern": "/proc/sys/kernel/core_pattern",
}
BWRAP_WANTED = (0, 8)  # from here on it has --disable-userns


# The checks are pure functions over what was read; None stands for a file that does not exist.


def host_findings(texts: Mapping[str, str | None], bwrap: str | None, *, system: str, engine: str) -> list[Finding]:
    """Judge the host by the texts of FILES and the output of `bwrap --version`."""
    if system != "Linux":
        hint = "containers run in the engine's own Linux: see what they report"
        return [_host("platform", "warning", system, hint)]
    return [
        _host("platform", "ok", system),
        check_user_namespaces(texts["clone"], texts["namespaces"], texts["apparmor"]),
        check_seccomp(texts["actions"], texts["status"] or ""),
        check_cgroup(texts["mounts"] or ""),
        check_core_pattern(texts["core_pattern"], engine=engine),
        check_bwrap(bwrap, engine=engine),
    ]


def check_user_namespaces(clone: str | None, namespaces: str | None, apparmor: str | None) -> Finding:
    """Judge whether processes without root may make user namespaces, which bubblewrap needs."""
    obstacles = []
    if clone is not None and clone.strip() == "0":
        obstacles.append("kernel.unprivileged_userns_clone=0: set it to 1")
    if namespaces is None:
        obstacles.append("the kernel has no user namespaces: it needs CONFIG_USER_NS")
    elif namespaces.strip() == "0":
        obstacles.append("user.max_user_namespaces=0: set it to 10000 or more")
    if apparmor is not None and apparmor.strip() == "1":
        obstacles.append(
            "kernel.apparmor_restrict_unprivileged_userns=1: set it to 0, or load a profile that allows them"
        )
    if obstacles:
        return _host("user namespaces", "warning", "perhaps not for everyone", "; ".join(obstacles))
    return _host("user namespaces", "ok", "open to processes without root")


def check_seccomp(actions: str | None, status: str) -> Finding:
    """Judge whether the kernel filters system calls, and tells how many filters a process has."""
    if actions is None or "errno" not in actions.split():
        return _host("seccomp", "warning", "no filters", "the kernel needs CONFIG_SECCOMP_FILTER")
    if "Seccomp_filters:" not in status:
        hint = "use a kernel from 5.9 on: this one does not report Seccomp_filters, so the self-test cannot count them"
        return _host("seccomp", "warning", "filters, but uncounted", hint)
    return _host("seccomp", "ok", "filters, and reports their number")


def check_cgroup(mounts: str) -> Finding:
    """Tell the version of the control groups that are mounted."""
    points = {(fields[1], fields[2]) for line in mounts.splitlines() if len(fields := line.split()) > 2}
    if ("/sys/fs/cgroup", "cgroup2") in points:
        return _host("cgroup", "ok", "version 2")
    if any(kind == "cgroup" for _, kind in points):
        return _host("cgroup", "ok", "version 1")
    return _host("cgroup", "warning", "none mounted", "mount cgroup2 at /sys/fs/cgroup: Docker's limits need it")


def check_core_pattern(pattern: str | None, *, engine: str) -> Finding:
    """Judge whether the dump of a sandboxed program would be handed to a program of the host, run as its root."""
    if pattern is None or not pattern.startswith("|"):
        return _host("core dumps", "ok", "not piped to a program of this host")
    receiver = pattern[1:].strip().partition(" ")[0]
    if engine == "docker":
        return _host("core dumps", "ok", f"piped to {receiver}, but not from containers: their core limit is 1")
    hint = "set kernel.core_pattern=core, or start the service with `ulimit -c 1`"
    return _host("core dumps", "warning", f"those of sandboxes too are piped to {receiver}", hint)


def check_bwrap(version: str | None, *, engine: str) -> Finding:
    """Judge the host's bubblewrap; containers bring their own. `version` is what `bwrap --version` says."""
    if engine == "docker":
        return _host("bubblewrap", "skipped", "the image brings its own")
    if version is None:
        return _host("bubblewrap", "MISSING", "not installed", "install the package `bubblewrap`")
    number = version.split()[-1] if version.split() else "?"
    if _numbers(number) < BWRAP_WANTED:
        hint = "use 0.8 or newer: older ones cannot forbid user namespaces within the sandbox"
        return _host("bubblewrap", "warning", f"version {number}", hint)
    return _host("bubblewrap", "ok", f"version {number}")


def _host(name: str, status: Status, detail: str, hint: str = "") -> Finding:
    return Finding(about="host", name=name, status=status, detail=detail, hint=hint)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def read(path: str) -> str | None:
    """Return a file's text, None when there is none to be had."""
    try:
        return Path(path).read_text()
    except OSError:
        return None


def bwrap_version() -> str | None:
    """Return what `bwrap --version` says, None where it is not installed."""
    if shutil.which("bwrap") is None:
        return None
    return subprocess.run(["bwrap", "--version"], check=False, capture_output=True, text=True).stdout
