"""What the engine says of our containers, and whether it can be heard at all. Planning never waits for it."""

import math
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from orchestrator.engine import Engine, Seen
from orchestrator.errors import EngineError
from orchestrator.metrics import Metrics

log = structlog.get_logger()
SLOW_S = 2.0  # an answer that takes longer says little about what is now
SETTLE_S = 2.0  # after a silence of the engine, so long may what it held back take to arrive
TROUBLED_S = 1.0  # time between two looks while the engine is silent, or a container waits for one
PATIENCE_S = 120.0  # no silence of an agent is put down to the engine for longer


@dataclass(frozen=True, slots=True)
class Answer:
    """The containers that the engine listed; `names` are those that were known when it was asked, `ready` those that ran.

    `is_return` is the first after an engine that gave none.
    """

    seen: Mapping[str, Seen]
    names: frozenset[str]
    ready: frozenset[str]
    is_return: bool


class Observer:
    """Asks the engine for its list, one question at a time. `answer` is the last one, until it is taken."""

    def __init__(self, engine: Engine, metrics: Metrics, *, every_s: float, wake: Callable[[], None]) -> None:
        self.answer: Answer | None = None
        self.due_at = 0.0
        self._engine = engine
        self._metrics = metrics
        self._every_s = every_s
        self._wake = wake
        self._fault: str | None = "the engine was not asked yet"
        self._asked_at: float | None = None
        self._heard_at = 0.0  # when the last question was asked that was answered soon
        self._well_since = 0.0

    @property
    def fault(self) -> str | None:
        """Why the engine cannot be relied on; None while it answers."""
        waited_s = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
        if self._fault is None and waited_s > SLOW_S:
            return f"The engine has not answered for {waited_s:.0f} s"
        return self._fault

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next look."""
        return self._asked_at is None and time.monotonic() >= self.due_at

    @property
    def next_at(self) -> float:
        """When to come back for the next look; what is being asked now tells by itself."""
        return self.due_at if self._asked_at is None else math.inf

    def hurry(self, in_s: float = 0.0) -> None:
        """Have the next look soon."""
        self.due_at = min(self.due_at, time.monotonic() + in_s)
        self._wake()

    def take(self) -> Answer | None:
        """Return the engine's answer to the last look, once."""
        answer, self.answer = self.answer, None
        return answer

    def look(self, known: frozenset[str], ready: frozenset[str]) -> Coroutine[Any, Any, None]:
        """Begin a look; the caller runs it."""
        self._asked_at = time.monotonic()
        self.due_at = self._asked_at + self._every_s
        return self._look(self._asked_at, known, ready)

    def blames_agent(self, since: float) -> bool:
        """Tell whether a silence since then is the agent's own doing. While the engine is silent too, it is not."""
        now = time.monotonic()
        if self._heard_at >= since and now - self._well_since >= SETTLE_S and self.fault is None:
            return True
        if now - since > PATIENCE_S:
            return True
        if self._heard_at < since:
            self.hurry()
        return False

    async def _look(self, asked_at: float, known: frozenset[str], ready: frozenset[str]) -> None:
        result = "error"
        try:
            seen = {item.name: item for item in await self._engine.list()}
            took_s = time.monotonic() - asked_at
            self.answer = Answer(seen, known, ready, is_return=self._fault is not None)
            self._fault = None
            if took_s > SLOW_S:
                self._well_since = math.inf
            else:
                self._heard_at = asked_at
                self._well_since = min(self._well_since, asked_at)
            result = "ok"
        except EngineError as error:
            self._fail(error.detail)
        except Exception as error:  # a fault of ours in one look must not be the last look
            log.exception("look_broke")
            self._fail(f"{type(error).__name__}: {error}")
        finally:
            self._asked_at = None
            self._metrics.reconcile.labels(result).observe(time.monotonic() - asked_at)
            self._wake()

    def _fail(self, detail: str) -> None:
        if self._fault is None:
            log.error("engine_failed", detail=detail)
        self._fault = detail
        self._well_since = math.inf
        self.due_at = min(self.due_at, time.monotonic() + TROUBLED_S)
