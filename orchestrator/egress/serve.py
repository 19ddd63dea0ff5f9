"""One connection of a program, from its first byte: HTTP proxy or SOCKS5, then bytes."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from orchestrator.egress import socks
from orchestrator.egress.http import Front
from orchestrator.egress.policy import Decision, Denied, Policy
from orchestrator.egress.relay import Ended, Upstream, relay, say_last
from orchestrator.errors import ContainerLost
from orchestrator.hosts import OddHost, parse_host
from orchestrator.models import EgressProtocol
from orchestrator.streams import Stream, StreamRefused

HEAD_S = 15.0  # for a request to arrive, and between two of them
SOCKS_ANSWERS: dict[Decision, socks.Answer] = {"refused": "refused", "failed": "unreachable", "limited": "failed"}


class Exits(Protocol):
    """Where connections go out, and where those are counted that do not."""

    policy: Policy

    def passage(self, protocol: EgressProtocol, host: str, port: int) -> AbstractAsyncContextManager[Upstream]:
        """Connect to a host for the time of the context. Denied when it may not be, or cannot."""

    def refuse(self, protocol: EgressProtocol, host: str, denied: Denied) -> None:
        """Count what was refused before it had a host that makes sense."""


async def serve(outlet: Exits, stream: Stream) -> None:
    """Serve one stream to its end. Whatever happens in it, it ends with it."""
    try:
        async with asyncio.timeout(HEAD_S):
            first = await stream.receive()
        if first[:1] == bytes([socks.VERSION]):
            await _serve_socks(outlet, stream, first)
        elif first:
            await _serve_http(outlet, stream, first)
        else:
            await say_last(stream, b"")
    except (StreamRefused, ContainerLost, Ended, TimeoutError):
        pass  # it is over, and was counted if it had begun
    finally:
        stream.close()


async def _serve_http(outlet: Exits, stream: Stream, first: bytes) -> None:
    front = Front(stream, first)
    again = True
    while again:
        try:
            async with asyncio.timeout(HEAD_S):
                head = await front.head()
        except Denied as denied:
            outlet.refuse("http", front.target, denied)
            await say_last(stream, front.refusal(denied))
            return
        if head is None:
            break
        try:
            async with outlet.passage("connect" if head.path is None else "http", head.host, head.port) as upstream:
                stream.widen()
                if head.path is None:
                    async with upstream.patience.kept():
                        first = await front.accept()
                    await relay(stream, first, upstream)
                    return
                again = await front.carry(head, upstream, outlet.policy.headers(head.host, head.port))
        except Denied as denied:
            await say_last(stream, front.refusal(denied))
            return
    await say_last(stream, b"")


async def _serve_socks(outlet: Exits, stream: Stream, data: bytes) -> None:
    try:
        async with asyncio.timeout(HEAD_S):
            while (end := socks.greeting(data)) is None:
                data += await _more(stream)
            await stream.write(socks.GREETED)
            data = data[end:]
            while (asked := socks.request(data)) is None:
                data += await _more(stream)
    except socks.BadSocks as error:
        outlet.refuse("socks5", "", Denied("refused", "bad_request", str(error)))
        await say_last(stream, error.answer)
        return
    try:
        host = parse_host(asked.host)
    except OddHost as error:
        denied = Denied("refused", "odd_host", f"{asked.host!a} is no host: {error}")
        outlet.refuse("socks5", asked.host, denied)
        await say_last(stream, socks.reply("refused"))
        return
    try:
        async with outlet.passage("socks5", host, asked.port) as upstream:
            stream.widen()
            async with upstream.patience.kept():
                await stream.write(socks.reply("ok"))
            await relay(stream, data[asked.end :], upstream)
    except Denied as denied:
        await say_last(stream, socks.reply(SOCKS_ANSWERS[denied.decision]))


async def _more(stream: Stream) -> bytes:
    if not (data := await stream.receive()):
        raise Ended("reset")
    return data
