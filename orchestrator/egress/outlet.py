"""The egress of one session: its policy, its connections, what it was refused. Each stream of the agent is served here."""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Literal

import structlog

from orchestrator.container import Container
from orchestrator.egress.border import Border
from orchestrator.egress.policy import Denied, Policy
from orchestrator.egress.relay import Ended, Patience, Upstream
from orchestrator.egress.serve import serve
from orchestrator.errors import ContainerLost
from orchestrator.hosts import Address
from orchestrator.models import EgressConnection, EgressCounters, EgressProtocol, EgressRefusal, SessionNetwork
from orchestrator.streams import Stream

log = structlog.get_logger()
PORT = 3128  # of the container's loopback
REFUSALS = 32  # that a session remembers
LOOKUPS = 4  # of one session at once
SHOWN = 300  # characters of a host or message that the code chose
PROXY = f"http://127.0.0.1:{PORT}"
LOCAL = "localhost,127.0.0.1,::1"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
# ALL_PROXY names the HTTP side as well: to some clients a SOCKS URL is an error unless a further package is there.
PROXY_VARIABLES = {"HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY, "ALL_PROXY": PROXY, "NO_PROXY": LOCAL}
ENVIRONMENT = (
    PROXY_VARIABLES
    | {name.lower(): value for name, value in PROXY_VARIABLES.items()}
    | {
        "NODE_USE_ENV_PROXY": "1",
        "npm_config_proxy": PROXY,
        "npm_config_https_proxy": PROXY,
        "npm_config_noproxy": LOCAL,
        "PIP_CERT": CERTIFICATES,
        "REQUESTS_CA_BUNDLE": CERTIFICATES,
        "SSL_CERT_FILE": CERTIFICATES,
        "NODE_EXTRA_CA_CERTS": CERTIFICATES,
    }
)


class Connection:
    """One connection from its request to its end. It counts its bytes, and ends when the session's are used up."""

    def __init__(self, outlet: "Outlet", protocol: EgressProtocol, host: str, port: int) -> None:
        self.protocol = protocol
        self.host = host
        self.port = port
        self.address: Address | None = None
        self.begun = time.monotonic()
        self.bytes_in = 0
        self.bytes_out = 0
        self.task = asyncio.current_task()
        self.ended = "done"
        self._outlet = outlet

    def sent(self, count: int) -> None:
        """Count bytes that go to the host."""
        self.bytes_out += count
        self._outlet.count("out", count)

    def received(self, count: int) -> None:
        """Count bytes that came from the host."""
        self.bytes_in += count
        self._outlet.count("in", count)

    def cut(self) -> None:
        """End it from outside: it is forbidden by now, or the session ends."""
        self.ended = "cut"
        if self.task is not None:
            self.task.cancel()

    def facts(self) -> EgressConnection:
        """Return what a client sees."""
        return EgressConnection(
            host=self.host,
            port=self.port,
            address=None if self.address is None else str(self.address),
            protocol=self.protocol,
            opened_at=datetime.now(UTC) - timedelta(seconds=time.monotonic() - self.begun),
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
        )


class Outlet:
    """The egress of one container. Every connection is decided on once, counted once, and logged once, at its end."""

    def __init__(self, border: Border, container: Container, owner: str, policy: Policy, *, port: int = PORT) -> None:
        self.policy = policy
        self.counters: Counter[str] = Counter()
        self.refusals: deque[EgressRefusal] = deque(maxlen=REFUSALS)
        self.open: set[Connection] = set()
        self._border = border
        self._container = container
        self._owner = owner
        self._port = port
        self._lookups = asyncio.Semaphore(LOOKUPS)
        self._tasks: set[asyncio.Task[None]] = set()
        if policy.is_open:
            self._listen()

    @property
    def environment(self) -> dict[str, str]:
        """The variables that tell programs of the proxy, while there is one."""
        return ENVIRONMENT if self.policy.is_open else {}

    @property
    def seal(self) -> str:
        """The seal on the policy, for the agent to keep with it."""
        return self._border.seal.of(owner_of(self._container, self._owner), self.policy.shown())

    def change(self, policy: Policy) -> None:
        """Replace the policy: for what comes from now on, and by cutting what it forbids."""
        was_open, self.policy = self.policy.is_open, policy
        for connection in list(self.open):
            try:
                policy.judge_host(connection.host, connection.port)
                if connection.address is not None:
                    policy.judge(connection.host, connection.port, connection.address)
            except Denied:
                connection.cut()
        if policy.is_open and not was_open:
            self._listen()
        elif was_open and not policy.is_open:
            self._container.open_network(None)

    def close(self) -> None:
        """End all connections: the session ends."""
        for task in self._tasks:
            task.cancel()

    @asynccontextmanager
    async def passage(self, protocol: EgressProtocol, host: str, port: int) -> AsyncIterator[Upstream]:
        """Connect to a host for the time of this context. Denied when it may not be, or cannot."""
        connection = Connection(self, protocol, host, port)
        upstream: Upstream | None = None
        denied: Denied | None = None
        self.open.add(connection)
        self._border.connections += 1
        try:
            upstream = await self._dial(connection)
            yield upstream
        except Denied as error:
            denied = error
            raise
        except Ended as error:
            connection.ended = str(error)
            raise
        except (ContainerLost, asyncio.CancelledError):
            connection.ended = "cut" if connection.ended == "cut" else "lost"
            raise
        finally:
            self.open.discard(connection)
            self._border.connections -= 1
            if upstream is not None:
                upstream.close()
            self._settle(connection, denied)

    def refuse(self, protocol: EgressProtocol, host: str, denied: Denied) -> None:
        """Count and log what was refused before it had a host that makes sense."""
        self._settle(Connection(self, protocol, ascii(host)[1:-1], 0), denied)

    async def _dial(self, connection: Connection) -> Upstream:
        settings, policy = self._border.settings, self.policy
        if len(self.open) > settings.egress_connections:
            raise Denied("limited", "connections", f"more than {settings.egress_connections} connections at once")
        if self._border.connections > settings.egress_max_connections:
            raise Denied("limited", "service_connections", "too many connections of all sessions: try again later")
        if max(self.counters["in"], self.counters["out"]) >= settings.egress_bytes:
            raise Denied("limited", "bytes", f"the session has used up its {settings.egress_bytes} bytes")
        address, reader, writer = await self._border.connect(policy, connection.host, connection.port, self._lookups)
        connection.address = address
        patience = Patience(settings.egress_idle_seconds, settings.egress_total_seconds)
        upstream = Upstream(reader, writer, connection, patience)
        if self.policy is not policy:  # replaced meanwhile
            try:
                self.policy.judge(connection.host, connection.port, address)
            except Denied:
                upstream.close()
                raise
        return upstream

    def _listen(self) -> None:
        self._container.streams.on_open = self._opened
        self._container.open_network(self._port)

    def _opened(self, stream: Stream) -> None:
        if stream.kind != "connect":
            raise ContainerLost("the agent opened a stream of an unknown kind")
        if not self.policy.is_open:  # it crossed the frame that closed the network
            stream.close()
            return
        task = asyncio.create_task(serve(self, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _settle(self, connection: Connection, denied: Denied | None) -> None:
        decision = "allowed" if denied is None else denied.decision
        reason = "ok" if denied is None else denied.reason
        self._border.count(decision, reason)
        self.counters[decision] += 1
        host = connection.host[:SHOWN]
        if denied is not None:
            self.refusals.append(
                EgressRefusal(
                    at=datetime.now(UTC),
                    host=host,
                    port=connection.port or None,
                    decision=denied.decision,
                    reason=denied.reason,
                    message=denied.message[:SHOWN],
                )
            )
        log.info(
            "egress_done",
            session=self._owner,
            protocol=connection.protocol,
            host=host,
            port=connection.port,
            address=None if connection.address is None else str(connection.address),
            decision=decision,
            reason=reason,
            ended=connection.ended if denied is None else None,
            bytes_in=connection.bytes_in,
            bytes_out=connection.bytes_out,
            duration_s=round(time.monotonic() - connection.begun, 6),
        )

    def count(self, direction: Literal["in", "out"], count: int) -> None:
        """Count bytes. Ended when the session has used up what it may have."""
        self.counters[direction] += count
        self._border.moved.labels(direction).inc(count)
        if self.counters[direction] > self._border.settings.egress_bytes:
            raise Ended("bytes")

    def facts(self) -> SessionNetwork:
        """Return what a client sees."""
        count = self.counters
        return SessionNetwork(
            policy=self.policy.shown(),
            connections=[connection.facts() for connection in self.open],
            counters=EgressCounters(
                allowed=count["allowed"],
                refused=count["refused"],
                failed=count["failed"],
                limited=count["limited"],
                bytes_in=count["in"],
                bytes_out=count["out"],
            ),
            refusals=list(self.refusals),
        )


def owner_of(container: Container, session: str) -> str:
    """Return what a sealed policy belongs to: one session in one container."""
    return f"{container.name} {session}"
