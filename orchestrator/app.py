"""The Litestar application: all doors, one service behind them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from litestar import Litestar
from litestar.di import Provide
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.plugins.prometheus import PrometheusConfig
from litestar.types import Middleware

from orchestrator import __version__
from orchestrator.api import aws, native, operations, pages, problems, seed, sockets
from orchestrator.api.bodies import StrictRequest
from orchestrator.api.guard import Gate, add_headers
from orchestrator.api.mcp import McpDoor
from orchestrator.errors import SettingsError
from orchestrator.service import Orchestrator
from orchestrator.settings import Settings, is_loopback

if TYPE_CHECKING:
    from orchestrator.otel import Tracing

HTTP_METRICS = PrometheusConfig(app_name="sandbox", prefix="sandbox_http", group_path=True)


def create_app(settings: Settings) -> Litestar:
    """Return the application. Its lifespan starts the engine's side and, at the end, removes everything of ours."""
    service = Orchestrator(settings)
    tracing = start_tracing(settings)
    first: list[Middleware] = [] if tracing is None else tracing.middleware
    gate = Gate(settings.api_keys, local_only=is_loopback(settings.host))

    mcp = McpDoor(service)

    @asynccontextmanager
    async def lifespan(_: Litestar) -> AsyncIterator[None]:
        async with tracing.run() if tracing is not None else nullcontext(), service.run(), mcp.run():
            yield

    app = Litestar(
        route_handlers=[
            *operations.handlers,
            *pages.handlers,
            native.router,
            seed.router,
            aws.door(settings),
            mcp.handler,
        ],
        dependencies={"service": Provide(lambda: service, sync_to_thread=False)},
        exception_handlers={Exception: problems.handle},
        after_exception=[sockets.note_refusal],
        guards=[gate.check],
        before_send=[add_headers],
        middleware=[*first, HTTP_METRICS.middleware],
        lifespan=[lifespan],
        request_max_body_size=settings.max_body,
        request_class=StrictRequest,
        openapi_config=OpenAPIConfig(
            title="Sandbox orchestrator",
            version=__version__,
            description="Untrusted code in warm containers, each execution in a fresh bubblewrap sandbox.",
            path="/openapi",  # where Litestar wants it; `pages` serves it at its usual place
            render_plugins=[JsonRenderPlugin()],
            use_handler_docstrings=True,
        ),
        signature_types=[Orchestrator],
        logging_config=None,
    )
    app.state.service = service
    return app


def start_tracing(settings: Settings) -> "Tracing | None":
    """Return the tracer that the settings ask for. SettingsError when its packages are missing."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from orchestrator.otel import Tracing
    except ImportError:
        raise SettingsError(
            "SANDBOX_OTLP_ENDPOINT needs packages that are not installed: pip install 'sandbox-orchestrator[otel]'"
        ) from None
    return Tracing(settings.otlp_endpoint, settings.instance)
