"""Traces: one from the caller's span to the user's code, received by a small OTLP/HTTP receiver."""

import gzip
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from orchestrator import settings
from orchestrator.errors import SettingsError
from tests.live import Live, free_port, serve

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SOON_S = 20.0
POLL_S = 0.05
SHOW_PLACE = "import os\ndef handler(event): return [os.environ.get('TRACEPARENT'), os.environ.get('TRACESTATE')]"


class Receiver(ThreadingHTTPServer):
    """What is sent to it by OTLP/HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Posts)
        self.spans: list[Span] = []
        self.resources: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def trace(self, trace_id: str, count: int) -> dict[str, Span]:
        """Wait for so many spans of a trace; return them by name."""
        end_at = time.monotonic() + SOON_S
        while len(found := [span for span in self.spans if span.trace_id.hex() == trace_id]) < count:
            assert time.monotonic() < end_at, [span.name for span in found]
            time.sleep(POLL_S)
        assert len({span.name for span in found}) == len(found) == count
        return {span.name: span for span in found}


class Posts(BaseHTTPRequestHandler):
    """Takes what the exporter sends."""

    server: Receiver

    def do_POST(self) -> None:
        """Keep the spans of a request to /v1/traces."""
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            facts = resource.resource.attributes
            self.server.resources.append({fact.key: fact.value.string_value for fact in facts})
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """A receiver of traces."""
    with Receiver() as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=(POLL_S,))
        thread.start()
        yield receiver
        receiver.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def traced(receiver: Receiver, state_dir: Path) -> Iterator[Live]:
    """A live service that sends its traces there, soon."""
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "50"
    try:
        instance = f"test-traced-{os.getpid()}"
        with serve(state_dir, instance=instance, engine="local", otlp_endpoint=receiver.url) as live:
            yield live
    finally:
        del os.environ["OTEL_BSP_SCHEDULE_DELAY"]


@pytest.fixture(scope="module")
def path(traced: Live) -> str:
    """A session's path."""
    return str(traced.client.post("/v1/sessions", json={}).headers["Location"])


def chain(spans: dict[str, Span], *names: str) -> bool:
    """Tell whether each of the spans is the parent of the next, and lasts as long as that at least."""
    pairs = list(pairwise(names))
    return all(spans[outer].span_id == spans[inner].parent_span_id for outer, inner in pairs) and all(
        spans[outer].start_time_unix_nano <= spans[inner].start_time_unix_nano
        and spans[inner].end_time_unix_nano <= spans[outer].end_time_unix_nano
        for outer, inner in pairs
    )


def facts(span: Span) -> dict[str, str]:
    """Return a span's attributes that are text."""
    return {fact.key: fact.value.string_value for fact in span.attributes}


def test_one_trace_leads_from_the_callers_span_to_the_users_code(traced: Live, receiver: Receiver, path: str) -> None:
    execution = traced.client.post(
        f"{path}/executions",
        json={"code": SHOW_PLACE},
        headers={"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=abc"},
    ).json()
    request = "POST /v1/sessions/{sid}/executions"
    spans = receiver.trace(TRACE, 6)
    assert {request, "execution", "channel", "launch", "code", "reap"} == set(spans)
    assert CALLER == spans[request].parent_span_id.hex()
    assert all(chain(spans, request, "execution", part) for part in ("channel", "launch", "code", "reap"))
    # The channel's may end after the launch: the agent has the job before we know that it was sent.
    ends = [spans[name].end_time_unix_nano for name in ("launch", "code", "reap")]
    assert ends == sorted(ends)
    assert [f"00-{TRACE}-{spans['code'].span_id.hex()}-01", "vendor=abc"] == execution["value"]
    told = facts(spans["execution"])
    assert (execution["id"], "python", "ok") == (
        told["execution.id"],
        told["execution.language"],
        told["execution.outcome"],
    )
    took_s = (spans["code"].end_time_unix_nano - spans["code"].start_time_unix_nano) / 1e9
    assert took_s == pytest.approx(execution["usage"]["wall_s"], abs=1e-3)


def test_a_session_shows_how_it_got_its_container(traced: Live, receiver: Receiver) -> None:
    trace = "a" * 32
    traced.client.post("/v1/sessions", json={}, headers={"traceparent": f"00-{trace}-{CALLER}-01"})
    spans = receiver.trace(trace, 2)
    assert chain(spans, "POST /v1/sessions", "acquire")
    assert facts(spans["acquire"])["template"] == "python"


def test_a_one_shot_execution_is_all_in_one_trace(traced: Live, receiver: Receiver) -> None:
    trace = "b" * 32
    order = {"command": "echo $TRACEPARENT"}
    execution = traced.client.post("/v1/execute", json=order, headers={"traceparent": f"00-{trace}-{CALLER}-01"}).json()
    spans = receiver.trace(trace, 7)
    assert chain(spans, "POST /v1/execute", "acquire")
    assert chain(spans, "POST /v1/execute", "execution", "code")
    assert f"00-{trace}-{spans['code'].span_id.hex()}-01\n" == execution["stdout"]


def test_a_request_without_a_trace_begins_one(traced: Live, receiver: Receiver, path: str) -> None:
    value = traced.client.post(f"{path}/executions", json={"code": SHOW_PLACE}).json()["value"]
    version, trace, code, flags = value[0].split("-")
    assert ("00", 1, None) == (version, int(flags, 16) & 1, value[1])
    assert receiver.trace(trace, 6)["code"].span_id.hex() == code


@pytest.mark.parametrize("place", ["", "nonsense", f"00-{'0' * 32}-{CALLER}-01", f"ff-{TRACE}-{CALLER}-01", "x" * 5000])
def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(traced: Live, path: str, place: str) -> None:
    answer = traced.client.post(f"{path}/executions", json={"code": SHOW_PLACE}, headers={"traceparent": place})
    assert TRACE not in answer.json()["value"][0]


def test_what_the_caller_did_not_sample_is_not_sent_and_the_code_is_told_so(
    traced: Live, receiver: Receiver, path: str
) -> None:
    trace = "c" * 32
    headers = {"traceparent": f"00-{trace}-{CALLER}-00"}
    place = traced.client.post(f"{path}/executions", json={"code": SHOW_PLACE}, headers=headers).json()["value"][0]
    assert place.startswith(f"00-{trace}-")
    assert place.endswith("-00")
    after = traced.client.post(f"{path}/executions", json={"code": SHOW_PLACE}).json()["value"][0].split("-")[1]
    receiver.trace(after, 6)
    assert [span.name for span in receiver.spans if span.trace_id.hex() == trace] == []


def test_an_environment_that_the_client_sets_counts(traced: Live, path: str) -> None:
    order = {"code": SHOW_PLACE, "env": {"TRACEPARENT": "mine"}}
    assert traced.client.post(f"{path}/executions", json=order).json()["value"][0] == "mine"


def test_a_timeout_is_the_codes_own_doing_and_no_error_of_the_trace(traced: Live, receiver: Receiver) -> None:
    trace = "d" * 32
    sid = traced.client.post("/v1/sessions", json={}).json()["id"]
    headers = {"traceparent": f"00-{trace}-{CALLER}-01"}
    order = {"code": "while True: pass", "timeout_s": 0.5}
    answer = traced.client.post(f"/v1/sessions/{sid}/executions", json=order, headers=headers)
    assert answer.json()["outcome"] == "timeout"
    spans = receiver.trace(trace, 6)
    assert spans["execution"].status.code == Status.STATUS_CODE_UNSET
    assert facts(spans["execution"])["execution.outcome"] == "timeout"


def test_health_and_metrics_are_not_traced_and_the_service_is_named(
    traced: Live, receiver: Receiver, path: str
) -> None:
    for quiet in ("/health", "/ready", "/metrics"):
        assert traced.client.get(quiet).status_code == 200
    after = traced.client.post(f"{path}/executions", json={"code": SHOW_PLACE}).json()["value"][0].split("-")[1]
    receiver.trace(after, 6)
    assert not {"GET /health", "GET /ready", "GET /metrics"} & {span.name for span in receiver.spans}
    named = receiver.resources[-1]
    assert ("sandbox-orchestrator", traced.instance) == (named["service.name"], named["service.instance.id"])


def test_a_receiver_that_is_away_neither_fails_requests_nor_keeps_the_service_from_ending(state_dir: Path) -> None:
    instance, endpoint = f"test-untraced-{os.getpid()}", f"http://127.0.0.1:{free_port()}"
    with serve(state_dir, instance=instance, engine="local", otlp_endpoint=endpoint) as live:
        assert live.client.post("/v1/execute", json={"code": SHOW_PLACE}).json()["outcome"] == "ok"
        assert live.terminate() == 0


def test_without_an_endpoint_no_tracer_is_even_imported_and_the_code_is_told_nothing(local_service: Live) -> None:
    """Litestar itself looks whether its plugin can be imported."""
    code = "import sys, orchestrator.app as a, orchestrator.settings as s; a.create_app(s.load({})); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "orchestrator.traces" in loaded
    assert "orchestrator.otel" not in loaded
    assert "opentelemetry.sdk" not in loaded
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    answer = local_service.client.post("/v1/execute", json={"code": SHOW_PLACE}, headers=headers)
    assert answer.json()["value"] == [None, None]


def test_opentelemetrys_own_variable_names_the_endpoint_unless_ours_does() -> None:
    theirs = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}
    assert settings.load(theirs).otlp_endpoint == "http://a:4318"
    assert settings.load(theirs | {"SANDBOX_OTLP_ENDPOINT": "http://b:4318"}).otlp_endpoint == "http://b:4318"


@pytest.mark.parametrize("address", ["localhost:4318", "ftp://a", "http://", "/v1/traces"])
def test_an_endpoint_that_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="SANDBOX_OTLP_ENDPOINT"):
        settings.load({"SANDBOX_OTLP_ENDPOINT": address})
