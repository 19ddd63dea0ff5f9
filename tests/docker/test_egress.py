"""Egress on the real engine, from inside sandboxes: real packages, a real clone, and what must reach nothing.

The registries are those that this machine is configured for; what they are is asked for at run time.
"""

import functools
import http.server
import io
import ipaddress
import json
import os
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import httpx
import msgspec
import pytest

from orchestrator.egress.border import Border
from orchestrator.hosts import Address
from orchestrator.models import ExecutionRequest, SessionRequest
from orchestrator.service import Orchestrator
from orchestrator.settings import Settings
from tests.live import IMAGE, TAG, Live, serve

TOOLS = f"sandbox-egress-tools:{TAG}"
DOCKERFILE = f"""
FROM {IMAGE}
RUN apt-get update && apt-get install --yes --no-install-recommends git npm && rm -rf /var/lib/apt/lists/*
"""
TEMPLATES = f"""
[tools]
image = "{TOOLS}"
memory_kb = 786432
"""
PACKAGE = "iniconfig"  # of Python: small, and needs nothing
MODULE = "is-number"  # of node: the same
CA = "/workspace/ca.crt"

pytestmark = pytest.mark.usefixtures("real_engine")


# --- what this machine has


def said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@functools.cache
def index() -> str:
    """Return the address of the Python index: pip's configuration, or else its own default."""
    script = "from pip._internal.models.index import PyPI; print(PyPI.simple_url)"
    configured = os.environ.get("PIP_INDEX_URL")
    if configured is None:
        listed = said(sys.executable, "-m", "pip", "config", "list")
        found = re.search(r"^(?:global|:env:)\.index-url='(.+)'$", listed, re.MULTILINE)
        configured = found[1] if found else said(sys.executable, "-c", script)
    return configured.rstrip("/")


@functools.cache
def registry() -> str:
    """Return the address of the npm registry: npm's configuration, here or else in the image."""
    words = ["npm", "config", "get", "registry"]
    if shutil.which("npm") is None:
        words = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "npm", TOOLS, *words[1:]]
    return said(*words).rstrip("/")


@functools.cache
def certificates() -> bytes:
    """Return the certificates that this machine trusts."""
    paths = ssl.get_default_verify_paths()
    return Path(paths.cafile or paths.openssl_cafile).read_bytes()


def hosts() -> set[str]:
    """Return the hosts that serve the index, the registry, and the files that they name."""
    with urllib.request.urlopen(f"{index()}/{PACKAGE}/") as page:
        links = re.findall(r'href="(https?://[^"#]+)', page.read().decode())
    with urllib.request.urlopen(f"{registry()}/{MODULE}") as page:
        links += [version["dist"]["tarball"] for version in json.load(page)["versions"].values()]
    return {str(urllib.parse.urlsplit(url).hostname) for url in [index(), registry(), *links]}


def addresses() -> list[str]:
    """Return the addresses of those hosts as patterns: they may be none that are public."""
    found = {str(facts[4][0]) for host in hosts() for facts in socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)}
    return [f"[{address}]:*" if ":" in address else f"{address}:*" for address in sorted(found)]


def own_address() -> str:
    """Return an address of this machine that is not its loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


class Files(http.server.SimpleHTTPRequestHandler):
    """A static server that says nothing."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(folder: Path, address: str) -> Iterator[int]:
    """Serve a folder; yield the port."""
    handler = functools.partial(Files, directory=str(folder))
    with http.server.ThreadingHTTPServer((address, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


class Counted(socketserver.ThreadingTCPServer):
    """A listener that counts its connections."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: str) -> None:
        self.count = 0
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), socketserver.BaseRequestHandler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.count += 1
        super().process_request(request, client_address)


@contextmanager
def counted(address: str) -> Iterator[Counted]:
    with Counted(address) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


# --- programs


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bare repository that a static server can serve."""
    folder = tmp_path_factory.mktemp("git")
    work, bare = folder / "work", folder / "served" / "project.git"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "init", "--quiet", work], check=True)
    (work / "hello.txt").write_text("hello from afar\n")
    subprocess.run([*git, "-C", work, "add", "."], check=True)
    subprocess.run([*git, "-C", work, "commit", "--quiet", "-m", "first"], check=True)
    subprocess.run(["git", "clone", "--quiet", "--bare", work, bare], check=True)
    subprocess.run(["git", "-C", bare, "update-server-info"], check=True)
    return folder / "served"


@pytest.fixture(scope="module")
def tools(real_engine: None) -> None:
    """Have the image with git and npm; its layers are kept by the engine."""
    engine = docker.from_env(timeout=900)
    # The host's network: for apt, and independent of the engine's bridge.
    engine.images.build(fileobj=io.BytesIO(DOCKERFILE.encode()), tag=TOOLS, rm=True, network_mode="host")
    engine.close()


@pytest.fixture(scope="module")
def git_port(repository: Path) -> Iterator[int]:
    with served(repository, own_address()) as port:
        yield port


@pytest.fixture(scope="module")
def live(state_dir: Path, tools: None, git_port: int) -> Iterator[Live]:
    """A service whose own policy names the registries' addresses and one server of this machine."""
    file = state_dir / "egress.toml"
    file.write_text(TEMPLATES)
    allow = ",".join(["*:*", *addresses(), f"{own_address()}:{git_port}"])
    instance = f"test-egress-{os.getpid()}"
    settings = {"templates_file": str(file), "egress_allow": allow, "pool_size": "1", "uid_base": "53000"}
    with serve(state_dir, instance=instance, engine="docker", **settings) as made:
        yield made


@pytest.fixture(scope="module")
def session(live: Live, git_port: int) -> Iterator[str]:
    """A session that may reach what is public, the registries, and the one server of this machine."""
    allow = ["*:*", *addresses(), f"{own_address()}:{git_port}"]
    env = dict.fromkeys(
        "PIP_CERT REQUESTS_CA_BUNDLE SSL_CERT_FILE NODE_EXTRA_CA_CERTS npm_config_cafile GIT_SSL_CAINFO".split(), CA
    )
    asked = {"template": "tools", "network": {"allow": allow}, "env": env}
    path = live.client.post("/v1/sessions", json=asked).headers["Location"]
    assert live.client.put(f"{path}/files/ca.crt", content=certificates()).status_code == 201
    yield path
    live.client.delete(path)


def run(live: Live, session: str, **fields: Any) -> dict[str, Any]:
    answer = live.client.post(f"{session}/executions", json=fields | {"timeout_s": 240}, timeout=250)
    assert answer.status_code == 200, answer.text
    execution: dict[str, Any] = answer.json()
    assert execution["outcome"] == "ok", (execution["stdout"][-2000:], execution["stderr"][-2000:], execution["error"])
    return execution


def test_pip_installs_a_package_from_the_machines_index(live: Live, session: str) -> None:
    run(live, session, command=f"python3 -m pip install --no-cache-dir --index-url {index()} {PACKAGE}")
    assert "/workspace/" in run(live, session, code=f"import {PACKAGE}; print({PACKAGE}.__file__)")["stdout"]


def test_npm_installs_a_package_from_the_machines_registry(live: Live, session: str) -> None:
    npm = f"npm install --no-audit --no-fund --cache /tmp/npm --registry {registry()} --prefix /workspace/node {MODULE}"
    run(live, session, command=npm)
    script = f"console.log(require('/workspace/node/node_modules/{MODULE}')(7))"
    assert run(live, session, command=["node", "-e", script])["stdout"] == "true\n"


def test_git_clones_over_http_from_a_server_that_the_policy_names(live: Live, session: str, git_port: int) -> None:
    url = f"http://{own_address()}:{git_port}/project.git"
    run(live, session, command=f"git clone --quiet {url} /workspace/clone && cat clone/hello.txt")
    network = live.client.get(f"{session}/network").json()
    assert network["counters"]["allowed"] > 0
    assert network["counters"]["bytes_in"] > 100


# --- what must reach nothing

ATTACK = """
import errno, json, socket, time

def raw(kind, address, port):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    begun = time.monotonic()
    with socket.socket(family, kind) as probe:
        probe.settimeout(5)
        try:
            probe.connect((address, port))
            return "connected"
        except OSError as error:
            assert time.monotonic() - begun < 1, "it took long"
            return errno.errorcode.get(error.errno, str(error))

def proxied(request):
    with socket.create_connection(("127.0.0.1", 3128), timeout=20) as proxy:
        proxy.sendall(request.encode("latin-1"))
        answer = b""
        while data := proxy.recv(65536):
            answer += data
    head = answer.partition(b"\\r\\n\\r\\n")[0].decode()
    reason = [line.split(": ")[1] for line in head.split("\\r\\n") if line.startswith("X-Egress-Reason")]
    return [int(head.split()[1]), *reason]

def handler(event):
    found = {"raw": {}, "proxied": {}}
    for address, port in event["raw"]:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            found["raw"][f"{kind.name} {address}"] = raw(kind, address, port)
    try:
        found["look-up"] = socket.getaddrinfo("example.com", 80)[0][4]
    except OSError:
        found["look-up"] = None
    for name, request in event["proxied"].items():
        found["proxied"][name] = proxied(request)
    return found
"""


def connect(where: str) -> str:
    return f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n\r\n"


def get(url: str, *headers: str) -> str:
    return "\r\n".join([f"GET {url} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""])


def test_nothing_is_reached_that_the_policy_does_not_name(live: Live) -> None:
    """Raw sockets, and a hostile table through the proxy, from a session that has the default network."""
    here = own_address()
    with counted("127.0.0.1") as loopback, counted(here) as outer, counted("::1") as loopback6:
        inner, port, inner6 = loopback.server_address[1], outer.server_address[1], loopback6.server_address[1]
        table: dict[str, tuple[str, int, str]] = {
            "metadata": (get("http://169.254.169.254/latest/meta-data/"), 403, "address"),
            "metadata in IPv6": (connect("[::ffff:169.254.169.254]:80"), 403, "address"),
            "the engine's gateway": (connect("172.17.0.1:80"), 403, ""),
            "a loopback service": (connect(f"127.0.0.1:{inner}"), 403, "own_address"),
            "a loopback service by IPv6": (connect(f"[::1]:{inner6}"), 403, "own_address"),
            "a loopback service in IPv6": (connect(f"[::ffff:127.0.0.1]:{inner}"), 403, "own_address"),
            "a service of the host": (connect(f"{here}:{port}"), 403, "own_address"),
            "the service itself": (get(f"http://127.0.0.1:{live.port}/v1/sessions"), 403, "own_address"),
            "the service by name": (get(f"http://localhost:{live.port}/v1/sessions"), 403, "own_address"),
            "a number": (get(f"http://2130706433:{inner}/"), 403, "odd_host"),
            "a hexadecimal number": (get(f"http://0x7f.1:{inner}/"), 403, "odd_host"),
            "user information": (get(f"http://example.com@127.0.0.1:{inner}/"), 403, "odd_host"),
            "a trailing dot": (get(f"http://localhost.:{inner}/"), 403, "odd_host"),
            "percent": (get(f"http://localhos%74:{inner}/"), 403, "odd_host"),
            "a NUL": (get(f"http://a\x00.example:{inner}/"), 400, "bad_request"),
            "two lengths": (
                get("http://example.com/", "Content-Length: 1", "Transfer-Encoding: chunked"),
                400,
                "bad_request",
            ),
            "a folded header": (get(f"http://127.0.0.1:{inner}/", "X: a\r\n GET / HTTP/1.1"), 403, "own_address"),
        }
        event = {
            "raw": [
                ["169.254.169.254", 80],
                [here, port],
                ["172.17.0.1", 80],
                ["1.1.1.1", 53],
                ["2606:4700::1111", 53],
            ],
            "proxied": {name: request for name, (request, _, _) in table.items()},
        }
        path = live.client.post("/v1/sessions", json={"template": "tools"}).headers["Location"]
        try:
            assert live.client.get(path).json()["network"] == "public"
            found = run(live, path, code=ATTACK, event=event)["value"]
            refusals = live.client.get(f"{path}/network").json()["refusals"]
        finally:
            live.client.delete(path)
        assert set(found["raw"].values()) <= {"ENETUNREACH", "EADDRNOTAVAIL"}, found["raw"]
        assert found["look-up"] is None
        for name, (_, status, reason) in table.items():
            code, said_why = found["proxied"][name]
            assert (name, code, reason or said_why) == (name, status, said_why)
        assert len(refusals) == len(table)
        assert (loopback.count, outer.count, loopback6.count) == (0, 0, 0)


def test_without_a_network_nothing_listens_and_no_variable_says_so(live: Live) -> None:
    path = live.client.post("/v1/sessions", json={"template": "tools", "network": "none"}).headers["Location"]
    code = "import os, socket\nprint([name for name in os.environ if 'proxy' in name.lower()])\n"
    code += "with socket.socket() as probe: print(probe.connect_ex(('127.0.0.1', 3128)))"
    assert run(live, path, code=code)["stdout"] == "[]\n111\n"
    assert live.client.patch(path, json={"network": "public"}).json()["network"] == "public"
    assert "HTTPS_PROXY" in run(live, path, code=code)["stdout"]
    assert run(live, path, code=code)["stdout"].endswith("\n0\n")
    assert live.client.patch(path, json={"network": "none"}).status_code == 200
    assert run(live, path, code=code)["stdout"] == "[]\n111\n"
    refused = live.client.patch(path, json={"network": {"allow": ["10.0.0.0/8"]}})
    assert refused.status_code == 200, "a network that only the connection's address can break"
    live.client.delete(path)


def test_half_open_connections_cost_the_session_alone(live: Live, session: str) -> None:
    """300 connections that say nothing; another session works meanwhile, and so does this one's next execution."""
    flood = "import socket, time\nkept = []\nfor _ in range(200):\n"
    flood += "    probe = socket.socket(); probe.settimeout(2)\n    kept.append((probe, probe.connect_ex(('127.0.0.1', 3128))))\n"
    flood += "print(len(kept))"
    assert run(live, session, code=flood)["stdout"] == "200\n"
    begun = time.monotonic()
    other = live.client.post("/v1/sessions", json={"template": "tools"}).headers["Location"]
    assert run(live, other, code="print(1)")["stdout"] == "1\n"
    assert run(live, session, code="print(1)")["stdout"] == "1\n"
    assert time.monotonic() - begun < 30
    live.client.delete(other)


class Names:
    """A resolver of the test's own: each name has its answers in turn."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = {name.replace("_", "."): found for name, found in answers.items()}

    async def addresses(self, host: str) -> list[Address]:
        found = self.answers[host]
        return [ipaddress.ip_address(address) for address in (found.pop(0) if len(found) > 1 else found[0]).split()]


@pytest.fixture
async def rebound(real_engine: None, state_dir: Path) -> AsyncIterator[Orchestrator]:
    """A service in this process, which looks names up in the test."""
    names = Names(
        a_example=["127.0.0.3", "127.0.0.1"], inner_example=["10.0.0.1"], both_example=["127.0.0.3 127.0.0.1"]
    )
    settings = Settings(
        image=IMAGE,
        instance=f"test-rebound-{os.getpid()}",
        state_dir=str(state_dir),
        uid_base=54000,
        pool_size=1,
        on_exit="remove",
        egress_allow="*:*,127.0.0.3:*",
    )
    service = Orchestrator(settings)
    service.sessions.border = Border(settings, service.metrics, names)
    async with service.run():
        yield service


async def test_a_name_that_changes_its_address_is_judged_by_the_one_that_is_connected(
    rebound: Orchestrator,
) -> None:
    with counted("127.0.0.3") as allowed, counted("127.0.0.1") as forbidden:
        port, other = allowed.server_address[1], forbidden.server_address[1]
        network = {"allow": ["*.example:*"]}
        request = msgspec.convert({"network": network}, SessionRequest)
        session = await rebound.sessions.create(request)
        asked = {
            "first": connect(f"a.example:{port}"),
            "second": connect(f"a.example:{other}"),
            "private": connect("inner.example:80"),
            "both": connect(f"both.example:{port}"),
        }
        order = ExecutionRequest(code=ATTACK, event={"raw": [], "proxied": asked}, timeout_s=60)
        execution = await rebound.sessions.execute(session.id, order)
        assert execution.outcome == "ok", execution
        assert msgspec.json.decode(execution.value)["proxied"] == {
            "first": [200],
            "second": [403, "own_address"],
            "private": [403, "address"],
            "both": [403, "own_address"],
        }
        assert (allowed.count, forbidden.count) == (1, 0)
        rebound.sessions.end(session, "closed")


def test_the_seeds_door_gives_the_network_that_it_asks_for(live: Live) -> None:
    for allow, network in ((True, "public"), (False, "none")):
        sid = f"seed-{allow}".lower()
        answer = live.client.post(f"/workspace/se/session/{sid}", json={"allow_network": allow})
        assert answer.status_code == 200, answer.text
        assert live.client.get(f"/v1/sessions/{sid}").json()["network"] == network
        live.client.delete(f"/v1/sessions/{sid}")


def test_a_one_shot_execution_has_a_network_too(live: Live) -> None:
    code = "import os; print('HTTP_PROXY' in os.environ)"
    for network, has in ((None, "True\n"), ("none", "False\n")):
        body = {"code": code} | ({"network": network} if network else {})
        answer: httpx.Response = live.client.post("/v1/execute", json=body)
        assert answer.json()["stdout"] == has
