"""Containers whose stream broke: each is attached again, or given up after some tries."""

import asyncio
import time

import structlog

from orchestrator.container import Container
from orchestrator.engine import Engine
from orchestrator.errors import EngineAway, SandboxError
from orchestrator.metrics import Metrics
from orchestrator.observer import Observer
from orchestrator.pool import Pool
from orchestrator.removals import Spawn

log = structlog.get_logger()
ATTACH_S = 5.0  # one try
TRIES = 5
PAUSE_S = 0.2


class Attachments:
    """`trying` names the containers that are being attached again."""

    def __init__(
        self, engine: Engine, pools: dict[str, Pool], metrics: Metrics, observer: Observer, *, spawn: Spawn
    ) -> None:
        self.trying: set[str] = set()
        self._engine = engine
        self._pools = pools
        self._metrics = metrics
        self._observer = observer
        self._spawn = spawn

    def broken(self, container: Container) -> None:
        """The stream of a container ended: whether the container did as well, the engine knows."""
        if container.name not in self.trying:
            self._observer.hurry()

    def begin(self, container: Container) -> None:
        """Have a container attached again."""
        self.trying.add(container.name)
        self._spawn(self._attach_again(container))

    async def _attach_again(self, container: Container) -> None:
        begun = container.broken_at or 0.0
        try:
            async with asyncio.timeout(ATTACH_S):
                await container.attach_again(self._engine)
        except (SandboxError, TimeoutError) as error:
            reason = str(error) or "the agent did not answer"
            container.tries += not isinstance(error, EngineAway)
            if container.tries >= TRIES:
                container.lose(f"{container.broken_reason}; attached again in vain: {reason}")
            self._observer.hurry(PAUSE_S)
        except Exception:  # whatever it was, only this container is lost by it
            log.exception("container_attach_broke", container=container.name)
            container.lose(container.broken_reason)
        else:
            if container.is_usable:
                lasted_s = round(time.monotonic() - begun, 3)
                log.info("container_attached_again", container=container.name, broken_s=lasted_s)
                self._metrics.attached_again.inc()
                self._pools[container.template].offer(container)
        finally:
            self.trying.discard(container.name)
