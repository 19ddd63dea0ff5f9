"""The calls about sessions."""

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator import models
from orchestrator.calls.call import EXECUTION_TIMEOUT_S, Call, body_of, page_of, path_of


def create_session(
    session_id: str | None = None,
    *,
    template: str | None = None,
    ttl_s: float | None = None,
    idle_timeout_s: float | None = None,
    env: Mapping[str, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    network: models.Network | Mapping[str, Any] | None = None,
    packages: Sequence[str] | None = None,
) -> Call[models.Session]:
    """Start a session; without an id the service gives it one. `network` is what its code may reach.

    With `packages`, pip installs these first.
    """
    life = {"ttl_s": ttl_s, "idle_timeout_s": idle_timeout_s, "network": network}
    fields = {"id": session_id, "template": template, "env": env, "metadata": metadata, "packages": packages} | life
    body = body_of(models.SessionRequest, fields)
    runs_s = EXECUTION_TIMEOUT_S if packages else 0.0
    return Call(method="POST", path="/v1/sessions", answer=models.Session, body=body, runs_s=runs_s)


def get_session(session_id: str) -> Call[models.Session]:
    """Read a session. SessionNotFound or errors.SessionEnded when there is none."""
    return Call(method="GET", path=path_of(session_id), answer=models.Session)


def list_sessions(*, limit: int = 100, after: str | None = None) -> Call[models.SessionPage]:
    """List sessions in the order of their ids; `after` continues with the `next` of the page before."""
    return Call(method="GET", path="/v1/sessions", answer=models.SessionPage, query=page_of(limit, after))


def extend_session(
    session_id: str,
    *,
    ttl_s: float | None = None,
    idle_timeout_s: float | None = None,
    metadata: Mapping[str, str] | None = None,
    network: models.Network | Mapping[str, Any] | None = None,
) -> Call[models.Session]:
    """Let a session's life count anew from now, or replace its metadata or its network."""
    fields = {"ttl_s": ttl_s, "idle_timeout_s": idle_timeout_s, "metadata": metadata, "network": network}
    return Call(
        method="PATCH", path=path_of(session_id), answer=models.Session, body=body_of(models.SessionPatch, fields)
    )


def session_network(session_id: str) -> Call[models.SessionNetwork]:
    """Read what a session may reach, what it is connected to, and what it was refused last."""
    return Call(method="GET", path=f"{path_of(session_id)}/network", answer=models.SessionNetwork)


def end_session(session_id: str) -> Call[None]:
    """End a session; what runs in it is killed."""
    return Call(method="DELETE", path=path_of(session_id), answer=type(None))
