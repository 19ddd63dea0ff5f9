"""A killed or upgraded orchestrator on the real engine: the next one takes its sessions over, and nothing runs twice."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from docker.models.containers import Container

from tests.live import IMAGE, Live, free_port, serve, start, until

UID_BASE = "54000"
SOON_S = 20.0
BACK_S = 10.0
SLACK_S = 1.0  # between two answers that tell the same moment

# Both count their runs in the workspace. The second waits there until it may end.
FINISHED = "open('finished', 'a').write('run\\n')\nprint('done')\nhandler = lambda event: {'n': 1}"
RUNNING = """
import os, sys, time
print("first", "x" * 100_000)
print("aside", file=sys.stderr)
sys.stdout.flush()
with open(sys.argv[1], "a") as file:
    file.write("run\\n")
while not os.path.exists("go"):
    time.sleep(0.02)
print("last")
handler = lambda event: {"event": event}
"""

pytestmark = pytest.mark.usefixtures("real_engine")


def executions(client: httpx.Client, path: str) -> dict[str, Any]:
    """Return a session's executions by id."""
    return {one["id"]: one for one in client.get(f"{path}/executions").json()["executions"]}


def shell(client: httpx.Client, path: str, command: str) -> str:
    """Run a command in a session; return its output."""
    answer = client.post(f"{path}/executions", json={"command": command}).json()
    assert answer["outcome"] in ("ok", "error"), answer
    return str(answer["stdout"])


def running_of(mark: str) -> dict[str, Any]:
    return {"code": RUNNING, "args": [mark], "event": [mark], "timeout_s": 120}


def ours(engine: docker.DockerClient, instance: str) -> list[Container]:
    """Return all containers of an instance, in any state."""
    return engine.containers.list(all=True, filters={"label": f"sandbox.instance={instance}"}, ignore_removed=True)


@contextmanager
def next_life(folder: Path, instance: str, **settings: str) -> Iterator[tuple[Live, float]]:
    """Start the orchestrator that comes after; yield it when it answers, and the seconds that this took."""
    port = free_port()
    begun = time.monotonic()
    process = start(folder, instance=instance, engine="docker", port=str(port), **settings)
    live = Live(process, port, instance, folder / f"{instance}.log")
    try:
        until(lambda: answers(live))
        yield live, time.monotonic() - begun
    finally:
        if process.poll() is None:
            live.terminate()
        live.client.close()


def answers(live: Live) -> bool:
    assert live.process.poll() is None, live.log
    try:
        return live.client.get("/v1/sessions").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def engine(real_engine: None) -> Iterator[docker.DockerClient]:
    """The engine itself, to look behind the service's back."""
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(scope="module")
def named(engine: docker.DockerClient) -> Iterator[Callable[[str], str]]:
    """Return names of instances whose containers are gone afterwards, even when a test fails between two services."""
    names: list[str] = []

    def name(purpose: str) -> str:
        names.append(f"test-adopt-{purpose}-{os.getpid()}")
        return names[-1]

    yield name
    for one in [container for name in names for container in ours(engine, name)]:
        one.remove(force=True)


# --- a crash


@dataclass(kw_only=True)
class Crash:
    """What was before the crash, and the service after it."""

    live: Live
    back_s: float
    path: str
    before: dict[str, Any]
    finished: dict[str, Any]
    running: str
    plain: str
    ended: str
    left: set[str | None]

    @property
    def client(self) -> httpx.Client:
        return self.live.client

    def repeat(self, key: str, **body: Any) -> httpx.Response:
        return self.client.post(f"{self.path}/executions", json=body, headers={"Idempotency-Key": key})


@pytest.fixture(scope="module")
def crash(engine: docker.DockerClient, named: Callable[[str], str], state_dir: Path) -> Iterator[Crash]:
    """Kill a service while two executions run, one of them with a key, and start it again."""
    instance = named("crash")
    folder = state_dir / instance
    folder.mkdir()
    settings = {"uid_base": UID_BASE, "pool_size": "1"}
    asked = {"env": {"A": "b"}, "metadata": {"team": "a"}, "ttl_s": 500, "idle_timeout_s": 400}
    with ThreadPoolExecutor(2) as threads, serve(folder, instance=instance, engine="docker", **settings) as first:
        client = first.client
        ended = client.post("/v1/sessions").headers["Location"]
        path = client.post("/v1/sessions", json=asked).headers["Location"]
        assert client.delete(ended).status_code == 204
        assert client.patch(path, json={"metadata": {"team": "b"}}).status_code == 200
        shell(client, path, "echo hello > file")

        def post(body: dict[str, Any], **headers: str) -> dict[str, Any]:
            return dict(client.post(f"{path}/executions", json=body, headers=headers).json())

        finished = post({"code": FINISHED}, **{"Idempotency-Key": "finished"})
        known = set(executions(client, path))
        tasks = [threads.submit(post, running_of("keyed"), **{"Idempotency-Key": "running"})]
        [running] = until(lambda: set(executions(client, path)) - known)
        tasks.append(threads.submit(post, running_of("plain")))
        [plain] = until(lambda: set(executions(client, path)) - known - {running})
        until(lambda: shell(client, path, "cat keyed plain") == "run\nrun\n")
        first.until_ready()
        before = client.get(path).json()
        first.process.kill()
        first.process.wait(SOON_S)
        for task in tasks:
            with pytest.raises(httpx.TransportError):
                task.result(SOON_S)
    labels = {"sandbox.instance": instance, "sandbox.template": "python", "sandbox.uid": "54099"}
    engine.containers.create(IMAGE, entrypoint=["sleep", "1000"], labels=labels, network_mode="none")
    left = {one.id for one in ours(engine, instance)}
    with next_life(folder, instance, **settings) as (live, back_s):
        yield Crash(
            live=live,
            back_s=back_s,
            path=path,
            before=before,
            finished=finished,
            running=running,
            plain=plain,
            ended=ended,
            left=left,
        )
        assert live.terminate() == 0
        assert ours(engine, instance) == [], "on_exit=remove leaves nothing"
        assert "Traceback" not in live.log


def test_after_a_crash_the_session_is_back_in_time_with_all_its_facts(crash: Crash) -> None:
    assert crash.back_s < BACK_S
    [after] = crash.client.get("/v1/sessions").json()["sessions"]
    for field in ("id", "template", "source", "network", "layers", "idle_timeout_s"):
        assert crash.before[field] == after[field], field
    assert after["metadata"] == {"team": "b"}, "as the client patched it"
    for field in ("created_at", "expires_at"):
        was, now = (datetime.fromisoformat(facts[field]) for facts in (crash.before, after))
        assert abs((now - was).total_seconds()) < SLACK_S, field


def test_environment_and_files_of_a_session_survive(crash: Crash) -> None:
    assert shell(crash.client, crash.path, "cat file; echo $A") == "hello\nb\n"


def test_an_execution_that_had_finished_is_still_answered_and_not_run_again(crash: Crash) -> None:
    again = crash.repeat("finished", code=FINISHED).json()
    for field in ("id", "outcome", "stdout", "value", "exit_code", "usage"):
        assert crash.finished[field] == again[field], field
    assert (again["outcome"], again["value"]) == ("ok", {"n": 1})
    assert shell(crash.client, crash.path, "cat finished") == "run\n"


def test_a_key_is_refused_for_another_request_after_a_crash_as_well(crash: Crash) -> None:
    answer = crash.repeat("finished", code="print(2)")
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")


def test_what_ran_goes_on_and_a_repeat_of_its_request_has_its_one_result(crash: Crash) -> None:
    both = {crash.running: "keyed", crash.plain: "plain"}
    now = executions(crash.client, crash.path)
    assert {eid: now[eid]["outcome"] for eid in both} == dict.fromkeys(both)
    with ThreadPoolExecutor(1) as threads:
        repeated: Future[httpx.Response] = threads.submit(crash.repeat, "running", **running_of("keyed"))
        shell(crash.client, crash.path, "touch go")
        assert repeated.result(SOON_S).json()["id"] == crash.running
    for eid, mark in both.items():
        until(lambda: crash.client.get(f"{crash.path}/executions/{eid}").json()["outcome"])  # noqa: B023
        execution = crash.client.get(f"{crash.path}/executions/{eid}").json()
        assert execution["outcome"] == "ok", execution["error"]
        assert execution["stdout"] == "first " + "x" * 100_000 + "\nlast\n"
        assert execution["stderr"] == "aside\n"
        assert execution["value"] == {"event": [mark]}
        assert shell(crash.client, crash.path, f"cat {mark}") == "run\n"
    assert repeated.result().json() == crash.client.get(f"{crash.path}/executions/{crash.running}").json()


def test_a_session_that_had_ended_stays_ended(crash: Crash) -> None:
    assert crash.client.get(crash.ended).status_code == 404


def test_containers_are_those_of_sessions_and_pool_and_no_others(engine: docker.DockerClient, crash: Crash) -> None:
    crash.live.until_ready()
    assert len(crash.left) == 3  # of the session, a ready one, and one that had no session
    now = {one.id for one in ours(engine, crash.live.instance)}
    assert len(now & crash.left) == 1
    until(lambda: len(ours(engine, crash.live.instance)) == 2)
    pool = crash.client.get("/v1/pool").json()
    assert (pool["containers"], pool["pools"][0]["ready"]) == (2, 1)


def test_what_waited_for_its_turn_runs_after_a_crash_once_and_in_order(
    engine: docker.DockerClient, named: Callable[[str], str], state_dir: Path
) -> None:
    """In a session that keeps as much as it may, in a script of which each letter takes the agent six bytes."""
    instance = named("queue")
    folder = state_dir / instance
    folder.mkdir()
    settings = {"uid_base": "54300", "pool_size": "1", "session_executions": "1"}
    metadata = {f"m{number}": "北" * 500 for number in range(16)}
    env = {f"A{number}": "京" * 1000 for number in range(10)}
    note = "\nopen('order', 'a').write(sys.argv[1])"
    wait = "import os, sys, time\nwhile not os.path.exists('go'): time.sleep(0.02)" + note
    with serve(folder, instance=instance, engine="docker", **settings) as first:
        path = first.client.post("/v1/sessions", json={"metadata": metadata, "env": env}).headers["Location"]

        def begin(code: str, mark: str) -> str:
            body = {"code": code, "args": [mark], "timeout_s": 60}
            answer = first.client.post(f"{path}/executions", json=body, headers={"Prefer": "respond-async"})
            assert answer.status_code == 202, answer.text
            return answer.headers["Location"]

        begun = [begin(wait, "a"), *(begin(f"import sys{note}\n#{'x' * 100_000}", mark) for mark in "bcd")]
        assert first.client.delete(begun[2]).status_code == 204
        first.client.get(path)  # answered behind what was sent
        first.process.kill()
        first.process.wait(SOON_S)
    with next_life(folder, instance, **settings) as (second, _):
        assert second.client.get(path).json()["metadata"] == metadata
        assert [second.client.get(one).status_code for one in begun] == [200, 200, 404, 200]
        assert second.client.put(f"{path}/files/go", content=b"").status_code in (200, 201, 204)
        for one in (begun[0], begun[1], begun[3]):
            until(lambda: second.client.get(one).json()["outcome"] == "ok")  # noqa: B023
        assert shell(second.client, path, "cat order") == "abd"
        assert second.terminate() == 0
    assert ours(engine, instance) == []


# --- an upgrade


def test_with_on_exit_keep_an_upgrade_loses_nothing(
    engine: docker.DockerClient, named: Callable[[str], str], state_dir: Path
) -> None:
    instance = named("keep")
    folder = state_dir / instance
    folder.mkdir()
    settings = {"uid_base": "54200", "pool_size": "1"}
    with (
        ThreadPoolExecutor(1) as threads,
        serve(folder, instance=instance, engine="docker", on_exit="keep", drain_seconds="0.5", **settings) as first,
    ):
        path = first.client.post("/v1/sessions", json={"metadata": {"team": "a"}}).headers["Location"]
        task = threads.submit(first.client.post, f"{path}/executions", json=running_of("plain"))
        [eid] = until(lambda: executions(first.client, path))
        until(lambda: shell(first.client, path, "cat plain") == "run\n")
        first.until_ready()
        assert len(ours(engine, instance)) == 2
        first.process.terminate()
        answer = task.result(SOON_S)
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable"), "what runs is left to the next"
        assert int(answer.headers["Retry-After"]) > 0
        assert first.process.wait(SOON_S) == 0
        assert len(ours(engine, instance)) == 1, "the session's; the ready one is removed"
        assert "Traceback" not in first.log
    with next_life(folder, instance, **settings) as (second, back_s):
        assert back_s < BACK_S
        assert second.client.get(path).json()["metadata"] == {"team": "a"}
        assert executions(second.client, path)[eid]["outcome"] is None
        shell(second.client, path, "touch go")
        execution = until(
            lambda: found if (found := second.client.get(f"{path}/executions/{eid}").json())["outcome"] else None
        )
        assert (execution["outcome"], execution["value"]) == ("ok", {"event": ["plain"]})
        assert shell(second.client, path, "cat plain") == "run\n"
        assert second.terminate() == 0
    assert ours(engine, instance) == []
