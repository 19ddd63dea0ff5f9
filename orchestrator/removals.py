"""Containers on their way out: each is removed until it is certainly gone, however often the engine refuses."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from orchestrator.backoff import pause_after
from orchestrator.engine import Engine
from orchestrator.errors import EngineAway, EngineError
from orchestrator.metrics import Metrics

log = structlog.get_logger()
REFUSALS = 3  # after so many, a container is in quarantine
Spawn = Callable[[Coroutine[Any, Any, None]], object]


class Removals:
    """`reasons` has every container that is being removed; `quarantined` those of them that the engine refuses to remove.

    An engine that does not answer refuses nothing: what waits for it is in no quarantine. A name stays here, and its
    container counts, until the engine has said that it is gone.
    """

    def __init__(self, engine: Engine, metrics: Metrics, *, spawn: Spawn, on_gone: Callable[[str], None]) -> None:
        self.reasons: dict[str, str] = {}
        self.quarantined: dict[str, float] = {}
        self._engine = engine
        self._metrics = metrics
        self._spawn = spawn
        self._on_gone = on_gone

    def begin(self, name: str, reason: str) -> None:
        """Have a container removed; one that is being removed already is left to that."""
        if name not in self.reasons:
            self.reasons[name] = reason
            self._spawn(self._remove(name))

    def _quarantine(self, name: str, detail: str) -> None:
        self.quarantined[name] = time.monotonic()
        log.error("container_quarantined", container=name, detail=detail)

    async def _remove(self, name: str) -> None:
        failures = refusals = 0
        while True:
            failures += 1
            try:
                await self._engine.remove(name)
                break
            except EngineAway as error:
                log.debug("engine_away", container=name, detail=error.detail)
            except EngineError as error:
                refusals += 1
                if refusals == REFUSALS:
                    self._quarantine(name, error.detail)
            except Exception:  # whatever it was, the container may still be there
                log.exception("container_remove_broke", container=name)
            await asyncio.sleep(pause_after(failures))
        if (since := self.quarantined.pop(name, None)) is not None:
            log.info("container_released", container=name, after_s=round(time.monotonic() - since, 1))
        self._metrics.containers_removed.labels(self.reasons.pop(name)).inc()
        self._on_gone(name)
