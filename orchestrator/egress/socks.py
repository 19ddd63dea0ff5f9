"""SOCKS5 (RFC 1928), the part that a program needs to reach a host: no authentication, CONNECT.

Read without I/O: what is there is parsed, or more is asked for. No well-kept library reads the server's side.
"""

import ipaddress
from typing import Literal, NamedTuple

VERSION = 5
NO_AUTHENTICATION = 0
GREETED = bytes([VERSION, NO_AUTHENTICATION])
NONE_ACCEPTABLE = bytes([VERSION, 0xFF])
CONNECT = 1
IPV4, NAME, IPV6 = 1, 3, 4
Answer = Literal["ok", "failed", "refused", "unreachable", "command", "address"]
CODES: dict[Answer, int] = {"ok": 0, "failed": 1, "refused": 2, "unreachable": 4, "command": 7, "address": 8}


class BadSocks(ValueError):
    """What is no SOCKS5 that is served here; `answer` is what to say to it."""

    def __init__(self, answer: bytes, message: str) -> None:
        super().__init__(message)
        self.answer = answer


class Asked(NamedTuple):
    """Where to: the host as it was written, and where in the data the request ends."""

    host: str
    port: int
    end: int


def greeting(data: bytes) -> int | None:
    """Return where a greeting ends that offers no authentication, None when more of it must come. Else BadSocks."""
    if len(data) < 2 or len(data) < 2 + data[1]:
        return None
    end = 2 + data[1]
    if data[0] != VERSION or NO_AUTHENTICATION not in data[2:end]:
        raise BadSocks(NONE_ACCEPTABLE, "only SOCKS5 without authentication is served")
    return end


def request(data: bytes) -> Asked | None:
    """Return what a request asks for, None when more of it must come. Else BadSocks."""
    if len(data) < 5:
        return None
    version, command, _, kind, length = data[:5]
    if version != VERSION:
        raise BadSocks(reply("failed"), "a request begins with the version, 5")
    if command != CONNECT:
        raise BadSocks(reply("command"), "only CONNECT is served")
    sizes = {IPV4: 4, IPV6: 16, NAME: 1 + length}
    if kind not in sizes:
        raise BadSocks(reply("address"), "an address is IPv4, IPv6 or a name")
    end = 4 + sizes[kind]
    if len(data) < end + 2:
        return None
    raw = data[4:end]
    host = raw[1:].decode("latin-1") if kind == NAME else str(ipaddress.ip_address(raw))
    return Asked(host, int.from_bytes(data[end : end + 2], "big"), end + 2)


def reply(answer: Answer) -> bytes:
    """Return the reply to a request; the address in it says nothing."""
    return bytes([VERSION, CODES[answer], 0, IPV4, 0, 0, 0, 0, 0, 0])
