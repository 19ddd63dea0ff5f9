"""Executions that nobody waits for: asynchronous ones, those in the background, and how they are cancelled."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live import Live, open_folder, serve, until

ASYNC = {"Prefer": "respond-async"}
SOON_S = 10.0
CANCEL_S = 1.0
FOREVER = {"command": "sleep 300"}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service of which a session runs one execution at once and two in the background."""
    with (
        open_folder() as folder,
        serve(
            folder,
            instance="test-async",
            engine="local",
            session_executions="1",
            session_background="2",
            reconcile_seconds="0.2",
            max_ttl_seconds="7200",
        ) as service,
    ):
        yield service


@pytest.fixture
def client(live: Live) -> httpx.Client:
    return live.client


@pytest.fixture
def session(session: str) -> str:
    """A session of the test's own, as the path of its executions."""
    return f"{session}/executions"


def begin(client: httpx.Client, session: str, body: dict[str, Any], **headers: str) -> str:
    """Begin an execution; return its path."""
    answer = client.post(session, json=body, headers=ASYNC | headers)
    assert answer.status_code == 202, answer.text
    return answer.headers["Location"]


def ended(client: httpx.Client, path: str) -> dict[str, Any]:
    """Wait until an execution has ended."""
    execution: dict[str, Any] = until(lambda: (one := client.get(path).json())["outcome"] and one)
    return execution


def cancelled(client: httpx.Client, path: str) -> float:
    """Cancel an execution; return the seconds until its outcome says so."""
    begun = time.monotonic()
    assert client.delete(path).status_code == 204
    assert ended(client, path)["outcome"] == "cancelled"
    return time.monotonic() - begun


def sleeping(seconds: str) -> bool:
    """Tell whether a `sleep` of these seconds is alive on this machine."""
    wanted = f"sleep\0{seconds}\0".encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == wanted:
                return True
        except OSError:
            continue
    return False


# --- asynchronous


def test_an_asynchronous_execution_is_answered_at_once_and_read_until_it_ends(
    client: httpx.Client, session: str
) -> None:
    body = {"command": "echo early; while [ ! -e go ]; do sleep 0.01; done; echo late"}
    answer = client.post(session, json=body, headers=ASYNC)
    assert (answer.status_code, answer.headers["Preference-Applied"]) == (202, "respond-async")
    execution = answer.json()
    path = answer.headers["Location"]
    assert path == f"{session}/{execution['id']}"
    assert (execution["outcome"], execution["background"]) == (None, False)
    running = until(lambda: (one := client.get(path).json())["stdout"] and one)
    assert (running["outcome"], running["stdout"]) == (None, "early\n")
    assert client.post(session, json={"command": "touch go", "background": True}).status_code == 202
    assert ended(client, path)["stdout"] == "early\nlate\n"


@pytest.mark.parametrize(
    ("prefer", "status"),
    [
        ("respond-async", 202),
        ("Respond-Async", 202),
        ("wait=10, respond-async", 202),
        ("respond-async; x=1, handling=lenient", 202),
        ("handling=lenient", 200),
        ("respond-asynchronously", 200),
        ("", 200),
    ],
)
def test_only_the_preference_itself_makes_it_asynchronous(
    client: httpx.Client, session: str, prefer: str, status: int
) -> None:
    assert client.post(session, json={"code": "1"}, headers={"Prefer": prefer}).status_code == status


def test_what_makes_no_sense_is_refused_and_not_begun(client: httpx.Client, session: str) -> None:
    assert client.post(session, json={"code": "1", "command": "ls"}, headers=ASYNC).status_code == 400
    assert client.get(session).json()["executions"] == []


def test_a_repeat_with_the_same_key_is_the_same_execution(client: httpx.Client, session: str) -> None:
    key = {"Idempotency-Key": "one"}
    path = begin(client, session, FOREVER, **key)
    assert begin(client, session, FOREVER, **key) == path
    assert client.post(session, json={"code": "2"}, headers=ASYNC | key).status_code == 422
    cancelled(client, path)


def test_executions_are_listed_in_pages(client: httpx.Client, session: str) -> None:
    ids = [client.post(session, json={"code": str(number)}).json()["id"] for number in range(5)]
    found: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while query.get("after", "") is not None:
        page = client.get(session, params=query).json()
        assert len(page["executions"]) <= 2
        found += [one["id"] for one in page["executions"]]
        query["after"] = page["next"]
    assert found == ids
    answer = client.get(session, params={"after": "e0"})
    assert (answer.status_code, answer.json()["code"]) == (404, "execution_not_found")


# --- cancelled


def test_a_running_execution_is_cancelled_within_a_second_and_its_processes_are_gone(
    client: httpx.Client, session: str
) -> None:
    path = begin(client, session, {"command": "sleep 4321.5 & sleep 4321.5"})
    until(lambda: sleeping("4321.5"))
    assert cancelled(client, path) < CANCEL_S
    assert not sleeping("4321.5")


def test_one_that_waits_for_its_turn_is_cancelled_at_once_and_never_runs(client: httpx.Client, session: str) -> None:
    first = begin(client, session, FOREVER)
    second = begin(client, session, {"command": "touch ran"})
    with ThreadPoolExecutor() as threads:
        third = threads.submit(client.post, session, json={"command": "touch ran"}, headers={"X": "waits"})
        until(lambda: len(client.get(session).json()["executions"]) == 3)
        waiting = client.get(session).json()["executions"][2]["id"]
        assert cancelled(client, second) < CANCEL_S
        assert client.delete(f"{session}/{waiting}").status_code == 204
        answer = third.result(CANCEL_S)  # who waits for it is answered too
    assert (answer.json()["outcome"], answer.json()["exit_code"]) == ("cancelled", None)
    assert client.get(first).json()["outcome"] is None
    cancelled(client, first)
    assert client.post(session, json={"command": "ls"}).json()["stdout"] == ""


def test_a_cancelled_execution_gives_its_turn_to_the_next(client: httpx.Client, session: str) -> None:
    first = begin(client, session, FOREVER)
    called_off = begin(client, session, FOREVER)
    last = begin(client, session, {"code": "print('ran')"})
    cancelled(client, called_off)
    cancelled(client, first)
    assert ended(client, last)["stdout"] == "ran\n"


def test_a_cancel_overtakes_no_job_that_is_sent_in_parts(client: httpx.Client, session: str) -> None:
    body = {"command": "sleep 300", "stdin": "x" * 6_000_000}
    for _ in range(5):
        assert cancelled(client, begin(client, session, body)) < CANCEL_S


# --- in the background


def test_a_background_execution_takes_no_turn_and_is_listed(client: httpx.Client, session: str) -> None:
    answer = client.post(session, json=FOREVER | {"background": True})
    assert (answer.status_code, answer.json()["background"], "Preference-Applied" in answer.headers) == (
        202,
        True,
        False,
    )
    assert client.post(session, json={"code": "print(1)"}).json()["stdout"] == "1\n"
    listed = client.get(session).json()["executions"]
    assert [(one["background"], one["outcome"]) for one in listed] == [(True, None), (False, "ok")]
    assert cancelled(client, answer.headers["Location"]) < CANCEL_S


def test_the_background_has_a_cap_of_its_own(client: httpx.Client, session: str) -> None:
    paths = [client.post(session, json=FOREVER | {"background": True}).headers["Location"] for _ in range(2)]
    answer = client.post(session, json=FOREVER | {"background": True})
    assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (429, "too_many_requests", "1")
    cancelled(client, paths[0])
    assert client.post(session, json={"command": "true", "background": True}).status_code == 202


def test_a_background_execution_has_the_timeout_that_it_asks_for_up_to_a_sessions_longest_life(
    client: httpx.Client, session: str
) -> None:
    body = FOREVER | {"background": True}
    assert ended(client, begin(client, session, body | {"timeout_s": 0.2}))["outcome"] == "timeout"
    cancelled(client, begin(client, session, body | {"timeout_s": 7200}))
    answer = client.post(session, json=body | {"timeout_s": 7201})
    assert (answer.status_code, answer.json()["code"]) == (400, "timeout_above_cap")
    assert "timeout_s" in answer.json()["detail"]


def test_the_handlers_context_knows_of_no_timeout_in_the_background(client: httpx.Client, session: str) -> None:
    body = {"code": "def handler(event, context): return context.get_remaining_time_in_millis()", "background": True}
    assert ended(client, begin(client, session, body))["value"] > 365 * 86400 * 1000


def test_a_background_execution_keeps_its_session_from_being_idle(client: httpx.Client) -> None:
    path = client.post("/v1/sessions", json={"idle_timeout_s": 0.5}).headers["Location"]
    body = {"command": "sleep 1.5", "background": True}
    running = client.post(f"{path}/executions", json=body).headers["Location"]
    assert ended(client, running)["outcome"] == "ok"
    until(lambda: client.get(path).status_code == 410)


def test_a_background_execution_ends_with_its_sessions_life(client: httpx.Client) -> None:
    path = client.post("/v1/sessions", json={"ttl_s": 0.6}).headers["Location"]
    client.post(f"{path}/executions", json={"command": "sleep 4321.75", "background": True})
    until(lambda: sleeping("4321.75"))
    until(lambda: client.get(path).status_code == 410)
    until(lambda: not sleeping("4321.75"))


@pytest.mark.parametrize("field", ["background", "stdin_open"])
def test_a_one_shot_has_no_background_and_no_open_stdin(client: httpx.Client, field: str) -> None:
    answer = client.post("/v1/execute", json={"code": "1", field: True})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")
    assert field in answer.json()["detail"]


def test_the_end_of_the_service_does_not_wait_for_the_background() -> None:
    with open_folder() as folder:
        with serve(folder, instance="test-end", engine="local", drain_seconds="60") as live:
            path = live.client.post("/v1/sessions", json={}).headers["Location"]
            live.client.post(f"{path}/executions", json=FOREVER | {"background": True})
            begun = time.monotonic()
        assert time.monotonic() - begun < SOON_S
