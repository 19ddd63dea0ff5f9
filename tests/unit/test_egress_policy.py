"""What a session may reach, as tables: its own rules, the service's, and the addresses that are never public."""

import ipaddress
import socket
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.egress.addresses import is_own, plain, special
from orchestrator.egress.policy import Bounds, Denied, Policy, adopted, bounds_of
from orchestrator.errors import InvalidRequest, NetworkNotAllowed, SandboxError
from orchestrator.models import Network, NetworkRules

PUBLIC = "8.8.8.8"
SECRET = "do not show this"

SPECIAL = [
    *(("127.0.0.1", "loopback"), ("127.9.9.9", "loopback"), ("::1", "loopback"), ("0.0.0.0", "unspecified")),
    *(("0.1.2.3", "unspecified"), ("::", "unspecified"), ("10.0.0.1", "private"), ("172.16.0.1", "private")),
    *(("172.31.255.255", "private"), ("192.168.1.1", "private"), ("fc00::1", "private"), ("fd00:ec2::254", "private")),
    *(("fec0::1", "private"), ("169.254.169.254", "link_local"), ("fe80::1", "link_local"), ("100.64.0.1", "shared")),
    *(("100.100.100.200", "shared"), ("100.127.255.255", "shared"), ("168.63.129.16", "metadata")),
    *(("224.0.0.1", "multicast"), ("239.1.1.1", "multicast"), ("ff02::1", "multicast"), ("192.0.0.192", "reserved")),
    *(("192.0.2.1", "reserved"), ("198.18.0.1", "reserved"), ("198.51.100.1", "reserved"), ("203.0.113.1", "reserved")),
    *(("240.0.0.1", "reserved"), ("255.255.255.255", "reserved"), ("192.88.99.1", "reserved")),
    *(("2001:db8::1", "reserved"), ("2001::1", "reserved"), ("2001:20::1", "reserved"), ("3fff::1", "reserved")),
    *(("100::1", "reserved"), ("5f00::1", "reserved"), ("4000::1", "reserved"), ("64:ff9b:1::1", "reserved")),
    # IPv4 in IPv6: mapped, compatible, NAT64, 6to4, Teredo
    *(("::ffff:127.0.0.1", "loopback"), ("::ffff:10.0.0.1", "private"), ("::ffff:169.254.169.254", "link_local")),
    *(("::127.0.0.1", "loopback"), ("::10.0.0.1", "private"), ("::8.8.8.8", "reserved")),
    *(("64:ff9b::127.0.0.1", "loopback"), ("64:ff9b::a9fe:a9fe", "link_local"), ("64:ff9b::10.0.0.1", "private")),
    *(
        ("2002:7f00:1::", "reserved"),
        ("2002:808:808::", "reserved"),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", "reserved"),
    ),
    *(("8.8.8.8", None), ("172.15.0.1", None), ("172.32.0.1", None), ("100.63.0.1", None), ("100.128.0.1", None)),
    *(("2606:4700::1", None), ("2a00:1450::1", None), ("::ffff:8.8.8.8", None), ("64:ff9b::8.8.8.8", None)),
]


@pytest.mark.parametrize(("address", "kind"), SPECIAL)
def test_an_address_is_public_or_says_why_not(address: str, kind: str | None) -> None:
    assert special(ipaddress.ip_address(address)) == kind


@given(st.ip_addresses())
def test_what_counts_as_public_is_so_for_the_standard_library(address: ipaddress.IPv4Address) -> None:
    if special(address) is None:
        assert plain(address).is_global
        assert not plain(address).is_multicast


@given(st.ip_addresses(v=4))
def test_an_address_in_another_is_judged_as_what_it_is(inner: ipaddress.IPv4Address) -> None:
    mapped = ipaddress.IPv6Address(f"::ffff:{inner}")
    translated = ipaddress.IPv6Address(f"64:ff9b::{inner}")
    assert special(mapped) == special(translated) == special(inner)


def test_the_addresses_of_this_machine_are_its_own() -> None:
    assert is_own(ipaddress.ip_address("127.0.0.1"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((PUBLIC, 9))
        except OSError:
            pytest.skip("no way out of this machine")
        assert is_own(ipaddress.ip_address(probe.getsockname()[0]))
    assert not is_own(ipaddress.ip_address(PUBLIC))


def policy(network: Any, allow: str = "*", deny: str = "", own: str = "") -> Policy:
    bounds = bounds_of(allow, deny)
    bounds = Bounds(bounds.allow, bounds.deny, frozenset(map(ipaddress.ip_address, own.split())))
    return Policy(msgspec.convert(network, Network), bounds)


def reason(judge: Policy, host: str, port: int, *addresses: str) -> str:
    """Return why a host is refused, by its name or by one of its addresses; "ok" when it is not."""
    try:
        judge.judge_host(host, port)
        for address in addresses or [host]:
            judge.judge(host, port, ipaddress.ip_address(address))
    except Denied as denied:
        return denied.reason if f"{host}:{port}" in denied.message else denied.message
    return "ok"


INNER = "10.1.1.1"
CASES: list[tuple[Any, str, str, str, int, list[str], str]] = [
    # network, the service's allow, its deny, host, port, addresses, reason
    ("none", "*", "", "a.example", 443, [PUBLIC], "closed"),
    ("public", "*", "", "a.example", 443, [PUBLIC], "ok"),
    ("public", "*", "", "a.example", 80, [PUBLIC], "ok"),
    ("public", "*", "", "a.example", 22, [PUBLIC], "service"),
    ("public", "*:*", "", "a.example", 22, [PUBLIC], "ok"),
    ("public", "*", "", PUBLIC, 443, [], "ok"),
    ("public", "*", "", "a.example", 443, [PUBLIC, INNER], "address"),
    ("public", "*", "", INNER, 443, [], "address"),
    ("public", "*", "", "::ffff:10.1.1.1", 443, [], "address"),
    ("public", "*", "", "127.0.0.1", 80, [], "own_address"),
    ("public", "*", "", "::1", 80, [], "own_address"),
    ("public", "*,10.0.0.0/8", "", INNER, 443, [], "address"),
    ("public", "*", "a.example", "a.example", 443, [PUBLIC], "service"),
    ("public", "*", "8.8.0.0/16", "a.example", 443, [PUBLIC], "service"),
    ("public", "b.example", "", "a.example", 443, [PUBLIC], "service"),
    ({"allow": ["a.example"]}, "*", "", "a.example", 443, [PUBLIC], "ok"),
    ({"allow": ["a.example"]}, "*", "", "b.example", 443, [PUBLIC], "no_rule"),
    ({"allow": ["a.example:443"]}, "*", "", "a.example", 80, [PUBLIC], "no_rule"),
    ({"allow": ["*.example"], "deny": ["b.example"]}, "*", "", "b.example", 443, [PUBLIC], "denied"),
    ({"allow": ["*.example"], "deny": ["8.8.8.0/24"]}, "*", "", "b.example", 443, [PUBLIC], "denied"),
    ({"allow": ["*"], "deny": ["8.8.8.0/24:80"]}, "*", "", "b.example", 443, [PUBLIC], "ok"),
    ({"allow": ["8.8.8.0/24"]}, "*", "", "b.example", 443, [PUBLIC], "ok"),
    ({"allow": ["8.8.8.0/24"]}, "*", "", "b.example", 443, ["9.9.9.9"], "no_rule"),
    ({"allow": ["a.example"]}, "*", "", "a.example", 443, [INNER], "address"),
    ({"allow": ["a.example"]}, "*,10.0.0.0/8", "", "a.example", 443, [INNER], "ok"),
    ({"allow": ["a.example"]}, "*,10.0.0.0/8:80", "", "a.example", 443, [INNER], "address"),
    ({"allow": ["10.1.1.1"]}, "*,10.0.0.0/8", "", INNER, 443, [], "ok"),
    ({"allow": ["a.example"]}, "10.0.0.0/8", "", "a.example", 443, [INNER], "ok"),
    ({"allow": ["a.example"]}, "10.0.0.0/8", "", "a.example", 443, [PUBLIC], "service"),
    ({"allow": ["*"]}, "*,10.0.0.0/8", "", "a.example", 443, [INNER], "address"),
    ({"allow": []}, "*", "", "a.example", 443, [PUBLIC], "closed"),
]


@pytest.mark.parametrize(("network", "allow", "deny", "host", "port", "addresses", "expected"), CASES)
def test_a_host_is_judged(
    network: Any, allow: str, deny: str, host: str, port: int, addresses: list[str], expected: str
) -> None:
    assert reason(policy(network, allow, deny), host, port, *addresses) == expected


def test_the_engines_address_is_refused_although_it_is_public() -> None:
    judge = policy("public", own="8.8.8.8 2606:4700::1")
    assert reason(judge, "a.example", 443, PUBLIC) == "own_address"
    assert reason(judge, "a.example", 443, "::ffff:8.8.8.8") == "own_address"
    assert reason(judge, "a.example", 443, "2606:4700::1") == "own_address"


REFUSED: list[tuple[Any, str, type[SandboxError], str]] = [
    ({"allow": ["a b"]}, "*", InvalidRequest, "a b"),
    ({"deny": ["a..b"]}, "*", InvalidRequest, "a..b"),
    ({"allow": ["a:22"]}, "*", NetworkNotAllowed, "a:22"),
    ({"allow": ["*"]}, "*.example", NetworkNotAllowed, "ask for less"),
    ({"allow": ["b.org"]}, "*.example", NetworkNotAllowed, "b.org"),
    ({"allow": ["10.0.0.0/8"]}, "10.1.0.0/16", NetworkNotAllowed, "10.0.0.0/8"),
    ({"allow": ["a.org:443"]}, "10.0.0.0/8:80", NetworkNotAllowed, "a.org:443"),
    ({"allow": [{"host": "a.org", "headers": {"X": "y"}}]}, "*", InvalidRequest, "plain HTTP"),
    ({"allow": [{"host": "*:80", "headers": {"X": "y"}}]}, "*", InvalidRequest, "name one host"),
    ({"allow": [{"host": "a.org:443", "headers": {"X": "y"}}]}, "*", InvalidRequest, "nothing is intercepted"),
    ({"allow": [{"host": "a.org:80", "headers": {"Host": "y"}}]}, "*", InvalidRequest, "`host`"),
    (
        {"allow": [{"host": "a.org:80", "headers": {"transfer-Encoding": "y"}}]},
        "*",
        InvalidRequest,
        "`transfer-encoding`",
    ),
]


@pytest.mark.parametrize(("network", "allow", "error", "text"), REFUSED)
def test_what_cannot_be_asked_for_is_refused_with_what_to_change(
    network: Any, allow: str, error: type[SandboxError], text: str
) -> None:
    with pytest.raises(error, match="`") as refusal:
        policy(network, allow)
    assert text in refusal.value.detail


MALFORMED = [
    "all",
    {"allow": "a"},
    {"allow": ["a"] * 65},
    {"allow": [{"host": "a:80"}]},
    {"allow": [{"host": "a:80", "headers": {}}]},
    {"allow": [{"host": "a:80", "headers": {"X": ""}}]},
    {"allow": [{"host": "a:80", "headers": {"X": "a\r\nY: b"}}]},
    {"allow": [{"host": "a:80", "headers": {"X\n": "a"}}]},
    {"allow": [{"host": "a:80", "headers": {"X:": "a"}}]},
    {"allow": ["x" * 281]},
    {"permit": []},
]


@pytest.mark.parametrize("network", MALFORMED, ids=str)
def test_what_is_no_network_is_refused_by_its_type(network: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(network, Network)


RULES = {"allow": ["b.org", {"host": "a.org:80", "headers": {"X-Key": SECRET, "Cookie": SECRET}}], "deny": ["c.org"]}


def test_headers_are_added_for_their_host_and_port_alone() -> None:
    judge = policy(RULES)
    assert judge.headers("a.org", 80) == {"X-Key": SECRET, "Cookie": SECRET}
    assert judge.headers("b.org", 80) == judge.headers("a.org", 8080) == judge.headers("x.a.org", 80) == {}


def test_headers_are_shown_and_kept_by_their_names_and_lost_in_a_restart() -> None:
    judge = policy(RULES)
    shown = msgspec.to_builtins(judge.shown())
    assert shown == {"allow": ["b.org", {"host": "a.org:80", "headers": ["Cookie", "X-Key"]}], "deny": ["c.org"]}
    after = Policy(adopted(judge.shown()), bounds_of("*", ""))
    assert isinstance(after.network, NetworkRules)
    assert after.shown() == judge.shown()
    with pytest.raises(Denied, match="PATCH") as denied:
        after.headers("a.org", 80)
    assert denied.value.reason == "credentials_lost"
    assert after.headers("b.org", 80) == {}
