"""Addresses: which are public, and which belong to this machine.

The tables are IANA's registries of special-purpose addresses; everything that they do not leave to the public is named
here by why it is none. An IPv4 address that hides in an IPv6 one is judged as what it is.
"""

import ipaddress
import socket

from orchestrator.hosts import Address, Network

_SPECIAL: dict[str, str] = {
    "unspecified": "0.0.0.0/8 ::/128",
    "loopback": "127.0.0.0/8 ::1/128",
    "private": "10.0.0.0/8 172.16.0.0/12 192.168.0.0/16 fc00::/7 fec0::/10",
    "link_local": "169.254.0.0/16 fe80::/10",
    "shared": "100.64.0.0/10",
    "metadata": "168.63.129.16/32",  # a cloud's services for its machines, in the midst of public addresses
    "multicast": "224.0.0.0/4 ff00::/8",
    "reserved": "192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 240.0.0.0/4 "
    "2001::/23 2001:db8::/32 2002::/16 3fff::/20",
}
SPECIAL: list[tuple[str, Network]] = [
    (kind, ipaddress.ip_network(text)) for kind, networks in _SPECIAL.items() for text in networks.split()
]
UNICAST = ipaddress.ip_network("2000::/3")  # all that is given out of IPv6
NAT64 = ipaddress.ip_network("64:ff9b::/96")
COMPATIBLE = ipaddress.ip_network("::/96")
DISCARD_PORT = 9


def plain(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 one stands for (mapped, compatible, NAT64); any other as it is."""
    if address.version == 6:
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in NAT64 or (address in COMPATIBLE and int(address) > 0xFFFF):
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def special(address: Address) -> str | None:
    """Return why an address is not public, None when it is."""
    known = plain(address)
    for kind, network in SPECIAL:
        if known.version == network.version and known in network:
            return kind
    if known.version == 6 and known not in UNICAST:
        return "reserved"
    if address in COMPATIBLE:
        return "reserved"  # long abandoned: who writes it means to hide something
    return None


def is_own(address: Address) -> bool:
    """Tell whether an address is this machine's: towards itself, it is its own source."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), DISCARD_PORT))  # sends nothing
            return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == address
    except OSError:
        return False
