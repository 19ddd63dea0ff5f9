"""What to do next, as a pure function of what was observed: no clock, no I/O, no state."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.engine import Seen
from orchestrator.models import EndReason


@dataclass(frozen=True, slots=True)
class PoolView:
    """One pool: names of its ready containers with their age, and who waits."""

    size: int
    waiting: int
    starting: int
    ready: Mapping[str, float]
    may_start: int


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a plan depends on; times in seconds.

    `seen` is None when the engine was not asked or did not answer: then nothing is concluded from
    absence. Nor is it for a container that is not `older`: started before the engine was asked.
    Everything else was copied after that. The stream of a `broken` container ended, and nobody attaches to it just now;
    a start that was `given_up` may have made its container late. `strangers` are listed by the engine and known to
    nobody, for so long.
    """

    pools: Mapping[str, PoolView]
    sessions: Mapping[str, str]
    overdue: Mapping[str, EndReason]
    lost: frozenset[str]
    strangers: Mapping[str, float]
    older: frozenset[str]
    seen: Mapping[str, Seen] | None
    broken: frozenset[str]
    given_up: frozenset[str]
    room: int
    max_age_s: float
    orphan_age_s: float


@dataclass(slots=True)
class Plan:
    """Containers to start by template, sessions to end and ready containers to drop by reason, orphans to remove.

    Of the containers whose stream broke: those to give up, and those to attach to again.
    """

    start: dict[str, int] = field(default_factory=dict)
    end: dict[str, EndReason] = field(default_factory=dict)
    drop: dict[str, str] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    lose: list[str] = field(default_factory=list)
    again: list[str] = field(default_factory=list)


def plan(view: View) -> Plan:
    """Return the plan that brings the world closer to what it should be."""
    made = Plan(end=dict(view.overdue))
    for sid, name in view.sessions.items():
        if _is_gone(view, name):
            made.end[sid] = "lost"
    for pool in view.pools.values():
        for name, age_s in pool.ready.items():
            if _is_gone(view, name):
                made.drop[name] = "lost"
            elif age_s > view.max_age_s:
                made.drop[name] = "max_age"
    made.orphans = [
        name for name, age_s in view.strangers.items() if name in view.given_up or age_s >= view.orphan_age_s
    ]
    if view.seen is not None:
        made.lose = [name for name in view.broken if _is_gone(view, name)]
        made.again = [name for name in view.broken if name not in made.lose and name in view.seen]
    room = view.room
    # Those who wait come before those who might: every pool's waiting first, then the pools' sizes.
    for template, pool in view.pools.items():
        room -= _start(made, template, pool, pool.waiting - pool.starting, room)
    for template, pool in view.pools.items():
        kept = sum(name not in made.drop for name in pool.ready)
        wanted = pool.size + pool.waiting - kept - pool.starting - made.start.get(template, 0)
        room -= _start(made, template, pool, wanted, room)
        surplus = kept - pool.size
        for name in [name for name in pool.ready if name not in made.drop][: max(0, surplus)]:
            made.drop[name] = "surplus"
    return made


def _start(made: Plan, template: str, pool: PoolView, wanted: int, room: int) -> int:
    already = made.start.get(template, 0)
    count = max(0, min(wanted, room, pool.may_start - already))
    if count:
        made.start[template] = already + count
    return count


def _is_gone(view: View, name: str) -> bool:
    if name in view.lost:
        return True
    if view.seen is None or name not in view.older:
        return False
    seen = view.seen.get(name)
    return seen is None or not seen.running
