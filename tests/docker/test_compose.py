"""compose.yaml on the real engine: the service comes up, Prometheus scrapes it, every panel and every alert has its data.

The image of Prometheus that compose.yaml names cannot be had everywhere. In its place stands one of Debian's package, which
compose runs with the configuration, rules, secret and target of compose.yaml as they are. Only Grafana is not run.
"""

import io
import json
import math
import os
import re
import secrets
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest
import yaml

from tests.lambdas import client, create, invoke
from tests.live import IMAGE, TAG, free_port
from tests.load import load

ROOT = Path(__file__).resolve().parents[2]
DEBS = ROOT / ".run" / "debs"
PACKAGES = ["docker-compose", "prometheus", "promtool"]
KEY = secrets.token_hex(16)
INSTANCE = f"test-compose-{os.getpid()}"
PROMETHEUS = f"sandbox-test-prometheus:{os.getpid()}"
# As the official image: the program is the entry point, the user is nobody, who owns the data.
DOCKERFILE = f"""
FROM {IMAGE}
USER root
RUN mkdir /etc/prometheus /prometheus && chown 65534:65534 /prometheus
COPY usr/bin/prometheus usr/bin/promtool /bin/
USER 65534:65534
VOLUME /prometheus
WORKDIR /prometheus
ENTRYPOINT ["/bin/prometheus"]
"""
# All that differs from compose.yaml: images, a small house beside others' on this engine, a port of Prometheus, and the name
# of the bridge, which scripts/engine.sh lets through where its engine may not touch the packet filter.
OVERRIDE = {
    "services": {
        "orchestrator": {
            "image": f"sandbox-orchestrator:{TAG}",
            "environment": {
                "SANDBOX_INSTANCE": INSTANCE,
                "SANDBOX_UID_BASE": "55000",
                "SANDBOX_IMAGE": IMAGE,
                "SANDBOX_POOL_SIZE": "1",
                "SANDBOX_MAX_CONTAINERS": "12",
                "SANDBOX_IDLE_TIMEOUT_SECONDS": "1",
            },
        },
        "prometheus": {"image": PROMETHEUS, "ports": ["127.0.0.1::9090"]},
    },
    "networks": {"default": {"driver_opts": {"com.docker.network.bridge.name": f"sandbox26-{os.getpid() % 10**5}"}}},
}
LOAD_S = 17.0
SOON_S = 60.0
POLL_S = 0.2
# What Grafana makes of a dashboard's variables: its rate interval is four scrapes.
VARIABLES = {"$__rate_interval": "20s", "$instance": ".+", "$template": ".+"}
DASHBOARD = json.loads((ROOT / "grafana" / "dashboards" / "sandbox.json").read_bytes())
RULES = yaml.safe_load((ROOT / "grafana" / "rules.yml").read_bytes())["groups"][0]["rules"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]


class Stack:
    """The project as compose runs it. `api` speaks to the service with its key."""

    def __init__(self, override: Path) -> None:
        socket = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock").removeprefix("unix://")
        port = free_port()
        self._environment = os.environ | {
            "DOCKER_SOCKET": socket,
            "DOCKER_GID": str(Path(socket).stat().st_gid),
            "SANDBOX_API_KEY": KEY,
            "SANDBOX_PORT": str(port),
        }
        self._command = [str(DEBS / "usr/bin/docker-compose"), "--project-name", INSTANCE]
        self._command += ["--file", str(ROOT / "compose.yaml"), "--file", str(override)]
        headers = {"Authorization": f"Bearer {KEY}"}
        self.url = f"http://127.0.0.1:{port}"
        self.api = httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)
        self.prometheus = httpx.Client(timeout=30, trust_env=False)

    def compose(self, *words: str) -> str:
        """Run compose on this project; return what it prints."""
        done = subprocess.run(
            [*self._command, *words], env=self._environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, path: str, **query: str) -> Any:
        """Return the data of an answer of Prometheus' API."""
        answer = self.prometheus.get(f"/api/v1/{path}", params=query).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def until(self, query: str) -> list[dict[str, Any]]:
        """Wait until a query has a result."""
        end_at = time.monotonic() + SOON_S
        while not (found := self.ask("query", query=query)["result"]):
            assert time.monotonic() < end_at, f"{query} has no result: {self.ask('targets')}"
            time.sleep(POLL_S)
        return list(found)


@pytest.fixture(scope="module")
def debs() -> Path:
    """Compose, Prometheus and its tool from Debian 13's packages, unpacked beside the system."""
    done = subprocess.run(
        [ROOT / "scripts" / "unpack.sh", "trixie", DEBS, *PACKAGES], capture_output=True, text=True, check=False
    )
    if done.returncode == 3 and os.environ.get("CI") != "true":
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return DEBS


@pytest.fixture(scope="module")
def prometheus_image(real_engine: None, debs: Path) -> Iterator[None]:
    """An image of Debian's Prometheus that can stand in for the official one."""
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        for name in ("usr/bin/prometheus", "usr/bin/promtool"):
            tar.add(debs / name, name)
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(DOCKERFILE.encode())
        tar.addfile(entry, io.BytesIO(DOCKERFILE.encode()))
    context.seek(0)
    api = docker.from_env()
    api.images.build(fileobj=context, custom_context=True, tag=PROMETHEUS, rm=True)
    yield
    api.images.remove(PROMETHEUS, force=True)
    api.close()


@pytest.fixture(scope="module")
def stack(prometheus_image: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The orchestrator and Prometheus, up and healthy."""
    override = tmp_path_factory.mktemp("compose") / "override.yaml"
    override.write_text(yaml.safe_dump(OVERRIDE))
    stack = Stack(override)
    try:
        stack.compose("up", "--detach", "--wait", "--no-build", "orchestrator", "prometheus")
        stack.prometheus.base_url = f"http://{stack.compose('port', 'prometheus', '9090').strip()}"
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "30")
        stack.api.close()
        stack.prometheus.close()


@pytest.fixture(scope="module")
def loaded(stack: Stack) -> Stack:
    """The same after a time under load."""
    assert load(stack.url, KEY, INSTANCE, LOAD_S, calm_s=3.0) > 10
    return stack


def test_every_port_is_bound_to_this_machine_and_nothing_has_capabilities(stack: Stack) -> None:
    services = json.loads(stack.compose("config", "--format", "json"))["services"]
    assert {"orchestrator", "prometheus", "grafana"} == set(services)
    for name, service in services.items():
        assert {"127.0.0.1"} == {port["host_ip"] for port in service["ports"]}, name
        assert (["ALL"], ["no-new-privileges:true"]) == (service["cap_drop"], service["security_opt"]), name
    assert services["orchestrator"]["read_only"]


def test_the_orchestrator_comes_up_healthy_and_executes_for_who_has_the_key(stack: Stack) -> None:
    (state,) = (json.loads(line) for line in stack.compose("ps", "--format", "json", "orchestrator").splitlines())
    assert ("running", "healthy") == (state["State"], state["Health"])
    order = {"code": "def handler(event): return event", "event": [20]}
    assert httpx.post(f"{stack.url}/v1/execute", json=order, trust_env=False).status_code == 401
    execution = stack.api.post("/v1/execute", json=order).json()
    assert ("ok", [20]) == (execution["outcome"], execution["value"])


def test_prometheus_takes_configuration_and_rules_and_may_scrape(stack: Stack) -> None:
    """The key comes as a secret; without it the scrape would be answered with 401."""
    said = stack.compose("exec", "-T", "prometheus", "promtool", "check", "config", "/etc/prometheus/prometheus.yml")
    assert f"{len(RULES)} rules found" in said
    (up,) = stack.until('up{job="sandbox"} == 1')
    assert up["metric"]["instance"] == "orchestrator:8000"


def test_every_alert_fires_when_it_should_and_not_before(debs: Path) -> None:
    tests = ROOT / "grafana" / "rules.test.yml"
    done = subprocess.run(
        [debs / "usr/bin/promtool", "test", "rules", tests], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    fires = re.findall(
        r'alertname="(\w+)", alertstate="firing"\}\)\', eval_time: \w+, exp_samples: \[\{value', tests.read_text()
    )
    assert sorted(rule["alert"] for rule in RULES) == sorted(fires)


@pytest.mark.parametrize("query", QUERIES)
def test_a_panels_query_returns_data(loaded: Stack, query: str) -> None:
    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    values = [float(sample["value"][1]) for sample in loaded.ask("query", query=query)["result"]]
    assert any(math.isfinite(value) for value in values), (query, values)


def test_every_alert_is_loaded_and_one_fires(loaded: Stack) -> None:
    """Under load a container vanished."""
    rules = loaded.ask("rules")["groups"][0]["rules"]
    assert {rule["alert"]: "ok" for rule in RULES} == {rule["name"]: rule["health"] for rule in rules}
    (alert,) = loaded.until('ALERTS{alertname="SandboxContainersLost", alertstate="firing"}')
    assert alert["metric"]["severity"] == "warning"


def test_a_session_its_network_and_a_function_outlive_a_new_container_of_the_service(loaded: Stack) -> None:
    api = loaded.api
    asked = {"id": "kept", "network": {"allow": ["a.example:443"]}, "idle_timeout_s": 300}
    before = api.post("/v1/sessions", json=asked).json()
    aws = client(loaded.url, name="me", key=KEY)
    create(aws, "kept")
    loaded.compose("up", "--detach", "--wait", "--no-build", "--force-recreate", "orchestrator")
    after = api.get("/v1/sessions/kept").json()
    assert [before[field] for field in ("template", "network")] == [after[field] for field in ("template", "network")]
    assert invoke(aws, "kept", {"a": 1})["event"] == {"a": 1}
    aws.delete_function(FunctionName="kept")
    assert api.delete("/v1/sessions/kept").status_code == 204
