"""The SDK against a live service on the local engine; where a service must misbehave, against a scripted one."""

import ast
import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator import errors, exchange, models
from orchestrator.calls import executions
from orchestrator.sdk import SandboxClient, SyncSandboxClient, blocking
from tests.live import Live, free_port, serve

KEY = "0123456789abcdef"
DEADLINE_S = 30.0
GREET = """
def handler(event):
    print("greeting")
    return {"message": f"Hello, {event['name']}!", "nothing": None}
"""
WAIT = "import time\ntime.sleep(60)"

# The seed document's example, with nothing but the import line changed.
SEED = """
from orchestrator.sdk import SandboxClient

client = SandboxClient(base_url="http://localhost:8000")

# Create session
session = await client.create_session(session_id="my_session")

# Execute code
result = await client.execute_code(
    session_id="my_session",
    code="print('Hello from sandbox!')"
)

print(result.stdout)  # "Hello from sandbox!"
"""


@pytest.fixture
async def sandbox(local_service: Live) -> AsyncIterator[SandboxClient]:
    async with SandboxClient(local_service.url) as client:
        yield client


@pytest.fixture(scope="module")
def small_service(state_dir: Path) -> Iterator[Live]:
    """A service that asks for a key and has room for one container."""
    settings = {"api_keys": f"tester:{KEY}", "uid_base": "30000", "pool_size": "1", "max_containers": "1"}
    with serve(state_dir, instance="sdk-small", engine="local", **settings) as live:
        yield live


async def test_the_seed_example_runs_with_only_its_import_changed(
    local_service: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    source = SEED.replace("http://localhost:8000", f"http://localhost:{local_service.port}")
    code = compile(source, "seed", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)

    await eval(code, names)

    assert capsys.readouterr().out == "Hello from sandbox!\n\n"
    await names["client"].end_session("my_session")
    await names["client"].aclose()


async def test_a_session_gives_the_handlers_value_as_plain_python(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        execution = await session.run(GREET, event={"name": "World"})

    assert type(execution) is models.Execution
    assert execution.value == {"message": "Hello, World!", "nothing": None}
    assert (execution.outcome, execution.exit_code, execution.stdout) == ("ok", 0, "greeting\n")


def test_the_twin_does_the_same_without_asyncio(local_service: Live) -> None:
    with SyncSandboxClient(local_service.url) as client, client.session(metadata={"of": "twin"}) as session:
        assert client.get_session(session.id).metadata == {"of": "twin"}
        assert session.run(GREET, event={"name": "Twin"}).value["message"] == "Hello, Twin!"
        assert session.command(["echo", "two words"]).stdout == "two words\n"
    with SyncSandboxClient(local_service.url) as client, pytest.raises(errors.SessionNotFound):
        client.get_session(session.id)


def test_the_twins_have_the_same_methods_with_the_same_parameters() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        return {
            name: inspect.signature(getattr(kind, name))
            for name in dir(kind)
            if name[0] != "_" and name[-5:] != "close"
        }

    own = {"terminal"}  # a dialogue, which one thread cannot have
    assert {name: known for name, known in methods(SandboxClient).items() if name not in own} == methods(
        SyncSandboxClient
    )
    assert {"create_session", "execute_code", "execute", "cancel", "ready", "session"} <= set(methods(SandboxClient))


def test_a_method_shows_help_and_parameters_of_its_call() -> None:
    signature = inspect.signature(SandboxClient.extend_session)

    assert list(signature.parameters) == ["self", "session_id", "ttl_s", "idle_timeout_s", "metadata", "network"]
    assert models.Session is signature.return_annotation
    assert "count anew" in str(SandboxClient.extend_session.__doc__)


async def test_a_session_keeps_its_files_and_takes_its_options(sandbox: SandboxClient) -> None:
    async with sandbox.session("kept", ttl_s=50, idle_timeout_s=40, env={"COLOUR": "red"}) as session:
        await session.command("echo $COLOUR > colour")
        assert (await session.command("cat colour")).stdout == "red\n"
        facts = await session.extend(ttl_s=100, metadata={"by": "me"})

    assert (facts.id, facts.idle_timeout_s, facts.metadata) == ("kept", 40.0, {"by": "me"})
    assert 90 < (facts.expires_at - facts.last_used_at).total_seconds() < 110


async def test_a_session_ends_with_its_block_when_that_raises(sandbox: SandboxClient) -> None:
    with pytest.raises(ZeroDivisionError):
        async with sandbox.session("raised"):
            _ = 1 / 0
    with pytest.raises(errors.SessionNotFound):
        await sandbox.get_session("raised")


async def test_a_session_ends_with_its_block_when_that_is_cancelled(sandbox: SandboxClient) -> None:
    entered = asyncio.Event()

    async def hold() -> None:
        async with sandbox.session("cancelled"):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hold())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(errors.SessionNotFound):
        await sandbox.get_session("cancelled")


async def test_a_block_may_end_its_session_itself(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        await sandbox.end_session(session.id)


async def test_sessions_are_listed_in_pages(sandbox: SandboxClient) -> None:
    async with sandbox.session("page-a"), sandbox.session("page-b"):
        first = await sandbox.list_sessions(limit=1, after="page-")
        second = await sandbox.list_sessions(limit=1, after=first.next)

    assert [page.sessions[0].id for page in (first, second)] == ["page-a", "page-b"]


async def test_what_an_execution_takes_reaches_it(sandbox: SandboxClient) -> None:
    code = """
import os, sys
def handler(event, context):
    return [event, context.tenant, sys.argv[1:], sys.stdin.read(), os.environ["COLOUR"]]
"""
    options: dict[str, Any] = {
        "context": {"tenant": "t"},
        "args": ["a"],
        "stdin": "in",
        "env": {"COLOUR": "blue"},
    }
    async with sandbox.session() as session:
        in_session = await session.run(code, event=None, **options)
    once = await sandbox.execute(code, event=None, **options)

    assert in_session.value == [None, "t", ["a"], "in", "blue"]
    assert in_session.value == once.value


async def test_files_go_there_and_back(sandbox: SandboxClient) -> None:
    async with sandbox.session() as s:
        written = await s.write_file("in/ä.bin", b"\0\xff")
        assert (written.path, written.size_bytes) == ("in/ä.bin", 2)
        ran = await s.run("print(open('in/t').read())\nopen('out','w').write('x')", files={"in/t": "text", "b": b"\0"})
        assert (ran.stdout, [artifact.path for artifact in ran.artifacts]) == ("text\n", ["out"])
        assert await s.read_file("in/ä.bin") == b"\0\xff"
        archive = await s.read_archive("in")
        assert (await s.write_archive(archive, path="again")).files == 2
        await s.make_directory("empty/one")
        await s.rename_file("again/t", "t")
        await s.delete_file("again", recursive=True)
        listed = await s.list_files(recursive=True)
        assert ["b", "empty", "empty/one", "in", "in/t", "in/ä.bin", "out", "t"] == [file.path for file in listed.files]
        with pytest.raises(errors.FileNotFound):
            await s.read_file("nowhere")
        with pytest.raises(errors.FileConflict):
            await s.delete_file("in")
    once = await sandbox.execute("open('o','wb').write(open('i','rb').read())", files={"i": b"\0\1"})
    assert [("o", b"\0\1")] == [(artifact.path, artifact.base64) for artifact in once.artifacts]


async def test_a_failing_code_is_an_outcome_not_an_exception(sandbox: SandboxClient) -> None:
    execution = await sandbox.execute("def handler(event): raise ValueError('no')")

    assert execution.outcome == "error"
    assert execution.error is not None
    assert (execution.error.type, execution.error.message) == ("ValueError", "no")


async def test_a_timeout_is_an_outcome(sandbox: SandboxClient) -> None:
    assert (await sandbox.execute(WAIT, timeout_s=0.2)).outcome == "timeout"


async def test_shell_and_commands_run_once_too(sandbox: SandboxClient) -> None:
    assert (await sandbox.execute("echo $((1 + 2))", language="shell")).stdout == "3\n"
    assert (await sandbox.execute(command="echo $((2 + 2))")).stdout == "4\n"


async def test_an_execution_can_be_found_and_cancelled_while_it_runs(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        running = asyncio.create_task(session.run(WAIT))
        async with asyncio.timeout(DEADLINE_S):
            while not (seen := (await sandbox.list_executions(session.id)).executions):
                pass
        assert (await sandbox.get_execution(session.id, seen[0].id)).outcome is None
        await session.cancel(seen[0].id)

        assert (await running).outcome == "cancelled"


async def test_one_client_serves_many_tasks(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        found = await asyncio.gather(*(session.run("def handler(event): return event", event=n) for n in range(12)))

    assert list(range(12)) == [execution.value for execution in found]


async def test_the_service_tells_of_itself_in_types(sandbox: SandboxClient) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not (await sandbox.ready()).ready:
            pass
    assert (await sandbox.health()).engine == "local"
    assert (await sandbox.templates()).templates[0].name == "python"
    assert (await sandbox.pool()).pools[0].template == "python"
    assert (await sandbox.isolation()).layers["user_namespace"]


class Lossy(httpx.AsyncHTTPTransport):
    """A way to the service on which the first answer to an execution is lost."""

    lost = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if "Idempotency-Key" in request.headers and not self.lost:
            self.lost += 1
            await response.aread()
            await response.aclose()
            raise httpx.ReadError("lost", request=request)
        return response


async def test_what_has_a_key_runs_once_though_its_answer_is_lost(local_service: Live) -> None:
    """The second request runs nothing: it gets the answer of the first."""
    async with SandboxClient(local_service.url) as client:
        transport = Lossy()
        client._http = httpx.AsyncClient(base_url=local_service.url, transport=transport)
        async with client.session() as session:
            execution = await session.command("echo once | tee -a runs", idempotency_key="k1")
            runs = await session.command("cat runs")

    assert (transport.lost, execution.stdout, runs.stdout) == (1, "once\n", "once\n")


async def test_a_key_that_had_another_request_is_refused(sandbox: SandboxClient) -> None:
    async with sandbox.session() as session:
        first = await session.run("print(1)", idempotency_key="k1")
        again = await session.run("print(1)", idempotency_key="k1")
        with pytest.raises(errors.KeyReused):
            await session.run("print(2)", idempotency_key="k1")

    assert (first.id, first.stdout) == (again.id, again.stdout)


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        (lambda client: client.get_session("unknown"), errors.SessionNotFound),
        (lambda client: client.execute_code("unknown", "1"), errors.SessionNotFound),
        (lambda client: client.cancel("unknown", "e1"), errors.SessionNotFound),
        (lambda client: client.create_session(template="cobol"), errors.UnknownTemplate),
        (lambda client: client.create_session(ttl_s=1e9), errors.TimeoutAboveCap),
        (lambda client: client.execute("1", timeout_s=1e9), errors.TimeoutAboveCap),
        (lambda client: client.execute(), errors.InvalidRequest),
        (lambda client: client.execute("x" * 2_000_000), errors.BodyTooLarge),
    ],
)
async def test_a_problem_document_is_raised_as_its_error(
    sandbox: SandboxClient, ask: Callable[[SandboxClient], Any], expected: type[errors.SandboxError]
) -> None:
    with pytest.raises(expected) as raised:
        await ask(sandbox)
    assert expected is type(raised.value)


@pytest.mark.parametrize("code", ["internal_error", "of_another_version"])
def test_a_problem_of_no_kind_of_its_own_is_the_root_of_all(code: str) -> None:
    problem = errors.Problem(title="Internal error", status=500, detail="Something went wrong", code=code)
    assert type(errors.from_problem(problem)) is errors.SandboxError


async def test_an_id_that_is_taken_is_refused(sandbox: SandboxClient) -> None:
    async with sandbox.session("taken"):
        with pytest.raises(errors.SessionExists):
            await sandbox.create_session("taken")


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.get_session("../../health"),
        lambda client: client.get_session(""),
        lambda client: client.cancel("fine", "a/b"),
        lambda client: client.create_session("-"),
        lambda client: client.create_session(env={"NOT A NAME": "x"}),
        lambda client: client.create_session(metadata={"x": 1}),
        lambda client: client.execute("1", timeout_s=0),
        lambda client: client.execute("1", timeout_s=-1),
        lambda client: client.execute("1", timeout_s=float("nan")),
        lambda client: client.execute("1", timeout_s=float("inf")),
        lambda client: client.execute("1", timeout_s="10"),
        lambda client: client.execute("1", language="cobol"),
        lambda client: client.execute("1", event=object()),
        lambda client: client.execute("1", event={"x": float("nan")}),
        lambda client: client.execute(b"1"),
        lambda client: client.execute(command=[]),
        lambda client: client.execute_code("fine", "1", idempotency_key=""),
        lambda client: client.execute_code("fine", "1", idempotency_key="k" * 256),
        lambda client: client.execute_code("fine", "1", idempotency_key="two\nlines"),
        lambda client: client.execute_command("fine", "true", idempotency_key="schlüssel"),
    ],
)
def test_what_the_service_would_refuse_is_not_even_sent(ask: Callable[[SyncSandboxClient], Any]) -> None:
    """Nothing listens at the client's address, and that goes unnoticed."""
    with (
        SyncSandboxClient(f"http://127.0.0.1:{free_port()}", tries=1) as client,
        pytest.raises(errors.InvalidRequest),
    ):
        ask(client)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://", "/v1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="base_url"):
        SandboxClient(url)


async def test_a_key_is_taken_from_the_parameter_or_the_environment(
    small_service: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_URL", small_service.url)
    async with SandboxClient() as client:
        assert (await client.health()).status == "ok"
        with pytest.raises(errors.Unauthorized):
            await client.pool()
    async with SandboxClient(api_key=KEY) as client:
        assert (await client.pool()).max_containers == 1
    monkeypatch.setenv("SANDBOX_API_KEY", KEY)
    async with SandboxClient() as client:
        assert (await client.pool()).max_containers == 1


async def test_a_proxy_is_not_asked_for_this_machine(local_service: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    async with SandboxClient(local_service.url) as client:
        assert (await client.health()).status == "ok"


async def test_a_full_service_is_asked_again_when_it_says(small_service: Live) -> None:
    """The second session finds no room until the first has ended, and then starts by itself."""
    async with SandboxClient(small_service.url, api_key=KEY, tries=20) as client:
        first = await client.create_session()
        second = asyncio.create_task(client.create_session())
        async with asyncio.timeout(DEADLINE_S):
            while not await refusals(small_service):
                pass
        await client.end_session(first.id)

        await client.end_session((await second).id)


async def refusals(live: Live) -> list[str]:
    answer = await asyncio.to_thread(live.client.get, "/metrics", headers={"X-API-Key": KEY})
    return [line for line in answer.text.splitlines() if line.startswith("sandbox_refusals_total{")]


async def test_a_full_service_is_not_asked_for_ever(small_service: Live) -> None:
    async with SandboxClient(small_service.url, api_key=KEY, retry_for_s=0.5) as client, client.session():
        with pytest.raises(errors.TooManyRequests) as raised:
            await client.create_session()
    assert raised.value.retry_after_s == 1


class Clock:
    """Stands in for `time` in the SDK: pauses take no time, and are told to `paused`."""

    def __init__(self, paused: Callable[[int], None]) -> None:
        self.pauses: list[float] = []
        self._paused = paused

    def replace_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blocking, "time", self)
        monkeypatch.setattr(exchange, "time", self)

    def monotonic(self) -> float:
        return sum(self.pauses)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._paused(len(self.pauses))


def test_a_service_that_comes_up_meanwhile_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is tried again, for nothing was sent; here the service listens from the second pause on."""
    port = free_port()
    with ExitStack() as later, SyncSandboxClient(f"http://127.0.0.1:{port}") as client:

        def paused(count: int) -> None:
            if count == 2:
                later.enter_context(scripted(HEALTHY, port=port))

        clock = Clock(paused)
        clock.replace_time(monkeypatch)

        assert client.health().status == "ok"
    assert [round(pause / 1.25, 1) for pause in clock.pauses] == [0.1, 0.2]


def test_a_service_that_does_not_come_up_is_an_error_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda _: None)
    clock.replace_time(monkeypatch)
    url = f"http://127.0.0.1:{free_port()}"
    with SyncSandboxClient(url, tries=5) as client, pytest.raises(errors.ConnectionFailed, match=url):
        client.health()
    assert len(clock.pauses) == 4


@pytest.mark.parametrize(
    ("error", "is_tried_again"),
    [
        (errors.ConnectionFailed("not reached"), True),
        (errors.TooManyRequests("full", retry_after_s=1), True),
        (errors.Unavailable("ending", retry_after_s=5), True),
        (errors.EngineError("no engine", retry_after_s=5), True),
        (errors.TooManyRequests("full", retry_after_s=60), False),
        (errors.TooManyRequests("full"), False),
        (errors.Unavailable("for good"), False),
        (errors.NoAnswer("lost on its way", retry_after_s=1), False),
        (errors.ContainerLost("gone"), False),
        (errors.SessionExists("taken"), False),
    ],
)
def test_only_what_was_certainly_not_done_is_tried_again(error: errors.SandboxError, *, is_tried_again: bool) -> None:
    pause_s = exchange.Tries(3, 30.0).pause_after(error)

    assert is_tried_again == (pause_s is not None)
    assert pause_s is None or pause_s >= (error.retry_after_s or 0.1)


# A scripted service: what a real one does only when it is broken, or what stands before one.

POLL_S = 0.01
Answer = tuple[int, dict[str, str], bytes] | str
HEALTHY: Answer = (200, {}, b'{"status":"ok","version":"1","engine":"local","layers":{}}')
DONE: Answer = (
    200,
    {},
    b'{"id":"e1","session_id":"s","started_at":"2030-01-01T00:00:00Z","language":"python","outcome":"ok"}',
)
BUSY = (503, {"Retry-After": "0"}, b"<h1>Come again</h1>")
GATEWAY = (502, {"Content-Type": "text/html"}, b"<h1>Bad gateway</h1>")
HANG_UP = "hang up"
SILENCE = "silence"


@contextmanager
def scripted(*answers: Answer, port: int = 0) -> Iterator[tuple[str, list[str]]]:
    """Give each request its scripted answer; yield the address and the requests so far."""
    seen: list[str] = []
    released = threading.Event()
    script = iter(answers)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", "0")))
            key = self.headers.get("Idempotency-Key")
            seen.append(f"{self.command} {self.path}" + (f" with {key}" if key is not None else ""))
            match next(script):
                case (status, headers, body):
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(body)
                case "silence":
                    released.wait()

        do_GET = do_POST = do_DELETE = answer  # noqa: N815 - http.server calls them so

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=[POLL_S])
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", seen
        finally:
            released.set()
            server.shutdown()
            thread.join()


async def test_an_execution_is_sent_again_when_it_was_turned_away() -> None:
    with scripted(BUSY, BUSY, DONE) as (url, seen):
        async with SandboxClient(url) as client:
            assert (await client.execute("1")).outcome == "ok"
    assert seen == ["POST /v1/execute"] * 3


@pytest.mark.parametrize(
    "answer", [HANG_UP, SILENCE, GATEWAY, (200, {}, b"<h1>Welcome</h1>"), (302, {"Location": "/"}, b"")]
)
async def test_an_execution_whose_fate_is_unknown_is_not_sent_again(answer: Answer) -> None:
    with scripted(answer) as (url, seen):
        async with SandboxClient(url, patience_s=0.2) as client:
            with pytest.raises(errors.NoAnswer, match=url) as raised:
                await client.execute("1", timeout_s=0.2)
    assert errors.NoAnswer is type(raised.value)
    assert seen == ["POST /v1/execute"]


async def test_an_execution_with_a_key_is_sent_again_when_the_connection_is_lost() -> None:
    with scripted(HANG_UP, HANG_UP, DONE) as (url, seen):
        async with SandboxClient(url) as client:
            assert (await client.execute_code("s", "1", idempotency_key="k1")).outcome == "ok"
    assert seen == ["POST /v1/sessions/s/executions with k1"] * 3


def test_an_execution_with_a_key_is_not_sent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(lambda _: None)
    clock.replace_time(monkeypatch)
    with (
        scripted(*[HANG_UP] * 3) as (url, seen),
        SyncSandboxClient(url, tries=3) as client,
        pytest.raises(errors.NoAnswer, match="whether it was served is unknown"),
    ):
        client.execute_command("s", "true", idempotency_key="k1")
    assert (len(seen), len(clock.pauses)) == (3, 2)


@pytest.mark.parametrize(
    ("answer", "key"), [(HANG_UP, None), (SILENCE, "k1"), (GATEWAY, "k1"), ((200, {}, b"<h1>Welcome</h1>"), "k1")]
)
async def test_only_a_lost_connection_and_a_key_together_are_a_reason_to_send_again(
    answer: Answer, key: str | None
) -> None:
    with scripted(answer) as (url, seen):
        async with SandboxClient(url, patience_s=0.2) as client:
            with pytest.raises(errors.NoAnswer):
                await client.execute_code("s", "1", timeout_s=0.2, idempotency_key=key)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (401, errors.Unauthorized),
        (429, errors.TooManyRequests),
        (503, errors.Unavailable),
        (500, errors.NoAnswer),
    ],
)
def test_an_answer_that_is_no_problem_document_is_an_error_too(
    status: int, expected: type[errors.SandboxError]
) -> None:
    with scripted((status, {}, b"no")) as (url, _), SyncSandboxClient(url) as client, pytest.raises(expected):
        client.pool()


def test_a_service_that_is_not_ready_is_an_answer() -> None:
    starting: Answer = (503, {}, b'{"ready":false,"reasons":["no container is ready"]}')
    with scripted(starting) as (url, _), SyncSandboxClient(url) as client:
        assert client.ready().reasons == ["no container is ready"]


@pytest.mark.parametrize(("timeout_s", "expected_s"), [(None, 305.0), (10.0, 15.0), (1000.0, 1005.0)])
def test_the_client_waits_longer_than_the_code_may_run(timeout_s: float | None, expected_s: float) -> None:
    call = executions.execute("1", timeout_s=timeout_s)

    assert expected_s == SandboxClient(patience_s=5.0)._arguments(call)["timeout"].read


def test_a_password_in_the_address_is_not_shown() -> None:
    url = f"http://me:secret@127.0.0.1:{free_port()}"
    with SyncSandboxClient(url, tries=1) as client, pytest.raises(errors.ConnectionFailed) as raised:
        client.health()
    assert "secret" not in raised.value.detail
