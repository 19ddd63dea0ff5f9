"""What a client that goes away means: nobody reads the answer, so its execution is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from litestar import Request

from orchestrator.errors import InvalidRequest
from orchestrator.executions import Record
from orchestrator.sessions import Sessions

T = TypeVar("T")
PATIENCE_S = 0.1  # most executions are done before it is worth while to watch the client


async def until_ended(request: Request[Any, Any, Any], sessions: Sessions, record: Record) -> None:
    """Wait for an execution to end. Cancel it when the client disconnects first, unless it goes on without."""
    if not await sessions.ended(record, PATIENCE_S):
        await while_connected(request, sessions.ended(record))


async def while_connected(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns. Cancel it when the client disconnects first."""
    task = asyncio.create_task(work)
    try:
        gone = asyncio.create_task(_disconnect(request))
        try:
            if task not in (await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED))[0]:
                raise InvalidRequest("The client went away before its answer")
            return task.result()
        finally:
            gone.cancel()
    finally:
        task.cancel()


async def _disconnect(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
