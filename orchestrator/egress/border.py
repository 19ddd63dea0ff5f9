"""What the egress of all sessions shares: the service's policy, the resolver, the limits, the count of connections."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import structlog
from prometheus_client import Counter

from orchestrator.egress.policy import Bounds, Decision, Denied, Policy, Reason, adopted, bounds_of
from orchestrator.egress.resolve import Resolver, SystemResolver
from orchestrator.egress.seal import Seal
from orchestrator.errors import InvalidRequest, NetworkNotAllowed
from orchestrator.hosts import Address, as_address
from orchestrator.metrics import Metrics
from orchestrator.models import Network, ShownNetwork
from orchestrator.settings import Settings

log = structlog.get_logger()
ATTEMPTS = 4  # addresses of a name that are tried
ATTEMPT_S = 3.0  # for one of them while there are others
LINE_BYTES = 64 * 1024  # that a connection of ours buffers


class Border:
    """One for the service."""

    def __init__(self, settings: Settings, metrics: Metrics, resolver: Resolver | None = None) -> None:
        self.settings = settings
        self.bounds: Bounds = bounds_of(settings.egress_allow, settings.egress_deny)
        self.connections = 0
        self.seal = Seal(Path(settings.state_dir) / f"{settings.instance}.key")
        self._metrics = metrics
        self._resolver = resolver or SystemResolver()

    def policy(self, asked: Network | None, *, given: str) -> Policy:
        """Return the policy of a session that asks for one; `given` is what its template gives, and the default.

        InvalidRequest or NetworkNotAllowed when it cannot be.
        """
        if given == "none" and asked not in (None, "none"):
            raise NetworkNotAllowed(
                "Sessions have no network here (SANDBOX_ALLOW_NETWORK=false, or the local engine): ask for `none`"
            )
        return Policy(asked or ("public" if given == "public" else "none"), self.bounds)

    def adopt(self, kept: ShownNetwork, seal: str, *, owner: str, given: str) -> Policy:
        """Return the policy of a session that goes on, by what its agent kept.

        It loses what is not ours by its seal, and what this service would not give it any more.
        """
        try:
            if not self.seal.fits(seal, owner, kept):
                raise InvalidRequest("The agent kept a network that this service did not give it")
            return self.policy(adopted(kept), given=given)
        except InvalidRequest as error:
            log.warning("network_closed", owner=owner, reason=error.detail)
            return self.policy("none", given=given)

    async def learn_own(self, hosts: Iterable[str]) -> None:
        """Learn addresses that are this service's although they are not of this machine, such as the engine's."""
        found: set[Address] = set(self.bounds.own)
        for host in hosts:
            with suppress(OSError):
                found |= set(await self.look_up(host))
        self.bounds = Bounds(self.bounds.allow, self.bounds.deny, frozenset(found))

    async def look_up(self, host: str) -> list[Address]:
        """Return all addresses of a host. OSError when there is none."""
        address = as_address(host)
        return [address] if address is not None else await self._resolver.addresses(host)

    async def connect(
        self, policy: Policy, host: str, port: int, lookups: asyncio.Semaphore
    ) -> tuple[Address, asyncio.StreamReader, asyncio.StreamWriter]:
        """Look a host up once, judge every address of it, and connect to one of these. Denied when that cannot be."""
        policy.judge_host(host, port)
        try:
            async with asyncio.timeout(self.settings.egress_connect_seconds):
                async with lookups:
                    addresses = await self.look_up(host)
                if not addresses:
                    raise Denied("failed", "dns", f"{host} has no address")
                for address in addresses:
                    policy.judge(host, port, address)
                return await _connect(host, port, addresses[:ATTEMPTS])
        except TimeoutError:
            raise Denied("failed", "timeout", f"{host}:{port} did not answer in time") from None
        except OSError as error:  # of the look-up
            raise Denied("failed", "dns", f"{host} cannot be looked up: {error.strerror or error}") from None

    def count(self, decision: Decision | Literal["allowed"], reason: Reason) -> None:
        """Count a connection, once it is decided on."""
        self._metrics.egress_connections.labels(decision, reason).inc()

    @property
    def moved(self) -> Counter:
        """The counter of bytes by direction."""
        return self._metrics.egress_bytes

    def close(self) -> None:
        """Begin no more look-ups."""
        if isinstance(self._resolver, SystemResolver):
            self._resolver.close()


async def _connect(
    host: str, port: int, addresses: list[Address]
) -> tuple[Address, asyncio.StreamReader, asyncio.StreamWriter]:
    why = ""
    for address in addresses:
        try:
            async with asyncio.timeout(None if address is addresses[-1] else ATTEMPT_S):
                # An address, not a name: nothing is looked up again.
                reader, writer = await asyncio.open_connection(str(address), port, limit=LINE_BYTES)
            return address, reader, writer
        except OSError as error:
            why = error.strerror or str(error) or "no answer"
    raise Denied("failed", "unreachable", f"{host}:{port} cannot be reached: {why}")
