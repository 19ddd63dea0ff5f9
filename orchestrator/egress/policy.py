"""What a session may reach: its own policy, within the service's. Pure: no look-up, no connection.

A host is judged by its name before it is looked up, and by each of its addresses before one is connected to.
"""

from typing import Literal, get_args

import msgspec

from orchestrator.egress.addresses import is_own, plain, special
from orchestrator.errors import InvalidRequest, NetworkNotAllowed
from orchestrator.hosts import Address, BadPattern, Pattern, as_address, parse_pattern
from orchestrator.models import AllowedHost, Network, NetworkRules, ShownHost, ShownNetwork, ShownRules
from orchestrator.settings import patterns_of

Decision = Literal["refused", "failed", "limited"]
Reason = Literal[
    "ok",
    "closed",
    "no_rule",
    "denied",
    "service",
    "address",
    "own_address",
    "odd_host",
    "bad_request",
    "credentials_lost",
    "dns",
    "unreachable",
    "timeout",
    "upstream",
    "connections",
    "service_connections",
    "bytes",
]
REASONS: tuple[Reason, ...] = get_args(Reason)
WEB_TLS_PORT = 443
FRAMING = frozenset(
    "host content-length transfer-encoding connection keep-alive te trailer upgrade expect proxy-authorization "
    "proxy-connection".split()
)


class Denied(Exception):
    """Why a connection is not to be; `decision` and `reason` are what is counted, the text names host and rule."""

    def __init__(self, decision: Decision, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.decision = decision
        self.reason = reason
        self.message = message


class Bounds(msgspec.Struct, frozen=True):
    """The service's own policy: what sessions may ask for at most, and which addresses are this service's."""

    allow: tuple[Pattern, ...]
    deny: tuple[Pattern, ...]
    own: frozenset[Address] = frozenset()

    def names(self, address: Address, port: int) -> bool:
        """Tell whether the service names this very address, or a network of it: then it need not be public."""
        return any(pattern.holds(address) and pattern.takes_port(port) for pattern in self.allow)

    def admits(self, asked: Pattern) -> bool:
        """Tell whether a session may ask for a pattern. A name may also lie in a network that the service names."""
        if any(pattern.covers(asked) for pattern in self.allow):
            return True
        is_name = asked.name is not None and not asked.is_every
        wide = msgspec.structs.replace(asked, name="*")
        return is_name and any(
            pattern.network is not None and msgspec.structs.replace(pattern, name="*", network=None).covers(wide)
            for pattern in self.allow
        )


def bounds_of(allow: str, deny: str) -> Bounds:
    """Return the service's policy of two settings."""
    return Bounds(tuple(patterns_of(allow)), tuple(patterns_of(deny)))


class Policy:
    """One session's policy within the service's. Headers are secret: they are told by name only."""

    def __init__(self, network: Network, bounds: Bounds) -> None:
        self.network = network
        self._bounds = bounds
        self._headers: list[tuple[Pattern, dict[str, str]]] = []
        if isinstance(network, NetworkRules):
            self._deny = tuple(map(_pattern, network.deny))
            self._allow = tuple(map(self._allowed, network.allow))
        else:
            self._deny = ()
            self._allow = (parse_pattern("*:*"),) if network == "public" else ()

    @property
    def is_open(self) -> bool:
        """Whether anything may be reached at all."""
        return bool(self._allow)

    def judge_host(self, host: str, port: int) -> None:
        """Refuse what no address could make right, before a name is looked up. Denied when it is refused."""
        address = as_address(host)
        self._judge(host, port, None if address is None else plain(address))

    def judge(self, host: str, port: int, address: Address) -> None:
        """Judge an address of a host. Denied when it is refused."""
        self._judge(host, port, plain(address))
        known, kind = plain(address), special(address)
        reason: Reason = "address"
        if known in self._bounds.own or is_own(known):
            reason, kind = "own_address", kind or "own"
        if kind is None:
            return
        where = f"{host}:{port}" if host == str(address) else f"{host}:{port} is {address}: it"
        if not self._bounds.names(known, port):
            raise Denied("refused", reason, f"{where} is no public address ({kind})")
        if not any(
            pattern.takes_port(port) and not pattern.is_every and (pattern.takes_host(host) or pattern.holds(known))
            for pattern in self._allow
        ):
            raise Denied("refused", reason, f"{where} is no public address ({kind}), and the session does not name it")

    def headers(self, host: str, port: int) -> dict[str, str]:
        """Return the headers to add for a host. Denied when they were lost with an earlier orchestrator."""
        for pattern, headers in self._headers:
            if pattern.takes_host(host) and pattern.takes_port(port):
                if not all(headers.values()):
                    message = f"the headers for {host}:{port} were lost in a restart: give them again with PATCH"
                    raise Denied("refused", "credentials_lost", message)
                return headers
        return {}

    def shown(self) -> ShownNetwork:
        """Return what may be seen of the policy."""
        if not isinstance(self.network, NetworkRules):
            return self.network
        allow = [
            item if isinstance(item, str) else ShownHost(host=item.host, headers=sorted(item.headers))
            for item in self.network.allow
        ]
        return ShownRules(allow=allow, deny=self.network.deny)

    def _judge(self, host: str, port: int, address: Address | None) -> None:
        """Judge by the rules. Without an address, networks that it might yet lie in count as allowing it."""
        where = f"{host}:{port}"
        if not self._allow:
            raise Denied("refused", "closed", f"{where}: the session's network is none")
        if (rule := _first(self._deny, host, port, address, guess=False)) is not None:
            raise Denied("refused", "denied", f"{where} is denied by the session's rule {rule.text}")
        if (rule := _first(self._bounds.deny, host, port, address, guess=False)) is not None:
            raise Denied("refused", "service", f"{where} is denied by this service")
        if _first(self._allow, host, port, address, guess=True) is None:
            raise Denied("refused", "no_rule", f"{where} is allowed by no rule of the session")
        if _first(self._bounds.allow, host, port, address, guess=True) is None:
            raise Denied("refused", "service", f"{where} is outside of what this service allows")

    def _allowed(self, item: str | AllowedHost) -> Pattern:
        pattern = _pattern(item if isinstance(item, str) else item.host)
        if not self._bounds.admits(pattern):
            raise NetworkNotAllowed(f"`{pattern.text}` is outside of what this service allows: ask for less")
        if isinstance(item, AllowedHost):
            _check_headers(pattern, item.headers)
            self._headers.append((pattern, item.headers))
        return pattern


def adopted(kept: ShownNetwork) -> Network:
    """Return the policy that an agent kept: the values of its headers are lost."""
    if not isinstance(kept, ShownRules):
        return kept
    allow = [
        item if isinstance(item, str) else AllowedHost(host=item.host, headers=dict.fromkeys(item.headers, ""))
        for item in kept.allow
    ]
    return NetworkRules(allow=allow, deny=kept.deny)


def _first(
    patterns: tuple[Pattern, ...], host: str, port: int, address: Address | None, *, guess: bool
) -> Pattern | None:
    for pattern in patterns:
        if pattern.takes_port(port):
            held = guess and pattern.network is not None if address is None else pattern.holds(address)
            if held or pattern.takes_host(host):
                return pattern
    return None


def _pattern(text: str) -> Pattern:
    try:
        return parse_pattern(text)
    except BadPattern as error:
        raise InvalidRequest(str(error)) from None


def _check_headers(pattern: Pattern, headers: dict[str, str]) -> None:
    if pattern.is_every or pattern.takes_port(WEB_TLS_PORT):
        raise InvalidRequest(
            f"`{pattern.text}`: headers are added to plain HTTP only, nothing is intercepted: "
            "name one host and a port of plain HTTP, such as `host:80`"
        )
    if framing := sorted(FRAMING & {name.lower() for name in headers}):
        raise InvalidRequest(f"`{pattern.text}`: the header `{framing[0]}` is the proxy's own: leave it out")
