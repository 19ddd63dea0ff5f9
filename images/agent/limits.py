"""What every execution of this container may use."""

import resource
from dataclasses import dataclass

RLIMIT_SIGPENDING = 11  # asm-generic/resource.h; Python has no name for it


@dataclass(slots=True, frozen=True)
class Limits:
    """What every execution of this container may use; sizes in bytes, of one stream where they name output.

    `preboot` says how many sandboxes of which language wait, `wheels` where in the image packages for pip are.
    """

    memory_bytes: int
    file_bytes: int
    processes: int
    open_files: int
    keep_bytes: int
    drain_bytes: int
    preboot: dict[str, int]
    wheels: str | None = None
    display_bytes: int = 8 << 20

    def room(self, stream: str) -> int:
        """Return how many bytes are kept of one stream."""
        return self.display_bytes if stream == "display" else self.keep_bytes

    def rlimits(self) -> dict[int, int]:
        """Return the resource limits of a sandbox's program."""
        return {
            resource.RLIMIT_NPROC: self.processes,
            resource.RLIMIT_NOFILE: self.open_files,
            resource.RLIMIT_FSIZE: self.file_bytes,
            resource.RLIMIT_DATA: self.memory_bytes,
            resource.RLIMIT_MEMLOCK: 65536,
            RLIMIT_SIGPENDING: 256,
        }
