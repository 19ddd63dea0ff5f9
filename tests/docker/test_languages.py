"""The image's languages: JavaScript row by row, and an image that lacks it."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.javascript import ROWS, WRITE_FILES, Row, assert_row
from tests.live import IMAGE, Live, serve

pytestmark = pytest.mark.usefixtures("real_engine")


@pytest.fixture(scope="module")
def path(docker_service: Live) -> Iterator[str]:
    """The path of a session's executions, the workspace of which has the files."""
    client = docker_service.client
    session = client.post("/v1/sessions").headers["Location"]
    assert client.post(f"{session}/executions", json={"code": WRITE_FILES}).json()["outcome"] == "ok"
    yield f"{session}/executions"
    client.delete(session)


def execute(client: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    answer = client.post(path, json={"language": "javascript", "timeout_s": 20} | fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_javascript_ends_as_lambda_has_it(docker_service: Live, path: str, row: Row) -> None:
    assert_row(row, execute(docker_service.client, path, **row.fields))


def test_javascript_runs_once_in_a_fresh_container(docker_service: Live) -> None:
    order = {"language": "javascript", "code": "exports.handler = async (event) => event.n * 2", "event": {"n": 21}}
    assert docker_service.client.post("/v1/execute", json=order).json()["value"] == 42


def test_the_default_image_has_every_language(docker_service: Live) -> None:
    [template] = docker_service.client.get("/v1/templates").json()["templates"]
    assert template["languages"] == ["python", "javascript", "shell"]


@pytest.fixture(scope="module")
def without_node(real_engine: None, state_dir: Path) -> Iterator[Live]:
    """A live service whose template `bare` has an image without node, which nothing was started from yet."""
    api = docker.from_env()
    tag = f"sandbox-test-bare:{os.getpid()}"
    recipe = f"FROM {IMAGE}\nRUN rm /usr/bin/node /usr/bin/nodejs\n"
    api.images.build(fileobj=io.BytesIO(recipe.encode()), tag=tag, network_mode="none", rm=True, forcerm=True)
    file = state_dir / "bare.toml"
    file.write_text(f'[bare]\nimage = "{tag}"\npreboot = {{ python = 1, javascript = 1 }}\n')
    instance = f"test-bare-{os.getpid()}"
    with serve(state_dir, instance=instance, engine="docker", uid_base="52500", templates_file=str(file)) as live:
        yield live
    api.images.remove(tag, force=True)
    api.close()


def test_a_language_that_the_image_lacks_is_refused_by_the_agents_word(without_node: Live) -> None:
    client = without_node.client
    order = {"language": "javascript", "code": "1", "template": "bare"}
    assert client.get("/v1/templates").json()["templates"][1]["languages"] is None
    first = client.post("/v1/execute", json=order)  # nobody knows yet: a container tells
    assert client.get("/v1/templates").json()["templates"][1]["languages"] == ["python", "shell"]
    second = client.post("/v1/execute", json=order)
    session = client.post("/v1/sessions", json={"template": "bare"}).headers["Location"]
    third = client.post(f"{session}/executions", json={"language": "javascript", "code": "1"})
    for answer in (first, second, third):
        assert (400, "invalid_request") == (answer.status_code, answer.json()["code"])
        assert "template bare lacks javascript, it has python, shell" in answer.json()["detail"]
    assert client.post(f"{session}/executions", json={"code": "print(1)"}).json()["stdout"] == "1\n"
    client.delete(session)
