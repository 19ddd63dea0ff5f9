"""A session's terminal from the client's side: bytes both ways over a WebSocket."""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidHandshake, InvalidStatus

from orchestrator import errors
from orchestrator.models import Exit, Resize, Trouble

CONNECT_S = 10.0
PIECE = 32 * 1024  # bytes of one message; the service takes eight times as many
SERVICE_ENDS = 1012  # a close code, RFC 6455


class RemoteTerminal:
    """An open terminal. Iterate over what its program writes, to its end; `exit` then says how that was."""

    def __init__(self, socket: ClientConnection) -> None:
        self.exit: Exit | None = None
        self._socket = socket
        self._problem: errors.Problem | None = None

    async def send(self, data: bytes) -> None:
        """Type. It waits while the program does not read; what is typed after its end is lost."""
        for start in range(0, len(data), PIECE):
            await self._say(data[start : start + PIECE])

    async def resize(self, *, cols: int, rows: int) -> None:
        """Tell the terminal its size, in characters."""
        await self._say(msgspec.json.encode(Resize(cols=cols, rows=rows)).decode())

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with self._translated():
            async for message in self._socket:
                if isinstance(message, bytes):
                    yield message
                elif isinstance(said := msgspec.json.decode(message, type=Exit | Trouble), Exit):
                    self.exit = said
                else:
                    self._problem = said.problem

    async def _say(self, message: bytes | str) -> None:
        try:
            await self._socket.send(message)
        except ConnectionClosed:  # who iterates is told why
            return

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except ConnectionClosedError as error:
            if self._socket.close_code == SERVICE_ENDS:
                raise errors.Unavailable("The service is ending: its terminals end with it") from error
            if self._problem is not None:
                raise errors.from_problem(self._problem) from error
            raise errors.NoAnswer(f"The connection to the terminal was lost ({error})") from error


@asynccontextmanager
async def open_terminal(
    base_url: str, session_id: str, *, headers: dict[str, str], through_proxy: bool, **query: Any
) -> AsyncIterator[RemoteTerminal]:
    """Open a terminal, and end it with the context. What a handshake is refused with is raised."""
    given = urlencode({name: value for name, value in query.items() if value is not None})
    address = re.sub(r"^http", "ws", base_url.rstrip("/"))
    try:
        socket = await connect(
            f"{address}/v1/sessions/{quote(session_id, safe='')}/terminal?{given}",
            additional_headers=headers,
            compression=None,
            open_timeout=CONNECT_S,
            ping_timeout=None,  # the answer waits behind what a program does not read; the service pings as well
            proxy=True if through_proxy else None,
        )
    except InvalidStatus as error:
        raise _refusal(error) from error
    except (OSError, TimeoutError, InvalidHandshake) as error:
        raise errors.ConnectionFailed(f"No terminal can be opened there ({error}): is the service running?") from error
    async with socket:
        yield RemoteTerminal(socket)


def _refusal(error: InvalidStatus) -> errors.SandboxError:
    try:
        return errors.from_problem(msgspec.json.decode(error.response.body or b"", type=errors.Problem))
    except msgspec.DecodeError:
        return errors.NoAnswer(f"The handshake was answered with {error.response.status_code}: check the address")
