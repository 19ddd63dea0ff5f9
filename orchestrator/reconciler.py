"""Keeps the world as it should be: observe, plan, apply. The only place that starts and removes containers."""

import asyncio
import math
import time
from collections.abc import Collection, Coroutine
from typing import Any

import structlog

from orchestrator.attachments import Attachments
from orchestrator.container import Container
from orchestrator.engine import Engine, Spec
from orchestrator.errors import EngineError
from orchestrator.metrics import Metrics
from orchestrator.observer import Observer
from orchestrator.plan import Plan, PoolView, View, plan
from orchestrator.pool import Pool
from orchestrator.removals import Removals
from orchestrator.sessions import Sessions
from orchestrator.settings import Settings
from orchestrator.starts import Starts

log = structlog.get_logger()
ORPHAN_AGE_S = 60.0
END_S = 10.0  # how long the end of the service waits for containers to be removed


class Reconciler:
    """The only place that starts and removes containers.

    `known` holds every container of this process from before its creation until it is certainly gone.
    """

    def __init__(self, settings: Settings, engine: Engine, pools: dict[str, Pool], metrics: Metrics) -> None:
        self.known: dict[str, Container] = {}
        self.layers: dict[str, bool] = {}
        self.canary: dict[str, object] = {}
        self.observer = Observer(engine, metrics, every_s=settings.reconcile_seconds, wake=self.wake)
        self.removals = Removals(engine, metrics, spawn=self._spawn, on_gone=self._forget)
        self.starts = Starts(
            settings,
            engine,
            metrics,
            templates=list(pools),
            enlist=self.enlist,
            discard=self.discard,
            on_ready=self.note_ready,
            wake=self.wake,
            spawn=self._spawn,
        )
        self.attachments = Attachments(engine, pools, metrics, self.observer, spawn=self._spawn)
        self._settings = settings
        self._engine = engine
        self._pools = pools
        self._metrics = metrics
        self._strangers: dict[str, float] = {}
        self._woken = asyncio.Event()

    @property
    def occupied(self) -> int:
        """How many containers there are of ours, as far as we know: those that nobody knows but must be removed too."""
        return len(self.known) + sum(name not in self.known for name in self.removals.reasons)

    def wake(self) -> None:
        """Have the next plan made at once."""
        self._woken.set()

    def discard(self, container: Container, reason: str) -> None:
        """Destroy a container that nobody holds any more."""
        container.close(f"the container was removed ({reason})")
        if container.name in self.known:
            self.removals.begin(container.name, reason)

    def enlist(self, spec: Spec, template: str) -> Container:
        """Take a container into `known`; it may not exist yet."""
        container = Container(
            spec,
            template,
            output_limit=self._settings.max_output,
            display_limit=self._settings.max_display,
            on_lost=lambda _: self.wake(),
            on_broken=self.attachments.broken if self._engine.reattaches else None,
            blames_agent=self.observer.blames_agent,
        )
        self.known[spec.name] = container
        return container

    def note_ready(self, container: Container) -> None:
        """Remember what the newest container's self-test showed, and what its image speaks."""
        self.layers, self.canary = container.layers, container.canary
        self._pools[container.template].languages = container.languages

    async def run(self, sessions: Sessions) -> None:
        """Reconcile until cancelled: when woken, when a session is due, and every `reconcile_seconds`."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._beat())
            while True:
                self._woken.clear()
                try:
                    self._reconcile(sessions)
                except Exception:  # a fault of ours in one tick must not end the care of all containers
                    log.exception("reconcile_failed")
                due = min((session.due for session in sessions.held.values()), default=math.inf)
                wait_s = min(self.observer.next_at, due) - time.monotonic()
                try:
                    async with asyncio.timeout(max(0.01, wait_s)):
                        await self._woken.wait()
                except TimeoutError:
                    pass

    async def clear(self, keep: Collection[Container] = ()) -> None:
        """Remove every container of this instance but those to keep, which are left alone. EngineError when it fails."""
        for container in keep:
            container.close("the service ended")
        names = {seen.name for seen in await self._engine.list()} | set(self.known)
        names -= {container.name for container in keep}
        try:
            async with asyncio.timeout(END_S):
                results = await asyncio.gather(*map(self._engine.remove, names), return_exceptions=True)
        except TimeoutError:
            raise EngineError(f"The engine did not remove {len(names)} containers within {END_S:g} s") from None
        for name, result in zip(names, results, strict=True):
            if isinstance(result, BaseException):
                log.error("container_left", container=name, error=str(result))
        self.known.clear()

    def faults(self) -> list[str]:
        """Return why no session can be served, as far as engine and containers are the reason."""
        found = [self.observer.fault]
        if any(pool.is_short for pool in self._pools.values()):
            found.append(self.starts.fault)
        if not any(
            pool.recipe.template.pool_size == 0 or any(container.is_usable for container in pool.ready)
            for pool in self._pools.values()
        ):
            found.append("no container is ready")
            if self.removals.quarantined and self.occupied >= self._settings.max_containers:
                count = len(self.removals.quarantined)
                found.append(f"{count} containers that the engine refuses to remove take up the room")
        return [fault for fault in found if fault is not None]

    # --- observe, plan, apply

    def _reconcile(self, sessions: Sessions) -> None:
        now = time.monotonic()
        names = self.known.keys() | self.removals.reasons.keys()
        if self.observer.is_due:
            ready = frozenset(name for name, container in self.known.items() if container.ready_at)
            self._spawn(self.observer.look(frozenset(names), ready))
        if (answer := self.observer.take()) is not None:
            unknown = answer.seen.keys() - names - answer.names
            self._strangers = {name: self._strangers.get(name, now) for name in unknown}
            if answer.is_return:
                self.starts.engine_returned()
        broken = [one for one in self.known.values() if one.broken_at is not None and one.lost_reason is None]
        for container in broken:
            if now - (container.broken_at or now) > self._settings.reattach_seconds:
                container.lose(container.broken_reason)
        made = plan(
            View(
                pools={
                    template: PoolView(
                        size=0 if sessions.admission.draining else pool.recipe.template.pool_size,
                        waiting=len(pool.waiting),
                        starting=len(pool.starting),
                        ready={container.name: now - container.ready_at for container in pool.ready},
                        may_start=self.starts.allowed(template, now) - len(pool.starting),
                    )
                    for template, pool in self._pools.items()
                },
                sessions={sid: session.container.name for sid, session in sessions.held.items()},
                overdue={sid: reason for sid, session in sessions.held.items() if (reason := session.overdue(now))},
                lost=frozenset(name for name, container in self.known.items() if container.lost_reason is not None),
                strangers={name: now - since for name, since in self._strangers.items() if name not in names},
                older=frozenset() if answer is None else answer.ready,
                seen=None if answer is None else answer.seen,
                broken=frozenset(one.name for one in broken if one.lost_reason is None) - self.attachments.trying,
                given_up=frozenset(self.starts.given_up),
                room=self._settings.max_containers - self.occupied,
                max_age_s=self._settings.max_age_seconds,
                orphan_age_s=ORPHAN_AGE_S,
            )
        )
        self._apply(made, sessions)
        self._metrics.reconcile.labels("woken").observe(time.monotonic() - now)

    def _apply(self, made: Plan, sessions: Sessions) -> None:
        for name in made.lose:
            self.known[name].lose(self.known[name].broken_reason)
        for sid, reason in made.end.items():
            if session := sessions.held.get(sid):
                if reason == "lost":
                    session.container.lose("the container is gone")
                sessions.end(session, reason)
        for pool in self._pools.values():
            for container in [container for container in pool.ready if container.name in made.drop]:
                pool.ready.remove(container)
                self.discard(container, made.drop[container.name])
        for name in made.orphans:
            self.removals.begin(name, "orphan")
        for name in made.again:
            self.attachments.begin(self.known[name])
        for template, count in made.start.items():
            for _ in range(count):
                taken = {container.spec.uid for container in self.known.values()}
                self.starts.begin(self._pools[template], taken_uids=taken)

    # --- parts

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.create_task(work)

    def _forget(self, name: str) -> None:
        """Learn that a container is certainly gone."""
        self.known.pop(name, None)
        self._strangers.pop(name, None)
        self.wake()

    async def _beat(self) -> None:
        """Ping every agent; one that stays silent makes its container lost, unless the engine is silent as well."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            for container in list(self.known.values()):
                if container.ready_at and not container.beat():
                    self._metrics.heartbeats_missed.inc()
                    is_late = container.heartbeat.missed >= self._settings.heartbeat_misses
                    if is_late and self.observer.blames_agent(container.heartbeat.silent_since):
                        container.lose("the agent missed its heartbeats")
