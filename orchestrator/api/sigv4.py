"""AWS Signature Version 4, verified: who signed a request, and that nothing of it was changed since.

The algorithm is AWS' own ("Signature Version 4 signing process"). The key id is the name of an API key, the secret its key.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, unquote

import msgspec

from orchestrator.api.aws_words import AwsError

FORBIDDEN, BAD_REQUEST = 403, 400
ALGORITHM = "AWS4-HMAC-SHA256"
SERVICE, END = "lambda", "aws4_request"
SKEW = timedelta(minutes=5)
TIME_FORMAT = "%Y%m%dT%H%M%SZ"
REQUIRED = {"host", "x-amz-date"}
Headers = Sequence[tuple[str, str]]  # names in lower case, in the order in which they arrived
_SIGNED = re.compile(r"[a-z0-9_-]+(;[a-z0-9_-]+)*")
_REGION = re.compile(r"[a-z0-9-]{1,32}")
_SIGNATURE = re.compile(r"[0-9a-f]{64}")


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """What an Authorization header says, not verified."""

    key_id: str
    date: str
    region: str
    service: str
    signed: list[str]
    signature: str


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What is signed of a request: path and query as they were sent."""

    method: str
    path: str
    query: str
    headers: Headers


def claim_of(headers: Headers) -> Claim:
    """Return what the request claims. AwsError when that is nothing."""
    values = [value for name, value in headers if name == "authorization"]
    if len(values) != 1 or not values[0].startswith(ALGORITHM):
        raise AwsError(
            "MissingAuthenticationTokenException",
            FORBIDDEN,
            f"Missing Authentication Token: sign the request with {ALGORITHM}",
        )
    pairs = (part.strip().partition("=") for part in values[0].removeprefix(ALGORITHM).split(","))
    found = {name: value for name, _, value in pairs}
    signed, signature = found.get("SignedHeaders", ""), found.get("Signature", "")
    if not _SIGNED.fullmatch(signed) or not _SIGNATURE.fullmatch(signature):
        raise AwsError(
            "IncompleteSignatureException",
            BAD_REQUEST,
            "Authorization header requires 'Credential', 'SignedHeaders' and 'Signature'",
        )
    scope = found.get("Credential", "").split("/")
    if len(scope) != 5 or scope[4] != END or not _REGION.fullmatch(scope[2]):
        raise AwsError(
            "IncompleteSignatureException", BAD_REQUEST, "Credential must be KEY_ID/YYYYMMDD/REGION/lambda/aws4_request"
        )
    key_id, date, region, service, _ = scope
    return Claim(
        key_id=key_id,
        date=date,
        region=region,
        service=service,
        signed=signed.split(";"),
        signature=signature,
    )


def check_claim(claim: Claim, headers: Headers, keys: Mapping[str, str], now: datetime) -> None:
    """Refuse what no body can make right: a stranger, a foreign scope, a time that is past, headers left unsigned."""
    names = [name for name, _ in headers]
    if claim.key_id not in keys or "x-amz-security-token" in names:
        raise AwsError(
            "UnrecognizedClientException",
            FORBIDDEN,
            "The security token included in the request is invalid: no API key has this name",
        )
    if claim.service != SERVICE:
        raise AwsError(
            "InvalidSignatureException", FORBIDDEN, f"Credential should be scoped to correct service: '{SERVICE}'"
        )
    times = [value for name, value in headers if name == "x-amz-date"]
    try:
        (text,) = times
        signed_at = datetime.strptime(text, TIME_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        raise AwsError(
            "IncompleteSignatureException", BAD_REQUEST, "Date must be in ISO-8601 'basic format', once, in X-Amz-Date"
        ) from None
    if not text.startswith(claim.date) or len(claim.date) != 8:
        raise AwsError(
            "InvalidSignatureException",
            FORBIDDEN,
            "Date in Credential scope does not match YYYYMMDD from ISO-8601 version of date from HTTP",
        )
    if abs(now - signed_at) > SKEW:
        what = "Signature expired" if signed_at < now else "Signature not yet current"
        raise AwsError(
            "InvalidSignatureException",
            FORBIDDEN,
            f"{what}: {text} is more than 5 min. from {now.strftime(TIME_FORMAT)}: set the clock",
        )
    needed = REQUIRED | {name for name in names if name.startswith("x-amz-")}
    if unsigned := needed - set(claim.signed):
        raise AwsError(
            "InvalidSignatureException",
            FORBIDDEN,
            f"'{min(unsigned)}' must be a 'SignedHeader' in the AWS Authorization",
        )


def check_signature(claim: Claim, message: Message, body: bytes, secret: str) -> None:
    """Refuse a signature that is not the one that this secret gives to this request."""
    digest = hashlib.sha256(body).hexdigest()
    for name, value in message.headers:
        if name == "x-amz-content-sha256" and not hmac.compare_digest(value.encode(), digest.encode()):
            raise AwsError(
                "InvalidSignatureException",
                FORBIDDEN,
                "The value of x-amz-content-sha256 is not the body's hash: sign the body",
            )
    text = "\n".join(
        [
            ALGORITHM,
            next(value for name, value in message.headers if name == "x-amz-date"),
            f"{claim.date}/{claim.region}/{claim.service}/{END}",
            hashlib.sha256(canonical(message, claim.signed, digest).encode()).hexdigest(),
        ]
    )
    key = f"AWS4{secret}".encode()
    for part in (claim.date, claim.region, claim.service, END):
        key = _hmac(key, part)
    if not hmac.compare_digest(_hmac(key, text).hex(), claim.signature):
        raise AwsError(
            "InvalidSignatureException",
            FORBIDDEN,
            "The request signature we calculated does not match the signature you provided. "
            "Check your AWS Secret Access Key and signing method",
        )


def canonical(message: Message, signed: list[str], digest: str) -> str:
    """Return the request in the one form that both sides hash."""
    pairs = [tuple(map(_encoded, pair.partition("=")[::2])) for pair in message.query.split("&") if pair]
    values: dict[str, list[str]] = {}
    for name, value in message.headers:
        values.setdefault(name, []).append(" ".join(value.split()))
    lines = [f"{name}:{','.join(values.get(name, ()))}" for name in signed]
    return "\n".join(
        [
            message.method,
            quote(_without_dots(message.path), safe="/~"),
            "&".join(f"{name}={value}" for name, value in sorted(pairs)),
            *lines,
            "",
            ";".join(signed),
            digest,
        ]
    )


def _encoded(text: str) -> str:
    return quote(unquote(text, errors="surrogateescape").encode("utf-8", "surrogateescape"), safe="-_.~")


def _without_dots(path: str) -> str:
    """Return the path without empty, `.` and `..` segments."""
    kept: list[str] = []
    for segment in path.split("/"):
        if segment == "..":
            del kept[-1:]
        elif segment not in ("", "."):
            kept.append(segment)
    slash = "/" if kept and path.endswith("/") else ""
    return f"/{'/'.join(kept)}{slash}"


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()
