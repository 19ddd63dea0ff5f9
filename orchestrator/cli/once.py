"""One execution for `run`: through a running service, or in a container that is started here."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.errors import EngineError, InvalidRequest
from orchestrator.models import Event, Execution, OneShotRequest, SessionRequest
from orchestrator.settings import Settings

if TYPE_CHECKING:
    from orchestrator.service import Orchestrator

Show = Callable[[Event], None]
LOOK_S = 0.1


def run_remote(fields: dict[str, Any], url: str, api_key: str | None, show: Show | None) -> Execution:
    """Run through a running service; with `show` in a session of its own, which tells what happens."""
    from orchestrator.sdk import SyncSandboxClient

    with SyncSandboxClient(url, api_key=api_key) as client:
        if show is None:
            return client.execute(**fields)
        with client.session() as session:
            for event in session.stream(**fields):
                show(event)
        assert event.execution is not None  # of `done`, which is the last one
        return event.execution


async def run_here(chosen: Settings, fields: dict[str, Any], show: Show | None) -> Execution:
    """Run in a container that is started for it. EngineError as soon as one fails to start."""
    from orchestrator import log
    from orchestrator.beside import beside
    from orchestrator.service import Orchestrator

    log.configure("error", chosen.log_format)
    try:
        request = msgspec.convert(fields, OneShotRequest)
    except msgspec.ValidationError as error:
        raise InvalidRequest(str(error)) from None
    with beside(chosen) as own:
        service = Orchestrator(own)
        for pool in service.pools.values():  # one container is started because it is waited for, and no other
            template = msgspec.structs.replace(pool.recipe.template, pool_size=0)
            pool.recipe = msgspec.structs.replace(pool.recipe, template=template)
        async with service.run(alone=True):
            once = service.sessions.execute_once(request) if show is None else follow(service, request, show)
            execution = asyncio.create_task(once)
            try:
                while not execution.done():
                    await asyncio.wait({execution}, timeout=LOOK_S)
                    if service.reconciler.starts.fault is not None:
                        raise EngineError(service.reconciler.starts.fault)
                # As over HTTP: the value is still the bytes that came out of the sandbox.
                return msgspec.json.decode(msgspec.json.encode(execution.result()), type=Execution)
            finally:
                execution.cancel()
                await asyncio.wait({execution})


async def follow(service: "Orchestrator", request: OneShotRequest, show: Show) -> Execution:
    """Run in a session of its own, and show what happens when it does."""
    from orchestrator.events import Reader
    from orchestrator.following import parsed

    session = await service.sessions.create(SessionRequest())
    record = service.sessions.start(session.id, request)
    reader = Reader(record)
    while True:
        for event in parsed(reader.take()):
            show(event)
        if reader.ended:
            return record.facts
        await reader.woken.wait()
