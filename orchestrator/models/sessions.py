"""Sessions: how they are asked for, extended and shown."""

from typing import Literal, get_args

import msgspec

from orchestrator.models.network import Network, ShownNetwork
from orchestrator.models.terms import Env, Id, Metadata, Request, Requirements, Seconds, Time

Source = Literal["warm", "cold"]
EndReason = Literal["closed", "expired", "idle", "lost", "drained"]
END_REASONS: tuple[EndReason, ...] = get_args(EndReason)


class SessionRequest(Request, frozen=True):
    """Start a session; without `id` it gets one."""

    id: Id | None = None
    template: str | None = None
    ttl_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    env: Env = {}
    metadata: Metadata = {}
    network: Network | None = None
    packages: Requirements = []


class SessionPatch(Request, frozen=True):
    """Extend a session: its life counts anew from now. A network that is given replaces the one before."""

    ttl_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    metadata: Metadata | None = None
    network: Network | None = None


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A client's named use of one container."""

    id: str
    template: str
    created_at: Time
    last_used_at: Time
    expires_at: Time
    idle_timeout_s: float
    executions: int
    source: Source
    network: ShownNetwork
    metadata: dict[str, str]
    layers: dict[str, bool]


class SessionPage(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions in the order of their ids; `next` continues after the last one."""

    sessions: list[Session]
    next: str | None = None
