"""The real agent as a process of this host: every outcome, and Lambda's semantics in full."""

import asyncio
import base64
import itertools
import os
import signal
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import frames as agent_frames
from orchestrator import frames, greeting, isolation
from orchestrator.container import Container
from orchestrator.engine import Spec, Wire
from orchestrator.engine.local import LocalEngine
from orchestrator.errors import ContainerLost, IsolationError
from orchestrator.executions import Record, job_of, lambda_context, note_of
from orchestrator.greeting import AGENT_VERSION, UNFIT
from orchestrator.models import Execution, ExecutionRequest, Stream

MIB = 1 << 20
KEEP, DRAIN = MIB, 16 * MIB
FIRST_UID = 52000
LIMITS: dict[str, Any] = {
    "memory_bytes": 128 * MIB,
    "file_bytes": 64 * MIB,
    "processes": 64,
    "open_files": 256,
    "keep_bytes": KEEP,
    "drain_bytes": DRAIN,
    "preboot": {"python": 2},
}
NUMBERS = itertools.count()
SOON_S = 10.0


@pytest.fixture(scope="module")
async def engine(state_dir: Path) -> AsyncIterator[LocalEngine]:
    made = LocalEngine(state_dir / "agents", record=lambda *_: None)
    yield made
    await made.close()


def spec() -> Spec:
    """Return a container under a name and a user of its own."""
    number = next(NUMBERS)
    return Spec(
        name=f"agent-{number}",
        image="",
        uid=FIRST_UID + number,
        cpus=1,
        memory_bytes=0,
        workspace_bytes=0,
        scratch_bytes=0,
        labels={},
    )


async def boot(engine: LocalEngine, **limits: Any) -> Container:
    """Start an agent and bind it."""
    container = Container(
        spec(), "python", output_limit=LIMITS["drain_bytes"], on_lost=lambda lost: print(lost.lost_reason)
    )
    await container.start(engine, LIMITS | limits)
    await container.bind("s1", {})
    return container


@pytest.fixture(scope="module")
async def container(engine: LocalEngine) -> Container:
    return await boot(engine)


async def run(container: Container, code: str | None = None, *, session_env: Any = None, **fields: Any) -> Execution:
    """Run as the service does, and return what it would answer, the value decoded."""
    return (await record_of(container, code, session_env=session_env, **fields)).facts


async def record_of(container: Container, code: str | None = None, *, session_env: Any = None, **fields: Any) -> Record:
    request = msgspec.convert({"code": code, "timeout_s": SOON_S} | fields, ExecutionRequest)
    timeout_s = request.timeout_s or SOON_S
    record = Record(f"e{next(NUMBERS)}", "s1", note_of(request, timeout_s=timeout_s, key=None))
    context = lambda_context(record.id, "s1", memory_kb=LIMITS["memory_bytes"] >> 10)
    job = job_of(request, timeout_s=timeout_s, env=session_env or {}, context=context)
    await record.run(container, job, grace_s=SOON_S)
    if isinstance(record.facts.value, msgspec.Raw):
        record.facts.value = msgspec.json.decode(record.facts.value)
    return record


async def value_of(container: Container, code: str, **fields: Any) -> Any:
    """Run code that must end well; return the handler's value."""
    execution = await run(container, code, **fields)
    assert (execution.outcome, execution.error) == ("ok", None), execution
    return execution.value


def handler(*body: str) -> str:
    """Return a handler of the event with this body."""
    return "def handler(event):\n" + "".join(f"    {line}\n" for line in body)


def commands() -> list[bytes]:
    """Return the command lines of all processes of this host."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return found


def pid_of(*words: str) -> int:
    """Return the pid of the only process with this command line."""
    wanted = b"\0".join(word.encode() for word in words) + b"\0"
    [pid] = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if read(path) == wanted]
    return pid


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# --- outcomes: code, outcome, exit code, stdout, type of the error

ENDINGS = [
    ("no output", "pass", "ok", 0, "", None),
    ("output", "print('hi')", "ok", 0, "hi\n", None),
    ("output without a newline", "print('hi', end='')", "ok", 0, "hi", None),
    ("a value", "print('in'); handler = lambda event: 5", "ok", 0, "in\n", None),
    ("a syntax error", "print('never')\ndef", "error", 1, "", "SyntaxError"),
    ("a null byte", "print(1)\0", "error", 1, "", "ValueError"),
    ("an exception", "print('before')\nraise ValueError('no')", "error", 1, "before\n", "ValueError"),
    ("an exception of the handler", handler("print('in')", "return 1 / 0"), "error", 1, "in\n", "ZeroDivisionError"),
    ("an interrupt", "raise KeyboardInterrupt", "error", 1, "", "KeyboardInterrupt"),
    ("an exception without a text", "class E(Exception):\n  def __str__(self): 1/0\nraise E", "error", 1, "", "E"),
    ("a recursion", "def f(): f()\nf()", "error", 1, "", "RecursionError"),
    ("sys.exit(3)", "import sys\nprint('before')\nsys.exit(3)", "error", 3, "before\n", None),
    ("sys.exit(0)", "import sys\nprint('before')\nsys.exit(0)", "ok", 0, "before\n", None),
    ("sys.exit()", "import sys\nsys.exit()", "ok", 0, "", None),
    ("sys.exit('why')", "import sys\nsys.exit('why')", "error", 1, "", None),
    ("sys.exit(256 + 7)", "import sys\nsys.exit(263)", "error", 7, "", None),
    ("exit(4)", "print('before')\nexit(4)", "error", 4, "before\n", None),
    ("os._exit(4)", "import os\nprint('before')\nos._exit(4)", "error", 4, "before\n", None),
    ("a signal of its own", "import os\nprint('x')\nos.kill(os.getpid(), 9)", "error", 137, "x\n", None),
    ("an abort", "import os\nos.abort()", "error", 134, "", None),
    ("a crash", "import ctypes\nprint('x')\nctypes.string_at(0)", "error", 139, "x\n", None),
    ("too much memory", "bytearray(1 << 30)", "error", 1, "", "MemoryError"),
    ("a surrogate on stdout", "print('\\ud800')", "error", 1, "", "UnicodeEncodeError"),
]


@pytest.mark.parametrize(
    ("code", "outcome", "exit_code", "stdout", "error"), [pytest.param(*row[1:], id=row[0]) for row in ENDINGS]
)
async def test_an_ending_has_its_outcome_its_exit_code_and_what_was_printed_until_then(
    container: Container, code: str, outcome: str, exit_code: int, stdout: str, error: str | None
) -> None:
    execution = await run(container, code)
    assert (execution.outcome, execution.exit_code, execution.stdout) == (outcome, exit_code, stdout)
    assert (execution.error.type if execution.error else None) == error
    assert execution.signal == (exit_code - 128 if exit_code > 128 else None)
    assert execution.usage is not None
    assert execution.usage.wall_s > 0
    assert (execution.truncated, execution.replaced) == ([], [])


async def test_a_text_given_to_exit_goes_to_stderr(container: Container) -> None:
    assert (await run(container, "import sys\nsys.exit('why')")).stderr == "why\n"


async def test_the_code_lets_the_agent_go_first_and_cannot_take_that_back(container: Container) -> None:
    code = """
        import os, threading
        me = os.PRIO_PROCESS, 0
        try: os.setpriority(*me, os.getpriority(*me) - 1)
        except OSError as error: refused = error.strerror
        thread = threading.Thread(target=lambda: print(os.getpriority(*me), refused))
        thread.start(); thread.join()
    """
    execution = await run(container, textwrap.dedent(code))
    assert execution.stdout == f"{os.getpriority(os.PRIO_PROCESS, 0) + 5} Permission denied\n", execution


async def test_a_timeout_keeps_what_was_printed(container: Container) -> None:
    begun = time.monotonic()
    execution = await run(container, "print('before')\nwhile True: pass", timeout_s=1.0)
    assert (execution.outcome, execution.exit_code, execution.stdout) == ("timeout", 137, "before\n")
    assert execution.usage is not None
    assert 0.5 < execution.usage.wall_s <= time.monotonic() - begun < 5  # a sandbox that still boots gets the job later
    assert execution.usage.cpu_s > 0.05


async def test_a_timeout_ends_what_does_not_want_to_end(container: Container) -> None:
    code = "import os, signal\nfor n in range(1, 32):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
    execution = await run(container, code + "os.fork()\nos.write(1, b'x')\nwhile True: signal.pause()", timeout_s=0.5)
    assert (execution.outcome, execution.stdout) == ("timeout", "xx")


async def test_a_timeout_ends_a_handler_that_waits(container: Container) -> None:
    code = "import asyncio\nasync def handler(event): await asyncio.sleep(60)"
    assert (await run(container, code, timeout_s=0.3)).outcome == "timeout"


async def test_ten_megabytes_of_output_end_well_and_the_beginning_is_kept(container: Container) -> None:
    execution = await run(container, "import sys\nfor n in range(10): sys.stdout.write(str(n) * (1 << 20))")
    assert (execution.outcome, execution.truncated) == ("ok", ["stdout"])
    assert execution.stdout == "0" * KEEP


async def test_output_without_end_is_ended(container: Container) -> None:
    execution = await run(container, "import sys\nwhile True: sys.stderr.write('x' * 65536)")
    assert (execution.outcome, execution.exit_code, execution.truncated) == ("output_limit", 137, ["stderr"])
    assert len(execution.stderr) == KEEP


async def test_bytes_that_are_not_utf_8_are_shown_and_named(container: Container) -> None:
    code = "import os\nos.write(1, b'a\\xffb')\nos.write(2, 'ü'.encode())"
    execution = await run(container, code)
    assert (execution.stdout, execution.stderr, execution.replaced) == ("a\ufffdb", "ü", ["stdout"])


async def test_a_character_that_arrives_in_two_pieces_is_whole(container: Container) -> None:
    code = "import os, time\nos.write(1, b'\\xc3')\ntime.sleep(0.05)\nos.write(1, b'\\xbc')"
    execution = await run(container, code)
    assert (execution.stdout, execution.replaced) == ("ü", [])


async def test_many_small_writes_become_few_pieces(container: Container) -> None:
    """The agent and we keep and send pieces: as many as writes would be a hundred times the output's size."""
    record = await record_of(container, "import os\nfor n in range(100_000): os.write(1, b'%d\\n' % n)")
    assert record.facts.stdout == "".join(f"{n}\n" for n in range(100_000))
    assert len(record.output) < 5_000


async def test_the_first_small_writes_are_pieces_of_their_own(container: Container) -> None:
    code = "import os, time\nfor n in range(20):\n  os.write(1 + n % 2, b'%d\\n' % n)\n  time.sleep(0.01)"
    record = await record_of(container, code)
    assert 15 <= len(record.output) <= 20  # a busy machine may let two be read at once
    assert [record.output.piece(number)[0] for number in (1, 2)] == ["stdout", "stderr"]


async def test_a_sandbox_that_is_killed_from_outside_is_killed(container: Container) -> None:
    """SIGKILL of bwrap itself: nobody reports an exit code, and the agent does not invent one."""
    running = asyncio.create_task(run(container, command=["sleep", "1234.25"]))
    sandbox = parent(parent(await until(lambda: pid_of("sleep", "1234.25"))))
    os.kill(sandbox, signal.SIGKILL)
    execution = await running
    assert (execution.outcome, execution.exit_code) == ("killed", None)
    assert (await run(container, "print(1)")).outcome == "ok"


async def until(found: Callable[[], int]) -> int:
    """Wait for what another process does."""
    async with asyncio.timeout(SOON_S):
        while True:
            try:
                return found()
            except ValueError:
                await asyncio.sleep(0.01)


async def test_a_fork_bomb_hits_its_limit_and_the_container_goes_on(container: Container) -> None:
    execution = await run(container, "import os\nwhile True: os.fork()", timeout_s=10)
    assert execution.outcome in ("error", "timeout")
    assert "Resource temporarily unavailable" in execution.stderr
    assert await value_of(container, handler("return 1")) == 1


# --- values

VALUES = [
    ("None", None),
    ("True", True),
    ("-5", -5),
    ("0.1", 0.1),
    ("10 ** 400", 10**400),
    ("'ü\\0\\u2028😀'", "ü\0\u2028😀"),
    ("[]", []),
    ("(1, (2,))", [1, [2]]),
    ("{'b': 1, 'a': [None]}", {"b": 1, "a": [None]}),
    ("{2: 'two', None: 0, True: 2.5}", {"2": "two", "null": 0, "true": 2.5}),
    ("__import__('collections').OrderedDict(x=1)", {"x": 1}),
    ("__import__('http').HTTPStatus.OK", 200),
    ("'x' * 500_000", "x" * 500_000),
]


@pytest.mark.parametrize(("source", "expected"), VALUES, ids=[source[:30] for source, _ in VALUES])
async def test_a_value_comes_back_as_json_carries_it(container: Container, source: str, expected: object) -> None:
    assert await value_of(container, handler(f"return {source}")) == expected


UNCARRIED = [
    ("a set", "return {1}", "Object of type set is not JSON serializable"),
    ("bytes", "return b''", "Object of type bytes is not JSON serializable"),
    ("an object", "return object()", "Object of type object is not JSON serializable"),
    ("NaN", "return float('nan')", "Out of range float values are not JSON compliant"),
    ("an infinity inside", "return [1, {'a': float('-inf')}]", "Out of range float values are not JSON compliant"),
    ("a circle", "a = []; a.append(a); return a", "Circular reference detected"),
    ("a tuple as key", "return {(1, 2): 3}", "keys must be str, int, float, bool or None"),
    (
        "an endless depth",
        "a = []\n    for _ in range(50_000): a = [a]\n    return a",
        "maximum recursion depth exceeded",
    ),
    ("an integer too long to write", "return 10 ** 5000", "Exceeds the limit"),
    ("a generator", "yield 1", "Object of type generator is not JSON serializable"),
]


@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in UNCARRIED])
async def test_a_value_that_json_cannot_carry_is_a_marshal_error(container: Container, body: str, reason: str) -> None:
    execution = await run(container, "print('before')\n" + handler(body))
    assert (execution.outcome, execution.exit_code, execution.value) == ("error", 1, None)
    assert execution.error is not None
    assert execution.error.type == "Runtime.MarshalError"
    assert execution.error.message.startswith("Unable to marshal response: ")
    assert reason in execution.error.message
    assert execution.stdout == "before\n"


REPORTS = [
    ("no JSON", b"hello"),
    ("no UTF-8", b'{"value":"\xff"}'),
    ("a lone surrogate", b'{"value":"\\ud800"}'),
    ("another object", b'{"outcome":"ok"}'),
    ("two reports", b'{"value":1}{"value":2}'),
    ("a list", b"[1]"),
    ("NaN", b'{"value":NaN}'),
    ("a deep value", b'{"value":' + b"[" * 100_000),
    ("an error of another shape", b'{"error":{"type":5}}'),
]


@pytest.mark.parametrize("report", [pytest.param(report, id=name) for name, report in REPORTS])
async def test_what_the_code_forges_on_the_values_descriptor_is_an_invalid_value(
    container: Container, report: bytes
) -> None:
    execution = await run(container, f"import os\nos.write(3, {report!r})")
    assert (execution.outcome, execution.value) == ("error", None)
    assert execution.error is not None
    assert execution.error.type == "Runtime.InvalidValue"


async def test_a_value_that_is_too_long_is_an_invalid_value(container: Container) -> None:
    execution = await run(container, handler(f"return 'x' * {KEEP}"))
    assert (execution.outcome, execution.truncated) == ("error", ["value"])
    assert execution.error is not None
    assert "too long" in execution.error.message


@pytest.mark.parametrize(
    "code",
    ["import sys\nsys.stdout.close()", "import os\nos.close(1)\nos.close(2)", "import sys\nsys.stdout = None"],
)
async def test_a_value_arrives_although_the_code_closed_its_streams(container: Container, code: str) -> None:
    assert await value_of(container, f"{code}\n" + handler("return 7")) == 7


# --- Lambda

EVENTS: list[tuple[str, dict[str, Any], Any]] = [
    ("its default", {}, {}),
    ("null", {"event": None}, None),
    ("a list", {"event": [1, "ü"]}, [1, "ü"]),
    ("a text", {"event": "hi"}, "hi"),
    ("a large integer", {"event": 2**200}, 2**200),
    ("false", {"event": False}, False),
]


@pytest.mark.parametrize(("fields", "expected"), [pytest.param(*row[1:], id=row[0]) for row in EVENTS])
async def test_the_handler_gets_the_event(container: Container, fields: dict[str, Any], expected: object) -> None:
    assert await value_of(container, handler("return event"), **fields) == expected


async def test_the_context_has_lambdas_attributes(container: Container) -> None:
    code = (
        "def handler(event, context):\n"
        "    names = 'aws_request_id function_name function_version memory_limit_in_mb log_group_name log_stream_name'\n"
        "    names += ' invoked_function_arn identity client_context'\n"
        "    return {name: getattr(context, name) for name in names.split()}\n"
    )
    facts = await value_of(container, code)
    today = facts.pop("log_stream_name")
    eid = facts.pop("aws_request_id")
    assert today.endswith(f"/[$LATEST]{eid}")
    assert facts == {
        "function_name": "s1",
        "function_version": "$LATEST",
        "memory_limit_in_mb": "128",
        "log_group_name": "/aws/lambda/s1",
        "invoked_function_arn": "arn:aws:lambda:local:000000000000:function:s1",
        "identity": None,
        "client_context": None,
    }


async def test_the_context_takes_the_clients_own_facts(container: Container) -> None:
    code = "def handler(event, context): return [context.function_name, context.tenant]"
    assert await value_of(container, code, context={"function_name": "mine", "tenant": {"id": 5}}) == [
        "mine",
        {"id": 5},
    ]


async def test_the_remaining_time_counts_down_to_the_timeout(container: Container) -> None:
    code = (
        "import time\n"
        "def handler(event, context):\n"
        "    first = context.get_remaining_time_in_millis()\n"
        "    time.sleep(0.1)\n"
        "    return [first, context.get_remaining_time_in_millis()]\n"
    )
    first, second = await value_of(container, code, timeout_s=3, context={"deadline": 1})
    assert 1000 < first <= 3000
    assert first - second >= 100


async def test_the_context_logs_to_stdout(container: Container) -> None:
    execution = await run(container, "def handler(event, context): context.log('said')")
    assert execution.stdout == "said\n"


WRAPPED = (
    "import functools\ndef deco(f):\n  @functools.wraps(f)\n  def inner(*a, **k): return [len(a), f(*a, **k)]\n"
    "  return inner\n{marks}\ndef handler({arguments}): return {value}\n"
)
CALLABLES = [
    ("one argument", "def handler(event): return ['e', event]", ["e", 1]),
    ("two arguments", "def handler(event, context): return ['c', context.function_version]", ["c", "$LATEST"]),
    ("a default for the context", "def handler(event, context=None): return context is None", False),
    ("any arguments", "def handler(*args): return len(args)", 2),
    ("a keyword only", "def handler(event, *, context=None): return context is None", True),
    ("a lambda", "handler = lambda e: e", 1),
    ("a lambda of two", "handler = lambda e, c: c.function_name", "s1"),
    (
        "wrapped, one argument",
        WRAPPED.format(marks="@deco", arguments="event", value="event"),
        [1, 1],
    ),
    (
        "wrapped twice, two arguments",
        WRAPPED.format(marks="@deco\n@deco", arguments="event, context", value="context.function_name"),
        [2, [2, "s1"]],
    ),
    ("decorated without wraps", "def deco(f):\n  return lambda *a: f(*a)\n@deco\ndef handler(e, c): return 5", 5),
    ("a partial", "import functools\nhandler = functools.partial(lambda a, e: [a, e], 'a')", ["a", 1]),
    ("a bound method", "class C:\n  def go(self, event): return event\nhandler = C().go", 1),
    ("a bound method of two", "class C:\n  def go(self, e, c): return c.function_name\nhandler = C().go", "s1"),
    ("a class method", "class C:\n  @classmethod\n  def go(cls, event): return event\nhandler = C.go", 1),
    ("a static method", "class C:\n  @staticmethod\n  def go(e, c): return 2\nhandler = C.go", 2),
    ("an object", "class C:\n  def __call__(self, event): return event\nhandler = C()", 1),
    ("an object of two", "class C:\n  def __call__(self, e, c): return c.function_name\nhandler = C()", "s1"),
    ("a built-in", "handler = abs", 1),
    ("a class", "class handler(dict):\n  def __init__(self, event): self['e'] = event", {"e": 1}),
    ("async", "async def handler(event): return event", 1),
    (
        "async of two, with a task",
        "import asyncio\nasync def handler(e, c):\n  t = asyncio.create_task(asyncio.sleep(0, c.function_name))\n  return await t",
        "s1",
    ),
    ("an async object", "class C:\n  async def __call__(self, event): return event\nhandler = C()", 1),
    ("a function that returns a coroutine", "async def f(e): return e\ndef handler(event): return f(event)", 1),
    ("a future-like value", "class F:\n  def __await__(self):\n    return 4\n    yield\nhandler = lambda e: F()", 4),
]


@pytest.mark.parametrize(("code", "expected"), [pytest.param(*row[1:], id=row[0]) for row in CALLABLES])
async def test_whatever_can_be_called_is_a_handler(container: Container, code: str, expected: object) -> None:
    assert await value_of(container, code, event=1) == expected


async def test_a_handler_may_have_another_name(container: Container) -> None:
    assert await value_of(container, "def main(event): return 3\ndef handler(event): return 4", handler="main") == 3


@pytest.mark.parametrize("code", ["handler = 5", "def Handler(event): return 1", "x = 1"])
async def test_code_without_a_handler_is_a_script(container: Container, code: str) -> None:
    assert await value_of(container, code) is None


MODULE = "def go(event, context): return [event, context.function_name]\n"


@pytest.fixture(scope="module")
async def files(container: Container) -> None:
    """Put modules into the workspace, as an earlier execution would."""
    sources = {
        "mod.py": MODULE,
        "pack/__init__.py": "",
        "pack/deep.py": MODULE,
        "broken.py": "def",
        "needs.py": "import nix",
    }
    code = "import os\nos.makedirs('pack')\n"
    code += "\n".join(f"open({name!r}, 'w').write({text!r})" for name, text in sources.items())
    assert (await run(container, code)).outcome == "ok"


@pytest.mark.parametrize("name", ["mod.go", "pack.deep.go"])
async def test_a_handler_may_be_a_function_of_a_workspace_file(container: Container, files: None, name: str) -> None:
    execution = await run(container, None, handler=name, event=1)
    assert execution.value == [1, "s1"]


@pytest.mark.parametrize(
    ("code", "name", "kind", "message"),
    [
        (None, "nowhere.go", "Runtime.ImportModuleError", "Unable to import module 'nowhere'"),
        (None, "needs.go", "Runtime.ImportModuleError", "No module named 'nix'"),
        (None, "mod.nothing", "Runtime.HandlerNotFound", "Handler 'nothing' missing in module 'mod'"),
        (None, "mod.__name__", "Runtime.HandlerNotFound", "Handler '__name__' missing in module 'mod'"),
        ("x = 1", "go", "Runtime.HandlerNotFound", "Handler 'go' missing in the code"),
        (None, "broken.go", "SyntaxError", "invalid syntax"),
    ],
)
async def test_a_handler_that_is_not_there_is_an_error_with_lambdas_type(
    container: Container, files: None, code: str | None, name: str, kind: str, message: str
) -> None:
    execution = await run(container, code, handler=name)
    assert (execution.outcome, execution.exit_code) == ("error", 1)
    assert execution.error is not None
    assert (execution.error.type, message in execution.error.message) == (kind, True)


async def test_exit_in_a_handler_is_its_exit_code_and_no_value(container: Container) -> None:
    execution = await run(container, handler("import sys", "print('in')", "sys.exit(6)"))
    assert (execution.outcome, execution.exit_code, execution.value, execution.error) == ("error", 6, None, None)
    assert execution.stdout == "in\n"


async def test_an_exception_has_type_message_and_the_stack_of_the_users_frames_only(container: Container) -> None:
    code = "def inner():\n    raise KeyError('lost')\n\ndef handler(event):\n    inner()\n"
    execution = await run(container, code)
    assert execution.error is not None
    assert (execution.error.type, execution.error.message) == ("KeyError", "'lost'")
    assert execution.error.stack_trace == [
        '  File "main.py", line 5, in handler\n    inner()\n',
        "  File \"main.py\", line 2, in inner\n    raise KeyError('lost')\n",
    ]
    assert execution.stderr.startswith('Traceback (most recent call last):\n  File "main.py", line 5, in handler\n')
    assert execution.stderr.endswith("KeyError: 'lost'\n")
    assert "bootstrap" not in execution.stderr


async def test_the_stack_of_a_workspace_file_is_the_users_too(container: Container) -> None:
    code = "open('fails.py', 'w').write('def go(event):\\n    raise OSError(5)\\n')"
    assert (await run(container, code)).outcome == "ok"
    execution = await run(container, None, handler="fails.go")
    assert execution.error is not None
    assert execution.error.stack_trace == ['  File "/workspace/fails.py", line 2, in go\n    raise OSError(5)\n']


async def test_an_exception_of_async_code_has_no_frame_of_ours(container: Container) -> None:
    execution = await run(container, "async def handler(event): raise ValueError('no')")
    assert execution.error is not None
    assert [frame for frame in execution.error.stack_trace if "bootstrap" in frame] == []
    assert execution.error.stack_trace[-1].startswith('  File "main.py", line 1, in handler\n')


# --- env, args, stdin, commands


async def test_env_reaches_the_code_and_the_executions_wins(container: Container) -> None:
    code = handler("import os", "return [os.environ.get(n) for n in ('A', 'B', 'HOME', 'PATH')]")
    found = await value_of(container, code, session_env={"A": "session", "B": "b"}, env={"A": "own ü"})
    assert found == ["own ü", "b", "/workspace", "/usr/local/bin:/usr/bin:/bin:/workspace/.local/bin"]


async def test_nothing_of_the_hosts_environment_is_in_the_sandbox(container: Container) -> None:
    names = await value_of(container, handler("import os", "return sorted(os.environ)"))
    assert set(names) <= {"HOME", "LANG", "PATH", "PWD", "LC_CTYPE"}
    initial = await value_of(container, handler("return open('/proc/1/environ').read()"))
    assert initial == ""


async def test_args_are_the_scripts(container: Container) -> None:
    assert await value_of(container, handler("import sys", "return sys.argv"), args=["a b", ""]) == [
        "main.py",
        "a b",
        "",
    ]


async def test_stdin_is_read_to_its_end(container: Container) -> None:
    code = handler("import sys", "return [input(), sys.stdin.read()]")
    assert await value_of(container, code, stdin="ü\n2\n3") == ["ü", "2\n3"]


async def test_without_stdin_it_ends_at_once(container: Container) -> None:
    assert await value_of(container, handler("import sys", "return sys.stdin.read()")) == ""


async def test_a_long_stdin_that_nobody_reads_holds_nothing_up(container: Container) -> None:
    assert (await run(container, "print(1)", stdin="x" * MIB)).stdout == "1\n"


async def test_a_long_stdin_arrives_whole(container: Container) -> None:
    code = handler("import sys", "return len(sys.stdin.read())")
    assert await value_of(container, code, stdin="x" * (2 * MIB)) == 2 * MIB


COMMANDS: list[tuple[str, dict[str, Any], int, str]] = [
    ("a line for bash", {"command": "echo a | tr a b; exit 7"}, 7, "b\n"),
    ("a line with arguments", {"command": 'echo "$#:$1"', "args": ["x y"]}, 0, "1:x y\n"),
    ("a list of words", {"command": ["printf", "%s.", "a b", ""]}, 0, "a b.."),
    ("a list with arguments", {"command": ["echo", "a"], "args": ["$HOME"]}, 0, "a $HOME\n"),
    ("a line that reads stdin", {"command": "cat", "stdin": "in"}, 0, "in"),
    ("code of the shell", {"language": "shell", "code": "x=5\necho $x $1", "args": ["y"]}, 0, "5 y\n"),
    ("env", {"command": "echo $A", "env": {"A": "b"}}, 0, "b\n"),
    ("the working directory", {"command": "pwd"}, 0, "/workspace\n"),
    ("a program that is not there", {"command": ["nowhere"]}, 127, ""),
    ("a file that is no program", {"command": ["/etc/passwd"]}, 126, ""),
    ("an empty word", {"command": [""]}, 126, ""),
    ("death by a signal", {"command": "kill -TERM $$"}, 143, ""),
]


@pytest.mark.parametrize(("fields", "exit_code", "stdout"), [pytest.param(*row[1:], id=row[0]) for row in COMMANDS])
async def test_a_command_runs(container: Container, fields: dict[str, Any], exit_code: int, stdout: str) -> None:
    execution = await run(container, **fields)
    assert (execution.exit_code, execution.stdout) == (exit_code, stdout)
    assert execution.outcome == ("error" if exit_code else "ok")
    assert "Traceback" not in execution.stderr


async def test_a_command_that_cannot_run_says_why(container: Container) -> None:
    assert (await run(container, command=["nowhere"])).stderr == "nowhere: No such file or directory\n"
    assert (await run(container, command=["/etc/passwd"])).stderr == "/etc/passwd: Permission denied\n"


async def test_a_null_byte_that_no_program_can_get_is_said_without_our_frames(container: Container) -> None:
    execution = await run(container, command=["echo", "a\0b"])
    assert (execution.outcome, execution.exit_code) == ("error", 126)
    assert execution.stderr == "echo: embedded null byte\n"


# --- the end of the code


async def test_a_file_that_was_left_open_is_written(container: Container) -> None:
    assert (await run(container, "kept = open('left.txt', 'w')\nkept.write('data')")).outcome == "ok"
    assert (await run(container, "print(open('left.txt').read(), end='')")).stdout == "data"


async def test_a_thread_is_waited_for_and_a_daemon_is_not(container: Container) -> None:
    code = (
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.1), print('thread'))).start()\n"
        "threading.Thread(target=lambda: (time.sleep(60), print('daemon')), daemon=True).start()\n"
        "print('main')\n"
    )
    execution = await run(container, code)
    assert (execution.outcome, execution.stdout) == ("ok", "main\nthread\n")


async def test_exit_handlers_run_and_their_output_counts(container: Container) -> None:
    code = "import atexit\natexit.register(print, 'bye')\nclass C:\n  def __del__(self): print('gone')\nkept = C()\nprint('main')"
    assert (await run(container, code)).stdout == "main\nbye\ngone\n"


async def test_what_was_left_in_the_background_is_killed_and_not_waited_for(container: Container) -> None:
    code = "import subprocess\nsubprocess.Popen(['sleep', '1235.25'], start_new_session=True)\nprint('main')"
    execution = await run(container, code)
    assert (execution.outcome, execution.stdout) == ("ok", "main\n")
    assert [line for line in commands() if b"1235.25" in line] == []


async def test_every_execution_has_its_own_tmp_and_the_workspace_stays(container: Container) -> None:
    assert (await run(container, command="echo 1 > /tmp/f; echo 1 > /dev/shm/f; echo 1 > stays")).outcome == "ok"
    assert (await run(container, command="ls /tmp /dev/shm; cat stays")).stdout == "/dev/shm:\n\n/tmp:\n1\n"


async def test_usage_counts_children_cpu_and_peak_memory(container: Container) -> None:
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'b = bytearray(80 << 20)\\nfor _ in range(3_000_000): pass'])"
    usage = (await run(container, code)).usage
    assert usage is not None
    assert usage.cpu_s > 0.03
    assert 80 * MIB < usage.max_rss_bytes < 128 * MIB
    assert usage.wall_s >= usage.cpu_s / 2


# --- several at once, cancelling


async def test_executions_run_at_the_same_time_and_their_outputs_stay_apart(container: Container) -> None:
    """Each waits for the files of all others, so they end only together."""
    code = (
        "import os, sys, time\n"
        "print('I am', sys.argv[1])\n"
        "open(f'meet-{sys.argv[1]}', 'w').close()\n"
        "while sum(name.startswith('meet-') for name in os.listdir()) < 6: time.sleep(0.005)\n"
        "print('we are', sys.argv[1])\n"
    )
    found = await asyncio.gather(*(run(container, code, args=[str(number)]) for number in range(6)))
    assert [execution.stdout for execution in found] == [f"I am {number}\nwe are {number}\n" for number in range(6)]


async def test_a_running_execution_is_cancelled_and_keeps_what_it_printed(container: Container) -> None:
    started = asyncio.Event()
    output: list[tuple[Stream, bytes]] = []

    def take(stream: Stream, data: bytes) -> None:
        output.append((stream, data))
        started.set()

    job = {"code": "import os\nos.write(1, b'started')\nwhile True: pass", "timeout_s": 30.0}
    running = asyncio.create_task(container.execute("to-cancel", job, note={}, deadline_s=30, sink=take, hold=False))
    await started.wait()
    container.cancel("to-cancel")
    container.cancel("to-cancel")
    result = await running
    assert (result.outcome, result.exit_code) == ("cancelled", 137)
    assert output == [("stdout", b"started")]
    assert await value_of(container, handler("return 1")) == 1


async def test_a_job_much_longer_than_a_frame_arrives(container: Container) -> None:
    code = f"text = {'x' * 300_000!r}\n" + handler("return [len(text), event]")
    assert await value_of(container, code, event={"long": "ü" * 100_000}) == [300_000, {"long": "ü" * 100_000}]


async def test_an_event_as_deep_as_the_orchestrator_takes_does_not_lose_the_container(container: Container) -> None:
    deep: list[Any] = []
    for _ in range(800):
        deep = [deep]
    assert await value_of(container, handler("return 1"), event=deep) == 1


# --- the self-test


async def test_the_self_test_sees_every_layer_that_this_engine_has(container: Container) -> None:
    root = os.geteuid() == 0
    assert container.layers == {
        "container": False,
        "user_namespace": True,
        "pid_namespace": True,
        "outer_seccomp": False,
        "inner_seccomp": True,
        "no_new_privs": True,
        "no_capabilities": True,
        "no_network": True,
        "read_only_root": True,
        "limits": True,
        "own_uid": root,
    }


async def test_a_layer_that_was_not_observed_refuses_the_container(engine: LocalEngine) -> None:
    class Strict(LocalEngine):
        required_layers = frozenset({"container", "no_network"})

    strict = Strict(engine._root, record=lambda *_: None)
    refused = Container(spec(), "python", output_limit=1, on_lost=lambda _: None)
    with pytest.raises(IsolationError, match="container is missing: run on the Docker engine"):
        await refused.start(strict, LIMITS)
    refused.close("done")
    await strict.close()


async def test_a_self_test_that_cannot_run_refuses_the_container_with_the_reason(engine: LocalEngine) -> None:
    refused = Container(spec(), "python", output_limit=1, on_lost=lambda _: None)
    with pytest.raises(ContainerLost, match=r"(?s)self-test did not run: .*MemoryError"):
        await refused.start(engine, LIMITS | {"memory_bytes": 2 * MIB})


SEEN: dict[str, Any] = {
    "uid": 1000,
    "capabilities": 0,
    "no_new_privs": 1,
    "seccomp_filters": 2,
    "processes": 2,
    "interfaces": ["lo"],
    "unshare": "EPERM",
    "connect": "ENETUNREACH",
    "write_root": "EROFS",
    "write_usr": "EROFS",
    "write_proc": "EROFS",
    "limits": {"NPROC": 64, "DATA": 0},
    "agent_uid": 50000,
    "agent_seccomp": 1,
}


def missing(**changes: Any) -> set[str]:
    canary = {name: value for name, value in (SEEN | changes).items() if value is not ...}
    return {layer for layer, active in isolation.judge(canary, engine="docker", uid=50000).items() if not active}


def test_a_self_test_that_saw_everything_proves_every_layer() -> None:
    assert missing() == set()


@pytest.mark.parametrize("name", sorted(SEEN))
def test_what_a_report_lacks_is_not_proven(name: str) -> None:
    assert missing(**{name: ...}) != set()


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        ({"uid": 0}, "user_namespace"),
        ({"unshare": "done"}, "user_namespace"),
        ({"processes": 40}, "pid_namespace"),
        ({"processes": 0}, "pid_namespace"),
        ({"agent_seccomp": 0}, "outer_seccomp"),
        ({"agent_seccomp": None}, "outer_seccomp"),
        ({"seccomp_filters": 1}, "inner_seccomp"),
        ({"no_new_privs": 0}, "no_new_privs"),
        ({"capabilities": 0x2000}, "no_capabilities"),
        ({"interfaces": ["lo", "eth0"]}, "no_network"),
        ({"connect": "done"}, "no_network"),
        ({"connect": "ECONNREFUSED"}, "no_network"),
        ({"write_root": "done"}, "read_only_root"),
        ({"write_usr": "done"}, "read_only_root"),
        ({"write_proc": "ENOENT"}, "read_only_root"),
        ({"limits": {"NPROC": -1}}, "limits"),
        ({"limits": {"NPROC": 64, "DATA": None}}, "limits"),
        ({"limits": {}}, "limits"),
        ({"agent_uid": 0}, "own_uid"),
        ({"connect": ["done"]}, "no_network"),
        ({"processes": "2"}, "pid_namespace"),
    ],
)
def test_what_the_self_test_saw_decides_on_the_layer(change: dict[str, Any], layer: str) -> None:
    assert layer in missing(**change)


def test_a_missing_layer_is_explained_with_what_to_change() -> None:
    text = isolation.explain({"user_namespace", "no_network"})
    assert "no_network is missing: " in text
    assert "kernel.apparmor_restrict_unprivileged_userns=0" in text


# --- the agent's side of the channel, spoken by hand


class Driver:
    """One agent, spoken to frame by frame."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._frames: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._lines = agent_frames.Lines()
        self.complaints = b""
        self.ended = asyncio.Event()
        self.name = ""
        self.wire: Wire

    async def attach(self) -> None:
        own = spec()
        self.name = own.name
        self.wire = await self._engine.start(own, self)

    async def start(self) -> None:
        await self.attach()
        self.send("hello", version=AGENT_VERSION, nonce="n1", limits=LIMITS)
        await self.expect("hello")

    def received(self, data: bytes) -> None:
        for line in self._lines.feed(data):
            frame = agent_frames.decode(line)
            assert frame is not None, line
            self._frames.put_nowait(frame)

    def said(self, text: bytes) -> None:
        self.complaints += text

    def lost(self, reason: str) -> None:
        self.ended.set()

    def send(self, kind: str, **fields: Any) -> None:
        self.wire.write(frames.encode(kind, **fields))

    async def expect(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the next frames, which must be of these kinds."""
        found: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(SOON_S):
                while len(found) < len(kinds):
                    found.append(await self._frames.get())
        except TimeoutError:
            raise AssertionError(f"{found} {self.complaints.decode()}") from None
        assert [frame["type"] for frame in found] == list(kinds)
        return found

    async def quiet(self) -> None:
        """Check that nothing came but the answer to a ping sent now."""
        self.send("ping", number=99)
        assert await self.expect("pong") == [{"type": "pong", "number": 99}]


@pytest.fixture(scope="module")
async def driver(engine: LocalEngine) -> Driver:
    made = Driver(engine)
    await made.start()
    return made


def job(code: str, timeout_s: float = 10.0) -> dict[str, Any]:
    return {"code": code, "timeout_s": timeout_s}


async def test_hello_comes_with_version_nonce_and_findings_and_again_when_asked(driver: Driver) -> None:
    driver.send("hello", version=AGENT_VERSION, nonce="n2", limits=LIMITS)
    [hello] = await driver.expect("hello")
    assert (hello["version"], hello["nonce"], hello["canary"]["uid"]) == (AGENT_VERSION, "n2", 1000)


@pytest.mark.parametrize("facts", [{"version": AGENT_VERSION + 1}, {}], ids=["another", "none, as before version 11"])
async def test_an_orchestrator_of_another_version_is_told_to_build_the_image_anew(
    engine: LocalEngine, facts: dict[str, int]
) -> None:
    """And not that a limit is unknown."""
    fresh = Driver(engine)
    await fresh.attach()
    fresh.send("hello", nonce="n", limits=LIMITS | {"unheard_of": 1}, **facts)
    assert await fresh.expect("fault") == [{"type": "fault", "message": UNFIT}]
    async with asyncio.timeout(SOON_S):
        await fresh.ended.wait()
    assert fresh.complaints.decode().splitlines() == [UNFIT]
    await engine.remove(fresh.name)


async def test_a_container_whose_agent_is_of_another_version_says_what_to_do(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greeting, "AGENT_VERSION", AGENT_VERSION + 1)
    with pytest.raises(ContainerLost) as caught:
        await boot(engine)
    assert caught.value.detail == UNFIT


async def test_an_agent_that_serves_answers_an_orchestrator_of_another_version_and_goes_on(driver: Driver) -> None:
    driver.send("hello", version=AGENT_VERSION + 1, nonce="n", limits={"unheard_of": 1})
    [hello] = await driver.expect("hello")
    assert hello["version"] == AGENT_VERSION
    await driver.quiet()


async def test_the_first_session_counts_and_its_kept_facts_are_replaced_and_told(engine: LocalEngine) -> None:
    fresh = Driver(engine)
    await fresh.start()
    for session, kept in (("first", {"n": 1}), ("second", {"n": 2}), ("first", {"n": 3})):
        fresh.send("bind", session=session, kept=kept)
    assert await fresh.expect("bound", "bound", "bound") == [{"type": "bound", "session": "first"}] * 3
    fresh.send("hello", version=AGENT_VERSION, nonce="n", limits=LIMITS)
    [hello] = await fresh.expect("hello")
    assert (hello["session"], hello["kept"]) == ("first", {"n": 3})
    assert 0 <= hello["kept_age_s"] < SOON_S
    await engine.remove(fresh.name)


async def test_a_hello_that_is_too_long_for_a_line_comes_in_parts(engine: LocalEngine) -> None:
    """What a session keeps counts in UTF-8, and leaves the agent in ASCII."""
    fresh = Driver(engine)
    await fresh.start()
    kept = {"metadata": {"text": "北" * 19_000}}
    fresh.send("bind", session="s", kept=kept)
    await fresh.expect("bound")
    fresh.send("hello", version=AGENT_VERSION, nonce="n", limits=LIMITS)
    parts = await fresh.expect(*["part"] * 4)
    assert [(part["nonce"], part["last"]) for part in parts] == [("n", False)] * 3 + [("n", True)]
    hello = frames.decode(b"".join(base64.b64decode(part["data"]) for part in parts))
    assert isinstance(hello, frames.Hello)
    assert (hello.nonce, hello.session, hello.kept) == ("n", "s", kept)
    await engine.remove(fresh.name)


async def test_a_job_in_the_queue_is_told_and_runs_when_its_turn_has_come(driver: Driver) -> None:
    long = job("import os\nos.write(1, b'q')\n#" + "x" * frames.LINE_LIMIT)
    for name, kept in (("long", long), ("short", job("pass")), ("unwanted", job("pass"))):
        driver.wire.write(b"".join(frames.encode_job("queue", name, kept, note={"key": name}, acks=[])))
    driver.send("cancel", id="unwanted")
    driver.send("hello", version=AGENT_VERSION, nonce="n", limits=LIMITS)
    [hello] = await driver.expect("hello")
    queued = [(known["id"], known["queued"], known["note"]) for known in hello["executions"]]
    assert queued == [("long", True, {"key": "long"}), ("short", True, {"key": "short"})]
    driver.send("execute", id="long", acks=[])
    driver.send("execute", id="unwanted", acks=[])
    output, result = await driver.expect("output", "result")
    assert (output["id"], base64.b64decode(output["data"]), result["outcome"]) == ("long", b"q", "ok")
    driver.wire.write(b"".join(frames.encode_job("execute", "short", job("exit(3)"), note={}, acks=["long"])))
    [result] = await driver.expect("result")
    assert result["exit_code"] == 3, "a job that comes with the word is the one that runs"
    driver.send("hello", version=AGENT_VERSION, nonce="n", limits=LIMITS)
    [hello] = await driver.expect("hello")
    assert [(known["id"], known.get("queued")) for known in hello["executions"]] == [("short", None)]
    driver.send("ack", acks=["short"])


async def test_a_result_is_kept_until_acknowledged_and_sent_again_from_any_number(driver: Driver) -> None:
    code = "import os, time\nfor n in range(3):\n  os.write(1, b'%d' % n)\n  time.sleep(0.05)"
    driver.send("execute", id="kept", job=job(code), note={"key": "k"})
    first = await driver.expect("output", "output", "output", "result")
    assert [frame["seq"] for frame in first] == [1, 2, 3, 3]
    assert [base64.b64decode(frame["data"]) for frame in first[:3]] == [b"0", b"1", b"2"]
    driver.send("hello", version=AGENT_VERSION, nonce="n", limits=LIMITS)
    [hello] = await driver.expect("hello")
    [known] = hello["executions"]
    assert 0.1 < known.pop("age_s") < SOON_S
    assert known == {"id": "kept", "seq": 3, "done": True, "note": {"key": "k"}}
    driver.send("resync", id="kept", seq=0)
    assert await driver.expect("output", "output", "output", "result") == first
    driver.send("resync", id="kept", seq=2)
    assert await driver.expect("output", "result") == first[2:]
    driver.send("resync", id="kept", seq=3)
    assert await driver.expect("result") == first[3:]
    driver.send("ack", acks=["kept"])
    driver.send("resync", id="kept", seq=0)
    await driver.quiet()


async def test_a_running_execution_survives_an_early_acknowledgement_and_a_resync(driver: Driver) -> None:
    driver.send("execute", id="early", job=job("import os, time\nos.write(1, b'a')\ntime.sleep(60)"))
    driver.send("execute", id="long", job=job("import os, time\nos.write(1, b'a')\ntime.sleep(60)"))
    await driver.expect("output", "output")
    driver.send("cancel", id="early")
    await driver.expect("result")
    driver.send("ack", acks=["long"])
    driver.send("ack", acks=["early"])
    driver.send("hello", version=AGENT_VERSION, nonce="n", limits=LIMITS)
    [hello] = await driver.expect("hello")
    assert [(known["id"], known["done"]) for known in hello["executions"]] == [("long", False)]
    driver.send("resync", id="long", seq=0)
    [again] = await driver.expect("output")
    assert (again["id"], again["seq"]) == ("long", 1)
    driver.send("cancel", id="long")
    [result] = await driver.expect("result")
    assert (result["outcome"], result["exit_code"]) == ("cancelled", 137)
    driver.send("ack", acks=["long"])


async def test_an_execution_is_cancelled_before_it_could_start(driver: Driver) -> None:
    """Both frames are read in one go: the sandbox has the job at most for an instant."""
    line = frames.encode("execute", id="early-cancel", job=job("import time\ntime.sleep(60)"))
    driver.wire.write(line + frames.encode("cancel", id="early-cancel"))
    [result] = await driver.expect("result")
    assert result["outcome"] == "cancelled"
    driver.send("ack", acks=["early-cancel"])


async def test_an_execution_that_is_cancelled_at_any_moment_of_its_sandboxes_boot_ends_and_leaves_no_process(
    engine: LocalEngine, driver: Driver
) -> None:
    """More at once than sandboxes wait, so most are still to boot; the pause before the cancel is what varies."""
    for step in range(20):
        names = [f"boot-{step}-{number}" for number in range(5)]
        for name in names:
            driver.send("execute", id=name, job=job("import time\ntime.sleep(60)"))
        await asyncio.sleep(step * 0.0005)
        for name in names:
            driver.send("cancel", id=name)
        found = await driver.expect(*["result"] * 5)
        assert {frame["outcome"] for frame in found} == {"cancelled"}
        driver.send("ack", acks=names)
    agent = engine._agents[driver.name]._process.get_pid()
    children = Path(f"/proc/{agent}/task/{agent}/children")
    async with asyncio.timeout(SOON_S):
        while len(read(children).split()) > LIMITS["preboot"]["python"]:
            await asyncio.sleep(0.01)


async def test_more_executions_than_waiting_sandboxes_all_end(driver: Driver) -> None:
    lines = b"".join(frames.encode("execute", id=f"many-{n}", job=job("pass")) for n in range(8))
    driver.wire.write(lines)
    found = await driver.expect(*["result"] * 8)
    assert sorted(frame["id"] for frame in found) == [f"many-{n}" for n in range(8)]
    assert {frame["outcome"] for frame in found} == {"ok"}
    for frame in found:
        driver.send("ack", acks=[frame["id"]])


@pytest.mark.parametrize("size", [1, 100_000], ids=["in one line", "in parts"])
async def test_an_execution_is_taken_once(driver: Driver, size: int) -> None:
    lines = list(frames.encode_job("execute", "twice", job("#" * size), note={}, acks=[]))
    driver.wire.write(b"".join(lines + lines))
    await driver.expect("result")
    driver.wire.write(b"".join(lines[1:] or lines))
    await driver.quiet()
    driver.send("ack", acks=["twice"])


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(b"\n\n\n", id="empty lines"),
        pytest.param(b'{"type":"execute","id":"torn","job":{"co\n', id="half a line of a dead client"),
        pytest.param(b"\xff\xfe\n[]\n5\n", id="no frames"),
        pytest.param(b'{"type":"dance"}\n{}\n', id="unknown frames"),
        pytest.param(b"x" * 300_000 + b"\n", id="a line that is too long"),
        pytest.param(frames.encode("cancel", id="none") + frames.encode("ack", acks=["none"]), id="unknown executions"),
        pytest.param(frames.encode("resync", id="none", seq=0), id="a resync of an unknown execution"),
        pytest.param(frames.encode("execute", id="no-parts"), id="a long job without its parts"),
    ],
)
async def test_noise_on_the_channel_is_passed_over(driver: Driver, noise: bytes) -> None:
    driver.wire.write(noise)
    await driver.quiet()


async def test_a_frame_may_arrive_byte_by_byte(driver: Driver) -> None:
    for byte in frames.encode("ping", number=5):
        driver.wire.write(bytes([byte]))
        await asyncio.sleep(0)
    assert await driver.expect("pong") == [{"type": "pong", "number": 5}]


async def test_the_agent_ends_with_its_channel(engine: LocalEngine) -> None:
    fresh = Driver(engine)
    await fresh.start()
    fresh.send("execute", id="e", job=job("import subprocess\nsubprocess.run(['sleep', '1236.25'])"))
    await until(lambda: pid_of("sleep", "1236.25"))
    fresh.wire.close()
    await asyncio.wait_for(fresh.ended.wait(), SOON_S)
    async with asyncio.timeout(SOON_S):
        while any(b"1236.25" in line for line in commands()):
            await asyncio.sleep(0.01)
        while any(seen.running for seen in await engine.list() if seen.name == fresh.name):
            await asyncio.sleep(0.01)
    await engine.remove(fresh.name)
