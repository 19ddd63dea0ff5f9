"""Streams, cancelling, the background and stdin on the real engine, and over a crash of the orchestrator."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.docker.test_adoption import next_life, ours
from tests.live import Live, serve, until

UID_BASE = "110000"
ASYNC = {"Prefer": "respond-async"}
CANCEL_S = 1.0
# Numbers its lines; pauses at 3000 of them until it may go on.
COUNTING = """
import os, sys, time
for n in range(6000):
    print(n, 'ü' * (n % 7), flush=True)
    if n == 3000:
        while not os.path.exists("go"):
            time.sleep(0.02)
print("end", file=sys.stderr)
handler = lambda event: n
"""
COUNTED = "".join(f"{n} {'ü' * (n % 7)}\n" for n in range(6000))
Event = tuple[int, str, Any]

pytestmark = pytest.mark.usefixtures("real_engine")


def parsed(data: bytes) -> list[Event]:
    """Return the whole events among the bytes: number, kind, data."""
    blocks = data[: data.rfind(b"\n\n") + 2].decode().split("\n\n")[:-1]
    fields = [dict(line.split(": ", 1) for line in block.split("\n")) for block in blocks if block != ":"]
    return [(int(one["id"]), one["event"], json.loads(one["data"])) for one in fields]


def text_of(events: list[Event], stream: str = "stdout") -> str:
    return "".join(data["text"] for _, kind, data in events if kind == stream)


@contextmanager
def following(client: httpx.Client, path: str, last: int | None = None) -> Iterator[Iterator[bytes]]:
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    with client.stream("GET", f"{path}/events", headers=headers) as answer:
        assert answer.status_code == 200
        yield answer.iter_raw()


@pytest.fixture(scope="module")
def engine(real_engine: None) -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


@pytest.fixture
def session(docker_service: Live) -> Iterator[str]:
    """A session of the test's own; yields the path of its executions."""
    path = docker_service.client.post("/v1/sessions", json={}).headers["Location"]
    yield f"{path}/executions"
    docker_service.client.delete(path)


def test_output_is_told_while_the_code_runs(docker_service: Live, session: str) -> None:
    client = docker_service.client
    body = {"command": "echo one; while [ ! -e go ]; do sleep 0.01; done; echo two"}
    with client.stream("POST", session, json=body, headers={"Accept": "text/event-stream"}) as answer:
        chunks = answer.iter_raw()
        data = b""
        while b"one" not in data:
            data += next(chunks)
        assert client.post(session, json={"command": "touch go"}).json()["outcome"] == "ok"
        events = parsed(data + b"".join(chunks))
    assert text_of(events) == "one\ntwo\n"
    assert [kind for _, kind, _ in events] == ["started", "stdout", "stdout", "artifact", "done"]
    assert events[-1][2] == client.get(answer.headers["Location"]).json()


def test_a_cancelled_execution_is_gone_within_a_second_with_all_its_processes(
    docker_service: Live, session: str, engine: docker.DockerClient
) -> None:
    client = docker_service.client
    body = {"command": "trap '' TERM INT; for n in 1 2 3; do setsid sleep 987.5 & done; sleep 987.5; :"}
    path = client.post(session, json=body, headers=ASYNC).headers["Location"]

    def alive() -> int:
        found = 0
        for one in ours(engine, docker_service.instance):
            with suppress(docker.errors.APIError):  # of a session that has ended
                found += sum(row[-1] == "sleep 987.5" for row in one.top()["Processes"] or [])
        return found

    until(lambda: alive() == 4)
    begun = time.monotonic()
    assert client.delete(path).status_code == 204
    until(lambda: client.get(path).json()["outcome"] == "cancelled")
    assert time.monotonic() - begun < CANCEL_S
    assert alive() == 0


@pytest.fixture
def crashing(engine: docker.DockerClient, state_dir: Path) -> Iterator[tuple[Path, str]]:
    """A folder and an instance for two services one after the other; nothing of it is left."""
    instance = f"test-streaming-{os.getpid()}"
    folder = state_dir / instance
    folder.mkdir(exist_ok=True)
    yield folder, instance
    for one in ours(engine, instance):
        one.remove(force=True)


def test_a_stream_goes_on_after_a_crash_and_every_byte_comes_once(crashing: tuple[Path, str]) -> None:
    """One reader was cut off in the middle of the output, the other between it and what came while nobody lived."""
    folder, instance = crashing
    settings = {"uid_base": UID_BASE, "pool_size": "1"}
    with serve(folder, instance=instance, engine="docker", **settings) as first:
        session = first.client.post("/v1/sessions", json={}).headers["Location"]
        executions = f"{session}/executions"
        counting = first.client.post(executions, json={"code": COUNTING}, headers=ASYNC).headers["Location"]
        body = {"command": "echo begun; cat", "background": True, "stdin_open": True}
        reading = first.client.post(executions, json=body).headers["Location"]
        until(lambda: "begun" in first.client.get(reading).json()["stdout"])
        data = b""
        with following(first.client, counting) as chunks:
            while b'"3000 ' not in data and b"\\n3000 " not in data:
                data += next(chunks)
        before = parsed(data)
        first.process.kill()
        first.process.wait(20)
    with next_life(folder, instance, **settings) as (second, _):
        client = second.client
        middle = before[len(before) // 2][0]
        with following(client, counting, before[-1][0]) as chunks, following(client, counting, middle) as other:
            assert client.post(executions, json={"command": "touch go"}).json()["outcome"] == "ok"
            rest, from_middle = parsed(b"".join(chunks)), parsed(b"".join(other))
        events = before + rest
        numbers = [number for number, _, _ in events]
        assert numbers == sorted(set(numbers))
        assert text_of(events) == COUNTED
        assert [event for event in events if event[0] > middle] == from_middle
        assert (events[0][:2], events[-1][1]) == ((0, "started"), "done")
        assert text_of(events, "stderr") == "end\n"
        assert (events[-1][2]["outcome"], events[-1][2]["value"], events[-1][2]["stdout"]) == ("ok", 5999, COUNTED)
        adopted = client.get(reading).json()
        assert (adopted["background"], adopted["outcome"], adopted["stdout"]) == (True, None, "begun\n")
        assert client.post(f"{reading}/stdin", json={"text": "later\n", "close": True}).status_code == 204
        until(lambda: client.get(reading).json()["outcome"] == "ok")
        assert client.get(reading).json()["stdout"] == "begun\nlater\n"
        assert second.terminate() == 0


def test_an_asynchronous_execution_that_ended_before_a_crash_is_told_after_it(crashing: tuple[Path, str]) -> None:
    folder, instance = crashing
    settings = {"uid_base": UID_BASE, "pool_size": "1"}
    with serve(folder, instance=instance, engine="docker", **settings) as first:
        session = first.client.post("/v1/sessions", json={}).headers["Location"]
        executions = f"{session}/executions"
        body = {"command": "echo out"}
        path = first.client.post(executions, json=body, headers=ASYNC).headers["Location"]
        until(lambda: first.client.get(path).json()["outcome"])
        with following(first.client, path) as chunks:
            before = parsed(b"".join(chunks))
        streamed = first.client.post(executions, json=body, headers={"Accept": "text/event-stream"})
        assert [event[1] for event in parsed(streamed.content)] == ["started", "stdout", "done"]
        assert first.client.post(executions, json={"code": "1"}).json()["outcome"] == "ok"  # acknowledges what may be
        first.process.kill()
        first.process.wait(20)
    with next_life(folder, instance, **settings) as (second, _):
        until(lambda: second.client.get(path).json()["outcome"])
        with following(second.client, path, before[0][0]) as chunks:
            after = parsed(b"".join(chunks))
        assert [event[:2] for event in after] == [event[:2] for event in before[1:]]
        assert text_of(after) == "out\n"
        with following(second.client, streamed.headers["Location"], 1) as chunks:
            assert parsed(b"".join(chunks))[0][2]["stdout"] == "out\n"
        assert second.terminate() == 0


def test_stdin_reaches_code_in_a_container(docker_service: Live, session: str) -> None:
    client = docker_service.client
    code = "import sys\nfor line in sys.stdin: print(len(line), flush=True)"
    path = client.post(session, json={"code": code, "stdin_open": True}, headers=ASYNC).headers["Location"]
    assert client.post(f"{path}/stdin", json={"text": "x" * 500_000 + "\n"}).status_code == 204
    until(lambda: client.get(path).json()["stdout"] == "500001\n")
    assert client.post(f"{path}/stdin", json={"close": True}).status_code == 204
    until(lambda: client.get(path).json()["outcome"] == "ok")


def test_text_for_code_that_closed_its_own_stdin_is_refused(docker_service: Live, session: str) -> None:
    """The agent looks from outside of the sandbox, without rights."""
    client = docker_service.client
    command = "exec 0<&-; touch closed; sleep 300"
    path = client.post(session, json={"command": command, "stdin_open": True}, headers=ASYNC).headers["Location"]
    wait = {"command": "while [ ! -e closed ]; do sleep 0.01; done"}
    assert client.post(session, json=wait).json()["outcome"] == "ok"
    answer = client.post(f"{path}/stdin", json={"text": "x"})
    assert (answer.status_code, answer.json()["code"]) == (409, "stdin_closed")
    client.delete(path)
