"""The attacks in their short form: every case that can be played here, each a test, and the control."""

from collections.abc import Iterator

import docker
import pytest
from docker.utils import kwargs_from_env

from tests.attack import code, controls
from tests.attack.cases import Case, Failed, Later, NotApplicable, load
from tests.attack.live import Live, serve
from tests.attack.run import attempt

CASES = load()
CONTROLS = ["ns-04", "fs-02", "priv-01", "net-05"]  # three that escape from a plain container, and one that does not
SLOW = {"life-09", "life-19", "shr-06"}  # long even in their short form: `make attack` has them


@pytest.fixture(scope="module")
def live(real_engine: None) -> Iterator[Live]:
    """One service for all cases; some start another of their own."""
    with serve() as live:
        yield live


@pytest.mark.parametrize("case", [case for case in CASES if case.id not in SLOW], ids=lambda case: case.id)
def test_an_attack_ends_as_a_good_sandbox_ends_it(live: Live, case: Case) -> None:
    try:
        attempt(live, case, short=True)
    except (NotApplicable, Later) as error:
        pytest.skip(str(error))


def test_plain_containers_let_the_same_attacks_through(real_engine: None) -> None:
    """So a case that passes passes because of the sandbox, not because of the runner."""
    api = docker.APIClient(**kwargs_from_env(), version="auto", timeout=60)
    chosen = [case for case in CASES if case.id in CONTROLS]
    escaped = [case.id for case in chosen if controls.escaped(api, case) is not None]
    api.close()
    assert escaped == CONTROLS[:3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("outcome", "timeout"),
        ("outcome", "lost"),
        ("stdout", "VERDICT:ESCAPED"),
        ("stdout", ""),
        ("stdout", "VERDICT:BLOCKED VERDICT:ESCAPED"),
    ],
)
def test_the_runner_sees_an_execution_that_is_not_as_expected(field: str, value: str) -> None:
    case = next(case for case in CASES if case.id == "ns-01")
    fine = {"outcome": "ok", "stdout": "VERDICT:BLOCKED", "stderr": "", "error": None, "exit_code": 0, "value": None}
    assert code.complaints(case, fine, 0.1) == []
    assert code.complaints(case, fine | {field: value}, 0.1) != []


def test_a_check_that_does_not_hold_fails_its_case(live: Live) -> None:
    """By a case whose code leaves a process in the session that is still running when the check looks."""
    case = next(case for case in CASES if case.id == "priv-01")
    wrong = Case(id="control", group="control", kind="code", language="python", payload="print(1)", expect=case.expect)
    with pytest.raises(Failed, match="stdout lacks"):
        code.run(live, wrong)
