"""How the sandboxes of this agent are made: what is the same for all of them, and what differs by language."""

import os
import py_compile
import shutil
import socket
import sys
from pathlib import Path

import seccomp
from contexts import compile_cells
from dialogue import Dialogue
from languages import CELLS, LANGUAGES, find_languages
from launcher import Launcher
from layout import Layout, make_etc
from limits import Limits
from loop import Loop
from seatbelt import Seatbelt

BAKED_WHEELS = "/opt/sandbox/wheels"  # of an image that brings packages for pip
SANDBOX_EXEC = "/usr/bin/sandbox-exec"


class Unfit(Exception):
    """Why this container cannot serve what its template says."""


class Sandboxes:
    """Boots sandboxes, all under the same limits and with the same layout; `languages` are those that the image has."""

    def __init__(self, loop: Loop, scratch: Path, workspace: Path, limits: Limits) -> None:
        """Prepare what all sandboxes share. Unfit when the image lacks something that the template names."""
        self.limits = limits
        self._loop = loop
        self._scratch = scratch
        self._bwrap = shutil.which("bwrap") or "/usr/bin/bwrap"
        self._filter = b"" if sys.platform == "darwin" else seccomp.program(os.uname().machine)
        self._rlimits = limits.rlimits()
        wheels = Path(limits.wheels or BAKED_WHEELS)
        self.has_wheels = wheels.is_dir()
        if limits.wheels is not None and not self.has_wheels:
            raise Unfit(f"the image has no directory {wheels}, which the template names for `wheels`")
        make_etc(scratch / "etc", wheels=self.has_wheels)
        own = Path(__file__).parent
        py_compile.compile(str(own / "bootstrap.py"), cfile=str(scratch / "bootstrap.pyc"), doraise=True)
        shutil.copyfile(own / "harness.js", scratch / "harness.js")
        alone = [name for _, name in socket.if_nameindex()] == ["lo"]
        self.layout = Layout(scratch, workspace, share_network=alone, wheels=wheels if self.has_wheels else None)
        self.languages = find_languages()

    def boot(self, language: str, devices: tuple[str, ...] = ()) -> Launcher | Seatbelt:
        """Boot a sandbox that waits for one job; OSError when that fails."""
        if sys.platform == "darwin":
            limits = self.limits
            return Seatbelt(
                self._loop, self.layout, files=limits.open_files, file_bytes=limits.file_bytes, command=SANDBOX_EXEC
            )
        return Launcher(
            self._loop,
            self.layout,
            LANGUAGES[language],
            self._filter,
            self._rlimits,
            bwrap=self._bwrap,
            devices=devices,
        )

    def boot_context(self) -> Launcher:
        """Boot a sandbox that takes cell after cell; OSError when that fails."""
        if sys.platform == "darwin":
            raise OSError("contexts need bubblewrap, which macOS has not")
        compile_cells(self._scratch / CELLS.harness)
        return Launcher(
            self._loop, self.layout, CELLS, self._filter, self._rlimits, bwrap=self._bwrap, program=Dialogue
        )
