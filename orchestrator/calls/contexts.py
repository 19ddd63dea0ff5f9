"""The calls about contexts."""

from orchestrator import models
from orchestrator.calls.call import Call, body_of, path_of

CONTEXT_BOOT_S = 30.0  # what a context gets to boot, unless the service is set otherwise


def create_context(
    session_id: str, context_id: str | None = None, *, language: models.ContextLanguage | None = None
) -> Call[models.Context]:
    """Start a context: an interpreter of the session that stays, whose executions share variables."""
    body = body_of(models.ContextRequest, {"id": context_id, "language": language})
    path = path_of(session_id, "contexts")
    return Call(method="POST", path=path, answer=models.Context, body=body, runs_s=CONTEXT_BOOT_S)


def list_contexts(session_id: str) -> Call[models.ContextPage]:
    """List the contexts of a session, oldest first."""
    return Call(method="GET", path=path_of(session_id, "contexts"), answer=models.ContextPage)


def get_context(session_id: str, context_id: str) -> Call[models.Context]:
    """Read a context."""
    return Call(method="GET", path=path_of(session_id, "contexts", context_id), answer=models.Context)


def restart_context(session_id: str, context_id: str) -> Call[models.Context]:
    """Give a context a fresh interpreter; its executions that run or wait are cancelled."""
    path = path_of(session_id, "contexts", context_id, "restart")
    return Call(method="POST", path=path, answer=models.Context, runs_s=CONTEXT_BOOT_S)


def delete_context(session_id: str, context_id: str) -> Call[None]:
    """Delete a context; its executions that run or wait are cancelled."""
    return Call(method="DELETE", path=path_of(session_id, "contexts", context_id), answer=type(None))
