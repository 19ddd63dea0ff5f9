"""AWS Lambda's wire on the real engine: boto3, a handler written with Powertools, memory, and what is left behind."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from tests import lambdas
from tests.lambdas import KEY, KEY_NAME, client, create, failure, invoke, zipped
from tests.live import Live, serve, until

INSTANCE = f"test-docker-lambda-{os.getpid()}"
NOISE = os.urandom(12 << 20).hex()  # a zip makes it about half as long
SETTINGS = {"api_keys": f"{KEY_NAME}:{KEY}", "uid_base": "56000"}


@pytest.fixture(scope="module")
def live(real_engine: None, state_dir: Path) -> Iterator[Live]:
    """A service with a key on the real engine."""
    with serve(state_dir, instance=INSTANCE, engine="docker", **SETTINGS) as live:
        yield live


@pytest.fixture
def aws(live: Live) -> Any:
    """A boto3 client of it."""
    return client(live.url)


def test_a_function_is_created_invoked_changed_and_deleted(aws: Any) -> None:
    create(aws, "f", Environment={"Variables": {"COLOUR": "red"}})
    said = [invoke(aws, "f", {"n": number}) for number in range(3)]
    assert [(one["event"]["n"], one["calls"], one["env"]["COLOUR"]) for one in said] == [
        (0, 1, "red"),
        (1, 2, "red"),
        (2, 3, "red"),
    ]
    aws.update_function_code(FunctionName="f", ZipFile=zipped(app="handler = lambda event: 'new'"))
    assert invoke(aws, "f") == "new"
    aws.delete_function(FunctionName="f")
    with pytest.raises(aws.exceptions.ResourceNotFoundException):
        aws.invoke(FunctionName="f")


def test_a_handler_that_is_written_with_powertools_runs_as_it_is(aws: Any) -> None:
    variables = {"POWERTOOLS_TRACE_DISABLED": "true"}
    create(aws, "orders", lambdas.powertools_zip(), Timeout=60, Environment={"Variables": variables})
    said = invoke(aws, "orders", lambdas.GATEWAY_EVENT)
    assert (said["statusCode"], json.loads(said["body"]), said["function"]) == (200, {"number": "7"}, "orders")


def test_a_function_that_uses_up_the_memory_is_told_so_and_runs_again(aws: Any) -> None:
    grow = "import mmap\ndef handler(event):\n  m = mmap.mmap(-1, event)\n  for at in range(0, event, 4096): m[at] = 1"
    create(aws, "hungry", grow, Timeout=30)
    assert failure(aws, "hungry", 1 << 30)["errorType"] == "Runtime.OutOfMemory"
    assert invoke(aws, "hungry", 4096) is None


def test_code_as_large_as_the_workspace_allows_gets_there_in_pieces(aws: Any) -> None:
    create(aws, "large", zipped(app="handler = lambda event: len(open('/workspace/data.py').read())", data=NOISE))
    assert invoke(aws, "large") == len(NOISE)


def test_code_that_does_not_fit_the_workspace_is_refused(aws: Any) -> None:
    with pytest.raises(aws.exceptions.InvalidParameterValueException, match="Could not unzip uploaded file"):
        create(aws, "huge", zipped(app=NOISE + NOISE[::-1] + NOISE[::2]))


def test_nothing_is_left_behind_and_functions_are_there_again(real_engine: None, state_dir: Path) -> None:
    instance = f"{INSTANCE}-end"
    settings = SETTINGS | {"uid_base": "56500", "on_exit": "keep"}
    containers = docker.from_env().containers
    with serve(state_dir, instance=instance, engine="docker", **settings) as live:
        create(client(live.url), "f")
        assert invoke(client(live.url), "f")["calls"] == 1
        assert live.terminate() == 0
    assert containers.list(all=True, filters={"label": f"sandbox.instance={instance}"}) == []
    with serve(state_dir, instance=instance, engine="docker", **settings) as live:
        assert invoke(client(live.url), "f")["calls"] == 1


def test_a_crash_leaves_no_container_of_a_function(real_engine: None, state_dir: Path) -> None:
    instance = f"{INSTANCE}-crash"
    settings = SETTINGS | {"uid_base": "57000", "pool_size": "0"}
    containers = docker.from_env().containers
    label: dict[str, str | list[str] | bool] = {"label": f"sandbox.instance={instance}"}
    with serve(state_dir, instance=instance, engine="docker", **settings) as live:
        create(client(live.url), "f")
        live.process.kill()
        live.process.wait()
    assert len(containers.list(filters=label)) == 1
    with serve(state_dir, instance=instance, engine="docker", **settings) as live:
        until(lambda: containers.list(all=True, filters=label) == [])
        assert invoke(client(live.url), "f")["calls"] == 1
