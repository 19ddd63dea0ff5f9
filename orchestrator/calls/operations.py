"""The calls about the service itself."""

from orchestrator import models
from orchestrator.calls.call import Call


def templates() -> Call[models.TemplatePage]:
    """List what containers can be started from; the first is the default."""
    return Call(method="GET", path="/v1/templates", answer=models.TemplatePage)


def pool() -> Call[models.PoolPage]:
    """Read how many containers are ready, starting and waited for."""
    return Call(method="GET", path="/v1/pool", answer=models.PoolPage)


def isolation() -> Call[models.Isolation]:
    """Read which layers of isolation the newest container's self-test observed active."""
    return Call(method="GET", path="/v1/isolation", answer=models.Isolation)


def health() -> Call[models.Health]:
    """Read whether the service lives."""
    return Call(method="GET", path="/health", answer=models.Health)


def ready() -> Call[models.Readiness]:
    """Read whether the service accepts sessions, and why not."""
    return Call(method="GET", path="/ready", answer=models.Readiness, statuses=frozenset({200, 503}))
