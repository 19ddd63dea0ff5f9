"""The cases of attacks.json, and the three ways in which one can end."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

FILE = Path(__file__).with_name("attacks.json")
Kind = Literal["code", "http", "file", "lifecycle"]
Verdict = Literal["pass", "fail", "n/a"]
VERDICTS: tuple[Verdict, ...] = ("pass", "fail", "n/a")


class Case(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One hostile case: what is done, and what a good sandbox answers."""

    id: str
    group: str
    kind: Kind
    language: str | None
    payload: Any
    expect: dict[str, Any]
    timeout_s: float | None = None

    @property
    def allowed_s(self) -> float:
        """How long its code may run. Short where the case is to time out; else a busy machine must not decide it."""
        if self.timeout_s is not None:
            return self.timeout_s
        return 2.0 if "timeout" in str(self.expect.get("status")) else 10.0


class Failed(AssertionError):
    """The service did not do what the case expects."""


class NotApplicable(Exception):
    """What the case attacks does not exist here."""


def check(holds: object, reason: str) -> None:
    """Raise Failed with the reason when the claim does not hold."""
    if not holds:
        raise Failed(reason)


def load() -> list[Case]:
    """Return all cases in the file's order."""
    # Not by msgspec: one payload is a lone surrogate, on purpose.
    return msgspec.convert(json.loads(FILE.read_bytes()), list[Case])


def select(cases: Iterable[Case], only: str | None) -> list[Case]:
    """Return the cases whose id or group the comma-separated list names; all without one."""
    chosen = list(cases)
    if only is None:
        return chosen
    wanted = {word.strip() for word in only.split(",") if word.strip()}
    known = {case.id for case in chosen} | {case.group for case in chosen}
    if unknown := wanted - known:
        raise ValueError(f"no case and no group is called {', '.join(sorted(unknown))}")
    return [case for case in chosen if wanted & {case.id, case.group}]
