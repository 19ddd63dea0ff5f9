"""What the two ends of a terminal say to each other beside its bytes."""

from typing import Annotated

import msgspec
from msgspec import Meta

from orchestrator.errors import Problem

TERM_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9+._-]{0,62}\Z"
Extent = Annotated[int, Meta(ge=1, le=1000)]


class Resize(msgspec.Struct, frozen=True, kw_only=True, tag="resize", forbid_unknown_fields=True):
    """Said by the client of a terminal: its size, in characters."""

    cols: Extent
    rows: Extent


class Exit(msgspec.Struct, frozen=True, kw_only=True, tag="exit"):
    """Said to the client of a terminal: its program has ended."""

    exit_code: int
    signal: int | None


class Trouble(msgspec.Struct, frozen=True, kw_only=True, tag="error"):
    """Said to the client of a terminal: what is wrong with what it sent, or why the terminal ends."""

    problem: Problem
