"""The events of an execution."""

from typing import Any, Literal

import msgspec

from orchestrator.models.executions import Artifact, Execution

EventKind = Literal["started", "stdout", "stderr", "display", "artifact", "done"]


class EventText(msgspec.Struct, frozen=True, kw_only=True):
    """What a `stdout` or `stderr` event carries."""

    text: str


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What the SDK makes of one event: `text` of `stdout` and `stderr`, else `item`, `artifact` or `execution`."""

    id: int
    kind: EventKind
    text: str = ""
    item: dict[str, Any] | None = None
    artifact: Artifact | None = None
    execution: Execution | None = None
