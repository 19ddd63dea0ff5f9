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
    "own_uid": "the container must run under the user id that was chosen for it",
}


def judge(canary: Mapping[str, Any], *, engine: str, uid: int) -> dict[str, bool]:
    """Return each layer with whether the self-test proves it. What the report lacks is not proven."""

    def refused(*names: str) -> bool:
        return all(canary.get(name) in REFUSED for name in names)

    filters, outer = canary.get("seccomp_filters"), canary.get("agent_seccomp")
    counted = isinstance(filters, int) and isinstance(outer, int)
    processes = canary.get("processes")
    return {
        "container": engine == "docker",
        "user_namespace": canary.get("uid") == SANDBOX_UID and refused("unshare"),
        "pid_namespace": isinstance(processes, int) and 0 < processes <= 3,
        "outer_seccomp": counted and outer >= 1,
        "inner_seccomp": counted and filters > outer,
        "no_new_privs": canary.get("no_new_privs") == 1,
        "no_capabilities": canary.get("capabilities") == 0,
        "no_network": canary.get("interfaces") == ["lo"] and canary.get("connect") in UNREACHABLE,
        "read_only_root": refused("write_root", "write_usr", "write_proc"),
        "own_uid": canary.get("agent_uid") == uid,
    }


def explain(missing: set[str]) -> str:
    """Return a sentence that names the missing layers and what to change."""
    return "; ".join(f"{layer} is missing: {HINTS[layer]}" for layer in sorted(missing))
