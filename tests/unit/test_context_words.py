"""What the orchestrator believes of an agent's contexts, and of what a cell shows."""

import json
from typing import Any

import msgspec
import pytest

from orchestrator import cells, frames
from orchestrator.channel import Channel
from orchestrator.contexts import Contexts
from orchestrator.errors import ContainerLost, ContextDead, ContextFailed, ContextNotFound
from orchestrator.models import ContextRequest

KNOWN: dict[str, Any] = {
    "id": "c1",
    "number": 1,
    "language": "python",
    "state": "idle",
    "message": "",
    "cells": 2,
    "age_s": 10.0,
}
HELLO: dict[str, Any] = {
    "type": "hello",
    "version": 1,
    "nonce": "n",
    "session": None,
    "kept": None,
    "kept_age_s": 0.0,
    "canary": {},
    "executions": [],
}


class Wire:
    """A wire that keeps what was written."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []

    def write(self, data: bytes) -> None:
        self.frames += [json.loads(line) for line in data.splitlines() if line]

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        pass


def new_contexts() -> tuple[Contexts, Wire]:
    wire, channel = Wire(), Channel(lambda _frame: None, lambda _reason: None)
    channel.open(wire)
    return Contexts(channel), wire


def known(**changed: Any) -> frames.KnownContext:
    return msgspec.convert(KNOWN | changed, frames.KnownContext)


@pytest.mark.parametrize(
    "changed",
    [
        {"id": "../x"},
        {"id": ""},
        {"number": -1},
        {"language": "perl"},
        {"state": "busy"},
        {"message": "x" * 5000},
        {"cells": -1},
        {"age_s": -1.0},
        {"more": 1},
    ],
    ids=str,
)
def test_a_hello_that_tells_something_impossible_of_a_context_is_none(changed: dict[str, Any]) -> None:
    good = json.dumps(HELLO | {"contexts": [KNOWN]}).encode()
    assert isinstance(frames.decode(good), frames.Hello)
    with pytest.raises(ContainerLost):
        frames.decode(json.dumps(HELLO | {"contexts": [KNOWN | changed]}).encode())
    with pytest.raises(ContainerLost):
        frames.decode(json.dumps(HELLO | {"contexts": [KNOWN] * 65}).encode())


async def test_what_is_said_of_an_earlier_sandbox_or_of_no_context_is_passed_over() -> None:
    contexts, _ = new_contexts()
    contexts.adopt([known(number=3)])
    contexts.take(frames.Context(id="c1", number=2, state="dead", message="old"))
    contexts.take(frames.Context(id="c2", number=3, state="dead", message="none"))
    assert contexts.living("c1").state == "idle"
    contexts.take(frames.Context(id="c1", number=3, state="dead", message="new"))
    with pytest.raises(ContextDead, match="new"):
        contexts.living("c1")


async def test_a_context_that_does_not_boot_is_gone() -> None:
    contexts, wire = new_contexts()
    with pytest.raises(ContextFailed, match="in time"):
        await contexts.open(ContextRequest(id="c1"), deadline_s=0.01)
    with pytest.raises(ContextNotFound):
        contexts.get("c1")
    assert [frame["type"] for frame in wire.frames] == ["open_context", "close_context"]


async def test_after_an_attach_both_sides_hold_the_same_contexts() -> None:
    contexts, wire = new_contexts()
    contexts.adopt([known(id="same"), known(id="died"), known(id="unknown", number=2), known(id="older", number=3)])
    contexts.catch_up(
        {
            "same": known(id="same"),
            "died": known(id="died", state="dead", message="gone"),
            "older": known(id="older", number=2),
            "deleted": known(id="deleted"),
        }
    )
    assert {cid: context.state for cid, context in contexts.held.items()} == {
        "same": "idle",
        "died": "dead",
        "unknown": "dead",
        "older": "dead",
    }
    assert wire.frames == [{"type": "close_context", "id": "deleted"}]


async def test_a_context_whose_container_is_lost_lets_nobody_wait() -> None:
    contexts, _ = new_contexts()
    contexts.adopt([known(state="starting")])
    contexts.fail("it vanished")
    async with contexts.turn("c1", "e1", begun=False) as refusal:
        assert refusal is not None
        assert "it vanished" in refusal


LINES = [
    (b'{"text/plain":"a"}\n{"text/plain":"b"}\n', 2),
    (b'[1]\n5\nnull\n"x"\n', 0),
    (b'{"text/plain":"a"}\n{"text/pl', 1),
    (b'{"a":NaN}\n\xff\n{"b":"\\ud800"}\n' + b'{"a":' * 5000, 0),
    (b"", 0),
]


@pytest.mark.parametrize(("lines", "count"), LINES)
def test_what_is_no_display_is_left_out(lines: bytes, count: int) -> None:
    found = cells.displays_of(lines)
    assert len(found) == count
    msgspec.json.encode(found)
