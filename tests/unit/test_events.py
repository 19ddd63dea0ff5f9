"""Executions as server-sent events: what is told, in which numbers, and how a reader that was cut off goes on."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.events import Reader
from orchestrator.executions import Note, Record, text_of
from orchestrator.models import Stream
from tests.live import Live, open_folder, serve, until

EVENTS = {"Accept": "text/event-stream"}
ASYNC = {"Prefer": "respond-async"}
SOON_S = 10.0
MIB = 1 << 20
Event = tuple[int, str, Any]


def parsed(data: bytes) -> list[Event]:
    """Return the events of a stream: number, kind, data."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if lines:
            assert list(lines) == ["id", "event", "data"]
            found.append((int(lines["id"]), lines["event"], json.loads(lines["data"])))
    return found


# --- a reader's place, without a service


def record_of(*pieces: tuple[Stream, bytes], over: bool = True) -> Record:
    """Return an execution with this output."""
    record = Record("e1", "s1", Note(language="python", timeout_s=1.0))
    for stream, data in pieces:
        record._take(stream, data)
    if over:
        record._show_output()
        record.facts.outcome = "ok"
    return record


def told(record: Record, after: int = -1) -> list[Event]:
    """Return all events behind a number."""
    reader = Reader(record, after=after)
    data = b""
    while events := reader.take():
        data += events
    reader.close()
    assert record.watchers == set()
    return parsed(data)


PIECES = st.lists(
    st.tuples(st.sampled_from(["stdout", "stderr", "value"]), st.binary(min_size=1, max_size=6)), max_size=12
)
TORN = "aüß€😀".encode() + b"\xff\xe2\x82\xf0\x9f\x98"


@given(pieces=PIECES, cuts=st.lists(st.integers(1, 5), max_size=12))
def test_the_texts_of_all_events_are_the_output_and_every_resumption_is_the_rest(
    pieces: list[tuple[Stream, bytes]], cuts: list[int]
) -> None:
    """Wherever the bytes are cut, and wherever the reader is cut off."""
    torn: list[tuple[Stream, bytes]] = []
    at = 0
    for size in cuts:
        torn.append(("stdout", TORN[at : at + size] or b"z"))
        at += size
    record = record_of(*pieces, *torn)
    events = told(record)
    numbers = [number for number, _, _ in events]
    assert numbers[0] == 0
    assert numbers == sorted(set(numbers))
    assert [kind for _, kind, _ in events if kind in ("started", "done")] == ["started", "done"]
    for stream in ("stdout", "stderr"):
        text = "".join(data["text"] for _, kind, data in events if kind == stream)
        assert text == text_of(record.output.whole(stream))[0] == getattr(record.facts, stream)
    for last in range(-1, numbers[-1] + 2):
        assert told(record, last) == [event for event in events if event[0] > last]


def test_the_number_of_done_follows_the_last_piece_and_those_of_unfinished_characters() -> None:
    whole = record_of(("stdout", b"a"), ("value", b"{}"))
    assert [(number, kind) for number, kind, _ in told(whole)] == [(0, "started"), (1, "stdout"), (3, "done")]
    torn = record_of(("stdout", b"a\xe2\x82"), ("stderr", b"\xf0"))
    expected = [
        (0, "started", None),
        (1, "stdout", "a"),
        (3, "stdout", "\ufffd"),
        (4, "stderr", "\ufffd"),
        (5, "done", None),
    ]
    assert [(number, kind, data.get("text")) for number, kind, data in told(torn)] == expected


def test_a_reader_takes_what_is_new_and_no_more() -> None:
    record = record_of(("stdout", b"a"), over=False)
    reader = Reader(record)
    assert [kind for _, kind, _ in parsed(reader.take())] == ["started", "stdout"]
    assert (reader.take(), reader.ended, reader.woken.is_set()) == (b"", False, False)
    record._take("stderr", b"b")
    assert reader.woken.is_set()
    assert parsed(reader.take()) == [(2, "stderr", {"text": "b"})]
    record.facts.outcome = "ok"
    assert [(number, kind) for number, kind, _ in parsed(reader.take())] == [(3, "done")]
    assert (reader.take(), reader.ended) == (b"", True)


def test_a_reader_that_is_ahead_of_an_adopted_execution_waits_until_it_has_caught_up() -> None:
    record = record_of(("stdout", b"a"), over=False)
    reader = Reader(record, after=2)
    assert (reader.take(), reader.ended) == (b"", False)
    record._take("stdout", b"b")
    assert (reader.take(), reader.ended) == (b"", False)
    record._take("stdout", b"c")
    assert parsed(reader.take()) == [(3, "stdout", {"text": "c"})]


def test_a_reader_of_what_is_left_to_the_next_orchestrator_ends_without_done() -> None:
    record = record_of(("stdout", b"a"), over=False)
    reader = Reader(record)
    record.left = True
    assert [kind for _, kind, _ in parsed(reader.take())] == ["started", "stdout"]
    assert reader.ended


def test_objects_are_events_of_their_own_and_what_is_none_is_left_out() -> None:
    file = b'{"path":"a.txt","type":"file","size_bytes":3,"modified_s":1.5}\n'
    record = record_of(
        ("display", b'{"text/plain":'),
        ("stdout", b"between"),
        ("display", b'\r"x"}\n'),
        ("display", b"[1]\n"),
        ("display", b'{"a":NaN}\n'),
        ("display", b'{"b":"\xff"}\n'),
        ("artifact", file),
        ("artifact", b'{"path":5}\n'),
        ("display", b'{"unfinished":'),
    )
    events = told(record)
    assert [event for event in events if event[1] == "display"] == [(3, "display", {"text/plain": "x"})]
    [(number, _, artifact)] = [event for event in events if event[1] == "artifact"]
    assert (number, artifact["path"], artifact["size_bytes"]) == (7, "a.txt", 3)
    assert artifact["modified_at"] == "1970-01-01T00:00:01.500000Z"
    assert told(record, after=1)[:2] == [(2, "stdout", {"text": "between"}), (3, "display", {"text/plain": "x"})]


def test_a_value_with_line_ends_of_its_own_does_not_break_an_event() -> None:
    record = record_of()
    record.facts.value = msgspec.Raw(b'{"a":\n\r\n [1,\r2]}')
    assert told(record)[-1][2]["value"] == {"a": [1, 2]}


def test_a_batch_is_bounded() -> None:
    pieces: list[tuple[Stream, bytes]] = [("stdout", b"x" * 10_000)] * 100
    record = record_of(*pieces)
    reader = Reader(record)
    sizes = []
    while events := reader.take():
        sizes.append(len(events))
    assert max(sizes[:-1]) < 80_000
    assert sum(sizes) > MIB - 60_000


# --- over HTTP


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """A service with a fast heartbeat and few streams."""
    with (
        open_folder() as folder,
        serve(
            folder,
            instance="test-events",
            engine="local",
            stream_heartbeat_seconds="0.2",
            session_streams="3",
            max_streams="5",
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


class Following:
    """An open stream of events."""

    def __init__(self, answer: httpx.Response) -> None:
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/event-stream; charset=utf-8")
        self.headers = answer.headers
        self.seen: list[Event] = []
        self.raw = b""
        self._chunks = answer.iter_raw()

    def until(self, kind: str, text: str = "") -> list[Event]:
        """Read on until an event of this kind, with this text in it; return all until then."""
        while not any(event[1] == kind and text in json.dumps(event[2]) for event in self.seen):
            self.raw += next(self._chunks)
            self.seen = parsed(self.raw[: self.raw.rfind(b"\n\n") + 2])
        return self.seen

    def rest(self) -> list[Event]:
        """Read to the end; return all."""
        self.raw += b"".join(self._chunks)
        return parsed(self.raw)


@contextmanager
def posted(client: httpx.Client, session: str, body: dict[str, Any], **headers: str) -> Iterator[Following]:
    with client.stream("POST", session, json=body, headers=EVENTS | headers) as answer:
        yield Following(answer)


@contextmanager
def resumed(client: httpx.Client, path: str, last: int | None = None) -> Iterator[Following]:
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    with client.stream("GET", f"{path}/events", headers=headers) as answer:
        yield Following(answer)


def running(client: httpx.Client, session: str) -> bool:
    return any(one["outcome"] is None for one in client.get(session).json()["executions"])


WAITING = "echo one; while [ ! -e go ]; do sleep 0.01; done; echo two >&2; echo three"


def go(client: httpx.Client, session: str) -> None:
    assert client.post(session, json={"command": "touch go"}).json()["outcome"] == "ok"


def test_events_come_as_they_happen(client: httpx.Client, session: str) -> None:
    with posted(client, session, {"command": WAITING}) as following:
        before = following.until("stdout")
        assert running(client, session)
        go(client, session)
        events = following.rest()
    assert before == events[: len(before)]
    path = following.headers["Location"]
    execution = client.get(path).json()
    assert [kind for _, kind, _ in events] == ["started", "stdout", "stderr", "stdout", "artifact", "done"]
    assert [data.get("text") for _, _, data in events[1:4]] == ["one\n", "two\n", "three\n"]
    assert (events[0][2]["id"], events[0][2]["outcome"]) == (execution["id"], None)
    assert events[-1][2] == execution


def test_a_value_is_in_the_last_event_alone(client: httpx.Client, session: str) -> None:
    body = {"code": "def handler(event):\n  print('in', end='')\n  return {'n': event}", "event": 5}
    with posted(client, session, body) as following:
        events = following.rest()
    assert [kind for _, kind, _ in events] == ["started", "stdout", "done"]
    assert events[-1][2]["value"] == {"n": 5}


def test_a_stream_is_resumed_without_loss_or_repetition_while_it_runs_and_after_it_ended(
    client: httpx.Client, session: str
) -> None:
    path = client.post(session, json={"command": WAITING}, headers=ASYNC).headers["Location"]
    with resumed(client, path) as first:
        begun = first.until("stdout")
    last = begun[-1][0]
    with resumed(client, path, last) as second:
        go(client, session)
        rest = second.rest()
    with resumed(client, path) as whole:
        assert whole.rest() == begun + rest
    for event in begun + rest[:-1]:
        with resumed(client, path, event[0]) as again:
            assert again.rest() == [one for one in begun + rest if one[0] > event[0]]
    done = rest[-1]
    assert done[1] == "done"
    answer = client.get(f"{path}/events", headers={"Last-Event-ID": str(done[0])})
    assert (answer.status_code, answer.content) == (204, b"")


def test_the_last_number_may_be_in_the_query_and_the_headers_counts_more(client: httpx.Client, session: str) -> None:
    path = client.post(session, json={"command": "echo 1"}, headers=ASYNC).headers["Location"]
    until(lambda: not running(client, session))
    query = {"last_event_id": "1"}
    asked = client.get(f"{path}/events", params=query)
    assert [kind for _, kind, _ in parsed(asked.content)] == ["done"]
    both = client.get(f"{path}/events", params=query, headers={"Last-Event-ID": "0"})
    assert [kind for _, kind, _ in parsed(both.content)] == ["stdout", "done"]


@pytest.mark.parametrize("last", ["-1", "x", "1.5", ""])
def test_a_number_that_is_none_is_refused(client: httpx.Client, session: str, last: str) -> None:
    path = client.post(session, json={"command": "echo 1"}, headers=ASYNC).headers["Location"]
    answer = client.get(f"{path}/events", headers={"Last-Event-ID": last})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


def test_what_is_refused_is_a_problem_document_and_no_stream(client: httpx.Client, session: str) -> None:
    for answer, status, code in [
        (client.post(session, json={"code": 5}, headers=EVENTS), 400, "invalid_request"),
        (client.post("/v1/sessions/nobody/executions", json={"code": "1"}, headers=EVENTS), 404, "session_not_found"),
        (client.get(f"{session}/e0/events"), 404, "execution_not_found"),
    ]:
        assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_a_silent_stream_is_kept_open_by_comments(client: httpx.Client, session: str) -> None:
    with posted(client, session, {"command": "sleep 0.7"}) as following:
        events = following.rest()
    assert following.raw.count(b":\n\n") >= 2
    assert [kind for _, kind, _ in events] == ["started", "done"]


# --- a client that goes away


def test_who_leaves_a_stream_cancels_what_it_began(client: httpx.Client, session: str) -> None:
    with posted(client, session, {"command": "echo one; sleep 300"}) as following:
        following.until("stdout")
    execution = until(lambda: not running(client, session) and client.get(session).json()["executions"][0])
    assert execution["outcome"] == "cancelled"


@pytest.mark.parametrize(
    ("more", "headers"),
    [({}, ASYNC), ({}, {"Idempotency-Key": "k"}), ({"background": True}, {})],
    ids=["asynchronous", "with a key", "in the background"],
)
def test_one_that_may_be_asked_for_again_goes_on(
    client: httpx.Client, session: str, more: dict[str, Any], headers: dict[str, str]
) -> None:
    with posted(client, session, {"command": WAITING} | more, **headers) as following:
        last = following.until("stdout")[-1][0]
    path = following.headers["Location"]
    go(client, session)
    with resumed(client, path, last) as second:
        assert [kind for _, kind, _ in second.rest()][:2] == ["stderr", "stdout"]
    assert client.get(path).json()["outcome"] == "ok"


def test_who_leaves_a_stream_that_it_resumed_cancels_nothing(client: httpx.Client, session: str) -> None:
    with posted(client, session, {"command": WAITING}) as following:
        following.until("stdout")
        with resumed(client, following.headers["Location"]) as second:
            second.until("stdout")
        assert running(client, session)
        go(client, session)
        assert following.rest()[-1][2]["outcome"] == "ok"


def test_a_repeat_with_the_same_key_follows_the_same_execution(client: httpx.Client, session: str) -> None:
    body = {"command": "echo $RANDOM; sleep 0.2"}
    with posted(client, session, body, **{"Idempotency-Key": "same"}) as first:
        events = first.rest()
    with posted(client, session, body, **{"Idempotency-Key": "same"}) as second:
        assert second.rest() == events


# --- slow readers, many readers


def test_a_slow_reader_holds_up_nobody_and_gets_everything(live: Live, session: str) -> None:
    """It reads nothing until the execution and others are done; a megabyte waits for it in the record."""
    client = live.client
    body = {"code": "import os\nfor n in range(64): os.write(1, b'%05d' % n + b'x' * 16379)"}
    request = (
        f"POST {session} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(json.dumps(body))}\r\n\r\n{json.dumps(body)}"
    )
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", live.port))
        slow.sendall(request.encode())
        until(lambda: client.get(session).json()["executions"])
        until(lambda: not running(client, session))
        assert client.post(session, json={"code": "print(2)"}).json()["stdout"] == "2\n"
        received = b""
        slow.settimeout(SOON_S)
        while data := slow.recv(1 << 16):
            received += data
    execution = client.get(session).json()["executions"][0]
    assert (execution["outcome"], len(execution["stdout"])) == ("ok", MIB)
    assert received.endswith(b"0\r\n\r\n")
    assert received.count(b"xxxxx") > 200_000


def test_streams_have_caps(client: httpx.Client, session: str) -> None:
    body = {"command": "sleep 300", "background": True}
    with (
        posted(client, session, body) as one,
        posted(client, session, body),
        resumed(client, one.headers["Location"]),
    ):
        for answer in (
            client.get(f"{one.headers['Location']}/events"),
            client.post(session, json={"command": "touch never"}, headers=EVENTS),
        ):
            assert (answer.status_code, answer.json()["code"]) == (429, "too_many_requests")
            assert answer.headers["Retry-After"] == "1"
        assert len(client.get(session).json()["executions"]) == 2
        other = client.post("/v1/sessions", json={}).headers["Location"]
        with posted(client, f"{other}/executions", body), posted(client, f"{other}/executions", body):
            assert client.post(f"{other}/executions", json=body, headers=EVENTS).status_code == 429
            assert "sandbox_event_streams 5.0" in client.get("/metrics").text
        client.delete(other)
    until(lambda: "sandbox_event_streams 0.0" in client.get("/metrics").text)


def test_many_readers_of_one_execution_are_told_the_same(client: httpx.Client, session: str) -> None:
    path = client.post(session, json={"command": WAITING}, headers=ASYNC).headers["Location"]

    def read(_: int) -> list[Event]:
        with resumed(client, path) as following:
            return following.rest()

    with ThreadPoolExecutor() as threads:
        reading = [threads.submit(read, number) for number in range(3)]
        go(client, session)
        first, *others = [task.result(SOON_S) for task in reading]
    assert others == [first, first]
    assert first[-1][1] == "done"


def test_the_end_of_a_session_is_the_end_of_its_streams(client: httpx.Client) -> None:
    path = client.post("/v1/sessions", json={}).headers["Location"]
    with posted(client, f"{path}/executions", {"command": "echo one; sleep 300"}) as following:
        following.until("stdout")
        client.delete(path)
        assert following.rest()[-1][2]["outcome"] == "lost"


def test_the_end_of_the_service_ends_its_streams() -> None:
    with (
        open_folder() as folder,
        serve(folder, instance="test-events-end", engine="local", drain_seconds="0.2") as live,
        httpx.Client(base_url=live.url, timeout=SOON_S, trust_env=False) as other,
    ):
        path = live.client.post("/v1/sessions", json={}).headers["Location"]
        body = {"command": "echo one; sleep 300", "background": True}
        with posted(other, f"{path}/executions", body) as following:
            following.until("stdout")
            assert live.terminate() == 0
            assert following.rest()[-1][2]["outcome"] == "cancelled"
