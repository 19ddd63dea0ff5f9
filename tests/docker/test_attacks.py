"""Every hostile case in its short form, against a live service on the real engine; `make attack` is the long form."""

import gc
import threading
import time
from collections.abc import Iterator

import docker
import pytest
from docker.utils import kwargs_from_env

from tests.attack import beyond, chaos, code, controls
from tests.attack.after import Scene, watched
from tests.attack.cases import Case, Failed, load
from tests.attack.live import Live, serve
from tests.attack.run import judge

CASES = [*load(), *beyond.CASES, *chaos.CASES]
# Long even when short: only `make attack` has them.
SLOW = {"api-14", "life-08", "life-09", "life-19", "shr-06", "chaos-01", "chaos-06"}
CONTROLS = ["ns-04", "fs-02", "priv-01", "net-05"]  # three that escape from a plain container, one that does not


@pytest.fixture(scope="module")
def attacked(real_engine: None) -> Iterator[Live]:
    """One service that has to stand all of them."""
    with serve("docker") as live:
        yield live


# docker-py may leave a socket open when its engine goes away under a call, and where the cases take engines away that is
# no fault of what is tested. Collected here, so that no other test is blamed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("case", [case for case in CASES if case.id not in SLOW], ids=lambda case: str(case.id))
def test_the_case_ends_as_in_a_good_sandbox(attacked: Live, case: Case) -> None:
    result = judge(attacked, case, short=True)
    gc.collect()
    if result.verdict == "n/a":
        pytest.skip(result.reason)  # what is attacked does not exist here
    assert result.verdict == "pass", result.reason


def test_plain_containers_let_the_same_attacks_through(real_engine: None) -> None:
    """What passes above passes because of the sandbox, not because the runner sees nothing."""
    api = docker.APIClient(**kwargs_from_env(), version="auto", timeout=60)
    escaped = [case.id for case in CASES if case.id in CONTROLS and controls.escaped(api, case) is not None]
    api.close()
    assert escaped == CONTROLS[:3]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("outcome", "timeout"),
        ("outcome", "lost"),
        ("stdout", "VERDICT:ESCAPED"),
        ("stdout", "VERDICT:BLOCKED VERDICT:ESCAPED"),
        ("stdout", ""),
    ],
)
def test_an_execution_that_is_not_as_expected_is_seen(field: str, value: str) -> None:
    case = next(case for case in CASES if case.id == "ns-01")
    fine = {"outcome": "ok", "stdout": "VERDICT:BLOCKED", "stderr": "", "error": None, "exit_code": 0, "value": None}
    assert code.complaints(case, fine, 0.1) == []
    assert code.complaints(case, fine | {field: value}, 0.1) != []


def test_a_case_that_escapes_fails(attacked: Live) -> None:
    expect = next(case for case in CASES if case.id == "ns-01").expect
    escape = Case("control", "control", "code", "python", "print('VERDICT:ESCAPED')", expect)
    with pytest.raises(Failed, match="stdout has 'VERDICT:ESCAPED'"):
        code.run(attacked, escape)


def test_a_process_that_stays_is_found(attacked: Live) -> None:
    """By an execution that still runs when the check looks."""
    expect = {"status": "ok", "stdout_contains": [], "stdout_not_contains": [], "after": ["no_processes_left"]}
    stays = Case("control", "control", "code", "python", "print(1)", expect)
    with attacked.session() as sid:
        scene = Scene(attacked, sid, stays)
        runner = threading.Thread(target=attacked.execute, args=(sid, "import time; time.sleep(3)"))
        with pytest.raises(Failed, match="alive after the result"), watched(scene):
            start(runner)
        runner.join()


def start(runner: threading.Thread) -> None:
    """Start a thread, and give it time to get where it wants to be."""
    runner.start()
    time.sleep(1)
