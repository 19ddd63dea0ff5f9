"""The launcher of macOS, driven with a stand-in for `sandbox-exec` that confines nothing: all but the profile."""

import py_compile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import End
from layout import Layout
from loop import Loop
from seatbelt import Seatbelt

AGENT = Path(__file__).parents[2] / "images" / "agent"
STAND_IN = '#!/bin/sh\nwhile [ "$1" = -p ] || [ "$1" = -D ]; do shift 2; done\nexec "$@"\n'
Run = Callable[..., tuple[End, dict[str, bytes]]]


class Ended(Exception):
    """Leaves the loop."""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run one job to its end, killed after `kill_s`; return the end and the output by stream."""
    command = tmp_path / "sandbox-exec"
    command.write_text(STAND_IN)
    command.chmod(0o755)
    workspace, scratch = tmp_path / "workspace", tmp_path / "scratch"
    workspace.mkdir()
    scratch.mkdir()
    py_compile.compile(str(AGENT / "bootstrap.py"), cfile=str(scratch / "bootstrap.pyc"), doraise=True)

    def once(job: dict[str, Any], *, kill_s: float | None = None, stdin: bytes = b"") -> tuple[End, dict[str, bytes]]:
        loop = Loop()
        layout = Layout(scratch, workspace, share_network=True)
        layout._numbers = len(list(scratch.iterdir()))
        launcher = Seatbelt(loop, layout, files=256, file_bytes=1 << 20, command=str(command))
        output: dict[str, bytes] = defaultdict(bytes)
        ends: list[End] = []

        def collect(stream: str, data: bytes) -> None:
            output[stream] += data

        def end(end: End) -> None:
            ends.append(end)
            raise Ended

        launcher.program.on_output = collect
        launcher.on_end = end
        empty: dict[str, Any] = {
            "code": None,
            "argv": None,
            "args": [],
            "handler": None,
            "event": {},
            "context": {},
            "env": {},
        }
        launcher.start(empty | {"timeout_s": 10.0, "deadline": 0.0} | job)
        launcher.program.stdin.write(stdin)
        launcher.program.stdin.end()
        if kill_s is not None:
            loop.call_later(kill_s, launcher.kill)
        with pytest.raises(Ended):
            loop.run()
        return ends[0], output

    return once


def test_a_handler_gives_its_value(run: Run) -> None:
    end, output = run({"code": "def handler(event): return event['n'] + 1", "event": {"n": 19}})
    assert (0, None, b'{"value":20}') == (end.exit_code, end.signal, output["value"])


def test_a_script_reads_stdin_and_keeps_its_exit_code(run: Run) -> None:
    end, output = run({"code": "import sys; print(sys.stdin.read().upper()); sys.exit(3)"}, stdin=b"abc")
    assert (3, b"ABC\n") == (end.exit_code, output["stdout"])


def test_its_files_stay_in_the_workspace_and_are_limited_in_size(run: Run, tmp_path: Path) -> None:
    end, output = run({"code": "open('kept', 'w').write('20')\nopen('big', 'wb').write(bytes(1 << 21))"})
    assert (1, "20") == (end.exit_code, (tmp_path / "workspace" / "kept").read_text())
    assert b"File too large" in output["stderr"]


def test_a_kill_takes_its_whole_process_group(run: Run) -> None:
    code = "import subprocess, time\nsubprocess.Popen(['sleep', '60'])\nprint('up', flush=True)\ntime.sleep(60)"
    end, output = run({"code": code}, kill_s=1.0)
    assert (137, 9, b"up\n") == (end.exit_code, end.signal, output["stdout"])
    assert end.wall_s < 30


def test_what_it_left_running_is_killed_when_it_ends(run: Run, tmp_path: Path) -> None:
    """The child would hold stdout open for a minute; the end comes at once."""
    end, _ = run({"argv": ["/bin/sh", "-c", "sleep 60 & echo $! > child"]})
    assert 0 == end.exit_code
    assert end.wall_s < 30
