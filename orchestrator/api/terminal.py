"""The native door's terminal: a WebSocket whose binary messages are bytes, and whose texts are control."""

import asyncio
import time
from contextlib import suppress
from typing import Annotated, Any

import msgspec
import structlog
from litestar import WebSocket, websocket
from litestar.exceptions import WebSocketException
from litestar.params import Parameter

from orchestrator.api.paths import Sid
from orchestrator.api.sockets import GONE
from orchestrator.errors import ContainerLost, InvalidRequest, SandboxError, TooManyRequests
from orchestrator.models import TERM_PATTERN, Exit, Resize, Trouble
from orchestrator.service import Orchestrator
from orchestrator.session import Session
from orchestrator.terminal import Terminal, open_terminal

log = structlog.get_logger()
Extent = Annotated[int, Parameter(ge=1, le=1000)]
Term = Annotated[str, Parameter(pattern=TERM_PATTERN)]
Command = Annotated[str | None, Parameter(min_length=1)]
Peer = WebSocket[Any, Any, Any]
SUBPROTOCOL = "terminal"
NORMAL, TROUBLE = 1000, 4000  # close codes; to the latter an HTTP status is added
LAST_WORDS_S = 5.0  # for a client to take what is left when the program has ended
GONE_ERRORS = (OSError, WebSocketException)


@websocket("/sessions/{sid:str}/terminal")
async def attend(
    socket: Peer,
    service: Orchestrator,
    sid: Sid,
    *,
    cols: Extent = 80,
    rows: Extent = 24,
    command: Command = None,
    term: Term = "xterm-256color",
) -> None:
    """Run a shell, or a command, on a terminal of the session until either side ends it."""
    session = service.sessions.get(sid)
    service.sessions.admission.terminal(in_session=session.terminals)
    begun = time.monotonic()
    end: Exit | SandboxError | None = None
    with session.attended():
        size = Resize(cols=cols, rows=rows)
        terminal = open_terminal(session.container, size=size, command=command, term=term, env=session.env)
        try:
            await socket.accept(subprotocols=SUBPROTOCOL if SUBPROTOCOL in socket.scope["subprotocols"] else None)
            end = await converse(socket, terminal)
        except ContainerLost as error:
            end = why_lost(service, session, error)
        except SandboxError as error:
            end = error
        finally:
            terminal.close()
            log.info("terminal_ended", session=sid, duration_s=round(time.monotonic() - begun, 3), **facts_of(end))
    await take_leave(socket, end)


async def converse(socket: Peer, terminal: Terminal) -> Exit | None:
    """Pass bytes both ways until the program has ended, or the client is gone: then None."""
    gone: asyncio.Event = socket.scope["state"][GONE]
    showing = asyncio.create_task(show(socket, terminal))
    ending = asyncio.create_task(terminal.end())
    leaving = [asyncio.create_task(work) for work in (take(socket, terminal), gone.wait())]
    try:
        await asyncio.wait([ending, *leaving], return_when=asyncio.FIRST_COMPLETED)
        if not ending.done():
            error = leaving[0].exception() if leaving[0].done() else None
            if isinstance(error, SandboxError):
                raise error
            return None
        end = ending.result()
        await asyncio.wait([showing, leaving[1]], timeout=LAST_WORDS_S, return_when=asyncio.FIRST_COMPLETED)
        return end
    finally:
        for task in (showing, ending, *leaving):
            task.cancel()
        await asyncio.gather(showing, ending, *leaving, return_exceptions=True)


async def show(socket: Peer, terminal: Terminal) -> None:
    """Send what the program writes, as fast as the client takes it."""
    while data := await terminal.read():
        await socket.send_bytes(data)


async def take(socket: Peer, terminal: Terminal) -> None:
    """Hand over what the client sends, as fast as the program takes it; return when the client leaves."""
    await terminal.write(b"")
    while (message := await socket.receive())["type"] == "websocket.receive":
        if (text := message.get("text")) is None:
            await terminal.write(message.get("bytes") or b"")
            continue
        try:
            await terminal.resize(msgspec.json.decode(text, type=Resize))
        except (msgspec.DecodeError, RecursionError) as error:
            await complain(socket, InvalidRequest(f'A text is control, such as {{"type": "resize"}}: {error}'))
        except TooManyRequests as error:
            await complain(socket, error)


async def complain(socket: Peer, error: SandboxError) -> None:
    """Send what is wrong, as a text."""
    await socket.send_text(msgspec.json.encode(Trouble(problem=error.problem())).decode())


async def take_leave(socket: Peer, end: Exit | SandboxError | None) -> None:
    """Say how it ended, and close; a client that is gone, or does not listen, is told nothing."""
    with suppress(TimeoutError, *GONE_ERRORS):
        async with asyncio.timeout(LAST_WORDS_S):
            if isinstance(end, SandboxError):
                await complain(socket, end)
                await socket.close(TROUBLE + end.status, end.code)
            elif end is not None:
                await socket.send_text(msgspec.json.encode(end).decode())
                await socket.close(NORMAL)


def why_lost(service: Orchestrator, session: Session, error: ContainerLost) -> SandboxError:
    """Return why the container is gone: because its session ended, as a rule."""
    try:
        service.sessions.get(session.id)
    except SandboxError as ended:
        return ended
    return error


def facts_of(end: Exit | SandboxError | None) -> dict[str, Any]:
    """Return what the log tells of an end."""
    match end:
        case Exit():
            return {"reason": "exit", "exit_code": end.exit_code}
        case None:
            return {"reason": "client"}
        case _:
            return {"reason": end.code}
