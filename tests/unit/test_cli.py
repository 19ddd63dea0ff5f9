"""The command line, as processes: what it prints where, and with which exit code it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import yaml

from orchestrator import __version__, settings
from orchestrator.cli import run, steps
from orchestrator.models import Execution, ExecutionError
from tests.live import POLL_S, Live, environment, free_port, open_folder, start

DEADLINE_S = 60.0
GREET = """
import sys
def handler(event, context):
    print("to stdout")
    print("to stderr", file=sys.stderr)
    return {"hello": event.get("name"), "größe": [1, 2.5, None], "tenant": getattr(context, "tenant", None)}
"""
SCRIPTS = {
    "greet": GREET,
    "echo": "def handler(event): return event",
    "raise": "def handler(event): raise ValueError('no\\nway')",
    "exit": "import sys; sys.exit(3)",
    "loop": "while True: pass",
    "script": "print('no handler')",
    "memory": "x = bytearray(1 << 32)",
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A directory with the scripts, which the local engine's agents can pass through."""
    with open_folder() as folder:
        for name, code in SCRIPTS.items():
            (folder / f"{name}.py").write_text(code)
        (folder / "event.json").write_text('{"name": "file"}')
        (folder / "bytes.py").write_bytes(b"\xff")
        yield folder


class Console:
    """Runs the command line in the folder of scripts."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.environment = environment(**settings) | {
            "NO_COLOR": "1",
            "PYTHONPATH": os.fspath(Path(__file__).parents[2]),
        }

    def __call__(self, *arguments: str, stdin: str = "", **more: str) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        done = subprocess.run(
            [sys.executable, "-m", "orchestrator", *arguments],
            check=False,
            capture_output=True,
            text=True,
            input=stdin,
            cwd=self.folder,
            env=self.environment | more,
            timeout=DEADLINE_S,
        )
        return done.returncode, done.stdout, done.stderr


@pytest.fixture
def console(folder: Path, local_service: Live) -> Console:
    """A console whose SANDBOX_URL is the live service."""
    return Console(folder, url=local_service.url)


@pytest.fixture
def lone_console(folder: Path) -> Console:
    """A console without a service: it starts a container itself, on the local engine."""
    return Console(folder, engine="local", uid_base="30000", state_dir=f"{folder}/state")


def test_stdout_has_the_value_alone_and_stderr_what_the_code_printed(console: Console) -> None:
    code, value, printed = console("run", "greet.py", "--event", '{"name": "World"}', "--context", '{"tenant": "t"}')

    assert (code, printed) == (0, "to stdout\nto stderr\n")
    assert value == '{"hello":"World","größe":[1,2.5,null],"tenant":"t"}\n'


def test_quiet_hides_what_the_code_printed(console: Console) -> None:
    code, value, printed = console("run", "greet.py", "--quiet")

    assert (code, printed) == (0, "")
    assert json.loads(value)["hello"] is None


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected"),
    [
        (["--event", "[1, null]"], "", [1, None]),
        (["--event", "null"], "", None),
        (["--event-file", "event.json"], "", {"name": "file"}),
        (["--event-file", "-"], '"stdin"', "stdin"),
        ([], "", {}),
    ],
)
def test_the_event_comes_from_an_option_a_file_or_stdin(
    console: Console, arguments: list[str], stdin: str, expected: object
) -> None:
    code, value, _ = console("run", "echo.py", *arguments, stdin=stdin)

    assert (code, json.loads(value)) == (0, expected)


def test_the_script_may_come_from_stdin(console: Console) -> None:
    assert console("run", "-", stdin="def handler(event): return 7") == (0, "7\n", "")


def test_the_scripts_name_tells_its_language(console: Console, folder: Path) -> None:
    (folder / "said.sh").write_text("echo shell $0")
    assert console("run", "said.sh") == (0, "null\n", "shell bash\n")
    assert console("run", "said.sh", "--language", "python")[0] == 1


def test_a_script_without_a_handler_has_the_value_null(console: Console) -> None:
    assert console("run", "script.py") == (0, "null\n", "no handler\n")


def test_the_value_may_go_to_a_file(console: Console) -> None:
    code, value, _ = console("run", "echo.py", "--event", '{"größe": 1}', "--output", "out.yaml", "--format", "yaml")

    assert (code, value) == (0, "")
    assert (console.folder / "out.yaml").read_text(encoding="utf-8") == "größe: 1\n"


@pytest.mark.parametrize("value", [{"b": [1, {"a": None}], "a": "é"}, "text", None, [], 1.5])
def test_every_format_can_be_read_back(value: object) -> None:
    assert json.loads(run.render(value, "json")) == value
    assert json.loads(run.render(value, "pretty")) == value
    assert yaml.safe_load(run.render(value, "yaml")) == value
    assert run.render(value, "json").count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected_code", "expected_line"),
    [
        (["raise.py"], 1, "orchestrator: error: ValueError: no way"),
        (["exit.py"], 1, "orchestrator: error: exit code 3"),
        (["loop.py", "--timeout", "0.3"], 124, "orchestrator: timeout"),
        (["memory.py"], 1, "orchestrator: error: MemoryError: "),
    ],
)
def test_code_that_fails_has_no_value_but_an_exit_code_and_a_line(
    console: Console, arguments: list[str], expected_code: int, expected_line: str
) -> None:
    code, value, printed = console("run", *arguments, "--quiet")

    assert (code, value, printed) == (expected_code, "", f"{expected_line.rstrip()}\n")


def test_without_quiet_a_traceback_is_shown_too(console: Console) -> None:
    _, _, printed = console("run", "raise.py")

    assert 'File "main.py", line 1, in handler' in printed


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [("ok", 0), ("error", 1), ("oom", 1), ("killed", 1), ("output_limit", 1), ("timeout", 124), ("lost", 3)],
)
def test_every_outcome_has_its_exit_code(outcome: str, expected: int) -> None:
    assert run.EXIT_CODES.get(outcome, steps.CODE_FAILED) == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            {"outcome": "oom", "error": ExecutionError(type="Sandbox.Killed", message="too much")},
            "oom: Sandbox.Killed: too much",
        ),
        ({"outcome": "timeout", "exit_code": 137}, "timeout"),
        ({"outcome": "error", "exit_code": 4}, "error: exit code 4"),
    ],
)
def test_a_missing_value_is_explained_in_a_line(facts: dict[str, object], expected: str) -> None:
    blank = {"id": "e", "session_id": "s", "started_at": "2030-01-01T00:00:00Z", "language": "python"}

    assert run.explain(msgspec.convert(blank | facts, Execution)) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["echo.py", "--event", "{"], "--event is no JSON"),
        (["echo.py", "--event", "NaN"], "--event is no JSON"),
        (["echo.py", "--event", "1", "--event-file", "event.json"], "not both"),
        (["echo.py", "--event-file", "missing.json"], "missing.json"),
        (["echo.py", "--context", "[1]"], "$.context"),
        (["echo.py", "--timeout", "0"], "$.timeout_s"),
        (["echo.py", "--timeout", "nan"], "$.timeout_s"),
        (["echo.py", "--timeout", "inf"], "JSON cannot carry"),
        (["echo.py", "--timeout", "1e9"], "at most"),
        (["echo.py", "--format", "xml"], "--format"),
        (["echo.py", "--output", "no/such/folder"], "cannot be written"),
        (["echo.py", "--url", "nonsense"], "base_url"),
        (["missing.py"], "missing.py"),
        (["bytes.py"], "no UTF-8"),
        ([], "SCRIPT"),
    ],
)
def test_wrong_use_ends_with_2_and_says_what_is_wrong(console: Console, arguments: list[str], expected: str) -> None:
    code, value, said = console("run", *arguments)

    assert (code, value) == (2, "")
    assert expected in said
    assert "Traceback" not in said


def test_a_service_that_cannot_be_reached_ends_with_3(console: Console) -> None:
    url = f"http://127.0.0.1:{free_port()}"

    code, value, said = console("run", "echo.py", "--url", url)

    assert (code, value, said.count("\n")) == (3, "", 1)
    assert f"orchestrator: {url} cannot be reached" in said


def test_without_a_service_a_container_is_started_and_removed(lone_console: Console) -> None:
    with open_folder() as scratch:
        code, value, _ = lone_console("run", "greet.py", "--event", '{"name": "World"}', "--quiet", TMPDIR=str(scratch))

        assert (code, json.loads(value)["hello"]) == (0, "World")
        assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_and_removes_its_container(lone_console: Console, number: signal.Signals) -> None:
    with open_folder() as scratch:
        command = [sys.executable, "-m", "orchestrator", "run", "loop.py"]
        given = lone_console.environment | {"TMPDIR": str(scratch)}
        process = subprocess.Popen(command, cwd=lone_console.folder, env=given, stderr=subprocess.PIPE)
        while not list(scratch.glob("*/*/*/workspace")) and process.poll() is None:
            time.sleep(POLL_S)
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE_S)

        assert (process.returncode, said) == (130, b"")
        assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("where", ["console", "lone_console"])
def test_a_stream_shows_what_the_code_prints_when_it_prints_it(where: str, request: pytest.FixtureRequest) -> None:
    made: Console = request.getfixturevalue(where)
    code = "import os\nprint('one', flush=True)\nwhile True: pass"
    (made.folder / "endless.py").write_text(code)
    command = [sys.executable, "-m", "orchestrator", "run", "endless.py", "--stream"]
    process = subprocess.Popen(command, cwd=made.folder, env=made.environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"one\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)
    assert made("run", "greet.py", "--stream")[::2] == (0, "to stdout\nto stderr\n")
    assert made("run", "raise.py", "--stream", "--quiet") == (1, "", "orchestrator: error: ValueError: no way\n")


def test_without_a_service_failing_code_and_wrong_use_end_as_with_one(lone_console: Console) -> None:
    assert lone_console("run", "raise.py", "--quiet") == (1, "", "orchestrator: error: ValueError: no way\n")
    assert lone_console("run", "loop.py", "--timeout", "0.3") == (124, "", "orchestrator: timeout\n")
    assert lone_console("run", "echo.py", "--timeout", "nan")[0] == 2


def test_a_container_that_does_not_start_ends_with_3_at_once(lone_console: Console) -> None:
    """With the reason, and not after the time that a session would wait for one."""
    code, value, said = lone_console("run", "echo.py", SANDBOX_START_TIMEOUT_SECONDS="0.001")

    assert (code, value) == (3, "")
    assert "orchestrator: no container of template python starts: the container gave no sign of life" in said


def test_a_host_without_its_engine_ends_with_3_and_one_line(lone_console: Console) -> None:
    code, value, said = lone_console("run", "echo.py", PATH="/nowhere")

    assert (code, value) == (3, "")
    assert said == "orchestrator: bwrap is missing: on Linux, install the package `bubblewrap`\n"


@pytest.mark.parametrize(
    ("arguments", "more", "expected"),
    [
        (["--port", "99999"], {}, "SANDBOX_PORT='99999' is not allowed"),
        (["--host", "0.0.0.0"], {}, "set SANDBOX_API_KEYS"),
        ([], {"SANDBOX_COLOUR": "red"}, "SANDBOX_COLOUR is no setting"),
        ([], {"SANDBOX_STATE_DIR": "/dev/null/x"}, "SANDBOX_STATE_DIR=/dev/null/x cannot be used"),
        (
            ["--engine", "docker"],
            {"DOCKER_HOST": "unix:///nowhere"},
            "No Docker Engine answers at unix:///nowhere",
        ),
        (["--engine", "docker"], {"DOCKER_HOST": "ssh://x"}, "DOCKER_HOST=ssh://x is not supported"),
    ],
)
def test_a_start_that_fails_ends_with_2_and_one_line(
    lone_console: Console, arguments: list[str], more: dict[str, str], expected: str
) -> None:
    port = ["--port", str(free_port())] if "--port" not in arguments else []

    code, shown, said = lone_console("serve", *port, *arguments, **more)

    assert (code, shown, said.count("\n")) == (2, "", 1)
    assert said.startswith("orchestrator: ")
    assert expected in said


def test_a_port_that_is_taken_ends_with_2_and_one_line(lone_console: Console) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        code, _, said = lone_console("serve", "--port", str(port))

    assert (code, said.count("\n")) == (2, 1)
    assert f"127.0.0.1:{port} cannot be listened on (Address already in use)" in said


def test_a_second_service_of_one_instance_ends_with_2_and_one_line(
    lone_console: Console, local_service: Live, state_dir: Path
) -> None:
    same = {"SANDBOX_INSTANCE": local_service.instance, "SANDBOX_STATE_DIR": str(state_dir)}

    code, _, said = lone_console("serve", "--port", str(free_port()), **same)

    assert (code, said.count("\n")) == (2, 1)
    assert f"Another orchestrator runs as SANDBOX_INSTANCE={local_service.instance}" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_service_in_order(folder: Path, number: signal.Signals) -> None:
    instance = f"cli-{number.name}"
    port = str(free_port())
    live = Live(
        start(folder, instance=instance, engine="local", port=port, uid_base="30000"),
        int(port),
        instance,
        folder / f"{instance}.log",
    )
    live.until_ready()
    live.client.close()
    live.process.send_signal(number)

    assert live.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in live.log
    assert list((folder / instance).iterdir()) == []


def test_settings_lists_every_variable(lone_console: Console) -> None:
    code, shown, _ = lone_console("settings")

    assert code == 0
    assert [line.split()[0] for line in shown.splitlines()] == [row[0] for row in settings.describe()]


def test_version_is_printed(lone_console: Console) -> None:
    assert lone_console("version") == (0, f"{__version__}\n", "")


def test_help_does_not_load_the_service() -> None:
    """What takes long to import is imported where it is used."""
    slow = ["docker", "httpx", "litestar", "structlog", "uvicorn", "yaml"]
    probe = f"import sys, orchestrator.cli; print([name for name in {slow} if name in sys.modules])"

    shown = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True).stdout

    assert shown == "[]\n"


def test_what_the_client_reads_is_no_wrong_setting() -> None:
    """One environment may serve both `orchestrator serve` and the SDK."""
    assert settings.load({"SANDBOX_URL": "http://localhost:8000", "SANDBOX_API_KEY": "x"}) == settings.load({})
