"""A client of terminals for tests: it types, and waits for what it is to see."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import msgspec
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from orchestrator.errors import Problem
from tests.live import Live

SOON_S = 20.0


class Seat:
    """One open terminal. `seen` is what was shown and not yet waited for, `texts` is the control that came."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.seen = b""
        self.texts: list[dict[str, Any]] = []

    async def type(self, data: bytes) -> None:
        await self.socket.send(data)

    async def flood(self, piece: bytes, *, for_s: float) -> None:
        """Type without end, for a while or until the service closes."""
        with suppress(TimeoutError, ConnectionClosed):
            async with asyncio.timeout(for_s):
                while True:
                    await self.type(piece)

    async def control(self, **fields: Any) -> None:
        await self.socket.send(json.dumps(fields))

    async def until(self, text: bytes) -> bytes:
        """Wait until the text is shown; return what was shown before it."""
        try:
            async with asyncio.timeout(SOON_S):
                while text not in self.seen:
                    await self._receive()
        except (TimeoutError, ConnectionClosed) as error:
            raise AssertionError(f"{text!r} was not shown, but {self.seen[-2000:]!r} and {self.texts}") from error
        before, _, self.seen = self.seen.partition(text)
        return before

    async def run(self, line: str) -> bytes:
        """Run a line of shell; return what it shows."""
        await self.type(f"{line}; echo 'rea''dy'\n".encode())
        shown = await self.until(b"ready\r\n")
        return shown[shown.rfind(b"\x1b[?2004l\r") + 9 :]

    async def complaint(self) -> dict[str, Any]:
        """Wait for a text; return the problem that it tells."""
        async with asyncio.timeout(SOON_S):
            while not self.texts:
                await self._receive()
        text = self.texts.pop(0)
        assert text["type"] == "error", text
        return dict(text["problem"])

    async def end(self) -> tuple[int, str, list[dict[str, Any]]]:
        """Wait until the service closes; return code, reason and the texts that came."""
        async with asyncio.timeout(SOON_S):
            try:
                while True:
                    await self._receive()
            except ConnectionClosed:
                pass
        assert self.socket.close_code is not None
        return self.socket.close_code, self.socket.close_reason or "", self.texts

    async def _receive(self) -> None:
        message = await self.socket.recv()
        if isinstance(message, bytes):
            self.seen += message
        else:
            self.texts.append(json.loads(message))


def address(live: Live, sid: str, **query: Any) -> str:
    """Return where a session's terminal is."""
    return f"{live.url.replace('http', 'ws')}/v1/sessions/{sid}/terminal?{urlencode(query)}"


@asynccontextmanager
async def sit(
    live: Live, sid: str, *, headers: Any = None, subprotocols: Any = None, origin: Any = None, **query: Any
) -> AsyncIterator[Seat]:
    """Open a terminal for the time of the context."""
    async with connect(
        address(live, sid, **query),
        proxy=None,
        additional_headers=headers,
        subprotocols=subprotocols,
        origin=origin,
        close_timeout=1,
    ) as socket:
        yield Seat(socket)


async def refusal(live: Live, sid: str, **options: Any) -> Problem:
    """Return the problem that a handshake is answered with."""
    with pytest.raises(InvalidStatus) as refused:
        async with sit(live, sid, **options):
            pass
    answer = refused.value.response
    problem = msgspec.json.decode(answer.body or b"", type=Problem)
    assert (answer.headers["Content-Type"], answer.status_code) == ("application/problem+json", problem.status)
    return problem


def start_session(live: Live, **fields: Any) -> str:
    """Start a session; return its id."""
    answer = live.client.post("/v1/sessions", json=fields)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def resident_kb(pid: int) -> int:
    """Return the resident memory of a process, in KB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def running(mark: str) -> list[int]:
    """Return the processes of this machine that have a mark in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def are_running(mark: str, count: int) -> None:
    """Wait until so many processes have the mark in their command line."""
    async with asyncio.timeout(SOON_S):
        while len(running(mark)) != count:
            await asyncio.sleep(0.02)
