"""Who may pass AWS Lambda's door: whoever signed the request with an API key, and only that request."""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from litestar import Request

from orchestrator.api import sigv4
from orchestrator.api.aws_words import AwsError

READING = 256 << 20  # bytes of bodies that are read before their signature can be checked
SMALL = 64 << 10  # bytes of a body that do not count
PATIENCE_S, LEAST_RATE = 30.0, 256 << 10  # a body may take so long, and longer by its size at this many bytes a second


class Signed:
    """The keys by name. A signature covers the body, so that strangers' bodies have to be read: so many bytes at once.

    Without keys every signature is taken, but there must be one: a page of a browser cannot send it unasked.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._keys = keys
        self._reading = 0

    async def check(self, request: Request[Any, Any, Any]) -> None:
        """Raise AwsError for a request that may not pass; note its id and region."""
        request.state.request_id = str(uuid4())
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.scope["headers"]]
        claim = sigv4.claim_of(headers)
        request.state.region = claim.region
        if self._keys:
            sigv4.check_claim(claim, headers, self._keys, datetime.now(UTC))
        limit = request.route_handler.resolve_request_max_body_size() or 0
        body = await self._read(request, int(request.headers.get("content-length") or limit))
        if self._keys:
            message = sigv4.Message(
                method=request.method,
                path=request.scope["raw_path"].decode("latin-1"),
                query=request.scope["query_string"].decode("latin-1"),
                headers=headers,
            )
            sigv4.check_signature(claim, message, body, self._keys[claim.key_id])

    async def _read(self, request: Request[Any, Any, Any], size: int) -> bytes:
        with self._reserve(0 if size <= SMALL else size):
            try:
                async with asyncio.timeout(PATIENCE_S + size / LEAST_RATE):
                    return await request.body()
            except TimeoutError:
                raise AwsError("RequestTimeoutException", 408, "The body arrives too slowly: send it faster") from None

    @contextmanager
    def _reserve(self, size: int) -> Iterator[None]:
        if self._reading + size > READING:
            raise AwsError("TooManyRequestsException", 429, "Too many uploads at once: try again later")
        self._reading += size
        try:
            yield
        finally:
            self._reading -= size
