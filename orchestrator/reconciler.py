"""Keeps the world as it should be: observe, plan, apply. The only place that starts and removes containers."""

import asyncio
import math
import random
import time
from collections.abc import Collection

import msgspec
import structlog

from orchestrator.container import Container
from orchestrator.engine import Engine, Seen, Spec
from orchestrator.errors import EngineError, SandboxError
from orchestrator.metrics import Metrics
from orchestrator.plan import Plan, PoolView, View, plan
from orchestrator.pool import Pool
from orchestrator.recipes import TEMPLATE_LABEL, UID_LABEL, limits_of, spec_of
from orchestrator.sessions import Sessions
from orchestrator.settings import Settings

log = structlog.get_logger()
FIRST_BACKOFF_S, LAST_BACKOFF_S = 1.0, 30.0
PARALLEL_STARTS = 4
ORPHAN_AGE_S = 60.0
END_S = 10.0  # how long the end of the service waits for containers to be removed


class Backoff:
    """Pause between failed starts of one template: doubled each time, with jitter."""

    def __init__(self) -> None:
        self._failures = 0
        self._until = 0.0

    def failed(self) -> float:
        """Count a failure; return the pause that follows it."""
        longest_s: float = FIRST_BACKOFF_S * 2.0**self._failures
        pause_s = min(LAST_BACKOFF_S, longest_s) * random.uniform(0.8, 1.2)  # noqa: S311 - jitter is no secret
        self._failures += 1
        self._until = time.monotonic() + pause_s
        return pause_s

    def succeeded(self) -> None:
        """Forget the failures."""
        self._failures = 0
        self._until = 0.0

    def may_start(self, now: float) -> int:
        """How many starts are allowed now; after a failure a single one probes."""
        if now < self._until:
            return 0
        return 1 if self._failures else PARALLEL_STARTS


class Reconciler:
    """The only place that starts and removes containers.

    `known` holds every container of this process from before its creation until it is certainly gone.
    """

    def __init__(self, settings: Settings, engine: Engine, pools: dict[str, Pool], metrics: Metrics) -> None:
        self.known: dict[str, Container] = {}
        self.layers: dict[str, bool] = {}
        self.canary: dict[str, object] = {}
        self.engine_fault: str | None = "the engine was not asked yet"
        self.start_fault: str | None = None
        self._settings = settings
        self._engine = engine
        self._pools = pools
        self._metrics = metrics
        self._backoffs = {template: Backoff() for template in pools}
        self._removing: dict[str, str] = {}
        self._woken = asyncio.Event()
        self._look_at = 0.0

    def wake(self) -> None:
        """Have the next plan made at once."""
        self._woken.set()

    def discard(self, container: Container, reason: str) -> None:
        """Destroy a container that nobody holds any more."""
        container.close(f"the container was removed ({reason})")
        if container.name in self.known and container.name not in self._removing:
            self._removing[container.name] = reason
            self._tasks.create_task(self._remove(container.name))

    async def run(self, sessions: Sessions) -> None:
        """Reconcile until cancelled: when woken, when a session is due, and every `reconcile_seconds`."""
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._beat())
            while True:
                self._woken.clear()
                try:
                    await self._reconcile(sessions)
                except Exception:  # a fault of ours in one tick must not end the care of all containers
                    log.exception("reconcile_failed")
                due = min((session.due for session in sessions.held.values()), default=math.inf)
                wait_s = min(self._look_at, due) - time.monotonic()
                try:
                    async with asyncio.timeout(max(0.01, wait_s)):
                        await self._woken.wait()
                except TimeoutError:
                    pass

    async def adopt(self, sessions: Sessions) -> None:
        """Take over the sessions of an earlier orchestrator, and remove what else it left. Before `run`."""
        seen = await self._engine.list()
        await asyncio.gather(*(self._adopt(item, sessions) for item in seen))

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
        found = [self.engine_fault, self.start_fault]
        if not any(pool.ready or pool.recipe.template.pool_size == 0 for pool in self._pools.values()):
            found.append("no container is ready")
        return [fault for fault in found if fault is not None]

    # --- observe, plan, apply

    async def _reconcile(self, sessions: Sessions) -> None:
        begun = time.monotonic()
        older = frozenset(name for name, container in self.known.items() if container.ready_at)
        seen = None
        result = "woken"
        if begun >= self._look_at:
            self._look_at = begun + self._settings.reconcile_seconds
            try:
                seen = {item.name: item for item in await self._engine.list()}
                self.engine_fault = None
                result = "ok"
            except EngineError as error:
                self._note_engine_fault(error)
                result = "error"
        now = time.monotonic()
        made = plan(
            View(
                pools={
                    template: PoolView(
                        size=0 if sessions.admission.draining else pool.recipe.template.pool_size,
                        waiting=len(pool.waiting),
                        starting=len(pool.starting),
                        ready={container.name: now - container.ready_at for container in pool.ready},
                        may_start=self._backoffs[template].may_start(now) - len(pool.starting),
                    )
                    for template, pool in self._pools.items()
                },
                sessions={sid: session.container.name for sid, session in sessions.held.items()},
                overdue={sid: reason for sid, session in sessions.held.items() if (reason := session.overdue(now))},
                lost=frozenset(name for name, container in self.known.items() if container.lost_reason is not None),
                known=frozenset(self.known),
                older=older,
                seen=seen,
                room=self._settings.max_containers - len(self.known),
                max_age_s=self._settings.max_age_seconds,
                orphan_age_s=ORPHAN_AGE_S,
                now=time.time(),
            )
        )
        self._apply(made, sessions)
        self._metrics.reconcile.labels(result).observe(time.monotonic() - begun)

    def _apply(self, made: Plan, sessions: Sessions) -> None:
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
            if name not in self._removing:
                self._removing[name] = "orphan"
                self._tasks.create_task(self._remove(name))
        for template, count in made.start.items():
            for _ in range(count):
                container = self._new(self._pools[template])
                self._tasks.create_task(self._start(container, self._pools[template]))

    # --- adopt, start, remove

    async def _adopt(self, seen: Seen, sessions: Sessions) -> None:
        template, uid = seen.labels.get(TEMPLATE_LABEL, ""), seen.labels.get(UID_LABEL, "")
        reason = "it does not run"
        if seen.running and template in self._pools and uid.isdigit():
            spec = msgspec.structs.replace(
                spec_of(self._settings, self._pools[template].recipe, uid=int(uid)), name=seen.name
            )
            container = self._container(spec, template)
            try:
                async with asyncio.timeout(self._settings.engine_timeout_seconds):
                    hello = await container.adopt(self._engine)
                if sessions.adopt(container, hello):
                    self.layers, self.canary = container.layers, container.canary
                    return
                reason = "it has no session"
            except TimeoutError:
                reason = "its agent did not answer"
            except SandboxError as error:
                reason = error.detail
            container.close(reason)
            del self.known[seen.name]
        log.info("container_not_adopted", container=seen.name, reason=reason)
        try:
            await self._engine.remove(seen.name)
        except EngineError as error:  # the reconciler finds it again, as an orphan
            self._note_engine_fault(error)

    def _new(self, pool: Pool) -> Container:
        """Register a container under a name of ours and a user id of its own, before it exists."""
        taken = {container.spec.uid for container in self.known.values()}
        uid = next(uid for uid in range(self._settings.uid_base, 1 << 31) if uid not in taken)
        container = self._container(spec_of(self._settings, pool.recipe, uid=uid), pool.recipe.template.name)
        pool.starting.add(container.name)
        return container

    def _container(self, spec: Spec, template: str) -> Container:
        limit = self._settings.max_output
        container = Container(spec, template, output_limit=limit, on_lost=lambda _: self.wake())
        self.known[spec.name] = container
        return container

    async def _start(self, container: Container, pool: Pool) -> None:
        settings, template = self._settings, pool.recipe.template
        begun = time.monotonic()
        result = "error"
        try:
            async with asyncio.timeout(settings.start_timeout_seconds):
                await container.start(self._engine, limits_of(settings, pool.recipe))
            result = "ok"
        except TimeoutError:
            self._start_failed(container, pool, "the container gave no sign of life in time")
        except SandboxError as error:
            self._start_failed(container, pool, error.detail)
        except Exception as error:  # whatever it was, only this container is lost by it
            log.exception("container_start_broke")
            self._start_failed(container, pool, f"{type(error).__name__}: {error}")
        else:
            pool.starting.discard(container.name)
            self._backoffs[template.name].succeeded()
            self.start_fault = None
            self.layers, self.canary = container.layers, container.canary
            pool.supply(container)
        finally:
            pool.starting.discard(container.name)
            self._metrics.container_start.labels(template.name, result).observe(time.monotonic() - begun)
        self.wake()

    def _start_failed(self, container: Container, pool: Pool, detail: str) -> None:
        template = pool.recipe.template.name
        pause_s = self._backoffs[template].failed()
        self.start_fault = f"no container of template {template} starts: {detail}"
        log.error("container_start_failed", template=template, detail=detail, pause_s=round(pause_s, 1))
        self.discard(container, "start_failed")
        asyncio.get_running_loop().call_later(pause_s, self.wake)

    async def _remove(self, name: str) -> None:
        """Destroy a container; what the engine refuses is tried again until it is gone."""
        reason = self._removing[name]
        pause_s = FIRST_BACKOFF_S
        while True:
            try:
                await self._engine.remove(name)
                break
            except EngineError as error:
                self._note_engine_fault(error)
            except Exception:  # whatever it was, the container may still be there
                log.exception("container_remove_broke", container=name)
            await asyncio.sleep(pause_s)
            pause_s = min(LAST_BACKOFF_S, 2 * pause_s)
        self.known.pop(name, None)
        del self._removing[name]
        self._metrics.containers_removed.labels(reason).inc()
        self.wake()

    def _note_engine_fault(self, error: EngineError) -> None:
        if self.engine_fault is None:
            log.error("engine_failed", detail=error.detail)
        self.engine_fault = error.detail

    async def _beat(self) -> None:
        """Ping every agent; one that stays silent makes its container lost."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            for container in list(self.known.values()):
                if container.ready_at and not container.beat():
                    self._metrics.heartbeats_missed.inc()
                    if container.missed_beats >= self._settings.heartbeat_misses:
                        container.lose("the agent missed its heartbeats")
