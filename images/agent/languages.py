"""The languages: one row each, and everything that the agent knows of it. A further language is a further row."""

import json
import marshal
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PATH = "/usr/local/bin:/usr/bin:/bin"  # where a sandbox looks for programs
CODE = "{code}"
HARNESSES = "/run"  # where a sandbox has its harness
PYTHON = "python"  # its sandboxes run whatever has no harness, too


@dataclass(slots=True, frozen=True)
class Language:
    """How code of one language is run.

    With a `harness`, a file or directory of ours, sandboxes are booted ahead in which `program` waits for its job; they call
    handlers, and `pack` is how they read the job. Without one, code is a command: `words`, with the code for CODE.
    `program` is what an image must have. In `options` {heap_mb} is what of the memory limit a heap may take.
    """

    program: str
    harness: str = ""
    options: tuple[str, ...] = ()
    pack: Callable[[dict[str, Any]], bytes] = marshal.dumps
    words: tuple[str, ...] = ()

    def command(self, memory_bytes: int) -> list[str]:
        """Return what runs in a sandbox that waits for a job."""
        heap_mb = max(16, (memory_bytes >> 20) * 5 // 8)  # the rest is for buffers, stacks and the program itself
        options = (option.format(heap_mb=heap_mb) for option in self.options)
        return [self.program, *options, f"{HARNESSES}/{self.harness}"]

    def argv(self, code: str, args: list[str]) -> list[str]:
        """Return the command that runs code of a language without a harness."""
        return [code if word == CODE else word for word in self.words] + args


def pack_json(job: dict[str, Any]) -> bytes:
    """Return the job for a program that is not Python."""
    return json.dumps(job).encode()


LANGUAGES = {
    PYTHON: Language(program=sys.executable, harness="bootstrap.pyc", options=("-I", "-S", "-u")),
    "javascript": Language(
        program="node",
        harness="harness.js",
        # Modules are evaluated from text; every thread of V8 would take its stack from the limit on data.
        options=("--max-old-space-size={heap_mb}", "--v8-pool-size=1", "--experimental-vm-modules"),
        pack=pack_json,
    ),
    "shell": Language(program="/bin/bash", words=("/bin/bash", "-c", CODE, "bash")),
}

CELLS = Language(program=sys.executable, harness="cells", options=("-I", "-S", "-u"))  # of contexts, in Python


def find_languages() -> dict[str, Language]:
    """Return the languages whose programs this image has, where a sandbox sees them."""
    found = {}
    for name, language in LANGUAGES.items():
        ahead = sys.platform != "darwin" or language.harness in ("", LANGUAGES[PYTHON].harness)
        if name == PYTHON or (ahead and shutil.which(language.program, path=PATH)):
            found[name] = language
    return found


def home_of(job: dict[str, Any]) -> str:
    """Return the language whose sandbox runs the job."""
    name = str(job.get("language", PYTHON))
    return name if "argv" not in job and LANGUAGES[name].harness else PYTHON
