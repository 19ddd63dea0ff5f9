"""An exchange with the service: where it is, what is sent, what an answer or its absence means, when to try again."""

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httpx
import msgspec

from orchestrator import errors
from orchestrator.calls.call import Call

T = TypeVar("T")
DEFAULT_URL = "http://localhost:8000"
CONNECT_S = 5.0
IDLE_CONNECTION_S = 5.0  # shorter than the service's own, so that none is reused while the service closes it
FIRST_PAUSE_S = 0.1
NO_CONTENT = 204  # of a stream: the last event is known already
REFUSED = {errors.TooManyRequests.status, errors.Unavailable.status}  # nothing was done, and later it may be
OF_STATUS = {kind.status: kind for kind in (errors.Unauthorized, errors.TooManyRequests, errors.Unavailable)}
LOST = (httpx.NetworkError, httpx.RemoteProtocolError)  # the connection ended, and no answer came


class Tries:
    """The tries of one call, which are not for ever: tried again is only what certainly was not done.

    With a key also what was lost on its way, for the service does it once.
    """

    def __init__(self, most: int, retry_for_s: float, *, has_key: bool = False) -> None:
        self._has_key = has_key
        self._left = most
        self._until = time.monotonic() + retry_for_s
        self._pause_s = FIRST_PAUSE_S

    def pause_after(self, error: errors.SandboxError) -> float | None:
        """Return how long to wait before the next try, in seconds; None when there is none."""
        is_lost = self._has_key and isinstance(error.__cause__, LOST)
        if is_lost or isinstance(error, errors.ConnectionFailed):
            pause_s, self._pause_s = self._pause_s, 2 * self._pause_s
        elif error.status in REFUSED and error.retry_after_s is not None:
            pause_s = error.retry_after_s
        else:
            return None
        pause_s *= random.uniform(1.0, 1.5)  # noqa: S311 - jitter, no secret
        self._left -= 1
        return pause_s if self._left > 0 and time.monotonic() + pause_s < self._until else None


class Client:
    """Where the service is, and how patient the client is.

    `base_url` is SANDBOX_URL or http://localhost:8000 unless given, `api_key` SANDBOX_API_KEY. `patience_s` is how long
    an answer may take, beyond the timeout of the execution that it is for. A call that was certainly not served (no
    connection, or an answer 429 or 503 that says when to come again) is made up to `tries` times within `retry_for_s`;
    with a key, also one whose connection was lost.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | None = None,
        patience_s: float = 60.0,
        tries: int = 4,
        retry_for_s: float = 30.0,
    ) -> None:
        self.base_url = base_url or os.environ.get("SANDBOX_URL") or DEFAULT_URL
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise errors.InvalidRequest(f"base_url is no address of a service: write it like {DEFAULT_URL}")
        self._shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"  # without a password
        self._is_local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        self._api_key = api_key or os.environ.get("SANDBOX_API_KEY")
        self._patience_s = patience_s
        self._tries = tries
        self._retry_for_s = retry_for_s

    def _new_tries(self, call: Call[Any]) -> Tries:
        is_safe = call.key is not None or (call.goes_on and call.method == "GET")
        return Tries(self._tries, self._retry_for_s, has_key=is_safe)

    def _options(self) -> dict[str, Any]:
        return {
            "base_url": self.base_url,
            "headers": {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            "limits": httpx.Limits(keepalive_expiry=IDLE_CONNECTION_S),
            "verify": not (self._is_local and self.base_url.startswith("http:")),  # no TLS: spare 40 ms of certificates
            "trust_env": not self._is_local,  # a proxy for the world does not reach this machine's loopback
        }

    def _arguments(self, call: Call[Any]) -> dict[str, Any]:
        wait_s = call.runs_s + self._patience_s
        headers = call.headers | ({} if call.body is None else {"Content-Type": call.media_type})
        return {
            "method": call.method,
            "url": call.path,
            "content": call.body,
            "params": call.query,
            "headers": headers if call.key is None else headers | {"Idempotency-Key": call.key},
            "timeout": httpx.Timeout(self._patience_s, connect=CONNECT_S, read=wait_s, pool=None),
        }

    @contextmanager
    def _translated(self, call: Call[Any]) -> Iterator[None]:
        """Raise what keeps an answer from coming as an error of ours."""
        try:
            yield
        except httpx.HTTPError as error:
            raise self._failure(call, error) from error

    def _failure(self, call: Call[Any], error: httpx.HTTPError) -> errors.NoAnswer:
        what = f"{call.method} {call.path}"
        why = str(error) or type(error).__name__
        match error:
            case httpx.ConnectError() | httpx.ConnectTimeout():
                return errors.ConnectionFailed(
                    f"{self._shown} cannot be reached ({why}): is the service running there?"
                )
            case httpx.ReadTimeout():
                wait_s = call.runs_s + self._patience_s
                return errors.NoAnswer(
                    f"{self._shown} did not answer {what} within {wait_s:g} s: it may still be at it"
                )
            case _:
                return errors.NoAnswer(f"{self._shown} did not answer {what} ({why}): whether it was served is unknown")

    def _read(self, call: Call[T], response: httpx.Response) -> T:
        """Return the answer as what it stands for; the error of a problem document is raised."""
        if response.status_code not in call.statuses:
            raise self._refusal(call, response)
        if call.answer is bytes:
            return cast(T, response.content)
        try:
            return msgspec.json.decode(response.content or b"null", type=call.answer)
        except msgspec.DecodeError as error:
            raise self._foreign(call, response) from error

    def _refusal(self, call: Call[Any], response: httpx.Response) -> errors.SandboxError:
        try:
            return errors.from_problem(msgspec.json.decode(response.content, type=errors.Problem))
        except msgspec.DecodeError:
            return self._foreign(call, response)

    def _foreign(self, call: Call[Any], response: httpx.Response) -> errors.SandboxError:
        """Something in between answered, or base_url is another service's."""
        kind = OF_STATUS.get(response.status_code, errors.NoAnswer)
        media_type = response.headers.get("Content-Type", "nothing")
        retry_after = response.headers.get("Retry-After", "")
        return kind(
            f"{self._shown} answered {call.method} {call.path} with {response.status_code} and {media_type}, "
            "as this service does not: check the address, and what stands between",
            retry_after_s=int(retry_after) if retry_after.isdecimal() else None,
        )
