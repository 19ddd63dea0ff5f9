"""A bare HTTP client: its own cost must not hide the service's."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

SMALL = {"code": "def handler(event): return {'hello': event['name']}", "event": {"name": "you"}, "timeout_s": 10}
CLIENTS = 16  # at once, in the load
IDLE_S = 2.0


class Client:
    """One kept-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._used_at = time.monotonic()

    async def __aenter__(self) -> "Client":
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Send one request, return status and decoded answer."""
        if time.monotonic() - self._used_at > IDLE_S:  # the service closes connections that rest
            self._writer.close()
            await self.__aenter__()
        self._used_at = time.monotonic()
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        self._writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        answer = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return int(lines[0].split()[1]), json.loads(answer) if answer else None

    @asynccontextmanager
    async def session(self) -> AsyncIterator[str]:
        """Start a session, yield its id, and end it; the service ends those of a measurement that failed."""
        _, session = await self.request("POST", "/v1/sessions", {})
        yield session["id"]
        await self.request("DELETE", f"/v1/sessions/{session['id']}")

    async def execute(self, sid: str, body: dict[str, Any]) -> tuple[float, Any]:
        """Execute, return seconds and the execution; any outcome but the expected is an error."""
        begun = time.perf_counter()
        status, execution = await self.request("POST", f"/v1/sessions/{sid}/executions", body)
        took_s = time.perf_counter() - begun
        if status != 200:
            raise RuntimeError(f"the service answered {status}: {execution}")
        return took_s, execution

    async def watch(self, sid: str, body: dict[str, Any]) -> float:
        """Execute code that prints what the monotonic clock says; return the seconds until that is here."""
        data = json.dumps(body).encode()
        head = f"POST /v1/sessions/{sid}/executions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        head += "Content-Type: application/json\r\nAccept: text/event-stream\r\n\r\n"
        self._writer.write(head.encode() + data)
        await self._reader.readuntil(b"event: stdout\ndata: ")
        line = await self._reader.readuntil(b"\n")
        took_s = time.clock_gettime(time.CLOCK_MONOTONIC) - float(json.loads(line)["text"])
        await self._reader.readuntil(b"\r\n0\r\n\r\n")
        self._used_at = time.monotonic()
        return took_s


def quantile(values: list[float], share: float) -> float:
    """Return the value below which the share of all values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
