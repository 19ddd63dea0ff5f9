"""Signatures: botocore's own signer is right about every request, and nothing of a signed request can be changed."""

from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.api import sigv4
from orchestrator.api.aws_words import AwsError
from orchestrator.api.sigv4 import Headers, Message

NAME, SECRET = "ci", "0123456789abcdef0123"
KEYS = {NAME: SECRET, "ops": "fedcba98765432100123"}
URL = "http://127.0.0.1:8000/2015-03-31/functions"
Text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
HeaderText = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)


def signed(
    url: str = f"{URL}/f/invocations",
    *,
    method: str = "POST",
    body: bytes = b"{}",
    headers: dict[str, str] | None = None,
    name: str = NAME,
    secret: str = SECRET,
    service: str = "lambda",
    token: str | None = None,
) -> Message:
    """Return a request as botocore signs it and as it arrives here."""
    request = AWSRequest(method, url, headers=headers or {}, data=body)
    SigV4Auth(Credentials(name, secret, token), service, "eu-west-1").add_auth(request)
    parts = urlsplit(url)
    arrived = [(key.lower(), value) for key, value in request.headers.items()]
    return Message(method=method, path=parts.path, query=parts.query, headers=[("host", parts.netloc), *arrived])


def check(message: Message, body: bytes = b"{}", *, later: timedelta = timedelta()) -> str:
    """Verify a request as the door does; return the region."""
    claim = sigv4.claim_of(message.headers)
    sigv4.check_claim(claim, message.headers, KEYS, datetime.now(UTC) + later)
    sigv4.check_signature(claim, message, body, KEYS[claim.key_id])
    return claim.region


def changed(message: Message, header: str, value: str | None) -> Message:
    """Return the request with one header replaced, or left out."""
    others = [(name, text) for name, text in message.headers if name != header]
    headers: Headers = others if value is None else [*others, (header, value)]
    return Message(method=message.method, path=message.path, query=message.query, headers=headers)


def refusal(message: Message, body: bytes = b"{}", *, later: timedelta = timedelta()) -> str:
    with pytest.raises(AwsError) as caught:
        check(message, body, later=later)
    return caught.value.kind


def test_what_botocore_signs_is_taken() -> None:
    assert check(signed()) == "eu-west-1"


@given(segment=Text, query=st.dictionaries(Text, Text, max_size=4), value=HeaderText, body=st.binary(max_size=100))
def test_what_botocore_signs_is_taken_whatever_it_is(
    segment: str, query: dict[str, str], value: str, body: bytes
) -> None:
    words = "&".join(f"{quote(key, safe='-_.~')}={quote(text, safe='-_.~')}" for key, text in query.items())
    url = f"{URL}/{quote(segment, safe='')}/invocations?{words}"
    assert check(signed(url, body=body, headers={"X-Amz-Thing": value}), body) == "eu-west-1"


@pytest.mark.parametrize("path", ["/a/../b", "/a/./b", "//a", "/a//b/", "/", "/a%2Fb", "/a:b", "/%7Ea", "/ü", "/.."])
def test_paths_are_normalised_as_botocore_does(path: str) -> None:
    check(signed(f"http://localhost{path}"))


@pytest.mark.parametrize("query", ["b=2&a=1", "a=2&a=1", "a", "a=", "A=1&a=2", "a-b=1&a=2", "a=%2F%20", ""])
def test_queries_are_sorted_as_botocore_does(query: str) -> None:
    check(signed(f"{URL}?{query}"))


def test_a_changed_body_is_refused() -> None:
    assert refusal(signed(), b"{} ") == "InvalidSignatureException"


def test_another_path_query_or_method_is_refused() -> None:
    message = signed(f"{URL}/f?Qualifier=1")
    for other in (
        Message(method="POST", path="/2015-03-31/functions/g", query=message.query, headers=message.headers),
        Message(method="POST", path=message.path, query="Qualifier=2", headers=message.headers),
        Message(method="POST", path=message.path, query="Qualifier=1&a=b", headers=message.headers),
        Message(method="PUT", path=message.path, query=message.query, headers=message.headers),
    ):
        assert refusal(other) == "InvalidSignatureException"


def test_changed_and_added_headers_are_refused() -> None:
    message = signed(headers={"X-Amz-Invocation-Type": "DryRun"})
    assert refusal(changed(message, "x-amz-invocation-type", "Event")) == "InvalidSignatureException"
    assert refusal(changed(message, "x-amz-invocation-type", None)) == "InvalidSignatureException"
    assert refusal(changed(message, "x-amz-log-type", "Tail")) == "InvalidSignatureException"
    assert refusal(changed(message, "host", "elsewhere")) == "InvalidSignatureException"


def test_a_wrong_secret_and_another_keys_secret_are_refused() -> None:
    assert refusal(signed(secret="x" * 20)) == "InvalidSignatureException"
    assert refusal(signed(secret=KEYS["ops"])) == "InvalidSignatureException"
    assert check(signed(name="ops", secret=KEYS["ops"])) == "eu-west-1"


def test_an_unknown_name_and_a_session_token_are_refused() -> None:
    assert refusal(signed(name="nobody")) == "UnrecognizedClientException"
    assert refusal(signed(token="token")) == "UnrecognizedClientException"


@pytest.mark.parametrize("minutes", [-6, 6])
def test_a_signature_of_another_time_is_refused(minutes: int) -> None:
    assert refusal(signed(), later=timedelta(minutes=minutes)) == "InvalidSignatureException"


@pytest.mark.parametrize("minutes", [-4, 4])
def test_clocks_may_differ_a_little(minutes: int) -> None:
    check(signed(), later=timedelta(minutes=minutes))


def test_another_services_signature_is_refused() -> None:
    assert refusal(signed(service="s3")) == "InvalidSignatureException"


def test_a_date_that_the_scope_does_not_have_is_refused() -> None:
    message = signed()
    yesterday = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y%m%d")
    today = sigv4.claim_of(message.headers).date
    authorization = dict(message.headers)["authorization"].replace(f"/{today}/", f"/{yesterday}/")
    assert refusal(changed(message, "authorization", authorization)) == "InvalidSignatureException"


def test_a_content_hash_that_is_not_the_bodys_is_refused() -> None:
    message = signed(headers={"X-Amz-Content-SHA256": "UNSIGNED-PAYLOAD"})
    assert refusal(message) == "InvalidSignatureException"


@pytest.mark.parametrize(
    ("authorization", "kind"),
    [
        (None, "MissingAuthenticationTokenException"),
        ("Bearer 0123456789abcdef0123", "MissingAuthenticationTokenException"),
        ("AWS4-HMAC-SHA256", "IncompleteSignatureException"),
        ("AWS4-HMAC-SHA256 Credential=ci/20260101/r/lambda/aws4_request", "IncompleteSignatureException"),
        (
            f"AWS4-HMAC-SHA256 Credential=ci/x, SignedHeaders=host;x-amz-date, Signature={'0' * 64}",
            "IncompleteSignatureException",
        ),
        (
            f"AWS4-HMAC-SHA256 Credential=ci/20260101/r/lambda/aws4_request, SignedHeaders=, Signature={'0' * 64}",
            "IncompleteSignatureException",
        ),
        (
            "AWS4-HMAC-SHA256 Credential=ci/20260101/r/lambda/aws4_request, SignedHeaders=host, Signature=0",
            "Incomplete",
        ),
    ],
)
def test_what_is_no_signature_is_refused(authorization: str | None, kind: str) -> None:
    assert refusal(changed(signed(), "authorization", authorization)).startswith(kind)


@pytest.mark.parametrize("date", [None, "", "now", "2026-01-01T00:00:00Z", "99999999T999999Z"])
def test_a_date_that_is_none_is_refused(date: str | None) -> None:
    assert refusal(changed(signed(), "x-amz-date", date)) == "IncompleteSignatureException"


def test_a_header_that_must_be_signed_and_is_not_is_refused() -> None:
    message = signed()
    authorization = dict(message.headers)["authorization"].replace("host;x-amz-date", "x-amz-date")
    assert refusal(changed(message, "authorization", authorization)) == "InvalidSignatureException"
