"""What a session may reach, as it is asked for and as it is shown, and what it reached."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from orchestrator.models.terms import Request, Time

HostPattern = Annotated[
    str,
    Meta(min_length=1, max_length=280, description="a host with ports, such as `example.com:443` or `*.example.com`"),
]
HeaderName = Annotated[str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}\Z")]
HeaderText = Annotated[str, Meta(pattern=r"^[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z", max_length=4096)]
Headers = Annotated[dict[HeaderName, HeaderText], Meta(min_length=1, max_length=16)]
EgressProtocol = Literal["connect", "http", "socks5"]


class AllowedHost(Request, frozen=True):
    """Hosts that may be reached by plain HTTP, and headers that are added on the way, out of the code's sight."""

    host: HostPattern
    headers: Headers


class NetworkRules(Request, frozen=True):
    """Hosts that a session may reach, as patterns with ports; what is denied is so whatever is allowed."""

    allow: Annotated[list[HostPattern | AllowedHost], Meta(max_length=64)] = []
    deny: Annotated[list[HostPattern], Meta(max_length=64)] = []


Network = Literal["none", "public"] | NetworkRules


class ShownHost(msgspec.Struct, frozen=True, kw_only=True):
    """Allowed hosts with the names of the headers that are added for them."""

    host: str
    headers: list[str]


class ShownRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of a session's network as they may be seen."""

    allow: list[str | ShownHost]
    deny: list[str]


ShownNetwork = Literal["none", "public"] | ShownRules


class EgressConnection(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that is open; `bytes_in` came from the host, `bytes_out` went there."""

    host: str
    port: int
    address: str | None
    protocol: EgressProtocol
    opened_at: Time
    bytes_in: int
    bytes_out: int


class EgressRefusal(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that was not made, and why; `decision` and `reason` are those of the metrics."""

    at: Time
    host: str
    port: int | None
    decision: Literal["refused", "failed", "limited"]
    reason: str
    message: str


class EgressCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What a session's network carried since the session, or this service, began."""

    allowed: int
    refused: int
    failed: int
    limited: int
    bytes_in: int
    bytes_out: int


class SessionNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """What a session may reach, what it is connected to, what it was refused last."""

    policy: ShownNetwork
    connections: list[EgressConnection]
    counters: EgressCounters
    refusals: list[EgressRefusal]
