"""Contexts: interpreters that stay."""

from typing import Literal

import msgspec

from orchestrator.models.terms import Id, Request, Time

ContextLanguage = Literal["python"]
ContextState = Literal["starting", "idle", "busy", "dead"]


class ContextRequest(Request, frozen=True):
    """Start a context; without `id` it gets one."""

    id: Id | None = None
    language: ContextLanguage = "python"


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """An interpreter that stays: its executions share variables. `detail` says why it is dead."""

    id: str
    session_id: str
    language: ContextLanguage
    state: ContextState
    created_at: Time
    executions: int
    detail: str | None = None


class ContextPage(msgspec.Struct, frozen=True, kw_only=True):
    """The contexts of a session, oldest first."""

    contexts: list[Context]
