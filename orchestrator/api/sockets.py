"""WebSockets on uvicorn: a refused handshake is answered by its problem, and peers that are gone are let go."""

import asyncio
from typing import Any

import msgspec
from litestar.connection import ASGIConnection
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

from orchestrator.api.guard import HEADERS
from orchestrator.api.problems import PROBLEM_JSON, problem_of

MESSAGE_LIMIT = 256 * 1024  # bytes of one message of a client
PIECES = 1024  # that a client may send a message in
PING_S = 20.0  # between an answer and the next ping; and how long its answer may take
CLOSE_S = 10.0  # for a peer to take what was sent before the end
GONE, REFUSAL = "socket_gone", "socket_refusal"  # in a scope's state


class Socket(WebSocketsSansIOProtocol):
    """One connection. `gone` is set once it is lost, also while nobody receives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._gone = asyncio.Event()
        self.app_state = self.app_state | {GONE: self._gone}

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone.set()
        super().connection_lost(exc)

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True  # it is answered: else uvicorn logs that it was not

    def keepalive_timeout(self) -> None:
        if self.read_paused:  # its answer waits behind what we do not read
            self.pong_timer = None
            self.send_keepalive_ping()  # one that is gone does not take it
            return
        super().keepalive_timeout()
        self.transport.abort()  # what it does not read would keep it open

    def handle_cont(self, event: Frame) -> None:
        if len(self.frames) < PIECES:
            super().handle_cont(event)
        elif not self.close_sent:  # the limit on a message does not count empty ones
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG)
            self.handle_parser_exception()

    def on_task_complete(self, task: asyncio.Task[None]) -> None:
        super().on_task_complete(task)
        self.loop.call_later(CLOSE_S, self.transport.abort)


async def note_refusal(error: Exception, scope: Scope) -> None:
    """Remember why a WebSocket is refused: of an error, Litestar sends no more than a close code."""
    if scope["type"] == ScopeType.WEBSOCKET:
        scope["state"][REFUSAL] = error


def explained(app: ASGIApp) -> ASGIApp:
    """Return the application with refused handshakes answered by problem documents."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.WEBSOCKET:
            await app(scope, receive, send)
            return
        accepted = False

        async def send_explained(message: Message) -> None:
            nonlocal accepted
            accepted = accepted or message["type"] == "websocket.accept"
            error = scope["state"].get(REFUSAL)
            if message["type"] == "websocket.close" and not accepted and error is not None:
                for part in refusal(scope, error):
                    await send(part)
            else:
                await send(message)

        await app(scope, receive, send_explained)

    return call


def refusal(scope: Scope, error: Exception) -> list[Any]:
    """Return the messages of an HTTP answer in the place of a handshake."""
    problem = problem_of(ASGIConnection(scope), error)
    headers = HEADERS | {"Content-Type": PROBLEM_JSON}
    if problem.retry_after_s is not None:
        headers["Retry-After"] = str(problem.retry_after_s)
    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    return [
        {"type": "websocket.http.response.start", "status": problem.status, "headers": lines},
        {"type": "websocket.http.response.body", "body": msgspec.json.encode(problem), "more_body": False},
    ]
