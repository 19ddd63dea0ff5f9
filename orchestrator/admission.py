"""What is let in: requests that make sense, as many at once as there is room for."""

from orchestrator import cells
from orchestrator.errors import InvalidRequest, TimeoutAboveCap, TooManyRequests, Unavailable
from orchestrator.metrics import Metrics
from orchestrator.models import ExecutionRequest
from orchestrator.settings import Settings

QUEUE_FACTOR = 16  # executions that may queue in a session, for each that may run at once


class Admission:
    """The caps of one service. Every refusal is counted, and says when to come again."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.draining = False
        self._settings = settings
        self._metrics = metrics

    def open(self) -> None:
        """Refuse what is new once the service is ending."""
        if self.draining:
            raise Unavailable("The service is ending: use another one", retry_after_s=5)

    def session(self, *, taken: int, waiting: int) -> None:
        """Refuse a session above the caps; `taken` counts the one that asks."""
        self.open()
        if taken > self._settings.max_containers:
            raise self.refuse("sessions", "All containers are in use: end a session, or try again later")
        if waiting > self._settings.max_waiting:
            raise self.refuse("waiting", "Too many sessions wait for a container: try again later")

    def execution(self, *, in_session: int, in_flight: int) -> None:
        """Refuse an execution above the caps."""
        self.open()
        if in_session >= self._settings.session_executions * (1 + QUEUE_FACTOR):
            raise self.refuse("session", "This session has too many executions waiting: wait for some to end")
        if in_flight >= self._settings.max_executions:
            raise self.refuse("executions", "Too many executions run: try again later")

    def background(self, *, in_session: int) -> None:
        """Refuse an execution in the background above its cap."""
        self.open()
        if in_session >= self._settings.session_background:
            raise self.refuse("background", "This session runs too much in the background: cancel some of it")

    def terminal(self, *, in_session: int) -> None:
        """Refuse a terminal above the cap."""
        self.open()
        if in_session >= self._settings.session_terminals:
            raise self.refuse("terminals", "This session has too many terminals: close one")

    def context(self, *, in_session: int) -> None:
        """Refuse a context above the cap."""
        self.open()
        if in_session >= self._settings.session_contexts:
            raise self.refuse("contexts", "This session has as many contexts as it may have: delete one")

    def timeout_s(self, request: ExecutionRequest) -> float | None:
        """Return the timeout of a request that makes sense, if it has one; refuse one that does not."""
        cells.check(request)
        if request.command is not None and (request.code is not None or request.handler is not None):
            raise InvalidRequest("Give `code` or `command`, not both")
        if request.command is None and request.code is None and "." not in (request.handler or ""):
            raise InvalidRequest("Give `code`, `command`, or a `handler` of the form module.function")
        if request.background:  # it ends with its session at the latest
            if request.timeout_s is not None:
                self.ttl_s(request.timeout_s, name="timeout_s")
            return request.timeout_s
        timeout_s = request.timeout_s or self._settings.timeout_seconds
        if timeout_s > self._settings.max_timeout_seconds:
            raise TimeoutAboveCap(f"`timeout_s` is at most {self._settings.max_timeout_seconds:g}")
        return timeout_s

    def ttl_s(self, ttl_s: float | None, *, name: str = "ttl_s") -> float:
        """Return the life of a session that asks for one; refuse one that is too long."""
        if ttl_s is not None and ttl_s > self._settings.max_ttl_seconds:
            raise TimeoutAboveCap(f"`{name}` is at most {self._settings.max_ttl_seconds:g}")
        return ttl_s or self._settings.ttl_seconds

    def refuse(self, reason: str, detail: str) -> TooManyRequests:
        """Return a refusal of what may come again later, and count it under its reason."""
        self._metrics.refusals.labels(reason).inc()
        return TooManyRequests(detail, retry_after_s=1)
