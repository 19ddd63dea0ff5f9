"""Warm sessions of functions: each holds the code of one revision of one function, and serves one invocation at a time."""

import secrets
import time
from collections import deque
from typing import NamedTuple

import msgspec
import structlog

from orchestrator.errors import (
    ContainerLost,
    FileTooLarge,
    FunctionThrottled,
    InvalidCode,
    SessionEnded,
    SessionNotFound,
    Unavailable,
    WorkspaceFull,
)
from orchestrator.functions import Function, Functions
from orchestrator.languages import check
from orchestrator.models import Execution, ExecutionRequest, SessionRequest
from orchestrator.session import Session
from orchestrator.sessions import Sessions
from orchestrator.settings import Settings
from orchestrator.unpack import ZIP, pieces, unpacking

log = structlog.get_logger()
PREFIX = "function-"  # of the ids of our sessions


class Warm(NamedTuple):
    """A session whose container holds the code of one revision of one function."""

    sid: str
    name: str
    revision: str


class WarmSessions:
    """Where a warm session is held is its state: in `idle` (longest unused first) or in `busy`; else it has ended."""

    def __init__(
        self, settings: Settings, functions: Functions, sessions: Sessions, workspace_bytes: dict[str, int]
    ) -> None:
        self.idle: deque[Warm] = deque()
        self.busy: set[str] = set()
        self.limit = min(settings.function_containers, settings.max_containers)
        self._settings = settings
        self._functions = functions
        self._sessions = sessions
        self._workspace_bytes = workspace_bytes

    @property
    def alive(self) -> int:
        """How many sessions are idle and have not ended yet."""
        return sum(warm.sid in self._sessions.held for warm in self.idle)

    async def take(self, name: str) -> tuple[Function, Warm, float | None]:
        """Return the function as it is now, and a container with its code that nobody else uses."""
        while True:
            function = self._functions.get(name)
            for warm in [warm for warm in reversed(self.idle) if warm.name == name]:
                self.idle.remove(warm)
                if self._alive(warm) is not None and warm.revision == function.revision:
                    self.busy.add(warm.sid)
                    return function, warm, None
                self._end(warm)
            begun = time.monotonic()
            try:
                warm = await self.prepare(function, await self._functions.code(function))
            except (Unavailable, InvalidCode):
                if self._functions.held.get(name) is function:
                    raise
                continue  # its code was replaced meanwhile
            return function, warm, time.monotonic() - begun

    async def prepare(self, function: Function, code: bytes) -> Warm:
        """Start a session and unpack the code in it. InvalidCode when that does not go."""
        while len(self.idle) + len(self.busy) >= self.limit:
            if not self.idle:
                raise FunctionThrottled("All containers of functions are in use: try again later")
            self._end(self.idle.popleft())
        warm = Warm(f"{PREFIX}{secrets.token_hex(10)}", function.name, function.revision)
        self.busy.add(warm.sid)
        try:
            await self._sessions.create(
                SessionRequest(
                    id=warm.sid,
                    template=function.template,
                    ttl_s=self._settings.max_ttl_seconds,
                    idle_timeout_s=self._settings.function_idle_seconds,
                    metadata={"function": function.name},
                )
            )
            await self._fill(warm, function, code)
        except BaseException:
            self.busy.discard(warm.sid)
            self._end(warm)
            raise
        return warm

    async def _fill(self, warm: Warm, function: Function, code: bytes) -> None:
        session, limit = self._sessions.get(warm.sid), self._workspace_bytes[function.template]
        call = ExecutionRequest(language=function.language, handler=function.handler)
        check(call, session.container.languages, template=function.template)
        with session.in_use() as workspace:
            try:
                await workspace.write(ZIP, pieces(code), limit=limit)
            except (FileTooLarge, WorkspaceFull):
                raise InvalidCode("Could not unzip uploaded file: it does not fit the workspace") from None
        execution = await self._sessions.execute(warm.sid, unpacking(limit_bytes=limit))
        if fault := fault_of(execution):
            raise InvalidCode(f"Could not unzip uploaded file: {fault}")

    def give_way(self) -> bool:
        """End the session that is unused longest, if one is; return whether there was one."""
        while self.idle:
            warm = self.idle.popleft()
            if self._alive(warm) is not None:
                self._end(warm)
                return True
        return False

    def give_back(self, warm: Warm) -> None:
        """Keep a container for the function's next invocation, unless that needs another one."""
        self.busy.discard(warm.sid)
        function = self._functions.held.get(warm.name)
        if function is not None and function.revision == warm.revision and self._alive(warm) is not None:
            self.idle.append(warm)
        else:
            self._end(warm)

    def refresh(self, name: str) -> None:
        """End the idle sessions of a function that hold another revision of it."""
        function = self._functions.held.get(name)
        for warm in [warm for warm in self.idle if warm.name == name]:
            if function is None or warm.revision != function.revision:
                self.idle.remove(warm)
                self._end(warm)

    def let_go(self) -> None:
        """Have what an earlier orchestrator left end, when nothing runs in it: what it holds, nobody here knows."""
        for session in self._all():
            session.expires = 0.0

    def end_all(self) -> None:
        """End all of them, also where sessions are kept at the end of the service: the next one would not know them."""
        for session in self._all():
            self._sessions.end(session, "drained")

    def _all(self) -> list[Session]:
        sessions = self._sessions.held.values()
        return [session for session in sessions if session.id.startswith(PREFIX) and "function" in session.metadata]

    def _alive(self, warm: Warm) -> Session | None:
        try:
            session = self._sessions.get(warm.sid)
        except (SessionNotFound, SessionEnded):
            return None
        return session if session.container.lost_reason is None else None

    def _end(self, warm: Warm) -> None:
        if (session := self._sessions.held.get(warm.sid)) is not None:
            self._sessions.end(session, "closed")


def fault_of(execution: Execution) -> str:
    """Return what unpacking has against the code; empty when it is well."""
    match execution.outcome:
        case "ok" if execution.value is not None:
            return str(msgspec.json.decode(execution.value))[:1000]
        case "lost":
            raise ContainerLost("The container vanished while the code was unpacked")
        case outcome:
            return f"unpacking ended with {outcome}"
