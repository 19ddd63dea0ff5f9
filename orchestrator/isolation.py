"""Judge what a container's self-test saw: which layers of isolation are active, which are missing."""

from collections.abc import Mapping
from typing import Any

REFUSED = {"EPERM", "EACCES", "EROFS", "ENOSYS", "ENOSPC"}  # ENOSPC: the limit on user namespaces is 0
UNREACHABLE = {"ENETUNREACH", "EHOSTUNREACH", "EPERM", "EACCES"}
SANDBOX_UID = 1000
HINTS = {
    "container": "run on the Docker engine",
    "user_namespace": "the host must allow unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, "
    "user.max_user_namespaces above 0, kernel.apparmor_restrict_unprivileged_userns=0 or a profile that allows them)",
    "pid_namespace": "bubblewrap must be able to mount a fresh /proc",
    "outer_seccomp": "the engine must apply the container's seccomp profile; check its `seccomp` option",
    "inner_seccomp": "the kernel must have CONFIG_SECCOMP_FILTER and report Seccomp_filters (5.9 or newer)",
    "no_new_privs": "the engine must support no-new-privileges",
    "no_capabilities": "the engine must drop all capabilities",
    "no_network": "the container must have no interface but lo",
    "read_only_root": "the sandbox's root, /usr and /proc must be read-only",
    "limits": "the agent must be able to set resource limits on a sandbox (prlimit)",
    "seatbelt": "only macOS has it: /usr/bin/sandbox-exec must work",
    "own_uid": "the container must run under the user id that was chosen for it",
}

# What bubblewrap says when it cannot make a sandbox at all, and what stands in its way.
COMPLAINTS = {
    "new namespace": HINTS["user_namespace"],
    "uid map": HINTS["user_namespace"],
    "make / slave": "the container's AppArmor or SELinux profile must allow mounts: Docker's own, docker-default, does not",
    "mount proc": HINTS["pid_namespace"],
    "Unknown option": "the image's bubblewrap must be 0.8 or newer",
}


def judge(canary: Mapping[str, Any], *, engine: str, uid: int) -> dict[str, bool]:
    """Return each layer with whether the self-test proves it. What the report lacks is not proven."""

    def refused(*names: str) -> bool:
        return all(str(canary.get(name)) in REFUSED for name in names)

    filters, outer = _count(canary.get("seccomp_filters")), _count(canary.get("agent_seccomp"))
    processes, limits = canary.get("processes"), canary.get("limits")
    layers = {
        "container": engine == "docker",
        "user_namespace": canary.get("uid") == SANDBOX_UID and refused("unshare"),
        "pid_namespace": isinstance(processes, int) and 0 < processes <= 3,
        "outer_seccomp": outer >= 1,
        "inner_seccomp": filters > outer >= 0,
        "no_new_privs": canary.get("no_new_privs") == 1,
        "no_capabilities": canary.get("capabilities") == 0,
        "no_network": canary.get("interfaces") == ["lo"] and str(canary.get("connect")) in UNREACHABLE,
        "read_only_root": refused("write_root", "write_usr", "write_proc"),
        "limits": isinstance(limits, dict) and len(limits) > 0 and all(_finite(value) for value in limits.values()),
        "own_uid": canary.get("agent_uid") == uid,
    }
    if canary.get("platform") == "darwin":
        layers["seatbelt"] = refused("write_root", "write_usr") and str(canary.get("connect")) in UNREACHABLE
    return layers


def _count(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _finite(limit: Any) -> bool:
    return _count(limit) >= 0  # RLIM_INFINITY is -1


def explain(missing: set[str]) -> str:
    """Return a sentence that names the missing layers and what to change."""
    return "; ".join(f"{layer} is missing: {HINTS[layer]}" for layer in sorted(missing))


def explain_complaint(said: str) -> str:
    """Return what the agent said when its self-test did not run, with what to change where that is known."""
    hints = [hint for words, hint in COMPLAINTS.items() if words in said]
    return f"{said}: {hints[0]}" if hints else said
