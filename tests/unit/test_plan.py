"""The reconciler's plan: what is observed, row by row, and what follows from it."""

from typing import Any

import pytest

from orchestrator.engine import Seen
from orchestrator.plan import Plan, PoolView, View, plan

MAX_AGE_S = 100.0
ORPHAN_AGE_S = 60.0
Row = tuple[str, dict[str, Any], dict[str, Any]]


def pool(size: int = 2, *, waiting: int = 0, starting: int = 0, ready: Any = (), may_start: int = 4) -> PoolView:
    """Return a pool; `ready` names its containers, or maps them to their age."""
    ages = ready if isinstance(ready, dict) else dict.fromkeys(ready, 1.0)
    return PoolView(size=size, waiting=waiting, starting=starting, ready=ages, may_start=may_start)


def view(**facts: Any) -> View:
    """Return a world in which nothing is to be done, but for the facts."""
    quiet: dict[str, Any] = {
        "pools": {},
        "sessions": {},
        "overdue": {},
        "lost": frozenset(),
        "strangers": {},
        "older": frozenset(),
        "seen": None,
        "broken": frozenset(),
        "given_up": frozenset(),
        "room": 64,
        "max_age_s": MAX_AGE_S,
        "orphan_age_s": ORPHAN_AGE_S,
    }
    return View(**(quiet | facts))


def seen(*names: str, stopped: tuple[str, ...] = ()) -> dict[str, Seen]:
    """Return what the engine lists."""
    return {name: Seen(name=name, running=name not in stopped, labels={}) for name in (*names, *stopped)}


def known(*names: str) -> frozenset[str]:
    return frozenset(names)


STARTS: list[Row] = [
    ("an empty pool is filled", {"pools": {"a": pool(2)}}, {"a": 2}),
    ("a full pool is left alone", {"pools": {"a": pool(2, ready="xy")}}, {}),
    ("what starts already counts", {"pools": {"a": pool(2, starting=1)}}, {"a": 1}),
    ("what starts already suffices", {"pools": {"a": pool(2, starting=2)}}, {}),
    ("who waits is served beyond the size", {"pools": {"a": pool(2, waiting=3, may_start=9)}}, {"a": 5}),
    ("who waits is served without a size", {"pools": {"a": pool(0, waiting=1)}}, {"a": 1}),
    ("a pool of size 0 stays empty", {"pools": {"a": pool(0)}}, {}),
    ("no more than may start now", {"pools": {"a": pool(9, may_start=4)}}, {"a": 4}),
    ("nothing during a pause after failures", {"pools": {"a": pool(2, waiting=1, may_start=0)}}, {}),
    ("nothing when more start than may", {"pools": {"a": pool(9, starting=5, may_start=-1)}}, {}),
    ("no more than there is room for", {"pools": {"a": pool(9)}, "room": 1}, {"a": 1}),
    ("nothing without room", {"pools": {"a": pool(2, waiting=1)}, "room": 0}, {}),
    ("nothing with more containers than allowed", {"pools": {"a": pool(2, waiting=1)}, "room": -1}, {}),
    ("those who wait come first", {"pools": {"a": pool(2), "b": pool(0, waiting=2)}, "room": 2}, {"b": 2}),
    (
        "what is left over fills pools",
        {"pools": {"a": pool(2), "b": pool(0, waiting=1)}, "room": 2},
        {"b": 1, "a": 1},
    ),
    ("both pools are filled", {"pools": {"a": pool(1), "b": pool(2)}}, {"a": 1, "b": 2}),
    (
        "what is dropped is replaced at once",
        {"pools": {"a": pool(2, ready={"old": MAX_AGE_S + 1, "new": 1.0})}},
        {"a": 1},
    ),
    ("what is lost is replaced at once", {"pools": {"a": pool(2, ready="xy")}, "lost": known("x")}, {"a": 1}),
]
DROPS: list[Row] = [
    ("nothing at the maximal age", {"pools": {"a": pool(1, ready={"x": MAX_AGE_S})}}, {}),
    ("what is above it", {"pools": {"a": pool(1, ready={"x": MAX_AGE_S + 0.1})}}, {"x": "max_age"}),
    ("what is too many, oldest first", {"pools": {"a": pool(1, ready="xyz")}}, {"x": "surplus", "y": "surplus"}),
    ("all when the pool is to be empty", {"pools": {"a": pool(0, ready="xy")}}, {"x": "surplus", "y": "surplus"}),
    ("not what is kept beside a dropped one", {"pools": {"a": pool(1, ready={"x": 999, "y": 1})}}, {"x": "max_age"}),
    ("what its channel says is lost", {"pools": {"a": pool(1, ready="x")}, "lost": known("x")}, {"x": "lost"}),
    (
        "lost before too old",
        {"pools": {"a": pool(1, ready={"x": 999})}, "lost": known("x"), "seen": seen("x"), "older": known("x")},
        {"x": "lost"},
    ),
    (
        "what the engine does not list",
        {"pools": {"a": pool(1, ready="x")}, "seen": {}, "older": known("x")},
        {"x": "lost"},
    ),
    (
        "what the engine lists as stopped",
        {"pools": {"a": pool(1, ready="x")}, "seen": seen(stopped=("x",)), "older": known("x")},
        {"x": "lost"},
    ),
    (
        "nothing that the engine lists as running",
        {"pools": {"a": pool(1, ready="x")}, "seen": seen("x"), "older": known("x")},
        {},
    ),
    ("nothing while the engine is silent", {"pools": {"a": pool(1, ready="x")}, "older": known("x")}, {}),
    (
        "nothing that began after the engine was asked",
        {"pools": {"a": pool(1, ready="x")}, "seen": {}, "older": known()},
        {},
    ),
]
ENDS: list[Row] = [
    ("nothing that lives", {"sessions": {"s": "x"}, "seen": seen("x"), "older": known("x")}, {}),
    ("what is overdue", {"sessions": {"s": "x"}, "overdue": {"s": "idle"}}, {"s": "idle"}),
    ("what its channel says is lost", {"sessions": {"s": "x"}, "lost": known("x")}, {"s": "lost"}),
    ("what the engine does not list", {"sessions": {"s": "x"}, "seen": {}, "older": known("x")}, {"s": "lost"}),
    (
        "what the engine lists as stopped",
        {"sessions": {"s": "x"}, "seen": seen(stopped=("x",)), "older": known("x")},
        {"s": "lost"},
    ),
    ("nothing while the engine is silent", {"sessions": {"s": "x"}, "older": known("x")}, {}),
    (
        "nothing that began after the engine was asked",
        {"sessions": {"s": "x"}, "seen": {}, "older": known()},
        {},
    ),
    (
        "lost before overdue",
        {"sessions": {"s": "x"}, "overdue": {"s": "expired"}, "lost": known("x")},
        {"s": "lost"},
    ),
]
ORPHANS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("what nobody knows, at the age", {"strangers": {"x": ORPHAN_AGE_S}}, ["x"]),
    ("nothing younger", {"strangers": {"x": ORPHAN_AGE_S - 0.1}}, []),
    ("while the engine is silent too", {"strangers": {"x": 999.0}, "seen": None}, ["x"]),
    ("what was given up, whatever its age", {"strangers": {"x": 0.0, "y": 0.0}, "given_up": known("y", "z")}, ["y"]),
    ("nothing else", {"seen": seen("x")}, []),
]
BROKEN: list[tuple[str, dict[str, Any], tuple[list[str], list[str]]]] = [
    ("what still runs is attached to again", {"seen": seen("x"), "older": known("x")}, ([], ["x"])),
    ("what has stopped is lost", {"seen": seen(stopped=("x",)), "older": known("x")}, (["x"], [])),
    ("what is gone is lost", {"seen": {}, "older": known("x")}, (["x"], [])),
    ("nothing that began after the engine was asked", {"seen": {}}, ([], [])),
    ("nothing while the engine is silent", {"older": known("x")}, ([], [])),
    ("nothing that somebody attaches to", {"seen": seen("x"), "older": known("x"), "broken": known()}, ([], [])),
]


def rows(table: list[Any]) -> list[Any]:
    return [pytest.param(facts, expected, id=name) for name, facts, expected in table]


@pytest.mark.parametrize(("facts", "expected"), rows(STARTS))
def test_starts(facts: dict[str, Any], expected: dict[str, int]) -> None:
    assert plan(view(**facts)).start == expected


@pytest.mark.parametrize(("facts", "expected"), rows(DROPS))
def test_drops(facts: dict[str, Any], expected: dict[str, str]) -> None:
    assert plan(view(**facts)).drop == expected


@pytest.mark.parametrize(("facts", "expected"), rows(ENDS))
def test_ends(facts: dict[str, Any], expected: dict[str, str]) -> None:
    assert plan(view(**facts)).end == expected


@pytest.mark.parametrize(("facts", "expected"), rows(ORPHANS))
def test_orphans(facts: dict[str, Any], expected: list[str]) -> None:
    assert plan(view(**facts)).orphans == expected


@pytest.mark.parametrize(("facts", "expected"), rows(BROKEN))
def test_broken_streams(facts: dict[str, Any], expected: tuple[list[str], list[str]]) -> None:
    made = plan(view(**({"broken": known("x")} | facts)))
    assert (made.lose, made.again) == expected


def test_a_world_as_it_should_be_needs_nothing() -> None:
    quiet = view(
        pools={"a": pool(1, ready="x")},
        sessions={"s": "y"},
        seen=seen("x", "y", "z"),
        older=known("x", "y", "z"),
    )
    assert plan(quiet) == Plan()


def test_a_plan_that_was_carried_out_needs_no_other() -> None:
    """Two rounds from an empty world reach what was asked for, within the room."""
    first = plan(view(pools={"a": pool(3, waiting=2, may_start=9)}, room=4))
    assert first.start == {"a": 4}
    # Two of the four serve those who waited; the engine has no room for more.
    second = plan(view(pools={"a": pool(3, ready="xy")}, sessions={"s": "v", "t": "w"}, room=0))
    assert second == Plan()
