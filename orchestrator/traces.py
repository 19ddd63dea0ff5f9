"""What happens to a request, as spans of its trace. Where no OTLP endpoint is set, all this does nothing.

`orchestrator.otel` makes the traces. It alone knows OpenTelemetry, and is not imported unless it is used.
"""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, Protocol

from orchestrator.models import Execution


class Trace(Protocol):
    """What a traced request carries along."""

    def span(self, name: str, **attributes: str) -> AbstractContextManager[Any]:
        """Return a span around a part of the work."""

    def execution(self, facts: Execution) -> AbstractContextManager[dict[str, str]]:
        """Return a span around an execution, which gives the environment that tells the code its place in the trace."""

    def ran(self, *, launch_s: float, wall_s: float) -> None:
        """Add the spans of what the agent did: `launch_s` from job to code, `wall_s` of the code itself."""


CURRENT: ContextVar[Trace | None] = ContextVar("trace", default=None)
_NOTHING: AbstractContextManager[Any] = nullcontext()
_NO_ENVIRONMENT: AbstractContextManager[dict[str, str]] = nullcontext({})


def span(name: str, **attributes: str) -> AbstractContextManager[Any]:
    """Return a span around a part of the work."""
    trace = CURRENT.get()
    return _NOTHING if trace is None else trace.span(name, **attributes)


def execution(facts: Execution) -> AbstractContextManager[dict[str, str]]:
    """Return a span around an execution, which gives what the code's environment is to have."""
    trace = CURRENT.get()
    return _NO_ENVIRONMENT if trace is None else trace.execution(facts)


def ran(*, launch_s: float, wall_s: float) -> None:
    """Add the spans of what the agent did."""
    trace = CURRENT.get()
    if trace is not None:
        trace.ran(launch_s=launch_s, wall_s=wall_s)
