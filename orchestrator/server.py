"""The HTTP server: uvicorn with our settings, from a bound socket to the drain."""

import asyncio
import gc
import math
import signal
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import uvicorn
import uvloop

from orchestrator.api import sockets
from orchestrator.api.protocol import Protocol
from orchestrator.app import create_app
from orchestrator.errors import SettingsError
from orchestrator.settings import Settings

# Longer than our clients keep an idle connection, so that none is closed just when it is used again.
KEEP_ALIVE_S = 30
MAX_CONNECTIONS = 4096
BACKLOG = 2048
ANSWER_S = 15.0  # beyond the drain time: to cancel what still runs, and to answer


class Server(uvicorn.Server):
    """Drains while uvicorn waits for requests: those of executions that are cancelled get their answer."""

    def __init__(self, config: uvicorn.Config, *, drain: Callable[[], Coroutine[Any, Any, None]]) -> None:
        super().__init__(config)
        self._drain = drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, close idle connections, and wait for those that are not idle."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._drain())
            await super().shutdown(sockets)


def run(chosen: Settings) -> None:
    """Serve until SIGTERM or SIGINT. SandboxError, perhaps in a group, when the start fails."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(chosen))


async def serve(chosen: Settings) -> None:
    """Serve. The lifespan is ours, not uvicorn's: so a failed start is an exception, not a traceback in a log."""
    app = create_app(chosen)
    config = uvicorn.Config(
        sockets.explained(app),
        host=chosen.host,
        port=chosen.port,
        loop="uvloop",
        http=Protocol,
        ws=sockets.Socket,
        ws_max_size=sockets.MESSAGE_LIMIT,
        ws_ping_interval=sockets.PING_S,
        ws_ping_timeout=sockets.PING_S,
        ws_per_message_deflate=False,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=math.ceil(chosen.drain_seconds + ANSWER_S),
    )
    server = Server(config, drain=lambda: app.state.service.sessions.drain(chosen.drain_seconds))
    for number in (signal.SIGINT, signal.SIGTERM):
        # Before and after uvicorn's own: a signal while we start or clean up must not end the process halfway.
        signal.signal(number, server.handle_exit)
    with bind(chosen.host, chosen.port) as listener:
        async with app.lifespan():
            gc.freeze()  # what is there now stays: no collection need look at it while a client waits
            await server.serve(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound but does not listen yet. SettingsError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise SettingsError(
            f"{host}:{port} cannot be listened on ({error.strerror}): choose another SANDBOX_PORT or SANDBOX_HOST"
        ) from None
    return listener
