"""Every hostile case in its short form, against a live service on the real engine; `make attack` is the long form."""

from collections.abc import Iterator

import pytest

from tests.attack.cases import Case, load
from tests.attack.live import Live, serve
from tests.attack.run import judge


@pytest.fixture(scope="module")
def attacked(real_engine: None) -> Iterator[Live]:
    """One service that has to stand all of them."""
    with serve("docker") as live:
        yield live


@pytest.mark.parametrize("case", load(), ids=lambda case: str(case.id))
def test_the_case_ends_as_in_a_good_sandbox(attacked: Live, case: Case) -> None:
    result = judge(attacked, case, short=True)
    if result.verdict in ("n/a", "later"):
        pytest.skip(result.reason)  # the service does not offer what is attacked, or not yet
    assert result.verdict == "pass", result.reason
