"""Hosts and patterns of hosts: one spelling each, and nothing that two programs could read in two ways."""

import ipaddress
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.hosts import BadPattern, OddHost, Pattern, as_address, parse_authority, parse_host, parse_pattern


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Example.COM", "example.com"),
        ("a", "a"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("_dmarc.example.com", "_dmarc.example.com"),
        ("1.2.3.4", "1.2.3.4"),
        ("[2001:DB8::0:1]", "2001:db8::1"),
        ("::ffff:127.0.0.1", "::ffff:7f00:1"),
    ],
)
def test_a_host_has_one_spelling(written: str, read: str) -> None:
    assert parse_host(written) == read


ODD = [
    *("", ".", "..", "a..b", ".a", "a.", "example.com.", "a b", "a\x00b", "a\nb", "a\tb", "\x7f", "a\r\nHost: b"),
    *("%61.example.com", "exa%mple", "user@host", "user:pass@host", "a/b", "a\\b", "a?b", "a#b", "bücher.example"),
    *("0x7f.1", "0x7f000001", "2130706433", "017700000001", "0177.0.0.1", "127.1", "127.0.1", "1.2.3.4.5", "256.1.1.1"),
    *("1.2.3.04", "01.2.3.4", "1.2.3.0x4", "1.2.3.4.", "[::1", "::1]", "[1.2.3.4]", "[::1%lo]", "fe80::1%eth0", "[]"),
    *("-a.example", "a-.example", "a" * 64, ".".join(["a" * 60] * 5), "\uff11\uff12\uff17.0.0.1", "localhost:80", "*"),
]


@pytest.mark.parametrize("host", ODD, ids=ascii)
def test_an_odd_host_is_none(host: str) -> None:
    with pytest.raises(OddHost):
        parse_host(host)


@given(st.text(alphabet=st.characters(max_codepoint=0x2100), max_size=40))
def test_what_is_read_as_a_host_is_read_the_same_again(text: str) -> None:
    with suppress(OddHost):
        host = parse_host(text)
        assert parse_host(host) == host
        assert host.isascii()
        assert not set(host) & set("%@/\\ []")


@given(st.ip_addresses())
def test_every_address_is_a_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert as_address(parse_host(str(address))) == address


AUTHORITIES = [
    ("example.com:443", ("example.com", 443)),
    ("[::1]:80", ("::1", 80)),
    ("1.2.3.4:65535", ("1.2.3.4", 65535)),
]


@pytest.mark.parametrize(("text", "found"), AUTHORITIES)
def test_an_authority_is_a_host_and_a_port(text: str, found: tuple[str, int]) -> None:
    assert parse_authority(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "example.com",
        "a:",
        "a:0",
        "a:65536",
        "a:-1",
        "a:+1",
        "a:8 0",
        "a:٣",
        "::1:80",
        "[::1]",
        "u@a:80",
        "a:80:90",
        ":80",
    ],
)
def test_what_is_no_authority_is_refused(text: str) -> None:
    with pytest.raises(OddHost):
        parse_authority(text)


def pattern(text: str) -> Pattern:
    return parse_pattern(text)


TAKES = [
    ("example.com", "example.com", 443, True),
    ("example.com", "example.com", 80, True),
    ("example.com", "example.com", 8080, False),
    ("example.com", "www.example.com", 443, False),
    ("example.com:*", "example.com", 22, True),
    ("*.example.com", "www.example.com", 443, True),
    ("*.example.com", "a.b.example.com", 443, True),
    ("*.example.com", "example.com", 443, False),
    ("*.example.com", "notexample.com", 443, False),
    ("EXAMPLE.com:8000-8099", "example.com", 8050, True),
    ("EXAMPLE.com:8000-8099", "example.com", 8100, False),
    ("10.0.0.0/8:80", "10.1.2.3", 80, True),
    ("10.0.0.0/8:80", "11.1.2.3", 80, False),
    ("10.0.0.0/8:80", "example.com", 80, False),
    ("[2001:db8::]:443", "2001:db8::", 443, True),
    ("2001:db8::/32", "2001:db8:1::", 443, True),
    ("*:*", "anything", 1, True),
    ("*", "anything", 22, False),
]


@pytest.mark.parametrize(("text", "host", "port", "taken"), TAKES)
def test_a_pattern_takes_its_hosts_and_ports(text: str, host: str, port: int, taken: bool) -> None:
    found = pattern(text)
    assert (found.takes_host(host) and found.takes_port(port)) is taken


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*.",
        "*.*",
        "a.*",
        "a:0",
        "a:1-",
        "a:9-8",
        "a:1,2",
        "a:x",
        "10.0.0.1/8",
        "10.0.0.0/33",
        "*.1.2.3.4",
        "0x7f.1",
        "a b",
        "[::1",
    ],
)
def test_what_is_no_pattern_says_so(text: str) -> None:
    with pytest.raises(BadPattern, match="`"):
        pattern(text)


COVERS = [
    ("*", "example.com", True),
    ("*", "example.com:22", False),
    ("*:*", "10.0.0.1:22", True),
    ("*", "*", True),
    ("*", "*:*", False),
    ("*.example.com", "*.a.example.com", True),
    ("*.example.com", "a.example.com", True),
    ("*.example.com", "example.com", False),
    ("example.com", "*", False),
    ("10.0.0.0/8", "10.1.0.0/16", True),
    ("10.1.0.0/16", "10.0.0.0/8", False),
    ("10.0.0.0/8", "example.com", False),
    ("example.com:1-100", "example.com:80", True),
]


@pytest.mark.parametrize(("wide", "narrow", "covered"), COVERS)
def test_a_pattern_covers_what_is_within_it(wide: str, narrow: str, covered: bool) -> None:
    assert pattern(wide).covers(pattern(narrow)) is covered
