"""The parts of one running service, put together, and its life from start to end."""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog
from prometheus_client import CollectorRegistry

from orchestrator.adoption import adopt
from orchestrator.engine import Engine
from orchestrator.engine.docker import DockerEngine
from orchestrator.engine.local import LocalEngine
from orchestrator.errors import BrokenReconciler, EngineError
from orchestrator.events import Streams
from orchestrator.functions import Functions
from orchestrator.invocations import Invocations
from orchestrator.lock import engine_lock, file_lock
from orchestrator.metrics import Metrics
from orchestrator.pool import Pool
from orchestrator.recipes import recipes
from orchestrator.reconciler import Reconciler
from orchestrator.session import Session
from orchestrator.sessions import Sessions
from orchestrator.settings import Settings
from orchestrator.warm import WarmSessions

log = structlog.get_logger()


class Orchestrator:
    """Engine, pools, reconciler and sessions of one orchestrator."""

    def __init__(self, settings: Settings) -> None:
        self.metrics = Metrics(CollectorRegistry())
        self.engine = make_engine(settings, self.metrics)
        if not self.engine.reattaches:  # its containers end with this process
            settings = msgspec.structs.replace(settings, on_exit="remove")
        self.settings = settings
        self.pools = {name: Pool(recipe, self._wake) for name, recipe in recipes(settings).items()}
        self.reconciler = Reconciler(settings, self.engine, self.pools, self.metrics)
        self.sessions = Sessions(settings, self.pools, self.metrics, self.reconciler.discard)
        self.functions = Functions(
            Path(settings.state_dir) / f"{settings.instance}.functions", storage_bytes=settings.function_storage
        )
        workspaces = {name: pool.recipe.template.workspace_kb << 10 for name, pool in self.pools.items()}
        warm = WarmSessions(settings, self.functions, self.sessions, workspaces)
        self.sessions.make_room = warm.give_way
        self.invocations = Invocations(self.functions, self.sessions, warm, self.metrics)
        self.streams = Streams(settings, self.sessions.admission)
        self.metrics.begin(self.pools)
        self.metrics.read_gauges(self._gauges)

    def not_ready(self) -> list[str]:
        """Return why no session is accepted now; empty when one is."""
        return (["the service is ending"] if self.sessions.admission.draining else []) + self.reconciler.faults()

    def workspace_bytes(self, session: Session) -> int:
        """Return how much a session's workspace holds."""
        return self.pools[session.container.template].workspace_bytes

    @asynccontextmanager
    async def run(self, *, alone: bool = False) -> AsyncIterator[None]:
        """Serve inside this context. At its end everything of ours is removed, but sessions that are to be kept.

        `alone` is for an instance that nobody else can have: it is not locked on the engine.
        """
        with file_lock(self.settings):
            self.functions.load()
            facts = await self.engine.check()
            log.info("engine_found", engine=self.engine.name, **facts)
            try:
                async with engine_lock(self.engine, self.settings, alone=alone), self._serve():
                    yield
            finally:
                self.sessions.border.close()
                await self.engine.close()

    @asynccontextmanager
    async def _serve(self) -> AsyncIterator[None]:
        await self.sessions.border.learn_own([] if self.engine.host is None else [self.engine.host])
        recipes = {name: pool.recipe for name, pool in self.pools.items()}
        await adopt(self.settings, self.engine, recipes, self.reconciler, self.sessions)
        self.invocations.warm.let_go()
        task = asyncio.create_task(self.reconciler.run(self.sessions))
        task.add_done_callback(end_if_broken)
        try:
            yield
        finally:
            await self.sessions.drain(self.settings.drain_seconds)
            await self.invocations.close()
            task.cancel()
            await asyncio.wait([task])
            try:
                await self.reconciler.clear(keep=[session.container for session in self.sessions.held.values()])
            except EngineError as error:
                log.warning("containers_left", error=error.detail)
        if not task.cancelled():
            raise BrokenReconciler("The reconciler broke; the log has the cause") from task.exception()

    def _wake(self) -> None:
        self.reconciler.wake()

    def _gauges(self) -> Iterator[tuple[str, str, dict[str, str], float]]:
        held = Counter(session.container.template for session in self.sessions.held.values())
        for name, pool in self.pools.items():
            label = {"template": name}
            yield "pool_target", "Containers that are to be ready", label, pool.recipe.template.pool_size
            yield "pool_ready", "Containers that are ready", label, len(pool.ready)
            yield "pool_starting", "Containers that start", label, len(pool.starting)
            yield "pool_waiting", "Sessions that wait for a container", label, len(pool.waiting)
            yield "sessions", "Sessions that live", label, held[name]
        terminals = sum(session.terminals for session in self.sessions.held.values())
        yield "terminals", "Terminals that are open", {}, terminals
        yield "executions_in_flight", "Executions that run or queue", {}, self.sessions.in_flight
        yield "event_streams", "Streams of events that are open", {}, len(self.streams)
        yield "containers", "Containers, those that start or are removed included", {}, self.reconciler.occupied
        quarantined = len(self.reconciler.removals.quarantined)
        yield "quarantined", "Containers that the engine refuses to remove", {}, quarantined
        yield "function_containers_busy", "Containers that run an invocation", {}, len(self.invocations.warm.busy)
        yield "function_containers_idle", "Containers that wait for one", {}, self.invocations.warm.alive
        yield "function_events_waiting", "Events of functions that wait", {}, self.invocations.events
        yield "ready", "1 when sessions are accepted", {}, float(not self.not_ready())


def end_if_broken(task: asyncio.Task[None]) -> None:
    """End the process when the reconciler ended by itself: whoever restarts it gets a whole one."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("reconciler_broke", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)


def make_engine(settings: Settings, metrics: Metrics) -> Engine:
    """Return the engine that the settings name."""

    def record(call: str, result: str, seconds: float) -> None:
        metrics.engine_call.labels(call, result).observe(seconds)

    if settings.engine == "local":
        return LocalEngine(Path(settings.state_dir) / settings.instance, record=record)
    return DockerEngine(settings.instance, timeout_s=settings.engine_timeout_seconds, record=record)
