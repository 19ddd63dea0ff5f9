"""What operators and their machines ask: health, readiness, metrics."""

from litestar import MediaType, Response, get
from litestar.openapi.datastructures import ResponseSpec
from prometheus_client import REGISTRY
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from orchestrator import __version__
from orchestrator.api.guard import OPEN
from orchestrator.models import Health, Readiness
from orchestrator.service import Orchestrator


@get("/health", opt={OPEN: True}, tags=["operations"], summary="Is the process alive")
async def health(service: Orchestrator) -> Health:
    """Answer whenever the process lives, whatever the engine does."""
    return Health(status="ok", version=__version__, engine=service.engine.name, layers=service.reconciler.layers)


@get(
    "/ready",
    opt={OPEN: True},
    responses={503: ResponseSpec(Readiness, generate_examples=False, description="None are, for these reasons")},
    tags=["operations"],
    summary="Are sessions accepted",
)
async def ready(service: Orchestrator) -> Response[Readiness]:
    """Answer 200 when sessions are accepted, else 503 with the reasons."""
    reasons = service.not_ready()
    return Response(Readiness(ready=not reasons, reasons=reasons), status_code=503 if reasons else 200)


@get("/metrics", media_type=MediaType.TEXT, tags=["operations"], summary="Prometheus metrics")
async def metrics(service: Orchestrator) -> Response[bytes]:
    """Return the metrics in Prometheus' text format: ours, those of HTTP, those of the process."""
    text = generate_latest(service.metrics.registry) + generate_latest(REGISTRY)
    return Response(text, media_type=CONTENT_TYPE_PLAIN_0_0_4)


handlers = [health, ready, metrics]
