"""Contexts on the local engine: IPython's own shell in a sandbox that stays, over the real agent."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from orchestrator import errors
from orchestrator.sdk import SandboxClient, SyncSandboxClient
from tests.contexts import Ctx, has_ipython, main_of, running
from tests.live import until

pytestmark = pytest.mark.skipif(not has_ipython(), reason="/usr/bin/python3 has no IPython: install python3-ipython")
INTERRUPTED = "The cell was interrupted; the context lives, its variables are kept"


@pytest.fixture(scope="module")
def session(local_service: Any) -> Iterator[str]:
    client = local_service.client
    sid = client.post("/v1/sessions", json={"env": {"TEAM": "a"}}).json()["id"]
    yield sid
    client.delete(f"/v1/sessions/{sid}")


@pytest.fixture(scope="module")
def shared(local_service: Any, session: str) -> Ctx:
    """A context for cells that leave nothing behind which others see."""
    return Ctx(local_service.client, session)


@pytest.fixture
def fresh(client: httpx.Client, session: str) -> Iterator[Ctx]:
    """A context of the test's own."""
    context = Ctx(client, session)
    yield context
    client.delete(context.path)


# --- cells


def test_variables_stay_from_cell_to_cell(fresh: Ctx) -> None:
    assert fresh.run("x = 20")["value"] is None
    assert fresh.value("x += 1; x * 2") == 42
    facts = fresh.facts()
    assert (facts["state"], facts["executions"], facts["language"]) == ("idle", 2, "python")


ENDINGS = [
    pytest.param("print('hi')", "ok", 0, None, "hi\n", id="output"),
    pytest.param("", "ok", 0, None, "", id="nothing"),
    pytest.param("print('before'); 1 / 0", "error", 1, "ZeroDivisionError", "before\n", id="an exception"),
    pytest.param("def f(:", "error", 1, "SyntaxError", "", id="a syntax error"),
    pytest.param("1\0", "error", 1, "ValueError", "", id="a null byte"),
    pytest.param("class E(Exception):\n  def __str__(self): 1/0\nraise E", "error", 1, "E", "", id="no text"),
    pytest.param("def f(): f()\nf()", "error", 1, "RecursionError", "", id="a recursion"),
    pytest.param("raise KeyboardInterrupt", "error", 1, "KeyboardInterrupt", "", id="an interrupt of its own"),
    pytest.param("import sys; sys.exit(3)", "error", 3, "SystemExit", "", id="sys.exit(3)"),
    pytest.param("import sys; sys.exit(0)", "ok", 0, None, "", id="sys.exit(0)"),
    pytest.param("exit", "ok", 0, None, "", id="exit"),
    pytest.param("exit(4)", "error", 4, "SystemExit", "", id="exit(4)"),
    pytest.param("%no_such_magic", "error", 1, "UsageError", "", id="no such magic"),
    pytest.param("bytearray(1 << 30)", "error", 1, "MemoryError", "", id="too much memory"),
    pytest.param("input('name? ')", "error", 1, "StdinNotImplementedError", "", id="input"),
    pytest.param(
        "import os\nif os.fork() == 0: print('child')\nelse: os.wait()[1]", "ok", 0, None, "child\n", id="fork"
    ),
]


@pytest.mark.parametrize(("code", "outcome", "exit_code", "error", "stdout"), ENDINGS)
def test_a_cell_has_its_outcome_and_leaves_the_context_alive(
    shared: Ctx, code: str, outcome: str, exit_code: int, error: str | None, stdout: str
) -> None:
    execution = shared.run(code)
    assert (execution["outcome"], execution["exit_code"], execution["stdout"]) == (outcome, exit_code, stdout)
    assert (execution["error"]["type"] if execution["error"] else None) == error
    assert execution["context_id"] == shared.id
    assert shared.value("'alive'") == "alive"


VALUES = [
    ("{'a': (1, 2.5, None, True)}", {"a": [1, 2.5, None, True]}, "{'a': (1, 2.5, None, True)}"),
    ("'ü\\n'", "ü\n", "'ü\\n'"),
    ("2 ** 70", 2**70, str(2**70)),
    ("object", None, "object"),
    ("float('nan')", None, "nan"),
    ("'\\ud800'", None, "'\\ud800'"),
    ("[...]", None, "[Ellipsis]"),
    ("'x' * 2_000_000", None, None),
    ("import asyncio\nawait asyncio.sleep(0.01)\n7", 7, "7"),
    ("%env TEAM", "a", "'a'"),
]


@pytest.mark.parametrize(("code", "value", "text"), VALUES, ids=[row[0][:20] for row in VALUES])
def test_the_last_expression_is_the_value_if_json_can_carry_it_and_always_the_main_display(
    shared: Ctx, code: str, value: Any, text: str | None
) -> None:
    execution = shared.run(code)
    assert (execution["outcome"], execution["value"]) == ("ok", value)
    shown = main_of(execution)
    assert text is None or shown == text


def test_a_semicolon_and_a_statement_show_nothing(shared: Ctx) -> None:
    for code in ("1;", "y = 1", "None"):
        execution = shared.run(code)
        assert (execution["value"], execution["displays"]) == (None, [])


def test_displays_come_in_order_as_objects_of_mime_types(shared: Ctx) -> None:
    code = """
from IPython.display import HTML, SVG, JSON, Image, Latex, Markdown, display
display(HTML('<b>x</b>'), SVG('<svg xmlns="http://www.w3.org/2000/svg"/>'), Latex('$x$'), Markdown('*x*'))
display(JSON({'a': [1]}), Image(data=b'\\x89PNG\\r\\n\\x1a\\n'), 'plain')
handle = display('first', display_id='d')
handle.update('second')
5
"""
    execution = shared.run(code)
    displays = execution["displays"]
    assert displays[0]["text/html"] == "<b>x</b>"
    assert "<svg" in displays[1]["image/svg+xml"]
    assert displays[2]["text/latex"] == "$x$"
    assert displays[3]["text/markdown"] == "*x*"
    assert displays[4]["application/json"] == {"a": [1]}
    assert displays[5]["image/png"] == "iVBORw0KGgo="
    assert displays[6] == {"text/plain": "'plain'"}
    assert displays[7] == {"text/plain": "'first'", "display_id": "d"}
    assert displays[8] == {"text/plain": "'second'", "display_id": "d", "update": True}
    assert displays[9] == {"text/plain": "5", "main": True}
    assert (execution["value"], execution["truncated"]) == (5, [])


def test_magics_and_shell_commands_work(shared: Ctx) -> None:
    assert shared.run("!echo out; echo err >&2")["stdout"] == "out\n"
    assert shared.value("!exit 3\n_exit_code") == 3
    assert shared.value("lines = !printf 'a\\nb\\n'\nlist(lines)") == ["a", "b"]
    assert shared.run("%%bash\necho in bash")["stdout"] == "in bash\n"
    assert "per loop" in shared.run("%timeit -n1 -r1 pass")["stdout"]
    assert shared.value("%pwd") == "/workspace"


def test_a_traceback_has_the_users_lines_and_no_colours(shared: Ctx) -> None:
    execution = shared.run("def f():\n    raise ValueError('no')\nf()")
    text = "\n".join(execution["error"]["stack_trace"])
    assert execution["error"]["message"] == "no"
    assert "raise ValueError('no')" in text
    assert "f()" in text
    assert "\x1b" not in text + execution["stderr"]
    assert not any(module in text for module in ("cells.py", "interactive.py", "records.py"))
    assert "ValueError: no" in execution["stderr"]


def test_files_of_the_workspace_are_imported_and_its_modules_do_not_reach_the_boot(client: httpx.Client) -> None:
    sid = client.post("/v1/sessions").json()["id"]
    bad = "open('/workspace/reached', 'w')"
    names = ("traitlets", "pygments", "IPython", "jedi", "decorator", "interactive", "records")
    code = "".join(f"open('{name}.py', 'w').write({bad!r})\n" for name in names) + "open('own.py', 'w').write('x = 5')"
    assert client.post(f"/v1/sessions/{sid}/executions", json={"code": code}).json()["outcome"] == "ok"
    context = Ctx(client, sid)
    assert context.value("import own; own.x") == 5
    assert context.value("import os; os.path.exists('reached')") is False
    assert context.value("import interactive, records; os.path.exists('reached')") is True
    client.delete(f"/v1/sessions/{sid}")


def test_the_environment_is_the_sessions_and_then_the_contexts_own(fresh: Ctx) -> None:
    assert fresh.value("import os; os.environ['TEAM']") == "a"
    fresh.run("os.environ['TEAM'] = 'b'")
    assert fresh.value("os.environ['TEAM'], 'SANDBOX_PORT' in os.environ") == ["b", False]


def test_nothing_of_a_cell_comes_late_or_leaks_into_the_next(shared: Ctx) -> None:
    for number in range(30):
        mark = f"<{number}>"
        execution = shared.run(f"import sys\nprint('{mark}' * 3000)\nsys.stderr.write('{mark}')\n!echo '{mark}'")
        assert execution["stdout"] == mark * 3000 + "\n" + mark + "\n"
        assert execution["stderr"] == mark


def test_what_is_printed_between_cells_is_dropped(fresh: Ctx) -> None:
    code = """
import threading, time
def chatter():
    time.sleep(0.2)
    print('between' * 20_000)
    done.set()
done = threading.Event()
threading.Thread(target=chatter).start()
"""
    assert fresh.run(code)["stdout"] == ""
    time.sleep(0.6)
    assert fresh.run("done.wait(10); print('own')")["stdout"] == "own\n"


def test_artifacts_and_usage_are_those_of_the_cell(fresh: Ctx) -> None:
    fresh.run("open('before', 'w').close()")
    execution = fresh.run(
        "open('mine', 'w').write('abc')\nimport time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    )
    assert [artifact["path"] for artifact in execution["artifacts"]] == ["mine"]
    usage = execution["usage"]
    assert 0.25 < usage["cpu_s"] < 2
    assert usage["wall_s"] >= 0.3
    assert usage["max_rss_bytes"] > 10 << 20
    assert fresh.run("1")["usage"]["cpu_s"] < 0.2


# --- limits


def test_displays_above_their_limit_are_dropped_whole_and_named(fresh: Ctx) -> None:
    execution = fresh.run("for n in range(10): display({'text/plain': str(n) * 1_000_000}, raw=True)")
    assert (execution["outcome"], execution["truncated"]) == ("ok", ["display"])
    assert [display["text/plain"][0] for display in execution["displays"]] == list("01234567")
    assert all(len(display["text/plain"]) == 1_000_000 for display in execution["displays"])


def test_a_flood_of_displays_and_one_of_output_are_ended_and_the_context_lives(fresh: Ctx) -> None:
    for flood in ("display({'text/plain': 'x' * 1_000_000}, raw=True)", "print('x' * 1_000_000)"):
        execution = fresh.run(f"while True: {flood}")
        assert (execution["outcome"], execution["exit_code"], execution["signal"]) == ("output_limit", 130, 2)
        assert execution["error"]["type"] == "Sandbox.Interrupted"
        assert fresh.value("5") == 5


# --- timeouts and cancelling


def test_a_timeout_interrupts_and_the_variables_are_kept(fresh: Ctx) -> None:
    fresh.run("x = 5")
    begun = time.monotonic()
    execution = fresh.run("print('before')\nwhile True: x += 0", timeout_s=0.5)
    assert time.monotonic() - begun < 2.4
    assert (execution["outcome"], execution["exit_code"], execution["signal"]) == ("timeout", 130, 2)
    assert (execution["stdout"], execution["value"]) == ("before\n", None)
    error = execution["error"]
    assert (error["type"], error["message"]) == ("Sandbox.Interrupted", INTERRUPTED)
    assert "while True" in "\n".join(error["stack_trace"])
    assert fresh.value("x") == 5


WAITS = ["import time; time.sleep(60)", "await asyncio.sleep(60)", "!sleep 60", "%%bash\nsleep 60"]


@pytest.mark.parametrize("code", WAITS)
def test_what_waits_is_interrupted(shared: Ctx, code: str) -> None:
    shared.run("import asyncio")
    execution = shared.run(code + "\nprint('never')", timeout_s=0.3)
    assert (execution["outcome"], execution["signal"], execution["stdout"]) == ("timeout", 2, "")
    assert execution["error"]["message"] == INTERRUPTED
    assert shared.value("await asyncio.sleep(0.1)\n'next'") == "next"


def test_a_cell_that_does_not_heed_the_interrupt_is_killed_with_its_context(fresh: Ctx) -> None:
    code = "import time\nwhile True:\n  try:\n    while True: time.sleep(0.1)\n  except KeyboardInterrupt: print('no')"
    execution = fresh.run(code, timeout_s=0.3)
    assert (execution["outcome"], execution["exit_code"], execution["signal"]) == ("timeout", 137, 9)
    assert execution["stdout"] == "no\n"
    assert execution["error"]["type"] == "Sandbox.ContextDied"
    assert "killed" in execution["error"]["message"]
    assert "restart" in execution["error"]["message"]
    assert fresh.facts()["state"] == "dead"
    refused = fresh.post("1")
    assert (refused.status_code, refused.json()["code"]) == (409, "context_dead")
    assert "restart it" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("import time; time.sleep(60)", 130),
        ("import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [2])\nwhile True: pass", 137),
    ],
)
def test_a_cancelled_cell_is_interrupted_first_and_killed_after_that(fresh: Ctx, code: str, seen: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(fresh.run, "print('begun')\n" + code)
        [eid] = until(lambda: running(fresh))
        until(lambda: fresh.facts()["executions"] == 1)
        time.sleep(0.3)  # the interrupt must not find the cell before its code
        assert fresh.client.delete(f"{fresh.session}/executions/{eid}").status_code == 204
        execution = answer.result()
    assert (execution["outcome"], execution["exit_code"], execution["stdout"]) == ("cancelled", seen, "begun\n")
    assert fresh.facts()["state"] == ("idle" if seen == 130 else "dead")


# --- death


DEATHS = [
    pytest.param("import os; print('x'); os._exit(3)", "error", 3, None, id="os._exit(3)"),
    pytest.param("import os; print('x'); os._exit(0)", "error", 0, None, id="os._exit(0)"),
    pytest.param("import os; print('x'); os.kill(os.getpid(), 9)", "error", 137, 9, id="a kill"),
    pytest.param("import ctypes; print('x'); ctypes.string_at(0)", "error", 139, 11, id="a crash"),
]


@pytest.mark.parametrize(("code", "outcome", "exit_code", "killer"), DEATHS)
def test_a_context_whose_process_ends_is_dead_until_it_is_restarted(
    fresh: Ctx, code: str, outcome: str, exit_code: int, killer: int | None
) -> None:
    fresh.run("y = 1")
    execution = fresh.run(code)
    assert (execution["outcome"], execution["exit_code"], execution["signal"]) == (outcome, exit_code, killer)
    assert execution["stdout"] == "x\n"
    assert execution["error"]["type"] == "Sandbox.ContextDied"
    facts = fresh.facts()
    assert (facts["state"], str(exit_code) in facts["detail"]) == ("dead", True)
    assert fresh.post("1").status_code == 409
    assert fresh.restart()["state"] == "idle"
    assert fresh.value("'y' in globals()") is False


def test_a_context_that_dies_between_cells_is_known_as_dead(fresh: Ctx) -> None:
    fresh.run("import os, threading; threading.Timer(0.2, lambda: os._exit(5)).start()")
    until(lambda: fresh.facts()["state"] == "dead")
    assert "exit code 5" in fresh.facts()["detail"]


def test_a_restart_cancels_what_runs_and_what_waits_and_keeps_the_id(fresh: Ctx) -> None:
    fresh.run("z = 1")
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(fresh.run, "import time; time.sleep(60)")
        until(lambda: fresh.facts()["state"] == "busy")
        second = pool.submit(fresh.run, "z")
        until(lambda: len(running(fresh)) == 2)
        assert fresh.restart()["id"] == fresh.id
        assert first.result()["outcome"] == "cancelled"
        assert first.result()["error"]["message"] == "The context was restarted or deleted while the cell ran"
        assert second.result()["outcome"] == "cancelled"
    assert fresh.value("'z' in globals()") is False


# --- order, and others beside


def test_cells_run_one_after_the_other_in_order_of_arrival_while_others_run_beside_them(fresh: Ctx) -> None:
    fresh.run("order = []; import os, time")
    with ThreadPoolExecutor(8) as pool:
        slow = pool.submit(fresh.run, "while not os.path.exists('go'): time.sleep(0.02)\norder.append(0)")
        until(lambda: len(running(fresh)) == 1)
        waiting = []
        for number in range(1, 6):
            waiting.append(pool.submit(fresh.run, f"order.append({number})"))
            until(lambda: len(running(fresh)) == number + 1)  # noqa: B023 - called here
        cancelled = running(fresh)[3]
        fresh.client.delete(f"{fresh.session}/executions/{cancelled}")
        until(lambda: len(running(fresh)) == 5)
        beside = fresh.client.post(f"{fresh.session}/executions", json={"code": "open('go', 'w').close()"}).json()
        assert beside["outcome"] == "ok"
        outcomes = [one.result()["outcome"] for one in [slow, *waiting]]
    assert outcomes == ["ok", "ok", "ok", "cancelled", "ok", "ok"]
    assert fresh.value("order") == [0, 1, 2, 4, 5]


def test_two_contexts_are_apart(client: httpx.Client, session: str, fresh: Ctx) -> None:
    other = Ctx(client, session)
    fresh.run("who = 'a'; open('/tmp/mine', 'w').close()")
    other.run("who = 'b'")
    assert (fresh.value("who"), other.value("who")) == ("a", "b")
    assert other.value("import os; os.path.exists('/tmp/mine')") is False
    client.delete(other.path)


# --- the API


def test_contexts_are_listed_read_and_deleted(client: httpx.Client) -> None:
    sid = client.post("/v1/sessions").json()["id"]
    path = f"/v1/sessions/{sid}/contexts"
    assert client.get(path).json() == {"contexts": []}
    context = Ctx(client, sid, id="mine")
    assert [one["id"] for one in client.get(path).json()["contexts"]] == ["mine"]
    taken = client.post(path, json={"id": "mine"})
    assert (taken.status_code, taken.json()["code"]) == (409, "context_exists")
    with ThreadPoolExecutor(1) as pool:
        cell = pool.submit(context.run, "import time; time.sleep(60)")
        until(lambda: context.facts()["state"] == "busy")
        assert client.delete(context.path).status_code == 204
        assert cell.result()["outcome"] == "cancelled"
    for answer in (
        client.get(context.path),
        client.delete(context.path),
        client.post(f"{context.path}/restart"),
        context.post("1"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "context_not_found")
    again = Ctx(client, sid, id="mine")
    assert again.value("1") == 1
    client.delete(f"/v1/sessions/{sid}")


def test_a_session_has_no_more_contexts_than_it_may_have(client: httpx.Client) -> None:
    sid = client.post("/v1/sessions").json()["id"]
    made = [Ctx(client, sid) for _ in range(4)]
    refused = client.post(f"/v1/sessions/{sid}/contexts")
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many_requests")
    client.delete(made[0].path)
    Ctx(client, sid)
    client.delete(f"/v1/sessions/{sid}")


REFUSED = [
    ({"command": "true"}, "command"),
    ({"code": "1", "language": "shell"}, "language"),
    ({"code": "1", "handler": "handler"}, "handler"),
    ({"code": "1", "event": 5}, "event"),
    ({"code": "1", "context": {"a": 1}}, "context"),
    ({"code": "1", "args": ["a"]}, "args"),
    ({"code": "1", "stdin": "a"}, "stdin"),
    ({"code": "1", "env": {"A": "b"}}, "env"),
    ({}, "code"),
    ({"code": "1", "context_id": "no/id"}, "context_id"),
    ({"code": "1", "context_id": 5}, "context_id"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=[f"{row[1]}-{n}" for n, row in enumerate(REFUSED)])
def test_a_cell_is_code_and_nothing_else(shared: Ctx, fields: dict[str, Any], named: str) -> None:
    answer = shared.client.post(f"{shared.session}/executions", json={"context_id": shared.id} | fields)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert named in answer.json()["detail"]


def test_bad_requests_for_contexts_are_refused(client: httpx.Client, session: str) -> None:
    path = f"/v1/sessions/{session}/contexts"
    bodies: list[Any] = [{"language": "shell"}, {"language": None}, {"id": ""}, {"id": "a b"}, {"name": "x"}, []]
    for body in bodies:
        answer = client.post(path, json=body)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request"), body
    assert client.post("/v1/sessions/none/contexts").status_code == 404
    once = client.post("/v1/execute", json={"code": "1", "context_id": "c"})
    assert (once.status_code, once.json()["code"]) == (400, "invalid_request")


def test_an_idempotency_key_answers_a_cell_again_without_running_it_again(fresh: Ctx) -> None:
    fresh.run("n = 0")
    body = {"code": "n += 1; n", "context_id": fresh.id}
    answers = [
        fresh.client.post(f"{fresh.session}/executions", json=body, headers={"Idempotency-Key": "once"}).json()
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    assert fresh.value("n") == 1


# --- hostile cells


LIES = [
    "os.write(FD, b'E 0 %d\\n' % n)\nimport time; time.sleep(0.5)",
    "os.write(FD, b'D 99999999\\nx')",
    "os.write(FD, b'V 99999999\\nx')",
    "os.write(FD, b'D 5\\nnope\\n')",
    "os.write(FD, b'V 3\\nx y')",
    "os.write(FD, b'\\xff' * 100_000)",
    "os.write(FD, b'E 999 999999999999999999\\nE -1 0\\nQ 5\\n')",
    "os.close(FD)",
    "os.closerange(0, 256)",
]


@pytest.mark.parametrize("lie", LIES)
def test_who_writes_on_the_runners_descriptor_lies_about_its_own_results_alone(
    client: httpx.Client, session: str, lie: str
) -> None:
    context = Ctx(client, session)
    find = "import os\nFD = min(int(n) for n in os.listdir('/proc/self/fd') if int(n) >= 200)\nn = 1\n"
    execution = context.run(find + lie, timeout_s=1)
    assert execution["outcome"] in ("ok", "error", "timeout", "output_limit")
    beside = client.post(f"{context.session}/executions", json={"code": "print(1)"}).json()
    assert (beside["outcome"], beside["stdout"]) == ("ok", "1\n")
    context.restart()
    assert context.value("7") == 7
    client.delete(context.path)


def test_threads_of_a_client_may_share_a_context(fresh: Ctx) -> None:
    fresh.run("total = 0")
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(fresh.value, ["total += 1"] * 20)) == {None}
    assert fresh.value("total") == 20


# --- streams of events, and the clients


def test_displays_are_events_as_they_happen(fresh: Ctx) -> None:
    body = {"code": "print('a', end='')\ndisplay('b')\n5", "context_id": fresh.id}
    headers = {"Accept": "text/event-stream"}
    with fresh.client.stream("POST", f"{fresh.session}/executions", json=body, headers=headers) as answer:
        lines = list(answer.iter_lines())
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert kinds == ["started", "stdout", "display", "display", "done"]
    shown = [
        json.loads(lines[at + 1].removeprefix("data: ")) for at, line in enumerate(lines) if line == "event: display"
    ]
    assert shown == [{"text/plain": "'b'"}, {"text/plain": "5", "main": True}]


def test_a_cell_that_is_not_waited_for_is_found_later(fresh: Ctx) -> None:
    answer = fresh.client.post(
        f"{fresh.session}/executions",
        json={"code": "y = 5\ny", "context_id": fresh.id},
        headers={"Prefer": "respond-async"},
    )
    assert answer.status_code == 202
    path = answer.headers["Location"]
    until(lambda: fresh.client.get(path).json()["outcome"])
    assert fresh.client.get(path).json()["value"] == 5


async def test_the_asyncio_client_has_contexts(local_service: Any) -> None:
    async with SandboxClient(local_service.url) as client, client.session() as session:
        context = await session.context()
        await context.run("x = 1")
        execution = await context.run("x + 1")
        assert (execution.value, execution.displays) == (2, [{"text/plain": "2", "main": True}])
        assert (await context.read()).executions == 2
        assert (await client.list_contexts(session.id)).contexts == [await context.read()]
        await context.restart()
        assert (await context.run("x")).outcome == "error"
        await context.run("import os; os._exit(1)")
        with pytest.raises(errors.ContextDead):
            await context.run("1")
        await context.delete()
        with pytest.raises(errors.ContextNotFound):
            await context.read()


def test_the_synchronous_client_has_contexts(local_service: Any) -> None:
    with SyncSandboxClient(local_service.url) as client, client.session() as session:
        context = session.context("mine")
        assert context.id == "mine"
        context.run("x = 1")
        assert context.run("x + 1").value == 2
        assert context.restart().state == "idle"
        with pytest.raises(errors.ContextExists):
            session.context("mine")
        context.delete()
