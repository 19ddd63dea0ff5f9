"""The real engine, end to end: live services, real containers, and what others do to them meanwhile."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
from docker.models.containers import Container
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from orchestrator.settings import Settings
from tests.live import IMAGE, Live, free_port, serve, start, until

MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("real_engine")


@pytest.fixture(scope="session")
def engine(real_engine: None) -> Iterator[docker.DockerClient]:
    """The engine itself, to look behind the service's back."""
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture(scope="session", autouse=True)
def foreign(engine: docker.DockerClient) -> Iterator[Container]:
    """Somebody else's container: of another instance, of our image. It must outlive everything that happens here."""
    testcontainers_config.ryuk_disabled = True  # the reaper's image is not there
    labels = {"sandbox.instance": "test-foreign", "sandbox.template": "python"}
    made = DockerContainer(
        IMAGE, entrypoint=["sleep", "1000"], labels=labels, network_mode="none", stop_signal="SIGKILL"
    )
    with made:
        wrapped = made.get_wrapped_container()
        yield wrapped
        wrapped.reload()
        assert wrapped.status == "running"


@pytest.fixture
def client(docker_service: Live) -> httpx.Client:
    return docker_service.client


def create(client: httpx.Client) -> str:
    return client.post("/v1/sessions").headers["Location"]


def execute(client: httpx.Client, session: str, code: str | None = None, **fields: Any) -> dict[str, Any]:
    answer = client.post(f"{session}/executions", json={"code": code} | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ours(engine: docker.DockerClient, instance: str) -> list[Container]:
    """Return all containers of an instance, in any state."""
    return engine.containers.list(all=True, filters={"label": f"sandbox.instance={instance}"}, ignore_removed=True)


def container_of(engine: docker.DockerClient, live: Live, session: str) -> Container:
    """Return a session's container: the one whose workspace has what the session wrote."""
    mark = session.rpartition("/")[2]
    assert execute(live.client, session, command=f"touch {mark}")["outcome"] == "ok"
    candidates = [one for one in ours(engine, live.instance) if one.status == "running"]
    [found] = [
        one for one in candidates if one.exec_run(["test", "-e", f"/workspace/{mark}"], user=user(one)).exit_code == 0
    ]
    return found


def user(container: Container) -> str:
    return str(container.attrs["Config"]["User"])


# --- a session, and its isolation


def test_a_warm_session_runs_a_handler_with_every_layer_observed(docker_service: Live) -> None:
    docker_service.until_ready()
    made = docker_service.client.post("/v1/sessions").json()
    assert made["source"] == "warm"
    assert {layer for layer, active in made["layers"].items() if not active} == set()
    assert made["layers"]["container"]
    code = "def handler(event, context): return [event, context.function_name]"
    execution = execute(docker_service.client, f"/v1/sessions/{made['id']}", code, event={"n": 1})
    assert (execution["outcome"], execution["value"]) == ("ok", [{"n": 1}, made["id"]])
    docker_service.client.delete(f"/v1/sessions/{made['id']}")


def test_what_the_self_test_saw_is_told(client: httpx.Client) -> None:
    observed = client.get("/v1/isolation").json()["observed"]
    assert observed["agent_uid"] >= 51000
    assert (observed["uid"], observed["capabilities"], observed["interfaces"]) == (1000, 0, ["lo"])
    assert observed["seccomp_filters"] == observed["agent_seccomp"] + 1 >= 2


def test_a_container_has_the_options_that_the_design_settled(
    engine: docker.DockerClient, docker_service: Live, session: str
) -> None:
    facts = container_of(engine, docker_service, session).attrs
    config, host = facts["Config"], facts["HostConfig"]
    uid = int(config["User"].partition(":")[0])
    assert config["User"] == f"{uid}:{uid}"
    assert 51000 <= uid < 51450
    assert (config["OpenStdin"], config["StdinOnce"], config["Tty"]) == (True, False, False)
    assert (config["Hostname"], config["Image"]) == ("sandbox", IMAGE)
    assert [name for name in config["Env"] or [] if name.startswith("SANDBOX_")] == []
    assert config["Labels"]["sandbox.instance"] == docker_service.instance
    assert config["Labels"]["sandbox.template"] == "python"
    assert facts["Name"].startswith(f"/sandbox-{docker_service.instance}-")
    assert (host["NetworkMode"], set(facts["NetworkSettings"]["Networks"])) == ("none", {"none"})
    assert (host["ReadonlyRootfs"], host["Privileged"], host["Init"]) == (True, False, True)
    assert (host["CapDrop"], host["CapAdd"] or []) == (["ALL"], [])
    assert host["SecurityOpt"][0] == "no-new-privileges:true"
    assert host["SecurityOpt"][1].startswith("seccomp={")
    assert (host["MaskedPaths"] or [], host["ReadonlyPaths"] or []) == ([], [])
    assert host["PidsLimit"] == 160
    assert host["Memory"] == host["MemorySwap"] == (128 + 48 + 64 + 64) * MIB
    assert 0 < host["NanoCpus"] <= 2e9
    assert {(limit["Name"], limit["Hard"]) for limit in host["Ulimits"]} == {("core", 1), ("nofile", 1024)}
    assert (host["LogConfig"]["Type"], host["AutoRemove"]) == ("none", False)
    assert (host["Binds"] or [], host["Devices"] or [], host["PidMode"], facts["Mounts"]) == ([], [], "", [])
    assert set(host["Tmpfs"]) == {"/workspace", "/scratch"}
    for options in host["Tmpfs"].values():
        assert {"nosuid", "nodev", f"uid={uid}", "mode=0700", f"size={64 * MIB}"} <= set(options.split(","))


def test_the_agent_runs_without_rights(engine: docker.DockerClient, docker_service: Live, session: str) -> None:
    container = container_of(engine, docker_service, session)
    script = "for s in /proc/[0-9]*/status; do grep -E '^(Name|Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):' $s; done"
    said = container.exec_run(["bash", "-c", script], user=user(container)).output
    assert isinstance(said, bytes)
    lines = [line.split() for line in said.decode().splitlines()]
    assert "python3" in {words[1] for words in lines if words[0] == "Name:"}
    assert {words[1] for words in lines if words[0].startswith("Cap")} == {"0000000000000000"}
    assert {words[1] for words in lines if words[0] == "NoNewPrivs:"} == {"1"}
    assert {words[1] for words in lines if words[0] == "Seccomp:"} == {"2"}
    assert {words[1] for words in lines if words[0] == "Uid:"} == {user(container).partition(":")[0]}


def test_two_sessions_share_neither_files_nor_user(
    engine: docker.DockerClient, docker_service: Live, session: str
) -> None:
    client = docker_service.client
    other = create(client)
    assert execute(client, session, command="echo secret > file")["outcome"] == "ok"
    assert execute(client, other, command="ls -A")["stdout"] == ""
    users = [user(container_of(engine, docker_service, path)) for path in (session, other)]
    assert users[0] != users[1]
    client.delete(other)


# --- what code does to its container

HARD: list[tuple[str, dict[str, Any], set[str]]] = [
    (
        "more memory than a process may have",
        {"code": "print('before')\nkept = bytearray(1 << 30)"},
        {"error"},
    ),
    (
        "shared memory until the kernel intervenes",
        {
            "code": "import mmap\nprint('before')\nm = mmap.mmap(-1, 1 << 30)\n"
            "for at in range(0, 1 << 30, 4096): m[at] = 1"
        },
        {"oom"},
    ),
    (
        "processes that together take too much",
        {
            "code": "import os, time\nprint('before', flush=True)\nfor _ in range(6):\n  if os.fork() == 0:\n"
            "    kept = bytearray(100 << 20); time.sleep(2); os._exit(0)\n"
            "codes = [os.wait()[1] for _ in range(6)]\nprint(codes)"
        },
        {"ok", "oom"},
    ),
    (
        "a fork bomb",
        {"code": "import os\nprint('before')\nwhile True: os.fork()", "timeout_s": 3},
        {"error", "timeout"},
    ),
    (
        "a bomb of threads",
        {
            "code": "import threading, time\nprint('before')\nwhile True: threading.Thread(target=time.sleep, args=(1,)).start()"
        },
        {"error", "timeout"},
    ),
    (
        "a full workspace",
        {"code": "print('before')\nwith open('big', 'wb') as f:\n  while True: f.write(bytes(1 << 20))"},
        {"error"},
    ),
    (
        "more files than there are inodes",
        {"code": "print('before')\nn = 0\nwhile True:\n  open(f'/tmp/{n}', 'w').close()\n  n += 1"},
        {"error"},
    ),
    ("an endless output", {"code": "print('before')\nwhile True: print('x' * 65536)"}, {"output_limit"}),
    ("an endless loop", {"code": "print('before')\nwhile True: pass", "timeout_s": 0.5}, {"timeout"}),
    (
        "killing everything in sight",
        {"code": "import os\nprint('before')\nos.kill(-1, 9)\nos.kill(1, 9)"},
        {"error", "ok"},
    ),
]


@pytest.mark.parametrize(("fields", "outcomes"), [pytest.param(*row[1:], id=row[0]) for row in HARD])
def test_hostile_code_has_its_outcome_and_the_session_stays_usable(
    client: httpx.Client, session: str, fields: dict[str, Any], outcomes: set[str]
) -> None:
    execution = execute(client, session, timeout_s=fields.pop("timeout_s", 20), **fields)
    assert execution["outcome"] in outcomes, execution["stderr"][-500:]
    assert execution["stdout"].startswith("before\n")
    if execution["outcome"] == "oom":
        assert (execution["exit_code"], execution["signal"]) == (137, 9)
    assert (
        execute(client, session, "import os\nos.path.exists('big') and os.remove('big')\nprint(1)")["stdout"] == "1\n"
    )
    assert client.get(session).status_code == 200


def test_oom_is_said_only_of_the_execution_that_met_it(client: httpx.Client, session: str) -> None:
    grow = "import mmap\nm = mmap.mmap(-1, 1 << 30)\nfor at in range(0, 1 << 30, 4096): m[at] = 1"
    assert execute(client, session, grow, timeout_s=20)["outcome"] == "oom"
    after = execute(client, session, "import os\nos.kill(os.getpid(), 9)")
    assert (after["outcome"], after["exit_code"]) == ("error", 137)


def test_output_and_jobs_of_any_size_pass_the_attached_stream(client: httpx.Client, session: str) -> None:
    code = f"text = {'ü' * 300_000!r}\nimport sys\nfor n in range(10): sys.stdout.write(str(n) * (1 << 20))\nhandler = lambda e: len(text)"
    execution = execute(client, session, code)
    assert (execution["outcome"], execution["value"], execution["truncated"]) == ("ok", 300_000, ["stdout"])
    assert execution["stdout"] == "0" * MIB
    strange = execute(client, session, "import os\nos.write(1, b'a\\xff\\x00\\n')")
    assert (strange["stdout"], strange["replaced"]) == ("a\ufffd\0\n", ["stdout"])


def test_many_executions_at_once_keep_their_outputs_apart(client: httpx.Client, session: str) -> None:
    code = "import sys\nfor _ in range(200): print(sys.argv[1] * 50)"
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: execute(client, session, code, args=[str(n)]), range(8)))
    assert [one["stdout"] for one in found] == [(str(n) * 50 + "\n") * 200 for n in range(8)]


# --- the pool, and containers that go behind our back


def test_what_is_taken_from_the_pool_is_replaced(client: httpx.Client) -> None:
    until(lambda: client.get("/ready").status_code == 200)
    paths = [create(client) for _ in range(3)]
    until(lambda: client.get("/v1/pool").json()["pools"][0]["ready"] == 2)
    for path in paths:
        client.delete(path)
    until(lambda: client.get("/v1/pool").json()["containers"] == 2)


def test_a_one_shots_container_is_gone_afterwards(engine: docker.DockerClient, docker_service: Live) -> None:
    client = docker_service.client
    until(lambda: client.get("/v1/pool").json()["pools"][0]["ready"] == 2)
    before = {one.name for one in ours(engine, docker_service.instance)}
    assert client.post("/v1/execute", json={"code": "handler = lambda e: e", "event": 5}).json()["value"] == 5
    until(lambda: len(before - {one.name for one in ours(engine, docker_service.instance)}) == 1)


@pytest.mark.parametrize("deed", ["kill", "pause"])
def test_a_container_that_is_killed_or_frozen_behind_our_back_is_lost(
    engine: docker.DockerClient, docker_service: Live, deed: str
) -> None:
    client = docker_service.client
    path = create(client)
    container = container_of(engine, docker_service, path)
    with ThreadPoolExecutor(1) as threads:
        code = "import os, time\nos.write(1, b'here')\nopen('/workspace/started', 'w').close()\ntime.sleep(60)"
        running = threads.submit(execute, client, path, code)
        until(lambda: container.exec_run(["test", "-e", "/workspace/started"], user=user(container)).exit_code == 0)
        getattr(container, deed)()
        execution = running.result()
    assert (execution["outcome"], execution["exit_code"], execution["stdout"]) == ("lost", None, "here")
    assert execution["error"]["type"] == "Sandbox.Lost"
    ended = until(lambda: (got := client.get(path)).status_code != 200 and got)
    assert (ended.status_code, ended.json()["code"]) == (410, "session_ended")
    assert "(lost)" in ended.json()["detail"]
    until(lambda: container.name not in {one.name for one in ours(engine, docker_service.instance)})


def test_a_ready_container_that_was_removed_is_replaced(engine: docker.DockerClient, docker_service: Live) -> None:
    client = docker_service.client
    until(lambda: client.get("/v1/pool").json()["pools"][0]["ready"] == 2)
    until(lambda: client.get("/v1/pool").json()["containers"] == 2)
    victim = ours(engine, docker_service.instance)[0]
    victim.remove(force=True)
    until(
        lambda: (
            (found := {one.name for one in ours(engine, docker_service.instance)})
            and len(found) == 2
            and victim.name not in found
            and client.get("/ready").status_code == 200
        )
    )
    assert execute_once(client) == 1


def execute_once(client: httpx.Client) -> object:
    return client.post("/v1/execute", json={"code": "handler = lambda e: 1"}).json()["value"]


# --- the life of the service


@pytest.fixture
def folder(state_dir: Path, request: pytest.FixtureRequest) -> Path:
    made = state_dir / f"life-{abs(hash(request.node.name))}"
    made.mkdir()
    return made


def test_at_sigterm_everything_of_ours_is_removed_and_nothing_else(
    engine: docker.DockerClient, docker_service: Live, folder: Path
) -> None:
    instance = f"test-end-{os.getpid()}"
    left = engine.containers.create(
        IMAGE, entrypoint=["sleep", "1000"], labels={"sandbox.instance": instance}, network_mode="none"
    )
    with serve(folder, instance=instance, engine="docker", uid_base="51500", pool_size="1") as live:
        assert left.id not in {one.id for one in ours(engine, instance)}, "an earlier life's container is still there"
        path = create(live.client)
        with ThreadPoolExecutor(1) as threads:
            code = "import time\ntime.sleep(1)\nhandler = lambda e: 'done'"
            finishing = threads.submit(execute, live.client, path, code)
            until(lambda: live.client.get(f"{path}/executions").json()["executions"])
            live.process.terminate()
            assert finishing.result()["value"] == "done"
        assert live.process.wait(30) == 0
        assert ours(engine, instance) == []
        assert "Traceback" not in live.log
    assert ours(engine, docker_service.instance) != []


def test_after_a_crash_sessions_go_on_and_what_else_was_left_is_removed(
    engine: docker.DockerClient, folder: Path
) -> None:
    settings = {"instance": f"test-crash-{os.getpid()}", "engine": "docker", "uid_base": "51600", "pool_size": "1"}
    instance = settings["instance"]
    with serve(folder, **settings) as live:
        path = create(live.client)
        assert execute(live.client, path, command="echo mine > file")["outcome"] == "ok"
        until(lambda: live.client.get("/ready").status_code == 200)
        live.process.kill()
        live.process.wait(30)
    old = {one.id for one in ours(engine, instance)}
    assert len(old) == 2
    with serve(folder, **settings) as live:
        assert execute(live.client, path, command="cat file")["stdout"] == "mine\n"
        assert execute_once(live.client) == 1
        assert len(old & {one.id for one in ours(engine, instance)}) == 1
    assert ours(engine, instance) == []


def test_a_second_orchestrator_of_an_instance_is_refused_and_changes_nothing(
    engine: docker.DockerClient, docker_service: Live, folder: Path, state_dir: Path
) -> None:
    instance = docker_service.instance
    path = create(docker_service.client)
    port = str(free_port())
    second = start(folder, instance=instance, engine="docker", port=port, state_dir=str(state_dir))
    assert second.wait(30) != 0
    assert f"Another orchestrator runs as SANDBOX_INSTANCE={instance}" in (folder / f"{instance}.log").read_text()
    assert execute(docker_service.client, path, "print(1)")["stdout"] == "1\n"
    docker_service.client.delete(path)


def test_an_image_that_is_missing_is_told_and_retried_with_care(engine: docker.DockerClient, folder: Path) -> None:
    instance, port = f"test-image-{os.getpid()}", free_port()
    process = start(folder, instance=instance, engine="docker", port=str(port), image="sandbox-nowhere:latest")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            answer = until(lambda: told(client))
            assert answer["ready"] is False
            assert "The image is missing" in " ".join(answer["reasons"])
            assert client.get("/health").status_code == 200
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert ours(engine, instance) == []


def told(client: httpx.Client) -> dict[str, Any] | None:
    try:
        answer: dict[str, Any] = client.get("/ready").json()
    except httpx.TransportError:
        return None
    return answer if any("missing" in reason for reason in answer["reasons"]) else None


def test_the_services_own_log_has_no_fault(docker_service: Live) -> None:
    """Runs last: what went before must not have broken anything inside."""
    for word in ("Traceback", "reconcile_failed", "request_failed", "container_start_broke", "container_remove_broke"):
        assert word not in docker_service.log


def test_the_defaults_fit_the_engine() -> None:
    assert Settings().image == f"{IMAGE.partition(':')[0]}:latest"
