"""JavaScript on the local engine, where the host has node; the image's node is tested in tests/docker."""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import languages
from orchestrator import models
from orchestrator.errors import InvalidRequest
from orchestrator.frames import Support
from orchestrator.languages import check
from orchestrator.models import ExecutionRequest
from tests.javascript import ROWS, WRITE_FILES, Row, assert_row
from tests.live import serve, until

HAS_NODE = shutil.which("node", path=languages.PATH) is not None
needs_node = pytest.mark.skipif(not HAS_NODE, reason="this host has no node in /usr")


@pytest.fixture(scope="module")
def path(local_service: Any) -> Iterator[str]:
    """The path of a session's executions, the workspace of which has the files."""
    client = local_service.client
    session = client.post("/v1/sessions").headers["Location"]
    assert client.post(f"{session}/executions", json={"code": WRITE_FILES}).json()["outcome"] == "ok"
    yield f"{session}/executions"
    client.delete(session)


def execute(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json={"language": "javascript", "timeout_s": 20} | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@needs_node
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_javascript_ends_as_lambda_has_it(client: httpx.Client, path: str, row: Row) -> None:
    assert_row(row, execute(client, path, **row.fields))


@needs_node
def test_a_timeout_ends_what_does_not_want_to_end(client: httpx.Client, path: str) -> None:
    code = "console.log('x'); process.on('SIGTERM', () => {}); for (;;);"
    execution = execute(client, path, code=code, timeout_s=0.5)
    assert ("timeout", 137, "x\n") == tuple(execution[name] for name in ("outcome", "exit_code", "stdout"))


@needs_node
def test_the_remaining_time_counts_down_from_the_timeout(client: httpx.Client, path: str) -> None:
    code = (
        "exports.handler = async (event, context) => { const first = context.getRemainingTimeInMillis();"
        "await new Promise((done) => setTimeout(done, 50)); return [first, context.getRemainingTimeInMillis()] }"
    )
    first, second = execute(client, path, code=code, timeout_s=3)["value"]
    assert 0 < second <= first - 49 < 3000
    assert isinstance(first, int)


def waiting_nodes(pid: int) -> int:
    """Count the nodes below a process."""
    found = 0
    with suppress(OSError):  # it ended meanwhile
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in task.read_text().split():
                found += Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"node\0") + waiting_nodes(int(child))
    return found


@needs_node
def test_a_node_waits_from_the_first_use_on(state_dir: Path) -> None:
    with serve(state_dir, instance="test-js-use", engine="local", uid_base="120600", pool_size="1") as live:
        pid = live.process.pid
        session = live.client.post("/v1/sessions").headers["Location"]
        assert live.client.post(f"{session}/executions", json={"code": "1"}).json()["outcome"] == "ok"
        assert waiting_nodes(pid) == 0
        for _ in range(2):
            execute(live.client, f"{session}/executions", code="1")
            until(lambda: waiting_nodes(pid) == 1)


@needs_node
def test_nodes_wait_ahead_where_the_template_wants_them(state_dir: Path) -> None:
    more = {"preboot": "python:1,javascript:2", "pool_size": "1", "uid_base": "120700"}
    with serve(state_dir, instance="test-js-ahead", engine="local", **more) as live:
        until(lambda: waiting_nodes(live.process.pid) == 2)


def test_both_sides_know_the_same_languages() -> None:
    assert set(models.LANGUAGES) == set(languages.LANGUAGES)


def test_a_template_tells_what_its_image_has(client: httpx.Client) -> None:
    client.delete(client.post("/v1/sessions").headers["Location"])
    has = [name for name in models.LANGUAGES if name in languages.find_languages()]
    assert client.get("/v1/templates").json()["templates"][0]["languages"] == has
    assert ("javascript" in has) == HAS_NODE


SPOKEN: dict[models.Language, Support] = {"python": Support(handlers=True), "shell": Support(handlers=False)}


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (ExecutionRequest(language="javascript", code="1"), "template t lacks javascript, it has python, shell"),
        (ExecutionRequest(language="shell", code="1", handler="a"), "`shell` has no handlers"),
        (ExecutionRequest(language="shell", handler="a.b"), "`shell` has no handlers"),
        (ExecutionRequest(code="1", handler="a"), None),
        (ExecutionRequest(command="true", language="javascript"), None),
        (ExecutionRequest(command=["node", "x.js"], language="javascript"), None),
    ],
)
def test_what_an_image_does_not_speak_is_refused(request_: ExecutionRequest, reason: str | None) -> None:
    with nullcontext() if reason is None else pytest.raises(InvalidRequest, match=reason):
        check(request_, SPOKEN, template="t")


def test_packing_for_a_program_that_is_not_python_keeps_every_character() -> None:
    assert languages.pack_json({"a": "é\ud800"}) == b'{"a": "\\u00e9\\ud800"}'
    assert languages.Language(program="x", words=("x", "-e", languages.CODE)).argv("1", ["a"]) == ["x", "-e", "1", "a"]


def test_a_heap_takes_part_of_the_memory_limit() -> None:
    command = languages.LANGUAGES["javascript"].command(128 << 20)
    assert (command[:2], command[-1]) == (["node", "--max-old-space-size=80"], "/run/harness.js")
