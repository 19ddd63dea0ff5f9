"""The HTTP doors of a live service on the local engine: what they answer, and how they refuse."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import errors, models
from orchestrator.egress.policy import REASONS as EGRESS_REASONS
from orchestrator.egress.policy import Decision
from orchestrator.metrics import REFUSE_REASONS, REMOVE_REASONS, Metrics
from tests.live import Live, free_port, serve, start, until

JSON = {"Content-Type": "application/json"}
PROBLEM = "application/problem+json"
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
EXECUTIONS = "/v1/sessions/table/executions"
SEED = "/workspace/se"
MIB = 1 << 20
HELLO = 'def handler(event): return {"message": "Hello!"}'


@pytest.fixture(scope="module", autouse=True)
def table(local_service: Live) -> Iterator[None]:
    """The session that the tables of this module use; at the end it still works."""
    assert local_service.client.post("/v1/sessions", json={"id": "table"}).status_code == 201
    yield
    answer = local_service.client.post(EXECUTIONS, json={"code": HELLO})
    assert answer.json()["value"] == {"message": "Hello!"}
    local_service.client.delete("/v1/sessions/table")
    assert "request_failed" not in local_service.log
    assert "reconcile_failed" not in local_service.log


def refusal(answer: httpx.Response, status: int, code: str) -> str:
    """Check that the answer is a problem document; return its sentence."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, PROBLEM), answer.text
    problem = answer.json()
    assert (
        {"title", "status", "detail", "code"} <= set(problem) <= {"title", "status", "detail", "code", "retry_after_s"}
    )
    assert (problem["status"], problem["code"]) == (status, code)
    assert code in {error.code for error in every_error(errors.SandboxError)}
    sentence = str(problem["detail"])
    assert re.match(r"[A-Z`]", sentence), sentence
    assert len(sentence.split()) > 2, sentence
    assert "Traceback" not in sentence
    return sentence


def every_error(kind: type[errors.SandboxError]) -> list[type[errors.SandboxError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in every_error(child))]


# --- bad input

BAD_BODIES: list[tuple[str, bytes, str]] = [
    ("half a JSON", b'{"code":', "truncated"),
    ("no JSON", b"code=1", "malformed"),
    ("no UTF-8", b'{"code":"\xff"}', "not UTF-8"),
    ("UTF-16", '{"code":""}'.encode("utf-16"), "malformed"),
    ("nothing", b"", "The body is missing"),
    ("a list", b"[]", "Expected `object`"),
    ("null", b"null", "Expected `object`"),
    ("a second value", b'{"code":"1"} {}', "malformed"),
    ("an empty object", b"{}", "Give `code`, `command`, or a `handler`"),
    ("code as a number", b'{"code":5}', "Expected `str | null`, got `int` - at `$.code`"),
    ("timeout as text", b'{"code":"","timeout_s":"5"}', "got `str` - at `$.timeout_s`"),
    ("an unknown field", b'{"code":"","nope":1}', "unknown field `nope`"),
    ("an unknown language", b'{"code":"","language":"ruby"}', "'ruby'"),
    ("timeout 0", b'{"code":"","timeout_s":0}', "> 0.0"),
    ("timeout -1", b'{"code":"","timeout_s":-1}', "> 0.0"),
    ("timeout NaN", b'{"code":"","timeout_s":NaN}', "malformed"),
    ("timeout Infinity", b'{"code":"","timeout_s":Infinity}', "malformed"),
    ("timeout 1e400", b'{"code":"","timeout_s":1e400}', "out of range"),
    ("timeout true", b'{"code":"","timeout_s":true}', "got `bool`"),
    ("code and command", b'{"code":"","command":"ls"}', "not both"),
    ("command and handler", b'{"command":"ls","handler":"a.b"}', "not both"),
    ("a handler of the shell", b'{"language":"shell","handler":"a.b"}', "no handlers"),
    ("a handler without code", b'{"handler":"main"}', "module.function"),
    ("a handler with a space", b'{"code":"","handler":"a b"}', "$.handler"),
    ("an empty command", b'{"command":[]}', ">= 1"),
    ("a name of env with =", b'{"code":"","env":{"A=B":"x"}}', "$.env"),
    ("an empty name of env", b'{"code":"","env":{"":"x"}}', "$.env"),
    ("a null byte in env", b'{"code":"","env":{"A":"\\u0000"}}', "$.env"),
    ("env as a number", b'{"code":"","env":{"A":1}}', "$.env"),
    ("a long value of env", b'{"code":"","env":{"A":"' + b"x" * 32769 + b'"}}', "32768"),
    ("many variables", b'{"code":"","env":{' + b",".join(b'"A%d":""' % n for n in range(257)) + b"}}", "256"),
    ("a lone surrogate", b'{"code":"","event":"\\ud800"}', "The body does not fit"),
    ("an integer of 5000 digits", b'{"code":"","event":' + b"1" * 5000 + b"}", "out of range"),
    ("a number without end", b'{"code":"","event":1e999}', "out of range"),
    ("a deep event", b'{"code":"","event":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("a deep unknown field", b'{"nope":' + b"[" * 100_000, "unknown field"),
    ("a deep object", b'{"code":"","event":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001, "nested too deeply"),
]


@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in BAD_BODIES])
@pytest.mark.parametrize("path", [EXECUTIONS, "/v1/execute"], ids=["session", "one-shot"])
def test_a_body_that_makes_no_sense_is_refused_with_what_to_change(
    client: httpx.Client, path: str, body: bytes, reason: str
) -> None:
    assert reason in refusal(client.post(path, content=body, headers=JSON), 400, "invalid_request")


BAD_SESSIONS: list[tuple[str, dict[str, Any], str, str]] = [
    ("an unknown template", {"template": "ruby"}, "unknown_template", "use one of python"),
    ("a network that is not given", {"network": "open"}, "invalid_request", "$.network"),
    ("ttl 0", {"ttl_s": 0}, "invalid_request", "> 0.0"),
    ("ttl above the cap", {"ttl_s": 86401}, "timeout_above_cap", "at most 86400"),
    ("idle timeout -1", {"idle_timeout_s": -1}, "invalid_request", "> 0.0"),
    ("metadata that is no text", {"metadata": {"a": 1}}, "invalid_request", "$.metadata"),
    ("metadata without a name", {"metadata": {"": "1"}}, "invalid_request", "$.metadata"),
    ("an unknown field", {"name": "x"}, "invalid_request", "unknown field `name`"),
]


@pytest.mark.parametrize(("body", "code", "reason"), [pytest.param(*row[1:], id=row[0]) for row in BAD_SESSIONS])
def test_a_session_that_cannot_be_is_refused(
    client: httpx.Client, body: dict[str, Any], code: str, reason: str
) -> None:
    assert reason in refusal(client.post("/v1/sessions", json=body), 400, code)


@pytest.mark.parametrize("timeout_s", [3600.1, 1e300])
@pytest.mark.parametrize("path", [EXECUTIONS, "/v1/execute"])
def test_a_timeout_above_the_cap_is_refused(client: httpx.Client, path: str, timeout_s: float) -> None:
    answer = client.post(path, json={"code": "", "timeout_s": timeout_s})
    assert refusal(answer, 400, "timeout_above_cap") == "`timeout_s` is at most 3600"


BAD_IDS = ["-a", "_a", "a.b", "a b", "é", "a\n", "a" * 64]


@pytest.mark.parametrize("sid", [*BAD_IDS, "", "a\0", "a/b"])
def test_an_id_of_another_form_is_refused_in_a_body(client: httpx.Client, sid: str) -> None:
    assert "$.id" in refusal(client.post("/v1/sessions", json={"id": sid}), 400, "invalid_request")


@pytest.mark.parametrize("sid", [*BAD_IDS, "a\0"])
@pytest.mark.parametrize("path", ["/v1/sessions/{}", "/v1/sessions/{}/executions", "/v1/sessions/table/executions/{}"])
def test_an_id_of_another_form_is_refused_in_a_path(client: httpx.Client, path: str, sid: str) -> None:
    quoted = "".join(f"%{byte:02X}" for byte in sid.encode())
    refusal(client.get(path.format(quoted)), 400, "invalid_request")


@pytest.mark.parametrize("sid", ["a", "0", "A-_9", "a" * 63])
def test_an_id_of_the_right_form_is_taken(client: httpx.Client, sid: str) -> None:
    assert client.post("/v1/sessions", json={"id": sid}).json()["id"] == sid
    assert client.delete(f"/v1/sessions/{sid}").status_code == 204


UNKNOWN = [
    ("GET", "/v1/sessions/none", "session_not_found"),
    ("PATCH", "/v1/sessions/none", "session_not_found"),
    ("DELETE", "/v1/sessions/none", "session_not_found"),
    ("POST", "/v1/sessions/none/executions", "session_not_found"),
    ("GET", "/v1/sessions/none/executions", "session_not_found"),
    ("GET", "/v1/sessions/none/executions/e1", "session_not_found"),
    ("DELETE", "/v1/sessions/none/executions/e1", "session_not_found"),
    ("GET", "/v1/sessions/table/executions/e1", "execution_not_found"),
    ("DELETE", "/v1/sessions/table/executions/e1", "execution_not_found"),
    ("GET", "/nowhere", "not_found"),
    ("GET", "/v1", "not_found"),
    ("GET", "/v1/sessions/table/nothing", "not_found"),
    ("GET", "/v1/sessions/..%2f..%2fetc", "not_found"),
]


@pytest.mark.parametrize(("method", "path", "code"), UNKNOWN)
def test_what_is_not_there_is_404(client: httpx.Client, method: str, path: str, code: str) -> None:
    body = {"json": {"code": ""} if path.endswith("executions") else {}} if method in ("POST", "PATCH") else {}
    refusal(client.request(method, path, **body), 404, code)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "path"),
    [("PUT", "/v1/sessions"), ("GET", "/v1/execute"), ("POST", "/health"), ("DELETE", "/v1/pool"), ("PATCH", "/ready")],
)
def test_a_method_that_a_path_does_not_take_is_405(client: httpx.Client, method: str, path: str) -> None:
    assert method in refusal(client.request(method, path), 405, "method_not_allowed")


@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=1001", "limit=x", "limit=1.5", f"after={'x' * 64}"])
def test_a_page_that_makes_no_sense_is_refused(client: httpx.Client, query: str) -> None:
    assert f"`{query.partition('=')[0]}`" in refusal(client.get(f"/v1/sessions?{query}"), 400, "invalid_request")


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="none"),
        pytest.param({"Content-Type": "text/plain"}, id="text"),
        pytest.param({"Content-Type": "application/x-www-form-urlencoded"}, id="form"),
        pytest.param({"Content-Type": "multipart/form-data; boundary=x"}, id="multipart"),
        pytest.param({"Content-Type": "application/msgpack"}, id="msgpack"),
        pytest.param(JSON | {"Content-Encoding": "gzip"}, id="gzip"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/execute", "/v1/sessions", f"{SEED}/v2/execute_code"])
def test_a_body_of_another_media_type_is_refused(client: httpx.Client, path: str, headers: dict[str, str]) -> None:
    answer = client.post(path, content=b'{"code":""}', headers=headers)
    assert answer.status_code == 415
    assert "Send the body" in answer.json()["detail"]


@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_a_media_type_may_have_parameters(client: httpx.Client, media_type: str) -> None:
    answer = client.post("/v1/execute", content=b'{"code":"print(1)"}', headers={"Content-Type": media_type})
    assert answer.json()["stdout"] == "1\n"


def test_a_body_over_the_limit_is_refused_whether_its_length_is_said_or_not(client: httpx.Client) -> None:
    body = b'{"code":"' + b"x" * MIB + b'"}'
    refusal(client.post("/v1/execute", content=body, headers=JSON), 413, "body_too_large")
    pieces = (body[at : at + 65536] for at in range(0, len(body), 65536))
    refusal(client.post("/v1/execute", content=pieces, headers=JSON), 413, "body_too_large")


def test_a_body_at_the_limit_is_taken(client: httpx.Client) -> None:
    head, tail = b'{"code":"print(len(\'', b"'))\"}"
    body = head + b"x" * (MIB - len(head) - len(tail)) + tail
    assert client.post("/v1/execute", content=body, headers=JSON).json()["stdout"] == f"{MIB - len(head) - len(tail)}\n"


@pytest.mark.parametrize("depth", [100, 500, 900, 930, 950, 960, 970, 980, 990, 1000])
def test_an_event_of_any_depth_runs_or_is_refused_and_never_loses_the_container(
    client: httpx.Client, depth: int
) -> None:
    body = b'{"code":"handler = lambda event: 1","event":' + b"[" * depth + b"]" * depth + b"}"
    answer = client.post(EXECUTIONS, content=body, headers=JSON)
    if answer.status_code != 200:
        refusal(answer, 400, "invalid_request")
    else:
        assert answer.json()["value"] == 1


@pytest.mark.parametrize("depth", [100, 500, 900, 980, 990, 1000, 3000])
def test_a_value_of_any_depth_comes_back_or_is_an_error(client: httpx.Client, depth: int) -> None:
    code = f"def handler(event):\n  value = []\n  for _ in range({depth}): value = [value]\n  return value"
    execution = client.post(EXECUTIONS, json={"code": code})
    assert execution.status_code == 200
    if execution.text.count('"outcome":"ok"') == 0:
        assert execution.json()["error"]["type"] in ("Runtime.MarshalError", "Runtime.InvalidValue")
    else:
        assert "[" * depth in execution.text


# --- the native door


def test_a_session_is_made_read_extended_and_ended(client: httpx.Client) -> None:
    body = {"id": "mine", "ttl_s": 100, "idle_timeout_s": 50, "metadata": {"team": "a"}, "env": {"A": "b"}}
    made = client.post("/v1/sessions", json=body)
    assert (made.status_code, made.headers["Location"]) == (201, "/v1/sessions/mine")
    facts = made.json()
    assert set(facts) == set(models.Session.__struct_fields__)
    assert (facts["template"], facts["network"], facts["executions"]) == ("python", "none", 0)
    assert facts["source"] in ("warm", "cold")
    assert (facts["metadata"], facts["idle_timeout_s"]) == ({"team": "a"}, 50)
    assert (facts["layers"]["no_network"], facts["layers"]["container"]) == (True, False)
    refusal(client.post("/v1/sessions", json={"id": "mine"}), 409, "session_exists")

    ran = client.post("/v1/sessions/mine/executions", json={"command": "echo $A"})
    assert ran.json()["stdout"] == "b\n"
    read = client.get("/v1/sessions/mine").json()
    assert read["executions"] == 1
    assert read["last_used_at"] >= facts["last_used_at"]
    assert abs(seconds(read["expires_at"]) - seconds(facts["expires_at"])) < 1

    patched = client.patch("/v1/sessions/mine", json={"ttl_s": 1000, "metadata": {}}).json()
    assert seconds(patched["expires_at"]) > seconds(facts["expires_at"]) + 800
    assert patched["metadata"] == {}
    refusal(client.patch("/v1/sessions/mine", json={"ttl_s": 1e9}), 400, "timeout_above_cap")
    refusal(client.patch("/v1/sessions/mine", json={"id": "other"}), 400, "invalid_request")

    ended = client.delete("/v1/sessions/mine")
    assert (ended.status_code, ended.content) == (204, b"")
    refusal(client.get("/v1/sessions/mine"), 404, "session_not_found")


def seconds(moment: str) -> float:
    from datetime import datetime

    found = datetime.fromisoformat(moment)
    assert found.tzinfo is not None
    return found.timestamp()


def test_a_session_without_a_body_gets_an_id(client: httpx.Client) -> None:
    made = client.post("/v1/sessions")
    assert made.status_code == 201
    assert re.fullmatch(models.ID_PATTERN, made.json()["id"])
    client.delete(made.headers["Location"])


def test_sessions_are_listed_in_pages(client: httpx.Client) -> None:
    names = [f"page-{number}" for number in range(3)]
    for name in names:
        assert client.post("/v1/sessions", json={"id": name}).status_code == 201
    everything = [one["id"] for one in client.get("/v1/sessions").json()["sessions"]]
    assert everything == sorted(everything)
    assert set(names) < set(everything)
    found: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = client.get("/v1/sessions", params=query).json()
        assert len(page["sessions"]) <= 2
        found += [one["id"] for one in page["sessions"]]
        if page["next"] is None:
            break
        query["after"] = page["next"]
    assert found == everything
    assert client.get("/v1/sessions", params={"after": "zzz"}).json() == {"sessions": [], "next": None}
    for name in names:
        client.delete(f"/v1/sessions/{name}")


def test_an_execution_is_answered_in_full_and_can_be_read_again(client: httpx.Client, session: str) -> None:
    body = {"code": "def handler(e, c):\n  print('in')\n  return [e, c.aws_request_id]", "event": {"a": 1}}
    answer = client.post(f"{session}/executions", json=body)
    assert answer.status_code == 200
    execution = answer.json()
    assert set(execution) == set(models.Execution.__struct_fields__)
    assert (execution["outcome"], execution["exit_code"], execution["stdout"]) == ("ok", 0, "in\n")
    assert execution["value"] == [{"a": 1}, execution["id"]]
    assert execution["usage"]["max_rss_bytes"] > MIB
    assert client.get(f"{session}/executions/{execution['id']}").json() == execution
    assert client.get(f"{session}/executions").json() == {"executions": [execution], "next": None}


def test_a_failing_code_is_an_outcome_and_no_error_of_http(client: httpx.Client, session: str) -> None:
    for body, outcome, exit_code in [
        ({"code": "1/0"}, "error", 1),
        ({"command": "exit 9"}, "error", 9),
        ({"code": "while True: pass", "timeout_s": 0.2}, "timeout", 137),
        ({"code": "import sys\nwhile True: sys.stdout.write('x' * 65536)"}, "output_limit", 137),
        ({"code": "def handler(e): return {1}"}, "error", 1),
        ({"code": 'import os\nos.write(3, b\'{"value":"\\xff"}\')'}, "error", 0),
    ]:
        answer = client.post(f"{session}/executions", json=body)
        assert answer.status_code == 200
        assert (answer.json()["outcome"], answer.json()["exit_code"]) == (outcome, exit_code)


def test_a_running_execution_is_seen_and_cancelled(client: httpx.Client, session: str) -> None:
    with ThreadPoolExecutor(1) as threads:
        body = {"code": "import time\ntime.sleep(60)", "timeout_s": 60}
        answer = threads.submit(client.post, f"{session}/executions", json=body)
        running = until(lambda: client.get(f"{session}/executions").json()["executions"])
        assert running[0]["outcome"] is None
        path = f"{session}/executions/{running[0]['id']}"
        assert client.delete(path).status_code == 204
        assert answer.result().json()["outcome"] == "cancelled"
        assert client.get(path).json()["outcome"] == "cancelled"
        assert client.delete(path).status_code == 204


def test_ending_a_session_ends_what_runs_in_it(client: httpx.Client) -> None:
    path = client.post("/v1/sessions", json={}).headers["Location"]
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(client.post, f"{path}/executions", json={"code": "import time\ntime.sleep(60)"})
        until(lambda: client.get(f"{path}/executions").json()["executions"])
        client.delete(path)
        assert answer.result().json()["outcome"] == "lost"


def test_a_session_that_expired_is_gone(client: httpx.Client) -> None:
    path = client.post("/v1/sessions", json={"ttl_s": 0.05}).headers["Location"]
    answer = until(lambda: (got := client.get(path)).status_code != 200 and got)
    assert "expired" in refusal(answer, 410, "session_ended")


def test_a_one_shot_runs_in_a_container_of_its_own(client: httpx.Client) -> None:
    body = {
        "code": "import os\ndef handler(e):\n  open('left', 'w').close()\n  return [e, len(os.listdir())]",
        "event": 1,
    }
    assert [client.post("/v1/execute", json=body).json()["value"] for _ in range(2)] == [[1, 1]] * 2
    assert "once-" not in client.get("/v1/sessions").text


def test_templates_pool_and_isolation_are_told(client: httpx.Client) -> None:
    [template] = client.get("/v1/templates").json()["templates"]
    assert (template["name"], template["memory_kb"], template["languages"][0]) == ("python", 131072, "python")
    pools = client.get("/v1/pool").json()
    assert (pools["pools"][0]["target"], pools["max_containers"]) == (2, 64)
    assert pools["pools"][0]["hits"] + pools["pools"][0]["misses"] > 0
    told = client.get("/v1/isolation").json()
    assert (told["engine"], told["layers"]["inner_seccomp"], told["observed"]["uid"]) == ("local", True, 1000)


# --- operations, headers, documentation


def test_health_and_readiness(client: httpx.Client) -> None:
    health = client.get("/health").json()
    assert (health["status"], health["engine"], health["layers"]["container"]) == ("ok", "local", False)
    until(lambda: client.get("/ready").status_code == 200)
    assert client.get("/ready").json() == {"ready": True, "reasons": []}


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/health"), ("GET", "/nowhere"), ("PUT", "/v1/sessions"), ("GET", "/v1/sessions/none"), ("GET", "/docs")],
)
def test_every_answer_has_the_security_headers(client: httpx.Client, method: str, path: str) -> None:
    headers = client.request(method, path).headers
    assert {name: headers.get(name) for name in SECURITY_HEADERS} == SECURITY_HEADERS


def test_the_server_does_not_name_its_software(client: httpx.Client) -> None:
    assert "server" not in client.get("/health").headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_a_name_that_a_stranger_chose_for_this_machine_is_refused(client: httpx.Client, host: str) -> None:
    for path in ("/v1/sessions", "/metrics", "/openapi.json", f"{SEED}/workspaces"):
        assert client.get(path, headers={"Host": host}).status_code == 401
    assert "localhost only" in refusal(client.get("/v1/pool", headers={"Host": host}), 401, "unauthorized")
    assert client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000"])
def test_this_machines_own_names_are_served(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/pool", headers={"Host": host}).status_code == 200


ROUTES = {
    "/health": {"get"},
    "/ready": {"get"},
    "/metrics": {"get"},
    "/v1/sessions": {"get", "post"},
    "/v1/sessions/{sid}": {"get", "patch", "delete"},
    "/v1/sessions/{sid}/network": {"get"},
    "/v1/sessions/{sid}/executions": {"get", "post"},
    "/v1/sessions/{sid}/executions/{eid}": {"get", "delete"},
    "/v1/sessions/{sid}/executions/{eid}/events": {"get"},
    "/v1/sessions/{sid}/executions/{eid}/stdin": {"post"},
    "/v1/execute": {"post"},
    "/v1/templates": {"get"},
    "/v1/pool": {"get"},
    "/v1/isolation": {"get"},
    f"{SEED}/healthy": {"get"},
    f"{SEED}/session/{{sid}}": {"post", "delete"},
    f"{SEED}/status/{{sid}}": {"get"},
    f"{SEED}/execute_code/{{sid}}": {"post"},
    f"{SEED}/execute/{{sid}}": {"post"},
    f"{SEED}/v2/execute_code": {"post"},
    f"{SEED}/workspaces": {"get"},
    f"{SEED}/cleanup-all": {"post"},
    "/v1/sessions/{sid}/files": {"get"},
    "/v1/sessions/{sid}/files/{path}": {"get", "head", "post", "put", "patch", "delete"},
    "/v1/sessions/{sid}/archive": {"get", "post"},
    "/v1/sessions/{sid}/contexts": {"get", "post"},
    "/v1/sessions/{sid}/contexts/{cid}": {"get", "delete"},
    "/v1/sessions/{sid}/contexts/{cid}/restart": {"post"},
    "/v1/sessions/{sid}/packages": {"post"},
    f"{SEED}/upload/{{sid}}": {"post"},
    f"{SEED}/download/{{sid}}/{{path}}": {"get"},
    f"{SEED}/create/{{sid}}": {"post"},
    f"{SEED}/files/{{sid}}": {"get"},
    f"{SEED}/files/{{sid}}/{{path}}": {"get"},
    f"{SEED}/readfile/{{sid}}/{{path}}": {"get"},
    "/2015-03-31/functions": {"get", "post"},
    "/2015-03-31/functions/{name}": {"get", "delete"},
    "/2015-03-31/functions/{name}/configuration": {"get", "put"},
    "/2015-03-31/functions/{name}/code": {"put"},
    "/2015-03-31/functions/{name}/invocations": {"post"},
    "/2017-10-31/functions/{name}/concurrency": {"put", "delete"},
    "/2019-09-30/functions/{name}/concurrency": {"get"},
}


def test_the_specification_lists_every_route_with_its_shapes(client: httpx.Client) -> None:
    specification = client.get("/openapi.json").json()
    assert {path: set(methods) for path, methods in specification["paths"].items()} == ROUTES
    for methods in specification["paths"].values():
        for method in methods.values():
            assert method["summary"]
    execution = specification["components"]["schemas"]["ExecutionRequest"]
    assert set(execution["properties"]) == set(models.ExecutionRequest.__struct_fields__)


def test_the_specification_knows_of_events_and_of_answers_before_the_end(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    answers = paths["/v1/sessions/{sid}/executions"]["post"]["responses"]
    assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert set(answers["202"]["content"]) == {"application/json"}
    events = paths["/v1/sessions/{sid}/executions/{eid}/events"]["get"]
    assert set(events["responses"]["200"]["content"]) == {"text/event-stream"}
    assert {"Last-Event-ID", "last_event_id"} <= {parameter["name"] for parameter in events["parameters"]}


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_what_is_for_people_is_a_page_of_our_own(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    parts = re.findall(r'(?:src|href)="([^"]*)"', answer.text)
    assert [part for part in parts if not part.startswith(("/", "data:"))] == []
    assert [200] * len(parts) == [client.get(part).status_code for part in parts if part.startswith("/")] + [
        200 for part in parts if part.startswith("data:")
    ]
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")


@pytest.mark.parametrize("method", ["OPTIONS", "POST"])
def test_the_methods_of_a_path_are_told_in_full(client: httpx.Client, method: str) -> None:
    answer = client.request(method, "/v1/sessions/any")
    assert (answer.status_code, {*answer.headers["allow"].split(", ")}) == (
        204 if method == "OPTIONS" else 405,
        {"DELETE", "GET", "OPTIONS", "PATCH"},
    )


# --- metrics

CLOSED: dict[str, set[str]] = {
    "language": set(models.LANGUAGES),
    "outcome": set(models.OUTCOMES),
    "source": {"warm", "cold"},
    "template": {"python"},
    "result": {"ok", "error", "timeout", "woken"},
    "reason": {*models.END_REASONS, *REMOVE_REASONS, *REFUSE_REASONS, *EGRESS_REASONS},
    "decision": {"allowed", *get_args(Decision)},
    "direction": {"in", "out"},
    "call": {"start", "info", "create", "version", "attach", "list", "remove"},
    "method": {"GET", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"},
    "path": {*ROUTES, "/", "/docs", "/mcp", "/openapi.json", "/pages/{name}"},
    "app_name": {"sandbox"},
}
GAUGES = {
    f"sandbox_{name}"
    for name in "pool_target pool_ready pool_starting pool_waiting sessions executions_in_flight containers ready".split()
}


def test_every_metric_is_there_and_its_labels_come_from_closed_sets(client: httpx.Client) -> None:
    client.get("/v1/sessions/some-id-that-must-not-be-a-label")
    client.get("/some/path/that/must/not/be/a/label")
    client.request("BREW", "/v1/pool")
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    registry = CollectorRegistry()
    Metrics(registry)
    ours = {family.name for family in registry.collect()} | GAUGES
    names = {family.name for family in families}
    assert ours - names == set()
    assert {name for name in names if name.startswith("sandbox_http")} >= {"sandbox_http_requests"}
    assert {"process_cpu_seconds", "python_gc_collections"} & names
    for family in families:
        if family.name.startswith("sandbox_"):
            for sample in family.samples:
                for label, value in sample.labels.items():
                    if label not in ("le", "status_code"):
                        assert value in CLOSED[label], sample
                assert sample.labels.get("status_code", "200").isdigit()


def test_what_happened_is_counted(client: httpx.Client) -> None:
    def count(sample: str, **labels: str) -> float:
        return sum(
            one.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for one in family.samples
            if one.name == sample and labels.items() <= one.labels.items()
        )

    duration, ended = "sandbox_execution_duration_seconds_count", "sandbox_sessions_ended_total"
    before = [count(duration, language="shell", outcome="error"), count(ended, reason="closed")]
    path = client.post("/v1/sessions", json={}).headers["Location"]
    client.post(f"{path}/executions", json={"language": "shell", "code": "exit 3"})
    client.delete(path)
    assert [count(duration, language="shell", outcome="error"), count(ended, reason="closed")] == [
        one + 1 for one in before
    ]
    assert count("sandbox_pool_target", template="python") == 2
    assert count("sandbox_execution_overhead_seconds_count") > 0


# --- keys

KEYS = {"ann": "0123456789abcdef", "bob": "fedcba9876543210"}


@pytest.fixture(scope="module")
def keyed(state_dir: Path) -> Iterator[Live]:
    """A service that asks for keys; nothing needs a container here."""
    pairs = ",".join(f"{name}:{key}" for name, key in KEYS.items())
    with serve(state_dir, instance="test-keyed", engine="local", pool_size="0", api_keys=pairs) as live:
        yield live


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer 0123456789abcdeX"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic 0123456789abcdef"},
        {"Authorization": "0123456789abcdef"},
        {"X-API-Key": "ann"},
        {"X-API-Key": ""},
        {"Authorization": "Bearer wrong", "X-API-Key": "0123456789abcdef"},
    ],
    ids=str,
)
def test_without_a_right_key_nothing_is_served(keyed: Live, headers: dict[str, str]) -> None:
    for path in ("/v1/sessions", "/metrics", "/openapi.json", "/openapi"):
        assert keyed.client.get(path, headers=headers).status_code == 401
    answer = keyed.client.post("/v1/execute", json={"code": ""}, headers=headers)
    refusal(answer, 401, "unauthorized")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert keyed.client.get(f"{SEED}/workspaces", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {KEYS['ann']}"},
        {"authorization": f"bearer {KEYS['bob']}"},
        {"X-API-Key": KEYS["ann"]},
        {"Authorization": f"Bearer {KEYS['ann']}", "Host": "sandbox.example"},
    ],
    ids=str,
)
def test_with_a_key_everything_is_served_under_any_host_name(keyed: Live, headers: dict[str, str]) -> None:
    for path in ("/v1/sessions", "/metrics", "/docs", f"{SEED}/workspaces"):
        assert keyed.client.get(path, headers=headers).status_code == 200


def test_health_readiness_and_pages_need_no_key(keyed: Live) -> None:
    assert [200] * 4 == [keyed.client.get(path).status_code for path in ("/health", "/ready", "/", "/docs")]


def test_keys_are_nowhere_in_the_log(keyed: Live) -> None:
    assert [key for key in KEYS.values() if key in keyed.log] == []


# --- the process


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"pool_size": "many"}, "SANDBOX_POOL_SIZE='many' is not allowed"),
        ({"host": "0.0.0.0"}, "SANDBOX_HOST=0.0.0.0 is not a loopback address"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_line(state_dir: Path, settings: dict[str, str], line: str) -> None:
    process = start(state_dir, instance="test-wrong", engine="local", port=str(free_port()), **settings)
    assert process.wait(30) != 0
    said = (state_dir / "test-wrong.log").read_text().strip().splitlines()
    assert len(said) == 1
    assert line in said[0]


def test_a_second_orchestrator_of_an_instance_does_not_start(local_service: Live, state_dir: Path) -> None:
    second = state_dir / "second"
    second.mkdir()
    name = local_service.instance
    process = start(second, instance=name, engine="local", port=str(free_port()), state_dir=str(state_dir))
    assert process.wait(30) != 0
    assert f"Another orchestrator runs as SANDBOX_INSTANCE={name}" in (second / f"{name}.log").read_text()
    assert local_service.client.get("/health").status_code == 200


# --- the seed's door


def seed_refusal(answer: httpx.Response, status: int, code: str) -> str:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body == {"detail": body["detail"], "error": {"code": code, "message": body["detail"]}}
    return str(body["detail"])


def test_the_seeds_curl_prints_the_handlers_value(client: httpx.Client) -> None:
    body = {"code": HELLO, "timeout": 10}
    answer = client.post(f"{SEED}/execute_code/my_session", json=body).json()
    assert answer["result"] == {"message": "Hello!"}
    assert set(answer) == {"stdout", "stderr", "exit_code", "returncode", "result", "execution_time", "metrics"}
    assert set(answer["metrics"]) == {"duration_ms", "cpu_time_ms", "memory_peak_mb"}
    assert client.get(f"{SEED}/status/my_session").json()["exists"] is True
    assert client.delete(f"{SEED}/session/my_session").json() == {"status": "success"}


def test_the_seeds_sessions_are_made_listed_and_ended(client: httpx.Client) -> None:
    limits = {"size": 1, "allow_network": False, "cpu_quota": 1.0, "memory_limit": 65536, "timeout": 60}
    assert client.get(f"{SEED}/healthy").json() == {"status": "success"}
    assert client.post(f"{SEED}/session/se1", json=limits).json() == {"session_id": "se1"}
    assert client.post(f"{SEED}/session/se2").json() == {"session_id": "se2"}
    seed_refusal(client.post(f"{SEED}/session/se1"), 400, "SESSION_EXISTS")
    seed_refusal(client.post(f"{SEED}/session/se3", json={"nope": 1}), 400, "INVALID_CODE")
    status = client.get(f"{SEED}/status/se1").json()
    assert (status["id"], status["exists"], status["files"]) == ("se1", True, [])
    assert client.get(f"{SEED}/status/none").json() == {"id": "none", "exists": False, "created_at": None, "files": []}
    assert {"se1", "se2"} <= set(client.get(f"{SEED}/workspaces").json()["workspaces"])
    assert client.delete(f"{SEED}/session/se1").status_code == 200
    seed_refusal(client.delete(f"{SEED}/session/se1"), 404, "SESSION_NOT_FOUND")
    client.delete(f"{SEED}/session/se2")


SEED_RUNS: list[tuple[str, str, dict[str, Any], int, str, Any]] = [
    ("code with an event", "execute_code", {"code": "handler = lambda e: e", "event": [1]}, 0, "", [1]),
    (
        "code with arguments",
        "execute_code",
        {"code": "import sys\nprint(sys.argv[1:])", "args": ["a"]},
        0,
        "['a']\n",
        None,
    ),
    (
        "code of the shell",
        "execute_code",
        {"code": "echo $1; exit 3", "script_type": "shell", "args": ["x"]},
        3,
        "x\n",
        None,
    ),
    ("a filename", "execute_code", {"code": "print(1)", "filename": "main.py"}, 0, "1\n", None),
    ("a command", "execute", {"command": "echo a; exit 4"}, 4, "a\n", None),
    ("a command with arguments", "execute", {"command": "echo $1", "args": ["b"]}, 0, "b\n", None),
    ("code as a command", "execute", {"code": HELLO, "event": {}, "timeout": 5}, 0, "", {"message": "Hello!"}),
]


@pytest.mark.parametrize(
    ("door", "body", "exit_code", "stdout", "result"), [pytest.param(*row[1:], id=row[0]) for row in SEED_RUNS]
)
def test_the_seeds_executions(
    client: httpx.Client, door: str, body: dict[str, Any], exit_code: int, stdout: str, result: object
) -> None:
    answer = client.post(f"{SEED}/{door}/table", json=body).json()
    assert (answer["exit_code"], answer["returncode"]) == (exit_code, exit_code)
    assert (answer["stdout"], answer["result"]) == (stdout, result)


def test_the_seeds_handler_runs_without_a_session(client: httpx.Client) -> None:
    body = {"handler_code": "def handler(e, c): return [e, c.user]", "event": 1, "context": {"user": "ann"}}
    answer = client.post(f"{SEED}/v2/execute_code", json=body).json()
    assert (answer["result"], answer["exit_code"]) == ([1, "ann"], 0)


def test_the_seeds_executions_at_once_make_one_session(client: httpx.Client) -> None:
    with ThreadPoolExecutor(4) as threads:
        path = f"{SEED}/execute_code/together"
        answers = list(threads.map(lambda n: client.post(path, json={"code": f"print({n})"}), range(4)))
    assert [answer.json()["stdout"] for answer in answers] == [f"{n}\n" for n in range(4)]
    client.delete(f"{SEED}/session/together")


VARIABLES: list[tuple[str, str, Any, dict[str, Any]]] = [
    ("a script", "x = 5\ny = [1, {'a': None}]\nz = 1", None, {"x": 5, "y": [1, {"a": None}]}),
    ("what is missing is left out", "x = 1", None, {"x": 1}),
    ("what JSON cannot carry is shown", "x = {1}\ny = float('nan')", None, {"x": "{1}", "y": "nan"}),
    ("beside a handler's value", "x = 1\ndef handler(event): return 7", 7, {"x": 1}),
    ("a handler changes one", "x = 1\ndef handler(event):\n  global x\n  x = 2\n  return x", 2, {"x": 2}),
    ("a handler with a context", "x = 1\ndef handler(e, c): return c.function_name", "table", {"x": 1}),
    ("an async handler", "x = 1\nasync def handler(event): return 3", 3, {"x": 1}),
    ("a callable object", "class C:\n  def __call__(self, e): return 4\nhandler, x = C(), 1", 4, {"x": 1}),
    (
        "a wrapped handler",
        "import functools\nx = 1\ndef f(e): return 5\nhandler = functools.wraps(f)(lambda *a: f(*a))",
        5,
        {"x": 1},
    ),
]


@pytest.mark.parametrize(("code", "result", "found"), [pytest.param(*row[1:], id=row[0]) for row in VARIABLES])
def test_the_seeds_output_variables(client: httpx.Client, code: str, result: object, found: dict[str, Any]) -> None:
    body = {"code": code, "output_params": ["x", "y"]}
    answer = client.post(f"{SEED}/execute_code/table", json=body).json()
    assert (answer.get("output_variables"), answer["result"]) == (found, result), answer


def test_the_seeds_output_variables_of_code_that_raises(client: httpx.Client) -> None:
    answer = client.post(f"{SEED}/execute_code/table", json={"code": "x = 1\n1/0", "output_params": ["x"]}).json()
    assert (answer["exit_code"], answer["result"]) == (1, None)
    assert "ZeroDivisionError" in answer["stderr"]


SEED_ERRORS: list[tuple[str, str, Any, int, str]] = [
    ("a timeout", "execute_code/table", {"code": "while True: pass", "timeout": 0.2}, 408, "EXECUTION_TIMEOUT"),
    (
        "an output without end",
        "execute_code/table",
        {"code": "import sys\nwhile True: sys.stdout.write('x' * 65536)"},
        429,
        "RESOURCE_LIMIT",
    ),
    ("no code", "execute_code/table", {}, 400, "INVALID_CODE"),
    ("code as a number", "execute_code/table", {"code": 1}, 400, "INVALID_CODE"),
    ("an unknown field", "execute_code/table", {"code": "", "nope": 1}, 400, "INVALID_CODE"),
    ("an unknown type", "execute_code/table", {"code": "", "script_type": "ruby"}, 400, "INVALID_CODE"),
    ("timeout 0", "execute_code/table", {"code": "", "timeout": 0}, 400, "INVALID_CODE"),
    ("timeout above the cap", "execute_code/table", {"code": "", "timeout": 1e6}, 400, "TIMEOUT_ABOVE_CAP"),
    ("nothing to do", "execute/table", {}, 400, "INVALID_CODE"),
    ("two things to do", "execute/table", {"code": "", "command": ""}, 400, "INVALID_CODE"),
    ("a bad id", "execute_code/-x", {"code": ""}, 400, "INVALID_CODE"),
    ("a bad variable", "execute_code/table", {"code": "", "output_params": ["a b"]}, 400, "INVALID_CODE"),
    (
        "variables of the shell",
        "execute_code/table",
        {"code": "x=1", "script_type": "shell", "output_params": ["x"]},
        400,
        "INVALID_CODE",
    ),
    ("no handler code", "v2/execute_code", {"code": ""}, 400, "INVALID_CODE"),
]


@pytest.mark.parametrize(("path", "body", "status", "code"), [pytest.param(*row[1:], id=row[0]) for row in SEED_ERRORS])
def test_the_seeds_errors(client: httpx.Client, path: str, body: Any, status: int, code: str) -> None:
    seed_refusal(client.post(f"{SEED}/{path}", json=body), status, code)


def test_the_seeds_errors_have_security_headers_and_form_whatever_went_wrong(client: httpx.Client) -> None:
    for answer in (
        client.post(f"{SEED}/execute_code/table", content=b'{"code":"\xff"}', headers=JSON),
        client.post(f"{SEED}/execute_code/table", content=b"[" * 100_000, headers=JSON),
    ):
        seed_refusal(answer, 400, "INVALID_CODE")
        assert answer.headers["x-content-type-options"] == "nosniff"
    body = b'{"code":"' + b"x" * MIB + b'"}'
    seed_refusal(client.post(f"{SEED}/execute_code/table", content=body, headers=JSON), 413, "BODY_TOO_LARGE")


def test_the_seeds_expired_session_is_410(client: httpx.Client) -> None:
    client.post(f"{SEED}/session/brief", json={"timeout": 0.05})
    answer = until(lambda: (got := client.delete(f"{SEED}/session/brief")).status_code != 200 and got)
    assert answer.status_code in (404, 410)


def test_cleaning_up_spares_what_runs_unless_forced(keyed: Live) -> None:
    headers = {"X-API-Key": KEYS["ann"]}
    client = httpx.Client(base_url=keyed.url, headers=headers, timeout=60, trust_env=False)
    with client, ThreadPoolExecutor(1) as threads:
        for name in ("busy", "calm"):
            assert client.post(f"{SEED}/session/{name}").status_code == 200
        running = threads.submit(client.post, f"{SEED}/execute/busy", json={"command": "sleep 60"})
        until(lambda: client.get("/v1/sessions/busy/executions").json()["executions"])
        cleaned = client.post(f"{SEED}/cleanup-all").json()
        assert cleaned == {"total": 2, "success": 1, "failed": 0, "skipped": 1}
        cleaned = client.post(f"{SEED}/cleanup-all", json={"force": True}).json()
        assert cleaned == {"total": 1, "success": 1, "failed": 0, "skipped": 0}
        assert running.result().status_code == 200
        assert client.get(f"{SEED}/workspaces").json() == {"workspaces": {}}
