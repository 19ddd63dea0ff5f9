"""Traces by OpenTelemetry, sent by OTLP over HTTP: one from the request to the user's code, which may go on with it.

POST /v1/sessions/{sid}/executions    the request, below the caller's span when it names one (W3C traceparent)
  acquire                             a container from the pool
  execution                           from its turn to its result
    channel                           the job's way to the agent
    launch                            the agent gives it to a sandbox, which may have to boot first
    code                              the user's code; its TRACEPARENT names this span
    reap                              nothing of the sandbox is alive, and the result has come
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from litestar.enums import ScopeType
from litestar.plugins.opentelemetry import OpenTelemetryConfig
from litestar.types import ASGIApp, Middleware, Receive, Scope, Send
from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode

from orchestrator import __version__, traces
from orchestrator.models import Execution

QUIET = ["^/health$", "^/ready$", "^/metrics$", "^/docs"]  # asked all the time, and nothing happens there
OURS = {"killed", "lost"}  # outcomes that are not the code's doing
SEND_S = 3.0  # at the end: how long what is not sent yet may take
A_YEAR_S = 3.2e7


class Ids(RandomIdGenerator):
    """Ids of spans. The code's is known before its span: the code gets it, and its span is made when it has ended."""

    def __init__(self) -> None:
        self.chosen: int | None = None

    def generate_span_id(self) -> int:
        """Return the chosen id, else a new one."""
        return super().generate_span_id() if self.chosen is None else self.chosen


class Tracing:
    """The tracer of one service. `middleware` makes a trace of each request."""

    def __init__(self, endpoint: str, instance: str) -> None:
        ours = {"service.name": "sandbox-orchestrator", "service.version": __version__, "service.instance.id": instance}
        # What OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say comes last, and so counts.
        resource = Resource(ours).merge(OTELResourceDetector().detect())
        self.ids = Ids()
        self._provider = TracerProvider(resource=resource, id_generator=self.ids, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self.tracer = self._provider.get_tracer("orchestrator", __version__)
        requests = OpenTelemetryConfig(
            tracer_provider=self._provider,
            meter_provider=NoOpMeterProvider(),
            scope_span_details_extractor=lambda scope: (str(scope.get("method", "")), {}),  # no path: it has ids
            scopes={ScopeType.HTTP},
            exclude=QUIET,
            exclude_spans=["send", "receive"],
        )
        self.middleware: list[Middleware] = [requests.middleware, self._carry]

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Send what is traced inside this context."""
        try:
            yield
        finally:
            await self._close()

    async def _close(self) -> None:
        """Send what is not sent yet, as far as that goes quickly."""
        flushing = asyncio.ensure_future(asyncio.to_thread(self._provider.force_flush))
        done, _ = await asyncio.wait([flushing], timeout=SEND_S)
        if not done:
            self._exporter.shutdown()  # else it would try for long to reach a receiver that is away
            await asyncio.wait([flushing])
        await asyncio.to_thread(self._provider.shutdown)

    def _carry(self, app: ASGIApp) -> ASGIApp:
        async def carry(scope: Scope, receive: Receive, send: Send) -> None:
            if route := scope.get("path_template"):  # Litestar starts the span before it knows
                span = trace.get_current_span()
                span.update_name(f"{scope.get('method', '')} {route}".strip())
                span.set_attribute("http.route", route)
            token = traces.CURRENT.set(RequestTrace(self))
            try:
                await app(scope, receive, send)
            finally:
                traces.CURRENT.reset(token)

        return carry


class RequestTrace:
    """The trace of one request."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    @contextmanager
    def span(self, name: str, **attributes: str) -> Iterator[None]:
        """Make a span around a part of the work."""
        with self._tracing.tracer.start_as_current_span(name, attributes=attributes):
            yield

    @contextmanager
    def execution(self, facts: Execution) -> Iterator[dict[str, str]]:
        """Make a span around an execution; give the environment that tells the code its place in the trace."""
        attributes = {"session.id": facts.session_id, "execution.id": facts.id, "execution.language": facts.language}
        with self._tracing.tracer.start_as_current_span("execution", attributes=attributes) as span:
            inner = ExecutionTrace(self._tracing, span.get_span_context())
            token = traces.CURRENT.set(inner)
            try:
                yield inner.environment()
            finally:
                traces.CURRENT.reset(token)
                span.set_attribute("execution.outcome", facts.outcome or "cancelled")
                if facts.outcome in OURS:
                    span.set_status(StatusCode.ERROR, facts.error.message if facts.error is not None else None)

    def ran(self, *, launch_s: float, wall_s: float) -> None:
        """Nothing runs outside of an execution."""


class ExecutionTrace(RequestTrace):
    """The part of a trace within one execution."""

    def __init__(self, tracing: Tracing, parent: SpanContext) -> None:
        super().__init__(tracing)
        self._code_id = tracing.ids.generate_span_id()
        self._parent = parent
        self._begun_ns = self._sent_ns = time.time_ns()

    def environment(self) -> dict[str, str]:
        """Return TRACEPARENT and, when there is one, TRACESTATE."""
        code = SpanContext(
            self._parent.trace_id,
            self._code_id,
            is_remote=False,
            trace_flags=self._parent.trace_flags,
            trace_state=self._parent.trace_state,
        )
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(NonRecordingSpan(code)))
        return {name.upper(): value for name, value in carrier.items() if name in ("traceparent", "tracestate")}

    @contextmanager
    def span(self, name: str, **attributes: str) -> Iterator[None]:
        """Make a span around a part of the work; what the agent does follows on it."""
        with super().span(name, **attributes):
            yield
        self._sent_ns = time.time_ns()

    def ran(self, *, launch_s: float, wall_s: float) -> None:
        """Add what the agent did, by its own clock, from when the job was sent.

        The agent may have had it a little before we went on; and what it says may be absurd.
        """
        now = time.time_ns()
        begun = max(self._begun_ns, min(self._sent_ns, now - ns(launch_s) - ns(wall_s)))
        launched = min(now, begun + ns(launch_s))
        ended = min(now, launched + ns(wall_s))
        self._add("launch", begun, launched)
        self._tracing.ids.chosen = self._code_id
        try:
            self._add("code", launched, ended)
        finally:
            self._tracing.ids.chosen = None
        self._add("reap", ended, now)

    def _add(self, name: str, begun_ns: int, ended_ns: int) -> None:
        self._tracing.tracer.start_span(name, start_time=begun_ns).end(ended_ns)


def ns(seconds: float) -> int:
    """Return nanoseconds, of a year at most."""
    return int(min(seconds, A_YEAR_S) * 1e9)
