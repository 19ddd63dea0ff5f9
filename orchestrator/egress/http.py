"""The HTTP side of the proxy: reads requests with h11, carries plain ones over with h11, and answers refusals.

What reaches the host is written anew from what was understood: nothing of the program's framing passes through.
"""

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any

import h11

from orchestrator.egress.policy import Denied
from orchestrator.egress.relay import Ended, Upstream
from orchestrator.hosts import OddHost, parse_authority
from orchestrator.streams import Stream

HEAD_BYTES = 64 * 1024
HTTP_PORT = 80
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"content-length host upgrade".split()
)
STATUS = {"refused": 403, "failed": 502, "limited": 429}
PHRASE = {"refused": "Forbidden", "failed": "Bad Gateway", "limited": "Too Many Requests"}
Headers = list[tuple[bytes, bytes]]


def malformed(why: str) -> Denied:
    """Return what refuses a request that a proxy cannot serve."""
    return Denied("refused", "bad_request", why)


class Head:
    """A request's head: `host` and `port` are where it goes, `path` what it asks for there; None for CONNECT."""

    def __init__(self, request: h11.Request) -> None:
        """Read the target. Denied when it is none for a proxy, or names an odd host."""
        self.request = request
        self.path: str | None = None
        authority, default = request.target.decode("ascii"), None
        if request.method != b"CONNECT":
            scheme, separator, rest = authority.partition("://")
            if not separator or scheme.lower() != "http":
                raise malformed("this is a proxy: ask for an absolute http:// URL, or CONNECT for TLS")
            if request.method == b"TRACE":
                raise malformed("TRACE is not carried: it would show what was added on the way")
            at = min((rest.find(mark) for mark in "/?#" if mark in rest), default=len(rest))
            authority, default, self.path = rest[:at], HTTP_PORT, rest[at:]
            if not self.path.startswith("/"):
                self.path = f"/{self.path}"
        try:
            self.host, self.port = parse_authority(authority, default_port=default)
        except OddHost as error:
            raise Denied("refused", "odd_host", f"{authority!a} is no host: {error}") from None


class Front:
    """The connection to the program, as HTTP."""

    def __init__(self, stream: Stream, data: bytes) -> None:
        self.stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        self._http.receive_data(data)
        self.may_answer = False
        self.target = ""

    async def head(self) -> Head | None:
        """Return the next request's head, None when the program is done. Denied for one that is not served."""
        self.may_answer = True
        event = await self._next()
        if not isinstance(event, h11.Request):
            return None
        self.target = event.target.decode("latin-1")
        names = [name for name, _ in event.headers]
        if b"transfer-encoding" in names and (b"content-length" in names or event.http_version < b"1.1"):
            raise malformed("a body has one length: Transfer-Encoding or Content-Length, the former in HTTP/1.1 only")
        return Head(event)

    async def accept(self) -> bytes:
        """Answer CONNECT; return what came behind it. From here on the bytes are not ours to read."""
        await self._say(h11.Response(status_code=200, headers=[], reason=b"Connected"))
        return self._http.trailing_data[0]

    def refusal(self, denied: Denied) -> bytes:
        """Return the answer that says why; it is the last one."""
        status = 400 if denied.reason == "bad_request" else STATUS[denied.decision]
        reason = "Bad Request" if status == 400 else PHRASE[denied.decision]
        body = f"{denied.decision} ({denied.reason}): {denied.message}\n"
        return (
            f"HTTP/1.1 {status} {reason}: {denied.reason}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body.encode())}\r\nX-Egress-Reason: {denied.reason}\r\nConnection: close\r\n\r\n{body}"
        ).encode()

    async def carry(self, head: Head, upstream: Upstream, added: dict[str, str]) -> bool:
        """Carry one plain request and its answer; return whether another may follow. Ended or Denied."""
        back = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_BYTES)
        async with upstream.patience.kept():
            await upstream.write(_data(back.send(_outward(head, added))))
            try:
                await _answered(self._carry_body(back, upstream), self._carry_answer(back, upstream))
            except h11.ProtocolError as error:
                if self.may_answer:
                    message = f"{head.host}:{head.port} answered with no HTTP: {error}"
                    raise Denied("failed", "upstream", message) from None
                raise Ended("reset") from None
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
            return True
        return False

    async def _carry_body(self, back: h11.Connection, upstream: Upstream) -> None:
        while True:
            event = await self._next()
            if not isinstance(event, h11.Data | h11.EndOfMessage):
                raise Ended("reset")
            plain = h11.Data(data=bytes(event.data)) if isinstance(event, h11.Data) else h11.EndOfMessage()
            try:
                await upstream.write(_data(back.send(plain)))
            except OSError:  # the host wants no more of it: its answer says why
                return
            if isinstance(event, h11.EndOfMessage):
                return

    async def _carry_answer(self, back: h11.Connection, upstream: Upstream) -> None:
        while True:
            event = back.next_event()
            if event is h11.NEED_DATA:
                back.receive_data(await upstream.read())
            elif isinstance(event, h11.InformationalResponse):
                if event.status_code == 100 and self._http.they_are_waiting_for_100_continue:
                    await self._say(h11.InformationalResponse(status_code=100, headers=[]))
            elif isinstance(event, h11.Response):
                self.may_answer = False
                await self._say(
                    h11.Response(status_code=event.status_code, headers=_inward(event), reason=bytes(event.reason))
                )
            elif isinstance(event, h11.Data):
                await self._say(h11.Data(data=bytes(event.data)))
            elif isinstance(event, h11.EndOfMessage):
                await self._say(h11.EndOfMessage())
                return
            else:  # it switched to something that was not asked for, or closed
                raise h11.RemoteProtocolError("the answer does not end")

    async def _next(self) -> object:
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                raise malformed(str(error)) from None
            if event is not h11.NEED_DATA:
                return event
            self._http.receive_data(await self.stream.receive())

    async def _say(self, event: h11.Event) -> None:
        if data := self._http.send(event):
            await self.stream.write(data)


async def _answered(body: Coroutine[Any, Any, None], answer: Coroutine[Any, Any, None]) -> None:
    """Wait for the answer; what is left of the body then is of no interest, but its failure before that is."""
    tasks = sending, answering = asyncio.ensure_future(body), asyncio.ensure_future(answer)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            await sending
        await answering
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _data(data: bytes | None) -> bytes:
    return data or b""


def _kept(event: h11.Request | h11.Response) -> Headers:
    """Return the headers that are meant for the other end, without those about one connection."""
    named = {
        token.strip().lower() for name, value in event.headers if name == b"connection" for token in value.split(b",")
    }
    return [(name, value) for name, value in event.headers.raw_items() if name.lower() not in HOP_BY_HOP | named]


def _framing(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Return the one header that says how long a body is."""
    known = dict(headers)
    if b"transfer-encoding" in known:
        return [(b"Transfer-Encoding", b"chunked")]
    return [(b"Content-Length", known[b"content-length"])] if b"content-length" in known else []


def _outward(head: Head, added: dict[str, str]) -> h11.Request:
    request = head.request
    names = {name.lower().encode() for name in added}
    host = f"[{head.host}]" if ":" in head.host else head.host
    authority = host if head.port == HTTP_PORT else f"{host}:{head.port}"
    return h11.Request(
        method=request.method,
        target=str(head.path),
        headers=[
            (b"Host", authority.encode()),
            *[(name, value) for name, value in _kept(request) if name.lower() not in names],
            *[(name.encode(), value.encode()) for name, value in added.items()],
            *_framing(request.headers),
            (b"Connection", b"close"),
        ],
    )


def _inward(response: h11.Response) -> Headers:
    return _kept(response) + [pair for pair in _framing(response.headers) if pair[0] == b"Content-Length"]
