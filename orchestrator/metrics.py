"""Every Prometheus metric of the service, but those of HTTP. Labels come from closed sets only."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.models import END_REASONS

FAST = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
REFUSE_REASONS = (
    "sessions",
    "waiting",
    "executions",
    "session",
    "background",
    "stdin",
    "streams",
    "terminals",
    "contexts",
    "functions",
)
REMOVE_REASONS = ("ended", "lost", "max_age", "surplus", "orphan", "start_failed", "bind_failed")
Readings = Callable[[], Iterable[tuple[str, str, dict[str, str], float]]]


class Metrics:
    """The instruments of one service on one registry. Gauges are read when Prometheus asks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sandbox_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"sandbox_{name}_seconds", text, labels, registry=registry, buckets=FAST)

        self.execution_duration = seconds(
            "execution_duration", "Time from request to result of an execution", "template", "language", "outcome"
        )
        self.execution_overhead = seconds(
            "execution_overhead", "Our share of an execution's time: all but the code", "template"
        )
        self.acquire = seconds("session_acquire", "Time to get a container for a session", "template", "source")
        self.sessions_ended = counter("sessions_ended", "Sessions that ended", "template", "reason")
        self.pool_hits = counter("pool_hits", "Acquires served by a ready container", "template")
        self.pool_misses = counter("pool_misses", "Acquires that waited for a start", "template")
        self.container_start = seconds("container_start", "Time from create to passed self-test", "template", "result")
        self.containers_removed = counter("containers_removed", "Containers that were removed", "reason")
        self.attached_again = counter("containers_attached_again", "Containers whose stream broke and was had again")
        self.heartbeats_missed = counter("heartbeats_missed", "Pings that an agent did not answer in time")
        self.reconcile = seconds("reconcile", "Time of one reconcile", "result")
        self.engine_call = seconds("engine_call", "Time of one call to the engine", "call", "result")
        self.function_invocations = counter("function_invocations", "Invocations of functions that ran", "outcome")
        self.egress_connections = counter(
            "egress_connections", "Connections that code asked for, once each has ended", "decision", "reason"
        )
        self.egress_bytes = counter("egress_bytes", "Bytes of those connections", "direction")
        self.refusals = counter("refusals", "Requests refused by admission", "reason")

    def begin(self, templates: Iterable[str]) -> None:
        """Begin at 0 what alerts and ratios look at: Prometheus sees no increase in a counter's first sample."""
        for template in templates:
            self.pool_hits.labels(template)
            self.pool_misses.labels(template)
            for end in END_REASONS:
                self.sessions_ended.labels(template, end)
        for direction in ("in", "out"):
            self.egress_bytes.labels(direction)
        self.egress_connections.labels("allowed", "ok")
        for reason in REFUSE_REASONS:
            self.refusals.labels(reason)
        for reason in REMOVE_REASONS:
            self.containers_removed.labels(reason)

    def read_gauges(self, readings: Readings) -> None:
        """Register the gauges: `readings` returns name, help, labels and value of each sample."""
        self.registry.register(_Gauges(readings))

    def value(self, sample: str, **labels: str) -> float:
        """Return the present value of one sample, 0 when it has none yet."""
        return self.registry.get_sample_value(sample, labels) or 0.0


class _Gauges(Collector):
    def __init__(self, readings: Readings) -> None:
        self._readings = readings

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, text, labels, value in self._readings():
            family = families.setdefault(name, GaugeMetricFamily(f"sandbox_{name}", text, labels=list(labels)))
            family.add_metric(list(labels.values()), value)
        return families.values()
