"""Containers on their way in: each is started, judged, and given to its pool; after failures, with caution."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

import structlog

from orchestrator.backoff import Backoff
from orchestrator.container import Container
from orchestrator.engine import Engine, Spec
from orchestrator.errors import EngineAway, SandboxError
from orchestrator.metrics import Metrics
from orchestrator.pool import Pool
from orchestrator.recipes import limits_of, spec_of
from orchestrator.removals import Spawn
from orchestrator.settings import Settings

log = structlog.get_logger()
GIVEN_UP = 1024


class Starts:
    """`fault` is why the last start failed, None since one that did not.

    `given_up` has the names of starts that failed lately: the engine may make their containers yet.
    """

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        metrics: Metrics,
        *,
        templates: list[str],
        enlist: Callable[[Spec, str], Container],
        discard: Callable[[Container, str], None],
        on_ready: Callable[[Container], None],
        wake: Callable[[], None],
        spawn: Spawn,
    ) -> None:
        self.fault: str | None = None
        self.given_up: deque[str] = deque(maxlen=GIVEN_UP)
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._backoffs = {template: Backoff() for template in templates}
        self._enlist = enlist
        self._discard = discard
        self._on_ready = on_ready
        self._wake = wake
        self._spawn = spawn

    def allowed(self, template: str, now: float) -> int:
        """How many starts of a template may run now."""
        return self._backoffs[template].may_start(now)

    def engine_returned(self) -> None:
        """Learn that the engine answers again."""
        for backoff in self._backoffs.values():
            backoff.returned()

    def begin(self, pool: Pool, *, taken_uids: set[int]) -> None:
        """Start a container for a pool, under a name of ours and a user id of its own, known before it exists."""
        uid = next(uid for uid in range(self._settings.uid_base, 1 << 31) if uid not in taken_uids)
        container = self._enlist(spec_of(self._settings, pool.recipe, uid=uid), pool.recipe.template.name)
        pool.starting.add(container.name)
        self._spawn(self._start(container, pool))

    async def _start(self, container: Container, pool: Pool) -> None:
        settings, template = self._settings, pool.recipe.template
        begun = time.monotonic()
        result = "error"
        try:
            async with asyncio.timeout(settings.start_timeout_seconds):
                await container.start(self._engine, limits_of(settings, pool.recipe))
            result = "ok"
        except TimeoutError:
            self._failed(container, "the container gave no sign of life in time")
        except SandboxError as error:
            self._failed(container, error.detail, away=isinstance(error, EngineAway))
        except Exception as error:  # whatever it was, only this container is lost by it
            log.exception("container_start_broke")
            self._failed(container, f"{type(error).__name__}: {error}")
        else:
            pool.starting.discard(container.name)
            self._backoffs[template.name].succeeded()
            self.fault = None
            self._on_ready(container)
            pool.supply(container)
        finally:
            pool.starting.discard(container.name)
            self._metrics.container_start.labels(template.name, result).observe(time.monotonic() - begun)
        self._wake()

    def _failed(self, container: Container, detail: str, *, away: bool = False) -> None:
        pause_s = self._backoffs[container.template].failed(away=away)
        self.fault = f"no container of template {container.template} starts: {detail}"
        log.error("container_start_failed", template=container.template, detail=detail, pause_s=round(pause_s, 1))
        self.given_up.append(container.name)
        self._discard(container, "start_failed")
        asyncio.get_running_loop().call_later(pause_s, self._wake)
