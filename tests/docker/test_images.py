"""The other images: what programs people expect works in a sandbox, and the service runs without privileges."""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.live import TAG, Live, serve

KEY = secrets.token_hex(16)
TEMPLATES = f"""
[data]
image = "sandbox-data:{TAG}"
memory_kb = 524288
"""
PROGRAMS = {
    "threads": "import threading\nseen = []\nts = [threading.Thread(target=seen.append, args=(n,)) for n in range(20)]\n"
    "[t.start() for t in ts]; [t.join() for t in ts]\nprint(len(seen))",
    "subprocess": "import subprocess\nprint(subprocess.run('seq 20 | wc -l', shell=True, capture_output=True, text=True)"
    ".stdout.strip())",
    "multiprocessing": "import multiprocessing as m\nif __name__ == '__main__':\n"
    "    with m.get_context('fork').Pool(3) as pool: print(sum(pool.map(abs, [-4, 6, -10])))",
    "asyncio on loopback": "import asyncio\nasync def main():\n"
    "    async def answer(r, w): w.write(str(20).encode()); w.close()\n"
    "    server = await asyncio.start_server(answer, '127.0.0.1', 0)\n"
    "    r, w = await asyncio.open_connection(*server.sockets[0].getsockname()); print((await r.read()).decode())\n"
    "    w.close(); server.close()\nasyncio.run(main())",
    "sqlite with a write-ahead log": "import sqlite3\nc = sqlite3.connect('/workspace/x.db')\n"
    "assert c.execute('pragma journal_mode=wal').fetchone() == ('wal',)\nc.execute('create table if not exists t(n)')\n"
    "c.execute('insert into t values (20)'); c.commit(); print(c.execute('select n from t').fetchone()[0])",
    "tempfile": "import tempfile\nwith tempfile.NamedTemporaryFile() as f: f.write(b'x' * 20); f.flush()\n"
    "print(len(open(f.name, 'rb').read()) if __import__('os').path.exists(f.name) else 20)",
    "numpy": "import numpy\nprint(int(numpy.linalg.det(numpy.diag([4.0, 5.0])).round()))",
    "pandas": "import pandas\nprint(pandas.DataFrame({'a': [4, 6, 10]}).a.sum())",
}
NODE = (
    "const server = require('http').createServer((q, r) => r.end('20')).listen(0, '127.0.0.1', async () => {"
    "console.log(await (await fetch(`http://127.0.0.1:${server.address().port}`)).text()); process.exit(0) })"
)


@pytest.fixture(scope="module")
def data_service(real_engine: None, state_dir: Path) -> Iterator[Live]:
    """A live service with the template of the data image."""
    file = state_dir / "templates.toml"
    file.write_text(TEMPLATES)
    instance = f"test-data-{os.getpid()}"
    with serve(state_dir, instance=instance, engine="docker", uid_base="52000", templates_file=str(file)) as live:
        yield live


@pytest.fixture(scope="module")
def session(data_service: Live) -> str:
    """A session in a container of the data image."""
    answer = data_service.client.post("/v1/sessions", json={"template": "data"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def execute(live: Live, sid: str, **fields: Any) -> dict[str, Any]:
    """Execute in the session, return the execution."""
    answer = live.client.post(f"/v1/sessions/{sid}/executions", json={"timeout_s": 30} | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("name", PROGRAMS)
def test_ordinary_python_programs_work_under_both_filters(data_service: Live, session: str, name: str) -> None:
    execution = execute(data_service, session, code=PROGRAMS[name])
    assert ("ok", "20\n", "") == (execution["outcome"], execution["stdout"], execution["stderr"])


def test_node_serves_and_fetches_on_its_loopback(data_service: Live, session: str) -> None:
    execution = execute(data_service, session, command=["node", "-e", NODE])
    assert ("ok", "20\n") == (execution["outcome"], execution["stdout"]), execution


def test_bash_runs_pipes_and_job_control(data_service: Live, session: str) -> None:
    execution = execute(
        data_service, session, command="sleep 0.01 & wait; for n in {1..20}; do echo $n; done | tail -1"
    )
    assert ("ok", "20\n") == (execution["outcome"], execution["stdout"]), execution


def test_executions_of_one_session_share_its_loopback(data_service: Live, session: str) -> None:
    """One program serves, another of the same session calls it; this is the session's own network, nobody else's."""
    server = "import http.server; http.server.HTTPServer(('127.0.0.1', 8123), http.server.SimpleHTTPRequestHandler)"
    call = (
        "import time, urllib.request\nfor _ in range(200):\n    try: print(urllib.request.urlopen("
        "'http://127.0.0.1:8123/').status); break\n    except OSError: time.sleep(0.02)"
    )
    url = f"{data_service.url}/v1/sessions/{session}/executions"
    with httpx.Client(timeout=30, trust_env=False) as other, httpx.Client(timeout=30, trust_env=False) as one:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor() as threads:
            serving = threads.submit(one.post, url, json={"code": f"{server}.handle_request()", "timeout_s": 20})
            answer = other.post(url, json={"code": call, "timeout_s": 20}).json()
            assert ("ok", "200\n") == (answer["outcome"], answer["stdout"]), answer
            assert serving.result().json()["outcome"] == "ok"


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_service_image_serves_without_root_or_capabilities_on_a_read_only_root(
    real_engine: None, free_port: int
) -> None:
    """The options are those of compose.yaml; the engine's socket comes by its group."""
    api = docker.from_env()
    path = str(api.api.base_url).removeprefix("http+unix://").removeprefix("unix://")
    path = path if path.startswith("/") else os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")[7:]
    instance = f"test-image-{os.getpid()}"
    container = api.containers.run(
        f"sandbox-orchestrator:{TAG}",
        detach=True,
        read_only=True,
        tmpfs={"/tmp": ""},
        cap_drop=["ALL"],
        security_opt=["no-new-privileges:true"],
        group_add=[str(Path(path).stat().st_gid)],
        volumes={path: {"bind": "/var/run/docker.sock", "mode": "rw"}},
        ports={"8000/tcp": ("127.0.0.1", free_port)},
        environment={
            "SANDBOX_API_KEYS": f"me:{KEY}",
            "SANDBOX_INSTANCE": instance,
            "SANDBOX_UID_BASE": "53000",
            "SANDBOX_POOL_SIZE": "1",
        },
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{free_port}", timeout=10, trust_env=False) as client:
            ended_at = time.monotonic() + 30
            while True:
                try:
                    if client.get("/ready").status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                assert time.monotonic() < ended_at, container.logs().decode()
                time.sleep(0.1)
            order = {"code": "def handler(event): return event", "event": [20]}
            assert client.post("/v1/execute", json=order).status_code == 401
            answer = client.post("/v1/execute", json=order, headers={"Authorization": f"Bearer {KEY}"}).json()
            assert ("ok", [20]) == (answer["outcome"], answer["value"])
            said = container.exec_run("cat /proc/1/status").output
            assert isinstance(said, bytes)
            status = said.decode()
            facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert ("65532", "0000000000000000", "1") == (
                facts["Uid"].split()[0],
                facts["CapEff"],
                facts["NoNewPrivs"],
            )
        container.stop(timeout=30)
        assert container.wait()["StatusCode"] == 0
        assert api.containers.list(all=True, filters={"label": f"sandbox.instance={instance}"}) == []
    finally:
        container.remove(force=True)
        for left in api.containers.list(all=True, filters={"label": f"sandbox.instance={instance}"}):
            left.remove(force=True)
        api.close()
