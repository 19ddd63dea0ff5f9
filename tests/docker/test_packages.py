"""Packages in containers: from wheels that an image brings, or that a template names; offline, in a fresh sandbox."""

import io
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.live import IMAGE, Live, serve
from tests.wheels import make_wheels

pytestmark = pytest.mark.usefixtures("real_engine")
TEMPLATES = """
[python]
image = "{tag}"
[named]
image = "{tag}"
wheels = "/opt/named"
[missing]
image = "{tag}"
wheels = "/opt/missing"
"""
GREET = "from hello_wheel import greet\ndef handler(event): return greet()"


@pytest.fixture(scope="module")
def live(real_engine: None, state_dir: Path) -> Iterator[Live]:
    """A live service on an image with wheels."""
    wheels = state_dir / "docker-wheels"
    make_wheels(wheels)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        recipe = f"FROM {IMAGE}\nCOPY wheels /opt/sandbox/wheels\nCOPY wheels /opt/named\n".encode()
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(recipe)
        tar.addfile(entry, io.BytesIO(recipe))
        tar.add(wheels, "wheels")
    packed.seek(0)
    tag = f"sandbox-test-wheels:{os.getpid()}"
    api = docker.from_env()
    api.images.build(fileobj=packed, custom_context=True, tag=tag, rm=True, forcerm=True)
    file = state_dir / "docker-wheels.toml"
    file.write_text(TEMPLATES.format(tag=tag))
    instance = f"test-wheels-{os.getpid()}"
    with serve(
        state_dir,
        instance=instance,
        engine="docker",
        uid_base="52700",
        templates_file=str(file),
        acquire_timeout_seconds="6",
    ) as live:
        yield live
    api.images.remove(tag, force=True)
    api.close()


@pytest.mark.parametrize("template", ["python", "named"])
def test_a_session_starts_with_its_packages_offline(live: Live, template: str) -> None:
    answer = live.client.post("/v1/sessions", json={"template": template, "packages": ["needy"]})
    assert answer.status_code == 201, answer.text
    path = answer.headers["Location"]
    assert live.client.post(f"{path}/executions", json={"code": GREET}).json()["value"] == "hello 1.0"
    assert live.client.post(f"{path}/packages", json={"packages": ["hello-wheel>=2"]}).json()["outcome"] == "ok"
    assert live.client.post(f"{path}/executions", json={"code": GREET}).json()["value"] == "hello 2.1"
    assert live.client.post(f"{path}/executions", json={"command": "hello-wheel"}).json()["stdout"] == "hello 2.1\n"
    live.client.delete(path)


def test_packages_that_cannot_be_had_leave_no_session_and_no_container(live: Live) -> None:
    answer = live.client.post("/v1/sessions", json={"packages": ["not-there"]})
    assert (answer.status_code, answer.json()["code"]) == (422, "packages_not_installed")
    assert "No matching distribution found for not-there" in answer.json()["detail"]
    assert live.client.get("/v1/sessions").json()["sessions"] == []


def test_wheels_that_the_image_lacks_are_named(live: Live) -> None:
    answer = live.client.post("/v1/sessions", json={"template": "missing"})
    assert answer.status_code == 503
    end_at = time.monotonic() + 30
    while "the image has no directory /opt/missing" not in live.log:
        assert time.monotonic() < end_at, live.log
        time.sleep(0.1)
