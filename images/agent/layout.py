"""What a sandbox sees: the arguments of bwrap, and the directories of one execution.

The order of bwrap's operations is the order of the arguments. Each choice is explained in
docs/architecture.md ("The sandbox").
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from languages import HARNESSES, PATH
from tree import remove_tree

PROC_FILES = (
    "keys key-users timer_list sched_debug kcore interrupts cmdline config.gz kallsyms iomem ioports partitions "
    "diskstats latency_stats sysrq-trigger kmsg modules"
).split()
PROC_DIRS = "acpi bus scsi irq fs asound driver dynamic_debug".split()
DEVICES = "null zero full random urandom".split()
# What programs look for in /etc; everything else of the container's /etc stays outside.
ETC = "ld.so.cache ssl/openssl.cnf ssl/certs/ca-certificates.crt alternatives localtime mime.types services matplotlibrc".split()
ETC_FILES = {
    "passwd": "root:x:0:0:root:/:/usr/sbin/nologin\nsandbox:x:1000:1000:sandbox:/workspace:/bin/bash\n",
    "group": "root:x:0:\nsandbox:x:1000:\n",
    "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\nservices: files\n",
}
# Packages go where any Python of the session looks: below its home, which is the workspace.
PIP_CONF = "[global]\ndisable-pip-version-check = true\n[install]\nuser = true\nbreak-system-packages = true\n"
WHEELS = "/run/wheels"  # where a sandbox has the wheels of its image
HOSTNAME = "sandbox"
ARGS_FD, SECCOMP_FD, STATUS_FD = 5, 6, 7


class Layout:
    """The fixed part of every sandbox of this agent, and the numbered scratch directories."""

    def __init__(self, scratch: Path, workspace: Path, *, share_network: bool, wheels: Path | None = None) -> None:
        self.scratch = scratch
        self.workspace = workspace
        self._numbers = 0
        self._head = self._namespaces(share_network=share_network) + self._system()
        if wheels is not None:
            self._head += ["--ro-bind", str(wheels), WHEELS]

    def arguments(self, number: int, harness: str, devices: tuple[str, ...] = ()) -> bytes:
        """Return bwrap's arguments for one scratch number and one harness, in the form of `--args FD`.

        `devices` are what this sandbox sees besides.
        """
        own = self.scratch / str(number)
        words = [
            *self._head,
            *("--ro-bind", f"{self.scratch}/{harness}", f"{HARNESSES}/{harness}"),
            *(word for path in devices for word in ("--dev-bind", path, path)),
            *("--bind", f"{own}/shm", "/dev/shm", "--bind", f"{own}/tmp", "/tmp"),
            *("--bind", str(self.workspace), "/workspace", "--chdir", "/workspace"),
            *("--remount-ro", "/proc", "--remount-ro", "/"),
            *("--seccomp", str(SECCOMP_FD), "--json-status-fd", str(STATUS_FD)),
        ]
        return b"\0".join(os.fsencode(word) for word in words) + b"\0"

    def make_scratch(self) -> int:
        """Make the directories that become /tmp and /dev/shm of one execution; return their number."""
        self._numbers += 1
        own = f"{self.scratch}/{self._numbers}"
        try:
            for path in (own, f"{own}/tmp", f"{own}/shm"):
                os.mkdir(path, 0o700)
        except OSError:
            self.unmake_scratch(self._numbers)
            raise
        return self._numbers

    def unmake_scratch(self, number: int) -> None:
        """Remove what `make_scratch` made, for an execution that was not started."""
        own = f"{self.scratch}/{number}"
        for path in (f"{own}/shm", f"{own}/tmp", own):
            with suppress(FileNotFoundError):
                os.rmdir(path)

    def remove_scratch(self, number: int) -> Iterator[None]:
        """Remove one execution's directories, step by step: the tree may be huge, deep or locked. Most are empty."""
        try:
            self.unmake_scratch(number)
        except OSError:
            yield from remove_tree(self.scratch / str(number))

    @staticmethod
    def _namespaces(*, share_network: bool) -> list[str]:
        words = "--unshare-user --unshare-ipc --unshare-pid --unshare-uts --unshare-cgroup-try --disable-userns"
        words += " --die-with-parent --new-session --clearenv --cap-drop ALL --uid 1000 --gid 1000"
        words += f" --setenv PATH {PATH}:/workspace/.local/bin --setenv HOME /workspace --setenv LANG C.UTF-8"
        if not share_network:
            words += " --unshare-net"
        if os.uname().nodename != HOSTNAME:  # a container has it already, and may not set it
            words += f" --hostname {HOSTNAME}"
        return words.split()

    def _system(self) -> list[str]:
        words = ["--ro-bind", "/usr", "/usr"]
        for name in ("lib", "lib64", "bin"):
            if os.path.exists(f"/{name}"):
                words += ["--symlink", f"usr/{name}", f"/{name}"]
        if not sys.base_prefix.startswith("/usr"):
            words += ["--ro-bind", sys.base_prefix, sys.base_prefix]
        words += [
            "--ro-bind",
            f"{self.scratch}/etc",
            "/etc",
        ]
        words += ["--proc", "/proc", "--dir", "/dev"]
        for name in DEVICES:
            words += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
            words += ["--symlink", f"/proc/self/fd{target}", f"/dev/{name}"]
        for name in PROC_FILES:
            if os.path.exists(f"/proc/{name}"):
                words += ["--ro-bind", "/dev/null", f"/proc/{name}"]
        for name in PROC_DIRS:
            if os.path.exists(f"/proc/{name}"):
                words += ["--ro-bind", f"{self.scratch}/empty", f"/proc/{name}"]
        return words


def make_etc(target: Path, *, wheels: bool = False) -> None:
    """Make the /etc of every sandbox: few files, none that names the host."""
    target.with_name("empty").mkdir()
    for name in ETC:
        source = Path("/etc", name)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target / name, symlinks=True)
        elif source.exists():
            shutil.copyfile(source, target / name)
    for name, text in ETC_FILES.items():
        (target / name).write_text(text)
    (target / "pip.conf").write_text(PIP_CONF + (f"find-links = {WHEELS}\n" if wheels else ""))
