"""The stdin of a running execution: what is sent to it, and what it cannot take."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.live import Live, open_folder, serve, until

ASYNC = {"Prefer": "respond-async"}
MIB = 1 << 20
# Tells at once what it reads.
ECHO = "import sys\nfor line in sys.stdin: print(f'<{line.strip()}>', flush=True)\nprint('end')"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with open_folder() as folder, serve(folder, instance="test-stdin", engine="local") as service:
        yield service


@pytest.fixture
def client(live: Live) -> httpx.Client:
    return live.client


@pytest.fixture
def session(session: str) -> str:
    """A session of the test's own, as the path of its executions."""
    return f"{session}/executions"


def begin(client: httpx.Client, session: str, **body: Any) -> str:
    """Begin an execution with an open stdin; return its path."""
    answer = client.post(session, json={"stdin_open": True} | body, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    return answer.headers["Location"]


def send(client: httpx.Client, path: str, text: str = "", *, close: bool = False) -> httpx.Response:
    return client.post(f"{path}/stdin", json={"text": text, "close": close})


def sent(client: httpx.Client, path: str, text: str = "", *, close: bool = False) -> None:
    answer = send(client, path, text, close=close)
    assert (answer.status_code, answer.content) == (204, b""), answer.text


def refused(answer: httpx.Response, status: int, code: str) -> str:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    return str(answer.json()["detail"])


def shown(client: httpx.Client, path: str, text: str) -> None:
    """Wait until this is what the execution has printed."""
    until(lambda: client.get(path).json()["stdout"] == text)


def test_code_reads_what_it_is_sent_while_it_runs(client: httpx.Client, session: str) -> None:
    path = begin(client, session, code=ECHO, stdin="zero\n")
    shown(client, path, "<zero>\n")
    sent(client, path, "one\ntw")
    shown(client, path, "<zero>\n<one>\n")
    sent(client, path, "ö\n")
    shown(client, path, "<zero>\n<one>\n<twö>\n")
    sent(client, path, "last", close=True)
    shown(client, path, "<zero>\n<one>\n<twö>\n<last>\nend\n")


def test_closing_alone_is_the_end_of_file(client: httpx.Client, session: str) -> None:
    path = begin(client, session, command="cat; echo end")
    sent(client, path, close=True)
    shown(client, path, "end\n")


def test_nothing_is_sent_to_what_has_ended(client: httpx.Client, session: str) -> None:
    path = begin(client, session, command="sleep 300")
    client.delete(path)
    until(lambda: client.get(path).json()["outcome"])
    assert "has ended (cancelled)" in refused(send(client, path, "x"), 409, "stdin_closed")


def test_what_was_closed_takes_no_more(client: httpx.Client, session: str) -> None:
    path = begin(client, session, command="cat > /dev/null; sleep 300")
    sent(client, path, "x", close=True)
    refused(send(client, path, "y"), 409, "stdin_closed")
    refused(send(client, path, close=True), 409, "stdin_closed")
    client.delete(path)


CLOSERS = [
    ("code", {"code": "import os, time\nos.close(0)\nprint('x', flush=True)\ntime.sleep(300)"}),
    ("a shell", {"command": "exec 0<&-; echo x; sleep 300"}),
    (
        "beside a dead child",
        {"code": "import os, time\nos.fork() or os._exit(0)\nos.close(0)\nprint('x', flush=True)\ntime.sleep(300)"},
    ),
]


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in CLOSERS])
def test_code_that_closed_its_own_stdin_takes_no_more(client: httpx.Client, session: str, body: dict[str, str]) -> None:
    path = begin(client, session, **body)
    shown(client, path, "x\n")
    refused(send(client, path, "y"), 409, "stdin_closed")
    sent(client, path, close=True)
    client.delete(path)


FROM_A_THREAD = """
import os, subprocess, threading
made = []
thread = threading.Thread(target=lambda: made.append(subprocess.Popen(["cat"], stdin=0)) or done.wait())
done = threading.Event()
thread.start()
while not made: pass
os.close(0)
print("x", flush=True)
made[0].wait()
done.set()
"""
HEIRS = [
    ("a child", {"command": "cat <&0 & exec 0<&-; echo x; wait"}),
    ("a thread's child", {"code": FROM_A_THREAD}),
    ("an orphan", {"command": "(cat <&0 &); exec 0<&-; echo x; while [ ! -e end ]; do sleep 0.01; done"}),
    (
        "another number",
        {"code": "import os\nos.dup2(0, 9)\nos.close(0)\nprint('x', flush=True)\nos.write(1, os.read(9, 9))"},
    ),
]


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in HEIRS])
def test_what_inherited_a_stdin_is_sent_its_text(client: httpx.Client, session: str, body: dict[str, str]) -> None:
    path = begin(client, session, **body)
    shown(client, path, "x\n")
    sent(client, path, "text\n", close=True)
    shown(client, path, "x\ntext\n")
    client.post(session, json={"command": "touch end"})


def test_only_an_execution_that_asked_for_it_has_an_open_stdin(client: httpx.Client, session: str) -> None:
    path = begin(client, session, command="sleep 300", stdin_open=False)
    assert "without `stdin_open`" in refused(send(client, path, "x"), 409, "stdin_closed")
    client.delete(path)


def test_what_is_not_read_is_bounded_and_a_refused_text_leaves_nothing_behind(
    client: httpx.Client, session: str
) -> None:
    """The pipe takes 64 KiB, and 1 MiB waits behind it."""
    path = begin(client, session, command="while [ ! -e go ]; do sleep 0.01; done; wc -c")
    taken = 0
    while (answer := send(client, path, "x" * 300_000)).status_code == 204:
        taken += 300_000
        assert taken <= MIB + (1 << 16)
    refused(answer, 429, "too_many_requests")
    assert answer.headers["Retry-After"] == "1"
    assert taken >= 900_000
    client.post(session, json={"command": "touch go"})
    until(lambda: send(client, path, "y" * MIB, close=True).status_code == 204)
    shown(client, path, f"{taken + MIB}\n")


def test_a_text_that_never_fits_is_refused(client: httpx.Client, session: str) -> None:
    path = begin(client, session, command="cat")
    assert "in parts" in refused(send(client, path, "ü" * (MIB // 2 + 1)), 400, "invalid_request")
    client.delete(path)


def test_one_that_waits_for_its_turn_takes_nothing_yet(client: httpx.Client, session: str) -> None:
    paths = [begin(client, session, command="cat") for _ in range(5)]
    refused(send(client, paths[4], "x"), 429, "too_many_requests")
    sent(client, paths[0], close=True)
    until(lambda: send(client, paths[4], "x", close=True).status_code == 204)
    shown(client, paths[4], "x")


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"text":5}', b'{"text":"x","close":"yes"}', b'{"more":1}', b'{"text":"\\ud800"}', b"\xff"]
)
def test_what_makes_no_sense_is_refused(client: httpx.Client, session: str, body: bytes) -> None:
    path = begin(client, session, command="cat")
    answer = client.post(f"{path}/stdin", content=body, headers={"Content-Type": "application/json"})
    refused(answer, 400, "invalid_request")
    sent(client, path, close=True)


def test_an_unknown_execution_is_404(client: httpx.Client, session: str) -> None:
    refused(send(client, f"{session}/e0"), 404, "execution_not_found")
