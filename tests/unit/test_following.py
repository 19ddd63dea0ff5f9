"""The SDK's side of executions that are not waited for: start, stream, resume, send to stdin."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from orchestrator import errors
from orchestrator.calls.running import events, stream
from orchestrator.exchange import Tries
from orchestrator.following import Place
from orchestrator.models import Event, Execution
from orchestrator.sdk import OpenSession, SandboxClient, SyncSandboxClient
from tests.live import Live

SOON_S = 10.0
WAITING = "echo one; while [ ! -e go ]; do sleep 0.01; done; echo two"


@pytest.fixture
async def session(local_service: Live) -> AsyncIterator[OpenSession]:
    async with SandboxClient(local_service.url) as client, client.session() as made:
        yield made


async def ended(session: OpenSession, eid: str) -> Execution:
    async with asyncio.timeout(SOON_S):
        while (execution := await session.get_execution(eid)).outcome is None:
            await asyncio.sleep(0.01)
        return execution


def texts(found: list[Event], kind: str = "stdout") -> str:
    return "".join(event.text for event in found if event.kind == kind)


async def test_what_is_started_is_not_waited_for(session: OpenSession) -> None:
    begun = await session.start(command=WAITING)
    assert (begun.outcome, begun.background) == (None, False)
    assert [one.id for one in (await session.list_executions()).executions] == [begun.id]
    await session.command("touch go")
    assert (await ended(session, begun.id)).stdout == "one\ntwo\n"


async def test_what_is_started_can_be_cancelled(session: OpenSession) -> None:
    begun = await session.start("while True: pass", background=True)
    assert begun.background
    await session.cancel(begun.id)
    assert (await ended(session, begun.id)).outcome == "cancelled"


async def test_events_are_yielded_as_they_happen(session: OpenSession) -> None:
    found = []
    async for event in session.stream(command=WAITING + "; echo three >&2; echo x > file"):
        found.append(event)
        if event.text == "one\n":
            await session.command("touch go")
    assert (texts(found), texts(found, "stderr")) == ("one\ntwo\n", "three\n")
    assert [event.artifact.path for event in found if event.artifact is not None] == ["file", "go"]
    first, last = found[0].execution, found[-1].execution
    assert first is not None
    assert last is not None
    assert (found[0].kind, found[0].id, first.outcome) == ("started", 0, None)
    assert (found[-1].kind, last.outcome, last.stdout) == ("done", "ok", "one\ntwo\n")
    again = [event async for event in session.events(first.id, last_event_id=found[1].id)]
    assert again == found[2:]
    assert [event async for event in session.events(first.id, last_event_id=found[-1].id)] == []


async def test_a_handlers_value_is_in_the_last_event(session: OpenSession) -> None:
    *_, last = [event async for event in session.stream("handler = lambda event: event['n'] + 1", event={"n": 1})]
    assert last.execution is not None
    assert last.execution.value == 2


async def test_who_stops_reading_cancels(session: OpenSession) -> None:
    reading = session.stream(command="echo one; sleep 300")
    async for event in reading:
        if event.kind == "stdout":
            break
    await reading.aclose()  # type: ignore[attr-defined]
    [execution] = (await session.list_executions()).executions
    assert (await ended(session, execution.id)).outcome == "cancelled"


async def test_text_is_sent_to_stdin(session: OpenSession) -> None:
    begun = await session.start("import sys\nfor line in sys.stdin: print(len(line))", stdin_open=True)
    await session.send_stdin(begun.id, "four\n")
    await session.send_stdin(begun.id, "sixxx\n", close=True)
    assert (await ended(session, begun.id)).stdout == "5\n6\n"
    with pytest.raises(errors.StdinClosed, match="has ended"):
        await session.send_stdin(begun.id, "more")


async def test_executions_are_listed_in_pages(session: OpenSession) -> None:
    ids = [(await session.run(str(number))).id for number in range(3)]
    page = await session.list_executions(limit=2)
    assert ([one.id for one in page.executions], page.next) == (ids[:2], ids[1])
    rest = await session.list_executions(after=page.next)
    assert ([one.id for one in rest.executions], rest.next) == (ids[2:], None)


def test_the_twin_does_the_same_without_asyncio(local_service: Live) -> None:
    with SyncSandboxClient(local_service.url) as client, client.session() as session:
        begun = session.start(command="cat", stdin_open=True)
        session.send_stdin(begun.id, "text", close=True)
        found = list(session.events(begun.id))
        assert texts(found) == "text"
        found = list(session.stream("print(1)"))
        assert (found[0].kind, texts(found), found[-1].kind) == ("started", "1\n", "done")
        with pytest.raises(errors.ExecutionNotFound):
            list(session.events("e0"))
        with pytest.raises(errors.InvalidRequest):
            list(session.stream("1", command="ls"))


# --- a connection that is lost in the middle

EXECUTION = Execution(id="e1", session_id="s1", started_at=datetime(2026, 1, 1, tzinfo=UTC), language="python")
STARTED = b"id: 0\nevent: started\ndata: " + msgspec.json.encode(EXECUTION) + b"\n\n"
DONE = b"id: 3\nevent: done\ndata: " + msgspec.json.encode(EXECUTION) + b"\n\n"


def text_event(number: int, text: str) -> bytes:
    return b'id: %d\nevent: stdout\ndata: {"text":"%s"}\n\n' % (number, text.encode())


@contextmanager
def playing(*answers: bytes) -> Iterator[tuple[str, list[str]]]:
    """Serve one connection for each answer, cut off behind it; yield the address, and the heads of what was asked."""
    asked: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection:
                    asked.append(connection.recv(65536).decode())
                    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                    connection.sendall(head + b"%x\r\n%s\r\n" % (len(answer), answer))
                    if answer.endswith(DONE):
                        connection.sendall(b"0\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        thread.join(SOON_S)


def last_event_id(head: str) -> str | None:
    lines = dict(line.lower().split(": ", 1) for line in head.split("\r\n\r\n", maxsplit=1)[0].split("\r\n")[1:])
    return lines.get("last-event-id")


def test_events_that_are_cut_off_go_on_behind_the_last_one_that_came() -> None:
    """Half an event at the cut is none."""
    cut = STARTED + text_event(1, "a") + text_event(2, "b")[:-9]
    with playing(cut, text_event(2, "b") + DONE) as (url, asked), SyncSandboxClient(url) as client:
        found = list(client.events("s1", "e1"))
    assert [event.id for event in found] == [0, 1, 2, 3]
    assert texts(found) == "ab"
    assert [last_event_id(head) for head in asked] == [None, "1"]


def test_what_outlives_its_connection_is_followed_on_another_one() -> None:
    with (
        playing(STARTED + text_event(1, "a"), text_event(2, "b") + DONE) as (url, asked),
        SyncSandboxClient(url) as client,
    ):
        found = list(client.stream("s1", "code", idempotency_key="k"))
    assert texts(found) == "ab"
    assert [head.split(" HTTP")[0] for head in asked] == [
        "POST /v1/sessions/s1/executions",
        "GET /v1/sessions/s1/executions/e1/events",
    ]
    assert last_event_id(asked[1]) == "1"


async def test_the_asyncio_client_goes_on_too() -> None:
    with playing(STARTED, text_event(1, "a") + DONE) as (url, asked):
        async with SandboxClient(url) as client:
            found = [event async for event in client.events("s1", "e1")]
    assert [event.id for event in found] == [0, 1, 3]
    assert [last_event_id(head) for head in asked] == [None, "0"]


def test_what_is_cancelled_by_the_loss_is_an_error() -> None:
    with (
        playing(STARTED + text_event(1, "a")) as (url, asked),
        SyncSandboxClient(url) as client,
        pytest.raises(errors.NoAnswer),
    ):
        list(client.stream("s1", "code"))
    assert len(asked) == 1


def test_a_background_stream_that_was_lost_before_it_began_is_not_begun_again() -> None:
    with playing(b":\n\n") as (url, asked), SyncSandboxClient(url) as client, pytest.raises(errors.NoAnswer):
        list(client.stream("s1", "code", background=True))
    assert len(asked) == 1


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_place_reads_events_from_any_pieces_and_passes_over_what_it_does_not_know(cut: int) -> None:
    place = Place(events("s1", "e1"), lambda call: Tries(1, 1.0))
    data = b":\n\nretry: 5\n\nid: 1\nevent: later\ndata: {}\n\n" + text_event(2, "a") + DONE
    found: list[Any] = []
    for start in range(0, len(data), cut):
        found += place.feed(data[start : start + cut])
    assert [(event.id, event.kind) for event in found] == [(2, "stdout"), (3, "done")]
    assert place.ended


def test_an_event_that_makes_no_sense_is_an_error() -> None:
    place = Place(stream("s1", "1"), lambda call: Tries(1, 1.0))
    with pytest.raises(errors.NoAnswer, match="does not understand"):
        list(place.feed(b"id: x\nevent: stdout\ndata: {}\n\n"))
