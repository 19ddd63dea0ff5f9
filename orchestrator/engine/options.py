"""What Docker holds a container to; docs/architecture.md ("The container") has the reason for each option."""

from typing import Any

from orchestrator.engine import Spec

PIDS = 160
FILES = 1024
INODES = 4096
LOCK_PIDS, LOCK_BYTES = 16, 64 << 20
HARD: dict[str, Any] = {
    "network_mode": "none",
    "read_only": True,
    "cap_drop": ["ALL"],
    "init": True,
    "log_config": {"type": "none"},
}
NO_NEW_PRIVILEGES = "no-new-privileges:true"


def container_options(spec: Spec, *, cpus: float, seccomp: str) -> dict[str, Any]:
    """Return the host config of a session's container, in docker-py's words, on a host with so many CPUs."""
    profile = [] if spec.apparmor_profile is None else [f"apparmor={spec.apparmor_profile}"]

    def tmpfs(size: int) -> str:
        return f"rw,nosuid,nodev,exec,size={size},nr_inodes={INODES},uid={spec.uid},gid={spec.uid},mode=0700"

    return HARD | {
        "security_opt": [NO_NEW_PRIVILEGES, f"seccomp={seccomp}", *profile],
        "pids_limit": PIDS,
        "mem_limit": spec.memory_bytes,
        "memswap_limit": spec.memory_bytes,
        "nano_cpus": int(min(spec.cpus, cpus) * 1e9),
        "ulimits": [
            {"name": "core", "soft": 1, "hard": 1},  # 1 also stops dumps into a pipe; core(5)
            {"name": "nofile", "soft": FILES, "hard": FILES},
        ],
        "tmpfs": {"/workspace": tmpfs(spec.workspace_bytes), "/scratch": tmpfs(spec.scratch_bytes)},
        "runtime": spec.runtime,
    }


def lock_options() -> dict[str, Any]:
    """Return the host config of the container that is an instance's lock; it ends with its only client."""
    return HARD | {
        "security_opt": [NO_NEW_PRIVILEGES],
        "pids_limit": LOCK_PIDS,
        "mem_limit": LOCK_BYTES,
        "memswap_limit": LOCK_BYTES,
        "auto_remove": True,
    }
