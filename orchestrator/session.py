"""One session: its container, its times, its executions; and what its agent keeps of it over our restart."""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from orchestrator import models
from orchestrator.container import Container
from orchestrator.egress.outlet import Outlet
from orchestrator.errors import InvalidRequest
from orchestrator.executions import Note, Record
from orchestrator.files import Workspace
from orchestrator.models import EndReason, SessionRequest, Source
from orchestrator.turns import Turns

KEPT_BYTES = 60_000  # of what a client gives a session; with our own facts it fits one frame
HISTORY = 64  # finished executions that a session remembers
DISPLAYED = 32 << 20  # bytes of their displays, above which it remembers fewer


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent keeps of its session, for the orchestrator that adopts it. Seconds count from when it was told."""

    source: Source
    network: models.ShownNetwork = "none"
    network_seal: str = ""
    env: dict[str, str]
    metadata: dict[str, str]
    age_s: float
    expires_in_s: float
    idle_timeout_s: float


class Session:
    """A client's use of one container. All times are monotonic."""

    def __init__(
        self, sid: str, container: Container, kept: Kept, outlet: Outlet, *, limit: int, told_ago_s: float = 0.0
    ) -> None:
        self.id = sid
        self.outlet = outlet
        self.container = container
        self.source = kept.source
        self.own_env = kept.env
        self.metadata = kept.metadata
        self.used = time.monotonic()
        self.created = self.used - told_ago_s - kept.age_s
        self.expires = self.used - told_ago_s + kept.expires_in_s
        self.idle_timeout_s = kept.idle_timeout_s
        self.count = 0
        self.terminals = 0
        self._transfers = 0
        self._displayed = 0
        self.turns = Turns(limit)
        self.installs = Turns(1)  # two at once would replace the same package, and leave it in pieces
        self.records: OrderedDict[str, Record] = OrderedDict()
        self.running: dict[str, asyncio.Task[None]] = {}
        self.keys: dict[str, str] = {}

    @property
    def env(self) -> dict[str, str]:
        """The environment of its executions."""
        return self.outlet.environment | self.own_env

    @property
    def background(self) -> int:
        """How many executions run in the background."""
        return sum(self.records[eid].note.background for eid in self.running)

    @property
    def due(self) -> float:
        """When it ends by itself. A running execution keeps it, and a transfer of files; one in the background, or
        an open terminal, keeps it from being idle.
        """
        if self._transfers or len(self.running) > self.background:
            return math.inf
        return self.expires if self.running or self.terminals else min(self.expires, self.used + self.idle_timeout_s)

    def overdue(self, now: float) -> EndReason | None:
        """Why it is to end now, if it is."""
        if now < self.due:
            return None
        return "expired" if now >= self.expires else "idle"

    def touch(self) -> None:
        """Note that it is in use."""
        self.used = time.monotonic()

    @contextmanager
    def in_use(self) -> Iterator[Workspace]:
        """Keep it from ending by itself for the time of an operation on its files."""
        self._transfers += 1
        try:
            yield Workspace(self.container)
        finally:
            self._transfers -= 1
            self.touch()

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Keep it from being idle for the time of a terminal."""
        self.terminals += 1
        try:
            yield
        finally:
            self.terminals -= 1
            self.touch()

    def is_busy(self, note: Note) -> bool:
        """Tell whether an execution that comes now has to wait for its turn."""
        if note.context_id is not None and self.container.contexts.is_busy(note.context_id):
            return True
        if note.installs and self.installs.all_taken:
            return True
        return self.turns.all_taken and not note.background

    def add(self, record: Record, task: asyncio.Task[None]) -> None:
        """Take an execution in."""
        self.records[record.id] = record
        self.running[record.id] = task
        self.count += 1
        if record.key is not None:
            self.keys[record.key] = record.id

    def finish(self, record: Record) -> None:
        """Note that an execution ended; forget the oldest ones."""
        del self.running[record.id]
        self.used = time.monotonic()
        finished = [eid for eid in self.records if eid not in self.running]
        self._displayed += len(record.output.whole("display"))
        while len(finished) > HISTORY or (self._displayed > DISPLAYED and len(finished) > 1):
            forgotten = self.records.pop(finished.pop(0))
            self._displayed -= len(forgotten.output.whole("display"))
            if forgotten.key is not None:
                del self.keys[forgotten.key]

    def kept(self) -> dict[str, Any]:
        """Return what the agent is to keep."""
        now = time.monotonic()
        kept = Kept(
            source=self.source,
            network=self.outlet.policy.shown(),
            network_seal=self.outlet.seal,
            env=self.own_env,
            metadata=self.metadata,
            age_s=now - self.created,
            expires_in_s=self.expires - now,
            idle_timeout_s=self.idle_timeout_s,
        )
        facts: dict[str, Any] = msgspec.to_builtins(kept)
        return facts

    def facts(self) -> models.Session:
        """Return what a client sees."""
        now, clock = time.monotonic(), datetime.now(UTC)
        return models.Session(
            id=self.id,
            template=self.container.template,
            created_at=clock - timedelta(seconds=now - self.created),
            last_used_at=clock - timedelta(seconds=now - self.used),
            expires_at=clock + timedelta(seconds=self.expires - now),
            idle_timeout_s=self.idle_timeout_s,
            executions=self.count,
            source=self.source,
            network=self.outlet.policy.shown(),
            metadata=self.metadata,
            layers=self.container.layers,
        )


def check_kept(env: dict[str, str], metadata: dict[str, str], network: models.ShownNetwork) -> None:
    """Refuse what an agent could not keep: it is told in one frame."""
    if len(msgspec.json.encode([env, metadata, network])) > KEPT_BYTES:
        raise InvalidRequest(
            f"`env`, `metadata` and `network` are together above {KEPT_BYTES} bytes: put long texts into files"
        )


def new(
    sid: str,
    container: Container,
    request: SessionRequest,
    source: Source,
    outlet: Outlet,
    *,
    limit: int,
    **life: float,
) -> Session:
    """Return a session that a client just asked for; `life` is `expires_in_s` and `idle_timeout_s`."""
    network, seal = outlet.policy.shown(), outlet.seal
    kept = Kept(
        source=source, network=network, network_seal=seal, env=request.env, metadata=request.metadata, age_s=0.0, **life
    )
    return Session(sid, container, kept, outlet, limit=limit)
