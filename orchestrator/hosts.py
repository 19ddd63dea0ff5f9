"""Names of hosts as programs and policies write them: what is a host at all, and patterns of hosts with ports.

A pattern is `HOST` or `HOST:PORTS`. HOST is a name, `*.NAME` (every name below it), an address, a network such as
`10.0.0.0/8`, or `*`: every name and every public address. PORTS is a number, a range such as `8000-8099`, or `*`; left
out, it is 80 and 443. An IPv6 address with ports stands in brackets.
"""

import ipaddress
import re

import msgspec

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Ports = tuple[tuple[int, int], ...]

WEB_PORTS: Ports = ((80, 80), (443, 443))
ALL_PORTS: Ports = ((1, 65535),)
LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\Z")
NUMBER = re.compile(r"[0-9]+\Z|0x[0-9a-f]*\Z")  # a name whose last label is one is an address to some resolvers
NAME_LENGTH = 253
EVERY = "*"


class OddHost(ValueError):
    """What is no host, or one that different programs would take for different ones; the text says why."""


class BadPattern(ValueError):
    """What is no pattern; the text says what to change."""


def parse_host(text: str) -> str:
    """Return a host in its one spelling: a name in lower case, or an address without brackets. OddHost for others."""
    if text.startswith("[") and text.endswith("]") and ":" in text:
        return str(_address(text[1:-1]))
    if ":" in text:
        return str(_address(text))
    name = text.lower()
    if not name or len(name) > NAME_LENGTH:
        raise OddHost(f"a name has 1 to {NAME_LENGTH} characters")
    if not all(33 <= ord(character) < 127 for character in text):
        raise OddHost("a name is ASCII without spaces and control characters; write others as xn--")
    labels = name.split(".")
    if "" in labels:
        raise OddHost("a name has no empty label, and no dot at its end")
    if NUMBER.match(labels[-1]):
        return str(_address(name))  # four decimal numbers without leading zeros, and nothing else
    if not all(LABEL.match(label) for label in labels):
        raise OddHost("a label has 1 to 63 letters, digits, `-` or `_`, and no `-` at its ends")
    return name


def as_address(host: str) -> Address | None:
    """Return the address that a parsed host is, None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _address(text: str) -> Address:
    try:
        if "%" in text:
            raise ValueError
        return ipaddress.ip_address(text)
    except ValueError:
        raise OddHost("an address is four decimal numbers, or IPv6 without a zone") from None


def parse_authority(text: str, *, default_port: int | None = None) -> tuple[str, int]:
    """Return host and port of `HOST:PORT`. OddHost when there is user information, no host, or no port."""
    if "@" in text:
        raise OddHost("user information does not belong here")
    host, separator, port = text.rpartition(":")
    if not separator or text.endswith("]"):
        if default_port is None:
            raise OddHost("the port is missing")
        return parse_host(text), default_port
    if ":" in host and not host.startswith("["):
        raise OddHost("an IPv6 address with a port stands in brackets")
    return parse_host(host), _port(port)


def _port(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise OddHost("a port is a number from 1 to 65535")
    return int(text)


class Pattern(msgspec.Struct, frozen=True):
    """Hosts and ports: a name, the names below one (`*.`), a network of addresses, or everything that is public."""

    text: str
    name: str | None
    network: Network | None
    ports: Ports

    @property
    def is_every(self) -> bool:
        """Whether it stands for every name and every public address."""
        return self.name == EVERY

    def takes_port(self, port: int) -> bool:
        """Tell whether the port is one of its ports."""
        return any(first <= port <= last for first, last in self.ports)

    def takes_host(self, host: str) -> bool:
        """Tell whether a parsed host is one of its hosts, by name, or as an address that is in its network."""
        if self.network is not None:
            address = as_address(host)
            return address is not None and self.holds(address)
        assert self.name is not None
        if self.is_every:
            return True
        return host.endswith(self.name[1:]) if self.name.startswith("*.") else host == self.name

    def holds(self, address: Address) -> bool:
        """Tell whether an address is in its network."""
        return self.network is not None and address.version == self.network.version and address in self.network

    def covers(self, other: "Pattern") -> bool:
        """Tell whether all that the other stands for, this one does."""
        ports = all(any(low <= first and last <= high for low, high in self.ports) for first, last in other.ports)
        if not ports or self.is_every:
            return ports
        if self.network is not None:
            mine, theirs = self.network, other.network
            return theirs is not None and mine.version == theirs.version and _within(theirs, mine)
        if other.name is None or other.is_every:
            return False
        assert self.name is not None
        return other.name == self.name or (self.name.startswith("*.") and other.name.endswith(self.name[1:]))


def _within(inner: Network, outer: Network) -> bool:
    return inner[0] in outer and inner[-1] in outer


def parse_pattern(text: str) -> Pattern:
    """Return the pattern. BadPattern when it is none."""
    host, ports = _split(text)
    try:
        if host == EVERY:
            return Pattern(text, EVERY, None, ports)
        if "/" in host:
            return Pattern(text, None, ipaddress.ip_network(host.strip("[]")), ports)
        if host.startswith("*."):
            if as_address(name := parse_host(host[2:])) is not None:
                raise OddHost("addresses have no names below them")
            return Pattern(text, f"*.{name}", None, ports)
        name = parse_host(host)
        if (address := as_address(name)) is not None:
            return Pattern(text, None, ipaddress.ip_network(address), ports)
        return Pattern(text, name, None, ports)
    except ValueError as error:
        raise BadPattern(f"`{text}` is no pattern of hosts: {error}") from None


def _split(text: str) -> tuple[str, Ports]:
    """Return the host's part of a pattern, and its ports."""
    bare = text.count(":") > 1 and not text.startswith("[")  # an IPv6 address without ports
    host, separator, ports = (text, "", "") if bare or text.endswith("]") else text.partition("]:")
    if separator:
        host += "]"
    elif not bare and not text.startswith("["):
        host, separator, ports = text.partition(":")
    if not separator:
        return host, WEB_PORTS
    if ports == EVERY:
        return host, ALL_PORTS
    first, dash, last = ports.partition("-")
    try:
        low = _port(first)
        high = _port(last) if dash else low
    except OddHost:
        raise BadPattern(f"`{text}`: ports are a number from 1 to 65535, a range such as 8000-8099, or *") from None
    if high < low:
        raise BadPattern(f"`{text}`: the range of ports ends before it begins")
    return host, ((low, high),)
