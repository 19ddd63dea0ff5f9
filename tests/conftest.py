"""Fixtures that all tests share: the event loop, and one live service on each engine."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.live import Live, open_folder, serve

NO_ENGINE = os.environ.get("SANDBOX_TEST_ENGINE") == "none"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Run async tests on asyncio, all in one loop, so that fixtures of any scope may be async."""
    return "asyncio"


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    """Where services and local engines of this run keep their files."""
    with open_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def local_service(state_dir: Path) -> Iterator[Live]:
    """A live service on the local engine, with a small limit on bodies."""
    instance = f"test-local-{os.getpid()}"
    with serve(state_dir, instance=instance, engine="local", max_body=str(1 << 20)) as live:
        yield live


@pytest.fixture
def client(local_service: Live) -> httpx.Client:
    """A client of the live service on the local engine."""
    return local_service.client


@pytest.fixture
def session(client: httpx.Client) -> Iterator[str]:
    """A session of the test's own; yields its path."""
    path = client.post("/v1/sessions", json={}).headers["Location"]
    yield path
    client.delete(path)


@pytest.fixture(scope="session")
def real_engine() -> None:
    """Skip without a Docker Engine, which only a person may choose: on CI it is a failure."""
    if NO_ENGINE:
        assert os.environ.get("CI") != "true", "CI tests the real engine: SANDBOX_TEST_ENGINE=none is not for it"
        pytest.skip("SANDBOX_TEST_ENGINE=none: the real engine is not tested")


@pytest.fixture(scope="session")
def docker_service(real_engine: None, state_dir: Path) -> Iterator[Live]:
    """A live service on the real engine."""
    instance = f"test-docker-{os.getpid()}"
    with serve(state_dir, instance=instance, engine="docker", uid_base="51000", heartbeat_seconds="1") as live:
        yield live
