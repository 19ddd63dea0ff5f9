"""Egress end to end with the real agent: what a program says to the proxy, and what reaches the listeners of the test."""

import asyncio
import base64
import ipaddress
import itertools
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from orchestrator.container import Container
from orchestrator.egress import serve as serving
from orchestrator.egress.border import Border
from orchestrator.egress.outlet import Outlet
from orchestrator.engine import Spec
from orchestrator.engine.local import LocalEngine
from orchestrator.hosts import Address
from orchestrator.metrics import Metrics
from orchestrator.models import Network
from orchestrator.settings import Settings
from tests.fake_engine import Stage
from tests.live import free_port
from tests.unit.test_agent import LIMITS
from tests.unit.test_frames_fuzz import SPEC

MIB = 1 << 20
SOON_S = 10.0
NUMBERS = itertools.count()
FIRST_UID = 171000
Served = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Names:
    """A resolver of the test's own. Every look-up of a name takes its next answer; the last one stays."""

    def __init__(self, **answers: list[str]) -> None:
        self.answers = {name.replace("_", "."): found for name, found in answers.items()}
        self.asked: list[str] = []

    async def addresses(self, host: str) -> list[Address]:
        self.asked.append(host)
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = self.answers[host]
        answer = found.pop(0) if len(found) > 1 else found[0]
        return [ipaddress.ip_address(address) for address in answer.split()]


class Host:
    """A listener of this machine: what came to it, and how many connections."""

    def __init__(self, served: Served) -> None:
        self.connections = 0
        self.heard = bytearray()
        self._served = served

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            await self._served(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer with what comes, and end when it ends."""
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read to the end, then say how much it was."""
    count = 0
    while data := await reader.read(65536):
        count += len(data)
    writer.write(b"%d" % count)
    await writer.drain()


async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say nothing until the other side goes."""
    await reader.read()


def http(answer: bytes, heard: bytearray | None = None) -> Served:
    """Return what answers each request's head with the same bytes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if heard is not None:
            heard.extend(head)
        writer.write(answer)
        await writer.drain()

    return serve


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Scene:
    """One agent with its outlet; the test is the program that speaks to the proxy's port."""

    def __init__(self, container: Container, resolver: Names, **settings: Any) -> None:
        self.metrics = Metrics(CollectorRegistry())
        given: dict[str, Any] = {"engine": "local", "egress_allow": "*:*,127.0.0.0/8:*,[::1]:*"}
        self.settings = Settings(**(given | settings))
        self.names = resolver
        self.border = Border(self.settings, self.metrics, resolver)
        self.container = container
        self.writers: list[asyncio.StreamWriter] = []
        self.port = free_port()
        self.outlet = Outlet(self.border, container, "s", self.border.policy("none", given="public"), port=self.port)

    async def allow(self, network: Any) -> None:
        """Give the session a network, and wait until the agent listens, or does not."""
        self.outlet.change(self.border.policy(msgspec.convert(network, Network), given="public"))
        while self.outlet.policy.is_open != self.listens():
            await asyncio.sleep(0.001)

    def listens(self) -> bool:
        """Tell whether somebody listens on the proxy's port; without connecting, for that would be a connection."""
        wanted = f"0100007F:{self.port:04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return any(line[1] == wanted and line[3] == "0A" for line in lines)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        return reader, writer

    async def ask(self, data: bytes) -> bytes:
        """Send a request, end, and return all that comes back."""
        reader, writer = await self.connect()
        writer.write(data)
        async with asyncio.timeout(SOON_S):
            answer = await reader.read()
        writer.close()
        return answer

    async def tunnel(self, where: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a connection through CONNECT."""
        reader, writer = await self.connect()
        writer.write(f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n\r\n".encode())
        async with asyncio.timeout(SOON_S):
            head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        return reader, writer

    def counted(self, decision: str, reason: str) -> float:
        return self.metrics.value("sandbox_egress_connections_total", decision=decision, reason=reason)

    async def until(self, condition: Callable[[], Any]) -> None:
        async with asyncio.timeout(SOON_S):
            while not condition():
                await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
async def engine(state_dir: Path) -> AsyncIterator[LocalEngine]:
    made = LocalEngine(state_dir / "egress", record=lambda *_: None)
    yield made
    await made.close()


@asynccontextmanager
async def scene(engine: LocalEngine, names: Names | None = None, **settings: Any) -> AsyncIterator[Scene]:
    """Boot an agent for the time of the context; afterwards it still lives."""
    number = next(NUMBERS)
    spec = Spec(
        name=f"egress-{number}",
        image="",
        uid=FIRST_UID + number,
        cpus=1,
        memory_bytes=0,
        workspace_bytes=0,
        scratch_bytes=0,
        labels={},
    )
    container = Container(spec, "python", output_limit=MIB, on_lost=lambda lost: print(lost.lost_reason))
    await container.start(engine, LIMITS)
    await container.bind("s", {})
    made = Scene(container, names or Names(), **settings)
    try:
        yield made
        assert container.lost_reason is None
    finally:
        made.outlet.close()
        for writer in made.writers:
            writer.transport.abort()
        await engine.remove(spec.name)


@asynccontextmanager
async def host(served: Served, address: str = "127.0.0.1", port: int = 0) -> AsyncIterator[tuple[Host, int]]:
    """Listen for the time of the context."""
    made = Host(served)
    server = await asyncio.start_server(made.serve, address, port)
    try:
        yield made, server.sockets[0].getsockname()[1]
    finally:
        server.close()


def reset(writer: asyncio.StreamWriter) -> None:
    """Break off a connection."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def status(answer: bytes) -> tuple[int, str]:
    """Return status and reason of a refusal."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    [reason] = [line.partition(": ")[2] for line in lines if line.startswith("X-Egress-Reason")]
    assert body.decode().split(" ")[1] == f"({reason}):"
    return int(lines[0].split()[1]), reason


# --- the path


async def test_nothing_listens_unless_the_session_may_use_the_network(engine: LocalEngine) -> None:
    async with scene(engine) as one:
        assert not one.listens()
        assert one.outlet.environment == {}
        await one.allow("public")
        assert one.listens()
        assert one.outlet.environment["https_proxy"] == one.outlet.environment["HTTPS_PROXY"]
        await one.allow("none")
        assert not one.listens()
        with pytest.raises(ConnectionRefusedError):
            await one.connect()
        await one.allow({"allow": ["a.example"]})
        assert one.listens()


async def test_a_tunnel_carries_bytes_both_ways_and_each_way_ends_by_itself(engine: LocalEngine) -> None:
    async with scene(engine) as one, host(swallow) as (far, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        reader, writer = await one.tunnel(f"127.0.0.1:{port}")
        writer.write(b"x" * 100_000)
        writer.write_eof()
        assert await reader.read() == b"100000"
        writer.close()
        await one.until(lambda: one.counted("allowed", "ok"))
        assert far.connections == 1
        assert one.metrics.value("sandbox_egress_bytes_total", direction="out") == 100_000
        assert one.metrics.value("sandbox_egress_bytes_total", direction="in") == 6
        assert one.outlet.facts().counters.bytes_out == 100_000
        assert one.outlet.facts().connections == []


async def test_what_follows_the_request_at_once_reaches_the_host(engine: LocalEngine) -> None:
    async with scene(engine) as one, host(echo) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        reader, writer = await one.connect()
        writer.write(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\nHost: a\r\n\r\nhello".encode())
        writer.write_eof()
        assert (await reader.read()).endswith(b"\r\n\r\nhello")


async def test_an_end_on_either_side_reaches_the_other(engine: LocalEngine) -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        reset(writer)

    async with scene(engine) as one, host(leave) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        reader, writer = await one.tunnel(f"127.0.0.1:{port}")
        writer.write(b"x")
        with pytest.raises(ConnectionResetError):
            await reader.read()
    async with scene(engine) as one, host(hold) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        reader, writer = await one.tunnel(f"127.0.0.1:{port}")
        await one.until(lambda: one.outlet.open)
        reset(writer)
        await one.until(lambda: not one.outlet.open)


async def test_plain_http_is_carried_and_the_connection_is_kept(engine: LocalEngine) -> None:
    heard = bytearray()
    async with scene(engine) as one, host(http(OK, heard)) as (far, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        reader, writer = await one.connect()
        for number in range(3):
            writer.write(f"GET http://127.0.0.1:{port}/{number}?q HTTP/1.1\r\nHost: other\r\nX-A: b\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 OK")
            assert await reader.readexactly(2) == b"ok"
        writer.close()
        assert far.connections == 3
        assert f"GET /1?q HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-A: b\r\n".encode() in heard
        assert b"other" not in heard


async def test_a_body_is_carried_whatever_its_framing(engine: LocalEngine) -> None:
    bodies: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = b""
        while not data.endswith((b"0\r\n\r\n", b"12345")):
            data += await reader.read(65536)
        bodies.append(data.partition(b"\r\n\r\n")[2])
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n0\r\n\r\n")
        await writer.drain()

    async with scene(engine) as one, host(take) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        url = f"http://127.0.0.1:{port}/"
        for framing, body in (
            ("Content-Length: 5", b"12345"),
            ("Transfer-Encoding: chunked", b"2\r\n12\r\n3;x=y\r\n345\r\n0\r\nX-Trailer: y\r\n\r\n"),
        ):
            head = f"POST {url} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{framing}\r\n\r\n".encode()
            answer = await one.ask(head + body)
            assert answer.endswith(b"3\r\none\r\n0\r\n\r\n"), answer
        assert bodies == [b"12345", b"2\r\n12\r\n3\r\n345\r\n0\r\n\r\n"]


async def test_headers_of_the_policy_are_added_and_replace_the_programs_own(engine: LocalEngine) -> None:
    heard = bytearray()
    async with scene(engine) as one, host(http(OK, heard)) as (_, port):
        await one.allow({"allow": [{"host": f"127.0.0.1:{port}", "headers": {"Authorization": "Bearer secret"}}]})
        await one.ask(
            f"GET http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: a\r\nauthorization: mine\r\n"
            "Connection: close, x-hop\r\nX-Hop: 1\r\nProxy-Authorization: 2\r\n\r\n".encode()
        )
        assert b"Authorization: Bearer secret\r\n" in heard
        assert heard.lower().count(b"authorization") == 1
        assert b"x-hop" not in heard.lower()
        assert "secret" not in str(msgspec.json.encode(one.outlet.facts()))
        answer = await one.ask(f"TRACE http://127.0.0.1:{port}/ HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert status(answer) == (400, "bad_request")


async def test_socks_reaches_names_and_addresses(engine: LocalEngine) -> None:
    names = Names(far_example=["127.0.0.1"])
    async with scene(engine, names) as one, host(echo) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}", f"far.example:{port}"]})
        for kind in (b"\x01\x7f\x00\x00\x01", b"\x03\x0bfar.example"):
            reader, writer = await one.connect()
            writer.write(b"\x05\x02\x00\x02")
            assert await reader.readexactly(2) == b"\x05\x00"
            writer.write(b"\x05\x01\x00" + kind + port.to_bytes(2, "big") + b"early")
            assert (await reader.readexactly(10))[:2] == b"\x05\x00"
            writer.write_eof()
            assert await reader.read() == b"early"
            writer.close()


# --- what is refused, and nothing reached


def connect(where: str) -> bytes:
    return f"CONNECT {where} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def get(url: str, *headers: str) -> bytes:
    lines = "".join(f"{header}\r\n" for header in headers)
    return f"GET {url} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()


HOSTILE: list[tuple[str, bytes, int, str]] = [
    ("cloud metadata", get("http://169.254.169.254/latest/meta-data/"), 403, "address"),
    ("cloud metadata by IPv6", get("http://[fd00:ec2::254]/"), 403, "address"),
    ("cloud metadata in IPv6", connect("[::ffff:169.254.169.254]:80"), 403, "address"),
    ("cloud metadata by NAT64", connect("[64:ff9b::a9fe:a9fe]:80"), 403, "address"),
    ("loopback", connect("127.0.0.1:PORT"), 403, "own_address"),
    ("another loopback", connect("127.1.2.3:PORT"), 403, "address"),
    ("loopback by IPv6", connect("[::1]:PORT"), 403, "own_address"),
    ("unspecified", connect("0.0.0.0:PORT"), 403, "address"),
    ("unspecified by IPv6", connect("[::]:PORT"), 403, "address"),
    ("a private name", connect("inner.example:PORT"), 403, "address"),
    ("a name that is also private", connect("both.example:PORT"), 403, "own_address"),
    ("a name of this machine", connect("localhost:PORT"), 403, "own_address"),
    ("an unknown name", connect("nowhere.example:443"), 502, "dns"),
    ("an odd port", connect("far.example:22"), 403, "service"),
    ("port 0", connect("far.example:0"), 403, "odd_host"),
    ("no port", connect("far.example"), 403, "odd_host"),
    ("user information", connect("user@far.example:443"), 403, "odd_host"),
    ("user information in a URL", get("http://far.example@127.0.0.1/"), 403, "odd_host"),
    ("a decimal address", get("http://2130706433/"), 403, "odd_host"),
    ("a hexadecimal address", get("http://0x7f.1/"), 403, "odd_host"),
    ("an octal address", get("http://0177.0.0.1/"), 403, "odd_host"),
    ("a short address", get("http://127.1/"), 403, "odd_host"),
    ("a trailing dot", get("http://localhost./"), 403, "odd_host"),
    ("an empty label", get("http://a..b/"), 403, "odd_host"),
    ("percent", get("http://%6cocalhost/"), 403, "odd_host"),
    ("a backslash", get("http://far.example\\@127.0.0.1/"), 403, "odd_host"),
    ("a NUL", get("http://far.example\x00.127.0.0.1/"), 400, "bad_request"),
    ("a control character", get("http://far\x01.example/"), 400, "bad_request"),
    ("origin form", get("/"), 400, "bad_request"),
    ("https to the proxy", get("https://far.example/"), 400, "bad_request"),
    ("another scheme", get("file:///etc/passwd"), 400, "bad_request"),
    ("no HTTP", b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", 400, "bad_request"),
    ("two lengths", get("http://far.example/", "Content-Length: 1", "Content-Length: 2"), 400, "bad_request"),
    (
        "length and chunks",
        get("http://far.example/", "Content-Length: 4", "Transfer-Encoding: chunked"),
        400,
        "bad_request",
    ),
    ("odd chunks", get("http://far.example/", "Transfer-Encoding: xchunked"), 400, "bad_request"),
    ("a space before the colon", get("http://far.example/", "Content-Length : 4"), 400, "bad_request"),
    ("two hosts", get("http://far.example/", "Host: y"), 400, "bad_request"),
    ("an endless head", b"GET http://far.example/ HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 400, "bad_request"),
]


@pytest.fixture(scope="module")
async def closed(engine: LocalEngine) -> AsyncIterator[tuple[Scene, list[Host], int]]:
    """A session that may reach the public network, and listeners of this machine that nobody may reach."""
    names = Names(
        far_example=["127.0.0.1"],
        inner_example=["10.0.0.1"],
        both_example=["8.8.8.8 127.0.0.1"],
        localhost=["127.0.0.1 ::1"],
    )
    async with (
        scene(engine, names, egress_allow="*,*:8000-65535") as one,
        host(echo) as (v4, port),
        host(echo, "::1", port) as (v6, _),
    ):
        await one.allow("public")
        yield one, [v4, v6], port


@pytest.mark.parametrize(("data", "code", "reason"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
async def test_a_hostile_request_is_refused_with_its_reason_and_reaches_nothing(
    closed: tuple[Scene, list[Host], int], data: bytes, code: int, reason: str
) -> None:
    one, hosts, port = closed
    decision = "failed" if code == 502 else "refused"
    before = one.counted(decision, reason)
    answer = await one.ask(data.replace(b"PORT", str(port).encode()))
    assert status(answer) == (code, reason)
    assert [host.connections for host in hosts] == [0, 0]
    assert one.counted(decision, reason) == before + 1
    last = one.outlet.facts().refusals[-1]
    assert (last.decision, last.reason) == (decision, reason)
    assert f"({reason}): {last.message}"[:200].encode() in answer


SOCKS: list[tuple[str, bytes, bytes]] = [
    ("loopback", b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01\x1f\x90", b"\x05\x00\x05\x02"),
    ("loopback by IPv6", b"\x05\x01\x00\x05\x01\x00\x04" + b"\x00" * 15 + b"\x01\x1f\x90", b"\x05\x00\x05\x02"),
    ("a private name", b"\x05\x01\x00\x05\x01\x00\x03\x0dinner.example\x1f\x90", b"\x05\x00\x05\x02"),
    ("an odd name", b"\x05\x01\x00\x05\x01\x00\x03\x060x7f.1\x1f\x90", b"\x05\x00\x05\x02"),
    ("a NUL in a name", b"\x05\x01\x00\x05\x01\x00\x03\x03a\x00b\x1f\x90", b"\x05\x00\x05\x02"),
    ("an empty name", b"\x05\x01\x00\x05\x01\x00\x03\x00\x1f\x90", b"\x05\x00\x05\x02"),
    ("an unknown name", b"\x05\x01\x00\x05\x01\x00\x03\x09a.nowhere\x1f\x90", b"\x05\x00\x05\x04"),
    ("BIND", b"\x05\x01\x00\x05\x02\x00\x01\x08\x08\x08\x08\x00\x50", b"\x05\x00\x05\x07"),
    ("UDP", b"\x05\x01\x00\x05\x03\x00\x01\x08\x08\x08\x08\x00\x50", b"\x05\x00\x05\x07"),
    ("an unknown kind of address", b"\x05\x01\x00\x05\x01\x00\x09\x08\x08\x08\x08\x00\x50", b"\x05\x00\x05\x08"),
    ("only a password", b"\x05\x01\x02", b"\x05\xff"),
    (
        "another version behind the greeting",
        b"\x05\x01\x00\x04\x01\x00\x01\x08\x08\x08\x08\x00\x50",
        b"\x05\x00\x05\x01",
    ),
]


@pytest.mark.parametrize(("data", "answer"), [case[1:] for case in SOCKS], ids=[case[0] for case in SOCKS])
async def test_a_hostile_socks_request_is_refused_with_its_code(
    closed: tuple[Scene, list[Host], int], data: bytes, answer: bytes
) -> None:
    one, hosts, _ = closed
    assert (await one.ask(data)).startswith(answer)
    assert [host.connections for host in hosts] == [0, 0]


async def test_a_name_is_looked_up_once_and_what_it_says_later_does_not_matter(engine: LocalEngine) -> None:
    """Rebinding: the first answer may be connected to, the second may not."""
    names = Names(a_example=["127.0.0.2", "127.0.0.1"])
    async with (
        scene(engine, names, egress_allow="*:*,127.0.0.2:*") as one,
        host(echo, "127.0.0.2") as (allowed, port),
        host(echo, "127.0.0.1", port) as (forbidden, _),
    ):
        await one.allow({"allow": [f"a.example:{port}"]})
        reader, writer = await one.tunnel(f"a.example:{port}")
        writer.write_eof()
        await reader.read()
        assert names.asked == ["a.example"]
        assert status(await one.ask(connect(f"a.example:{port}"))) == (403, "own_address")
        assert (allowed.connections, forbidden.connections) == (1, 0)


async def test_a_name_that_no_rule_allows_is_not_looked_up(engine: LocalEngine) -> None:
    """Else a look-up would carry out what the session knows."""
    async with scene(engine) as one:
        await one.allow({"allow": ["a.example"]})
        assert status(await one.ask(connect("secret.b.example:443"))) == (403, "no_rule")
        assert one.names.asked == []


async def test_a_redirect_to_a_private_host_is_one_more_request_to_be_judged(engine: LocalEngine) -> None:
    async with scene(engine) as one, host(hold) as (inner, secret):
        there = f"http://127.0.0.1:{secret}/"
        async with host(http(b"HTTP/1.1 302 Found\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n" % there.encode())) as (
            _,
            port,
        ):
            await one.allow({"allow": [f"127.0.0.1:{port}"]})
            assert f"Location: {there}".encode() in await one.ask(get(f"http://127.0.0.1:{port}/", "Connection: close"))
            assert status(await one.ask(get(there))) == (403, "no_rule")
            assert inner.connections == 0


async def test_what_is_smuggled_behind_a_request_is_a_request_of_its_own(engine: LocalEngine) -> None:
    heard = bytearray()
    async with scene(engine) as one, host(http(OK, heard)) as (far, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        inner = get("http://169.254.169.254/")
        answer = await one.ask(get(f"http://127.0.0.1:{port}/", "Content-Length: 0") + inner)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert b"403 Forbidden: no_rule" in answer
        assert heard.count(b"HTTP/1.1") == far.connections == 1


async def test_a_host_that_does_not_answer_or_speaks_no_http_is_a_502(engine: LocalEngine) -> None:
    async with scene(engine) as one, host(http(b"\x00\x01 no HTTP\r\n\r\n")) as (_, port):
        nobody = free_port()
        await one.allow({"allow": ["127.0.0.1:*"]})
        assert status(await one.ask(connect(f"127.0.0.1:{nobody}"))) == (502, "unreachable")
        assert status(await one.ask(get(f"http://127.0.0.1:{port}/"))) == (502, "upstream")


# --- live changes


async def test_a_changed_policy_cuts_what_it_forbids_and_leaves_the_rest(engine: LocalEngine) -> None:
    async with scene(engine) as one, host(echo) as (_, kept), host(echo) as (_, cut):
        await one.allow({"allow": [f"127.0.0.1:{kept}", f"127.0.0.1:{cut}"]})
        stays, goes = await one.tunnel(f"127.0.0.1:{kept}"), await one.tunnel(f"127.0.0.1:{cut}")
        assert {connection.port for connection in one.outlet.facts().connections} == {kept, cut}
        await one.allow({"allow": [f"127.0.0.1:{kept}"]})
        with pytest.raises(ConnectionResetError):
            await goes[0].read()
        stays[1].write(b"x")
        assert await stays[0].readexactly(1) == b"x"
        assert [connection.port for connection in one.outlet.facts().connections] == [kept]
        await one.allow("none")
        with pytest.raises(ConnectionResetError):
            await stays[0].read()
        await one.until(lambda: one.counted("allowed", "ok") == 2)


async def test_a_port_that_the_code_took_is_taken_back_when_it_is_free(engine: LocalEngine) -> None:
    async with scene(engine) as one:
        with socket.create_server(("127.0.0.1", one.port)):
            one.outlet.change(one.border.policy("public", given="public"))
            one.container.beat()
            await one.until(one.container.beat)  # the agent has heard of it, and lives
        await one.until(one.listens)
        assert status(await one.ask(get("http://127.0.0.1/")))[0] == 403


# --- limits


async def test_more_connections_than_allowed_are_a_429(engine: LocalEngine) -> None:
    async with scene(engine, egress_connections=2) as one, host(hold) as (far, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        tunnels = [await one.tunnel(f"127.0.0.1:{port}") for _ in range(2)]
        assert status(await one.ask(connect(f"127.0.0.1:{port}"))) == (429, "connections")
        tunnels[0][1].close()
        await one.until(lambda: len(one.outlet.open) == 1)
        await one.tunnel(f"127.0.0.1:{port}")
        assert far.connections == 3


async def test_the_service_has_its_own_limit_on_connections(engine: LocalEngine) -> None:
    async with scene(engine, egress_max_connections=1) as one, host(hold) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        await one.tunnel(f"127.0.0.1:{port}")
        assert status(await one.ask(connect(f"127.0.0.1:{port}"))) == (429, "service_connections")


async def test_a_session_that_has_used_up_its_bytes_is_cut_and_then_refused(engine: LocalEngine) -> None:
    async with scene(engine, egress_bytes=10_000) as one, host(echo) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        reader, writer = await one.tunnel(f"127.0.0.1:{port}")
        writer.write(b"x" * 20_000)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await one.until(lambda: not one.outlet.open)
        assert status(await one.ask(connect(f"127.0.0.1:{port}"))) == (429, "bytes")


@pytest.mark.parametrize("settings", [{"egress_idle_seconds": 0.2}, {"egress_total_seconds": 0.2}], ids=str)
async def test_silence_ends_a_connection_and_so_does_its_age(engine: LocalEngine, settings: dict[str, Any]) -> None:
    async with scene(engine, **settings) as one, host(hold) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        reader, _ = await one.tunnel(f"127.0.0.1:{port}")
        with pytest.raises(ConnectionResetError):
            async with asyncio.timeout(SOON_S):
                await reader.read()


@pytest.mark.parametrize("credit", [0, 2], ids=["http", "socks"])
async def test_an_agent_that_takes_not_even_the_word_that_it_is_connected_is_a_silence(credit: int) -> None:
    stage = Stage()
    container = Container(SPEC, "python", output_limit=MIB, on_lost=lambda _: None)
    await container.start(stage, {})
    one, agent = Scene(container, Names(), egress_idle_seconds=0.2), stage.agents[SPEC.name]
    async with host(hold) as (listener, port):
        one.outlet.change(one.border.policy(msgspec.convert({"allow": ["127.0.0.1:*"]}, Network), given="public"))
        socks = b"\x05\x01\x00\x05\x01\x00\x01\x7f\x00\x00\x01" + port.to_bytes(2, "big")
        asked = socks if credit else connect(f"127.0.0.1:{port}")  # two bytes are the answer to the greeting
        agent.say("open", id="a1", kind="connect", credit=credit, facts={})
        agent.say("data", id="a1", data=base64.b64encode(asked).decode())
        await one.until(lambda: listener.connections)
        await one.until(lambda: not one.outlet.open)
        assert (len(container.streams), container.lost_reason) == (0, None)


async def test_a_look_up_that_takes_too_long_is_a_502(engine: LocalEngine) -> None:
    class Slow(Names):
        async def addresses(self, host: str) -> list[Address]:
            await asyncio.sleep(SOON_S)
            return []

    async with scene(engine, Slow(), egress_connect_seconds=0.1) as one:
        await one.allow("public")
        assert status(await one.ask(connect("a.example:443"))) == (502, "timeout")


async def test_half_open_connections_go_and_leave_the_session_whole(
    engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the agent has streams for: they wait, then each is ended by its silence."""
    monkeypatch.setattr(serving, "HEAD_S", 1.0)
    async with scene(engine) as one, host(echo) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        idle = [await one.connect() for _ in range(200)]
        for number, (_, writer) in enumerate(idle):
            writer.write(b"GET http" if number % 2 else b"\x05")
        reader, writer = await one.tunnel(f"127.0.0.1:{port}")
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        for _, writer in idle:
            writer.close()


# --- flow


async def fill(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send without end."""
    while True:
        writer.write(b"x" * 65536)
        await writer.drain()


async def test_a_dead_reader_costs_a_window_and_stalls_nobody(engine: LocalEngine) -> None:
    async with scene(engine) as one, host(fill) as (_, port), host(echo) as (_, other):
        await one.allow({"allow": ["127.0.0.1:*"]})
        dead = [await one.tunnel(f"127.0.0.1:{port}") for _ in range(8)]
        for _, writer in dead:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
        before, moved = -1, 0
        while before != moved:  # until all of them stand
            before = moved
            await asyncio.sleep(0.2)
            moved = one.outlet.facts().counters.bytes_in
        assert moved < 8 * 16 * MIB
        reader, writer = await one.tunnel(f"127.0.0.1:{other}")
        writer.write(b"x")
        assert await reader.readexactly(1) == b"x"
        for _, writer in dead:
            writer.transport.abort()


async def test_a_ping_and_memory_while_much_flows(engine: LocalEngine) -> None:
    """64 MiB each way: the answer to a ping does not queue behind them, and memory does not grow with them."""
    async with scene(engine) as one, host(echo) as (_, port):
        await one.allow({"allow": [f"127.0.0.1:{port}"]})
        reader, writer = await one.tunnel(f"127.0.0.1:{port}")
        total, got = 64 * MIB, 0

        async def send() -> None:
            for _ in range(total // 65536):
                writer.write(b"x" * 65536)
                await writer.drain()
            writer.write_eof()

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sending = asyncio.create_task(send())
        waits = []
        asked = 0.0
        while data := await reader.read(1 << 20):
            got += len(data)
            if one.container.beat():
                if asked:
                    waits.append(time.perf_counter() - asked)
                asked = time.perf_counter()
        await sending
        assert got == total
        assert len(waits) > 10
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kib < 32 * 1024
        assert sorted(waits)[len(waits) // 2] < 0.2  # the figure itself is measured by bench/egress.py
