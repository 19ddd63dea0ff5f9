"""Contexts on the real engine: figures, both ends of a timeout, no memory left, a crash of the service, a hundred cells."""

import base64
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.contexts import Ctx, main_of, running
from tests.live import TAG, Live, free_port, serve, start, until

UID_BASE = "130000"
TEMPLATES = f"""
[data]
image = "sandbox-data:{TAG}"
memory_kb = 524288
"""
PNG = b"\x89PNG\r\n\x1a\n"
# Shared memory counts for no process's own limit: the kernel has to intervene.
EAT = "import mmap\nprint('before')\nm = mmap.mmap(-1, 1 << 30)\nfor at in range(0, 1 << 30, 4096): m[at] = 1"
OPEN_FDS = """
import os
own = os.getpid()
for pid in filter(str.isdigit, os.listdir('/proc')):
    words = open(f'/proc/{pid}/cmdline', 'rb').read().split(b'\\0')
    if words[0].endswith(b'python3') and b'/opt/sandbox/agent' in words and int(pid) != own:
        print(len(os.listdir(f'/proc/{pid}/fd')))
"""


@pytest.fixture(scope="module")
def service(real_engine: None, state_dir: Path) -> Iterator[Live]:
    file = state_dir / "contexts.toml"
    file.write_text(TEMPLATES)
    instance = f"test-contexts-{os.getpid()}"
    given = {"uid_base": UID_BASE, "templates_file": str(file), "pool_size": "1", "heartbeat_seconds": "1"}
    with serve(state_dir, instance=instance, engine="docker", **given) as live:
        yield live


@pytest.fixture(scope="module")
def session(service: Live) -> str:
    return str(service.client.post("/v1/sessions").json()["id"])


@pytest.fixture
def context(service: Live, session: str) -> Iterator[Ctx]:
    made = Ctx(service.client, session)
    yield made
    service.client.delete(made.path)


@pytest.fixture(scope="module")
def data(service: Live) -> Ctx:
    """A context of the data image."""
    return Ctx(service.client, service.client.post("/v1/sessions", json={"template": "data"}).json()["id"])


def test_variables_stay_and_the_last_expression_is_shown(context: Ctx) -> None:
    context.run("x = [1, 2]")
    execution = context.run("x.append(3)\nx")
    assert (execution["value"], main_of(execution)) == ([1, 2, 3], "[1, 2, 3]")


def test_magics_commands_and_await_work(context: Ctx) -> None:
    assert context.run("!echo $((6 * 7))")["stdout"] == "42\n"
    assert context.run("%%bash\necho a\n")["stdout"] == "a\n"
    assert "per loop" in context.run("%timeit -n1 -r1 pass")["stdout"]
    assert context.value("import asyncio\nawait asyncio.sleep(0.01)\n5") == 5


def test_a_traceback_has_the_users_lines_alone(context: Ctx) -> None:
    execution = context.run("def f():\n    return 1 / 0\nf()")
    text = "\n".join(execution["error"]["stack_trace"])
    assert execution["error"]["type"] == "ZeroDivisionError"
    assert "return 1 / 0" in text
    assert "\x1b" not in text
    assert "/opt" not in text


def test_figures_and_tables_are_displays(data: Ctx) -> None:
    code = "import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\naxes.plot([1, 3, 2])\nprint('drawn')\nNone"
    execution = data.run(code, timeout_s=60)
    assert (execution["outcome"], execution["stdout"], execution["error"]) == ("ok", "drawn\n", None), execution
    [figure] = execution["displays"]
    assert base64.b64decode(figure["image/png"]).startswith(PNG)
    assert figure["text/plain"].startswith("<Figure size")
    assert data.run("1")["displays"] == [{"text/plain": "1", "main": True}], "a figure is shown once"
    table = data.run("import pandas\npandas.DataFrame({'a': [4, 6]})")
    assert table["value"] is None
    assert "<table" in table["displays"][0]["text/html"]
    svg = data.run("%config InlineBackend.figure_formats = ['svg']\nplt.plot([1])\nNone")
    assert "<svg" in svg["displays"][0]["image/svg+xml"]


def test_a_timeout_interrupts_and_kills_only_what_does_not_heed_it(context: Ctx) -> None:
    context.run("x = 5")
    execution = context.run("while True: pass", timeout_s=0.5)
    assert (execution["outcome"], execution["signal"]) == ("timeout", 2)
    assert execution["error"]["type"] == "Sandbox.Interrupted"
    assert context.value("x") == 5
    stubborn = "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [2])\nprint('on', flush=True)\nwhile True: pass"
    begun = time.monotonic()
    execution = context.run(stubborn, timeout_s=0.5)
    assert 2.5 <= time.monotonic() - begun < 8
    assert (execution["outcome"], execution["exit_code"], execution["stdout"]) == ("timeout", 137, "on\n")
    assert execution["error"]["type"] == "Sandbox.ContextDied"
    assert context.post("1").status_code == 409
    assert context.restart()["state"] == "idle"
    assert context.value("'x' in globals()") is False


def test_a_cancelled_cell_ends_before_a_kill_would_come_and_the_context_lives(context: Ctx) -> None:
    context.run("x = 5")
    with ThreadPoolExecutor(1) as pool:
        cell = pool.submit(context.run, "import time\nopen('begun', 'w').close()\ntime.sleep(60)")
        [eid] = until(lambda: running(context))
        until(lambda: context.client.get(f"{context.session}/files/begun").status_code == 200)
        time.sleep(0.1)
        begun = time.monotonic()
        assert context.client.delete(f"{context.session}/executions/{eid}").status_code == 204
        execution = cell.result()
        assert time.monotonic() - begun < 2
    assert (execution["outcome"], execution["signal"]) == ("cancelled", 2)
    assert context.value("x") == 5


def test_a_context_without_memory_is_an_oom_and_dead_until_it_is_restarted(service: Live) -> None:
    context = Ctx(service.client, service.client.post("/v1/sessions").json()["id"])
    execution = context.run(EAT, timeout_s=30)
    assert (execution["outcome"], execution["exit_code"], execution["stdout"]) == ("oom", 137, "before\n")
    assert execution["error"]["type"] == "Sandbox.ContextDied"
    assert context.facts()["state"] == "dead"
    assert context.restart()["state"] == "idle"
    assert context.value("1") == 1
    service.client.delete(context.session)


def test_two_contexts_and_plain_executions_are_apart_and_run_beside_each_other(service: Live, context: Ctx) -> None:
    other = Ctx(service.client, context.session.rpartition("/")[2])
    with ThreadPoolExecutor(2) as pool:
        waits = "import os, time\nwhile not os.path.exists('{}'): time.sleep(0.02)\nopen('{}', 'w').close()\nwho = '{}'"
        one = pool.submit(context.run, waits.format("b", "c", "one"))
        two = pool.submit(other.run, waits.format("a", "b", "two"))
        plain = service.client.post(f"{context.session}/executions", json={"code": "open('a', 'w').close()"}).json()
        assert plain["outcome"] == "ok"
        assert (one.result()["outcome"], two.result()["outcome"]) == ("ok", "ok")
    assert (context.value("who"), other.value("who")) == ("one", "two")
    service.client.delete(other.path)


def test_a_context_starts_no_process_before_it_is_asked_for_and_leaves_none(service: Live) -> None:
    sid = service.client.post("/v1/sessions").json()["id"]
    [container] = containers(service, sid)
    before = len(container.top()["Processes"])
    context = Ctx(service.client, sid)
    context.run("import subprocess; subprocess.Popen(['sleep', '1000'])")
    assert len(container.top()["Processes"]) > before
    service.client.delete(context.path)
    until(lambda: len(container.top()["Processes"]) <= before)
    service.client.delete(f"/v1/sessions/{sid}")


def test_a_hundred_cells_open_nothing_that_stays_open(service: Live) -> None:
    sid = service.client.post("/v1/sessions").json()["id"]
    [container] = containers(service, sid)
    context = Ctx(service.client, sid)
    context.run("n = 0")
    before = open_fds(container)
    for _ in range(100):
        context.run("n += 1\nprint(n)\ndisplay(n)\nn")
    assert context.value("n") == 100
    for _ in range(5):
        context.restart()
        context.run("import os; os._exit(1)")
        context.restart()
    assert open_fds(container) <= before
    service.client.delete(f"/v1/sessions/{sid}")


def containers(live: Live, sid: str) -> list[Any]:
    """Return the container that serves a session: the one whose workspace has what the session wrote."""
    mark = f"mark-{sid}"
    assert live.client.put(f"/v1/sessions/{sid}/files/{mark}", content=b"").status_code == 201
    engine = docker.from_env()
    found = engine.containers.list(filters={"label": f"sandbox.instance={live.instance}"}, ignore_removed=True)
    return [one for one in found if has(one, f"/workspace/{mark}")]


def has(container: Any, path: str) -> bool:
    """Tell whether a container that may be on its way out has a file."""
    try:
        return bool(container.exec_run(["test", "-e", path]).exit_code == 0)
    except docker.errors.APIError:
        return False


def open_fds(container: Any) -> int:
    """Return how many descriptors the agent of a container has open."""
    said = container.exec_run(["python3", "-c", OPEN_FDS])
    assert said.exit_code == 0, said.output
    return int(said.output)


def test_contexts_and_the_cell_that_runs_outlive_a_crash_of_the_service(real_engine: None, state_dir: Path) -> None:
    instance = f"test-contexts-crash-{os.getpid()}"
    folder = state_dir / instance
    folder.mkdir()
    settings = {"uid_base": "130500", "pool_size": "1"}
    with ThreadPoolExecutor(1) as pool, serve(folder, instance=instance, engine="docker", **settings) as first:
        sid = first.client.post("/v1/sessions").json()["id"]
        context = Ctx(first.client, sid, id="mine")
        dead = Ctx(first.client, sid, id="dead")
        dead.run("import os; os._exit(3)")
        context.run("x = 1")
        code = "import os, time\nprint('first')\ndisplay('shown')\nopen('on', 'w').close()\nwhile not os.path.exists('go'): time.sleep(0.02)\nx += 1\nx"
        cell = pool.submit(context.run, code, timeout_s=100)
        [eid] = until(lambda: running(context))
        until(lambda: first.client.get(f"{context.session}/files/on").status_code == 200)
        first.process.kill()
        first.process.wait(20)
        with pytest.raises(httpx.TransportError):
            cell.result(20)
    port = free_port()
    process = start(folder, instance=instance, engine="docker", port=str(port), **settings)
    live = Live(process, port, instance, folder / f"{instance}.log")
    try:
        live.until_ready()
        context.client = dead.client = live.client
        facts = context.facts()
        assert (facts["state"], facts["executions"]) == ("busy", 2)
        assert (dead.facts()["state"], dead.post("1").status_code) == ("dead", 409)
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(context.run, "x * 10")
            until(lambda: len(running(context)) == 2)
            live.client.put(f"{context.session}/files/go", content=b"")
            assert second.result()["value"] == 20
        adopted = live.client.get(f"{context.session}/executions/{eid}").json()
        assert (adopted["outcome"], adopted["value"], adopted["stdout"]) == ("ok", 2, "first\n")
        assert [display["text/plain"] for display in adopted["displays"]] == ["'shown'", "2"]
        assert adopted["context_id"] == "mine"
        assert dead.restart()["state"] == "idle"
    finally:
        assert live.terminate() == 0
        assert "Traceback" not in live.log
