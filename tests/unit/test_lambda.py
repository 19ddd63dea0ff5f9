"""AWS Lambda's wire as boto3 speaks it, against a live service on the local engine."""

import io
import json
import random
import re
import shutil
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from botocore.exceptions import ClientError

from languages import PATH
from tests import lambdas
from tests.lambdas import KEY, KEY_NAME, ROLE, client, create, entries, failure, invoke, zipped
from tests.live import Live, serve, until

CONTAINERS = 3
MORE = {"api_keys": f"{KEY_NAME}:{KEY}", "uid_base": "160200", "function_containers": str(CONTAINERS)}
SLOW = "import time\ndef handler(event): time.sleep(event)"
ZIP_ERROR = "Could not unzip uploaded file"


@pytest.fixture(scope="module")
def live(state_dir: Path) -> Iterator[Live]:
    """A service with a key and few containers for functions."""
    with serve(state_dir, instance="test-lambda", engine="local", **MORE) as live:
        yield live


@pytest.fixture
def aws(live: Live) -> Iterator[Any]:
    """A boto3 client; the functions that a test leaves are deleted."""
    aws = client(live.url)
    yield aws
    for function in aws.list_functions()["Functions"]:
        aws.delete_function(FunctionName=function["FunctionName"])


def gauge(live: Live, name: str) -> float:
    text = live.client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    found = re.findall(rf"^sandbox_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert found
    return sum(map(float, found))


def busy(live: Live) -> float:
    return gauge(live, "function_containers_busy")


# --- functions


def test_a_function_lives_from_creation_to_deletion(aws: Any) -> None:
    made = create(
        aws, "f", Description="adds", Timeout=5, Environment={"Variables": {"COLOUR": "red"}}, Tags={"a": "b"}
    )
    assert made["ResponseMetadata"]["HTTPStatusCode"] == 201
    assert made["FunctionArn"] == "arn:aws:lambda:eu-west-1:000000000000:function:f"
    assert (made["Timeout"], made["MemorySize"], made["Version"], made["State"]) == (5, 128, "$LATEST", "Active")
    aws.get_waiter("function_active_v2").wait(FunctionName="f")

    found = aws.get_function(FunctionName="f")
    configuration = aws.get_function_configuration(FunctionName=made["FunctionArn"])
    del made["ResponseMetadata"], configuration["ResponseMetadata"]
    assert found["Configuration"] == configuration == made
    assert found["Tags"] == {"a": "b"}

    changed = aws.update_function_configuration(FunctionName="f", Timeout=6, Environment={"Variables": {}})
    assert (changed["Timeout"], changed["Environment"], changed["Description"]) == (6, {"Variables": {}}, "adds")
    assert changed["RevisionId"] != made["RevisionId"]

    aws.delete_function(FunctionName="f")
    with pytest.raises(aws.exceptions.ResourceNotFoundException):
        aws.get_function(FunctionName="f")
    with pytest.raises(aws.exceptions.ResourceNotFoundException):
        aws.delete_function(FunctionName="f")


def test_functions_are_listed_in_pages(aws: Any) -> None:
    names = ["a", "b", "c"]
    for name in names:
        create(aws, name)
    pages = list(aws.get_paginator("list_functions").paginate(PaginationConfig={"PageSize": 2}))
    assert [[function["FunctionName"] for function in page["Functions"]] for page in pages] == [names[:2], names[2:]]


def test_a_name_is_taken_once(aws: Any) -> None:
    create(aws, "f")
    with pytest.raises(aws.exceptions.ResourceConflictException):
        create(aws, "f")


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("Runtime", "python2.7", "`Runtime`"),
        ("Runtime", "java21", "`Runtime`"),
        ("Handler", "handler", "`Handler`"),
        ("Handler", ".", "`Handler`"),
        ("Handler", "a b.c", "Handler"),
        ("MemorySize", 256, "`MemorySize` is at most 128"),
        ("MemorySize", 127, "MemorySize"),
        ("Timeout", 901, "Timeout"),
        ("Timeout", 0, "Timeout"),
        ("Timeout", "3", "Timeout"),
        ("Role", "me", "Role"),
        ("Environment", {"Variables": {"AWS_REGION": "mine"}}, "AWS_REGION"),
        ("Environment", {"Variables": {"A B": "c"}}, "Environment"),
        ("Environment", {"Variables": {"AB": "x" * 4096}}, "4096 bytes"),
        ("Environment", {"Variables": {"AB": "a\0b"}}, "Environment"),
        ("Layers", ["arn:aws:lambda:eu-west-1:000000000000:layer:x:1"], "Layers"),
        ("VpcConfig", {"SubnetIds": ["x"]}, "VpcConfig"),
        ("Publish", True, "Publish"),
        ("PackageType", "Image", "PackageType"),
        ("TracingConfig", {"Mode": "Active"}, "TracingConfig"),
        ("Description", "x" * 257, "Description"),
        ("FunctionName", "a/b", "a/b"),
        ("FunctionName", "x" * 65, "x" * 65),
        ("FunctionName", "..", ".."),
    ],
)
def test_what_a_function_cannot_be_is_refused_by_name(live: Live, field: str, value: Any, says: str) -> None:
    aws = client(live.url, validates=False)
    given = {"FunctionName": "f", "Runtime": "python3.11", "Role": ROLE, "Handler": "app.handler"} | {field: value}
    with pytest.raises(aws.exceptions.InvalidParameterValueException, match=re.escape(says)):
        aws.create_function(Code={"ZipFile": zipped(app="")}, **given)
    assert aws.list_functions()["Functions"] == []


def link() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("app.py")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "code",
    [
        b"no zip",
        b"PK\x03\x04 no zip either",
        zipped(app="x")[:-20],
        entries(zipfile.ZipInfo("../app.py")),
        entries(zipfile.ZipInfo("/workspace/app.py")),
        entries(zipfile.ZipInfo("a/../../app.py")),
        entries(link()),
        entries(zipfile.ZipInfo("app.py"), zipfile.ZipInfo("app.py/x")),
        entries(*(zipfile.ZipInfo(f"{number}") for number in range(4001))),
    ],
    ids=["text", "head", "cut", "dots", "absolute", "hidden dots", "link", "file and folder", "many"],
)
def test_code_that_is_no_good_zip_is_refused(live: Live, aws: Any, code: bytes) -> None:
    with pytest.raises(aws.exceptions.InvalidParameterValueException, match=ZIP_ERROR):
        create(aws, "f", code)
    assert aws.list_functions()["Functions"] == []
    assert busy(live) == 0


def test_code_that_grows_beyond_the_workspace_is_refused(aws: Any) -> None:
    with pytest.raises(aws.exceptions.InvalidParameterValueException, match="Unzipped size must be smaller"):
        create(aws, "f", zipped(app="#" * (65 << 20)))


def test_code_that_lies_about_its_size_is_refused(aws: Any) -> None:
    code = bytearray(zipped(app="#" * (65 << 20)))
    for offset in (code.index(b"PK\x01\x02") + 24, code.index(b"PK\x03\x04") + 22):
        code[offset : offset + 4] = (100).to_bytes(4, "little")
    with pytest.raises(aws.exceptions.InvalidParameterValueException, match=ZIP_ERROR):
        create(aws, "f", bytes(code))


def test_a_change_needs_the_revision_that_it_names(aws: Any) -> None:
    made = create(aws, "f")
    aws.update_function_configuration(FunctionName="f", Timeout=4, RevisionId=made["RevisionId"])
    with pytest.raises(aws.exceptions.PreconditionFailedException):
        aws.update_function_configuration(FunctionName="f", Timeout=5, RevisionId=made["RevisionId"])
    with pytest.raises(aws.exceptions.PreconditionFailedException):
        aws.update_function_code(FunctionName="f", ZipFile=zipped(app=""), RevisionId=made["RevisionId"])
    assert aws.get_function_configuration(FunctionName="f")["Timeout"] == 4


# --- invocations


def test_an_invocation_is_the_handlers_with_event_environment_and_context(aws: Any) -> None:
    create(aws, "f", Timeout=7, Environment={"Variables": {"COLOUR": "red"}})
    answer = aws.invoke(FunctionName="f", Payload=b'{"a": [1, "\\u00fc"]}')
    said = json.loads(answer["Payload"].read())
    assert (answer["StatusCode"], answer["ExecutedVersion"]) == (200, "$LATEST")
    assert said["event"] == {"a": [1, "ü"]}
    assert said["env"]["COLOUR"] == "red"
    assert said["env"]["AWS_REGION"] == "eu-west-1"
    assert said["env"]["AWS_LAMBDA_FUNCTION_NAME"] == "f"
    assert said["env"]["_HANDLER"] == "app.handler"
    assert said["context"] == {
        "aws_request_id": answer["ResponseMetadata"]["RequestId"],
        "function_name": "f",
        "function_version": "$LATEST",
        "memory_limit_in_mb": "128",
        "invoked_function_arn": "arn:aws:lambda:eu-west-1:000000000000:function:f",
        "log_group_name": "/aws/lambda/f",
        "log_stream_name": said["env"]["AWS_LAMBDA_LOG_STREAM_NAME"],
    }
    assert 0 < said["left_ms"] <= 7000


@pytest.mark.parametrize(
    "name", ["f", "f:$LATEST", "000000000000:function:f", "arn:aws:lambda:eu-west-1:000000000000:function:f:$LATEST"]
)
def test_a_function_has_many_names(aws: Any, name: str) -> None:
    create(aws, "f", "handler = lambda event: 1")
    assert invoke(aws, name) == 1


def test_no_payload_is_an_empty_event(aws: Any) -> None:
    create(aws, "f", "handler = lambda event: event")
    assert json.loads(aws.invoke(FunctionName="f")["Payload"].read()) == {}


def test_a_handler_may_lie_in_a_package_and_import_its_neighbours(aws: Any) -> None:
    code = zipped(**{"pkg/__init__": "", "pkg/main": "from other import n\ndef run(event): return n", "other": "n = 5"})
    create(aws, "dots", code, Handler="pkg.main.run")
    create(aws, "slash", code, Handler="pkg/main.run")
    assert (invoke(aws, "dots"), invoke(aws, "slash")) == (5, 5)


@pytest.mark.skipif(shutil.which("node") is None, reason="this host has no node")
def test_a_handler_may_be_written_in_javascript(aws: Any) -> None:
    code = """
const other = require("./lib/other");
exports.handler = async (event, context) => ({
  sum: event.a + other.b, name: context.functionName, colour: process.env.COLOUR, region: process.env.AWS_REGION,
});
"""
    content = zipped(**{"index.js": code, "lib/other.js": "exports.b = 2;"})
    variables = {"COLOUR": "red"}
    create(aws, "js", content, Runtime="nodejs22.x", Handler="index.handler", Environment={"Variables": variables})
    assert invoke(aws, "js", {"a": 1}) == {"sum": 3, "name": "js", "colour": "red", "region": "eu-west-1"}
    create(
        aws,
        "bad",
        zipped(**{"index.js": "exports.handler = async () => { throw new TypeError('no'); };"}),
        Runtime="nodejs22.x",
        Handler="index.handler",
    )
    error = failure(aws, "bad")
    assert (error["errorType"], error["errorMessage"]) == ("TypeError", "no")


def test_a_function_is_served_by_a_warm_container_of_its_own_until_it_changes(aws: Any) -> None:
    create(aws, "f")
    create(aws, "g")
    assert [invoke(aws, name)["calls"] for name in ("f", "f", "g", "f")] == [1, 2, 1, 3]
    aws.update_function_code(FunctionName="f", ZipFile=zipped(app=lambdas.ECHO + "# new"))
    assert [invoke(aws, "f")["calls"], invoke(aws, "f")["calls"]] == [1, 2]
    aws.update_function_configuration(FunctionName="f", Environment={"Variables": {"COLOUR": "blue"}})
    said = invoke(aws, "f")
    assert (said["calls"], said["env"]["COLOUR"]) == (1, "blue")
    aws.delete_function(FunctionName="f")
    create(aws, "f")
    assert invoke(aws, "f")["calls"] == 1


def test_new_code_is_what_runs_and_a_dry_run_changes_nothing(aws: Any) -> None:
    create(aws, "f", "handler = lambda event: 1")
    aws.update_function_code(FunctionName="f", ZipFile=zipped(app="handler = lambda event: 2"), DryRun=True)
    assert invoke(aws, "f") == 1
    with pytest.raises(aws.exceptions.InvalidParameterValueException, match=ZIP_ERROR):
        aws.update_function_code(FunctionName="f", ZipFile=b"PK")
    assert invoke(aws, "f") == 1
    aws.update_function_code(FunctionName="f", ZipFile=zipped(app="handler = lambda event: 2"))
    assert invoke(aws, "f") == 2


def test_the_log_comes_with_the_answer_when_asked(aws: Any) -> None:
    create(aws, "f", "def handler(event):\n    print('first', end='')\n    print('x' * 5000 if event else 'last')")
    answer = aws.invoke(FunctionName="f", LogType="Tail")
    rid = answer["ResponseMetadata"]["RequestId"]
    start, printed, end, report, _ = lambdas.log_of(answer).split("\n")
    assert (start, printed, end) == (f"START RequestId: {rid} Version: $LATEST", "firstlast", f"END RequestId: {rid}")
    assert re.fullmatch(
        rf"REPORT RequestId: {rid}\tDuration: \d+\.\d\d ms\tBilled Duration: \d+ ms\tMemory Size: 128 MB\t"
        r"Max Memory Used: \d+ MB\t",
        report,
    )
    long = lambdas.log_of(aws.invoke(FunctionName="f", Payload=b"1", LogType="Tail"))
    assert len(long) == 4096
    assert long.startswith("xxx")
    assert "LogResult" not in aws.invoke(FunctionName="f")


def test_the_log_has_both_streams_in_their_order(aws: Any) -> None:
    code = "import sys, time\ndef handler(event):\n for n in range(6):\n  print(n, file=(sys.stdout, sys.stderr)[n % 2])\n  time.sleep(0.05)"
    create(aws, "f", code)
    lines = lambdas.log_of(aws.invoke(FunctionName="f", LogType="Tail")).splitlines()
    assert lines[1:-2] == list("012345")


def test_what_the_handler_raises_is_an_unhandled_error(aws: Any) -> None:
    create(aws, "f", "def handler(event):\n    raise KeyError('name')\n")
    error = failure(aws, "f")
    assert (error["errorType"], error["errorMessage"]) == ("KeyError", "'name'")
    assert ["  File \"/workspace/app.py\", line 2, in handler\n    raise KeyError('name')\n"] == error["stackTrace"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("import nothing", "Runtime.ImportModuleError"),
        ("", "Runtime.HandlerNotFound"),
        ("def handler(event): return {1, 2}", "Runtime.MarshalError"),
        ("def handler(event): raise SystemExit(3)", "Runtime.ExitError"),
        ("def handler(event): raise SystemExit(0)", "Runtime.ExitError"),
        ("import os\ndef handler(event): os.kill(os.getpid(), 9)", "Runtime.ExitError"),
        ("def handler(event): return 'x' * (2 << 20)", "Function.ResponseSizeTooLarge"),
        ("def handler(event): return 'x' * (200 << 20)", "MemoryError"),
        ("import sys\ndef handler(event):\n    while True: print('x' * 100000)", "Runtime.ExitError"),
    ],
)
def test_every_other_end_is_an_error_of_lambdas(aws: Any, code: str, kind: str) -> None:
    create(aws, "f", code, Timeout=20)
    assert failure(aws, "f")["errorType"] == kind
    assert failure(aws, "f")["errorType"] == kind


@pytest.mark.skipif(shutil.which("node", path=PATH) is None, reason="this host has no node in /usr")
def test_a_function_may_be_javascript(aws: Any) -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("index.js", "exports.handler = async (event, context) => [event.a, context.functionName]")
    create(aws, "f", held.getvalue(), Runtime="nodejs20.x", Handler="index.handler")
    assert json.loads(aws.invoke(FunctionName="f", Payload=b'{"a": 1}')["Payload"].read()) == [1, "f"]


def test_a_timeout_is_said_in_lambdas_words(aws: Any) -> None:
    create(aws, "f", SLOW, Timeout=1)
    error = failure(aws, "f", 60)
    assert error["errorType"] == "Sandbox.Timedout"
    assert re.fullmatch(rf"20\S+Z {error['requestId']} Task timed out after 1\.00 seconds", error["errorMessage"])
    assert invoke(aws, "f", 0) is None


def test_an_event_is_taken_and_run_later(live: Live, aws: Any) -> None:
    create(aws, "f", "print('called')\ndef handler(event): return event")
    answer = aws.invoke(FunctionName="f", InvocationType="Event", Payload=b'{"n": 1}')
    assert (answer["StatusCode"], answer["Payload"].read()) == (202, b"")
    (execution,) = until(lambda: [found for found in lambdas.executions(live, "f") if found["outcome"]])
    assert (execution["outcome"], execution["value"], execution["stdout"]) == ("ok", {"n": 1}, "called\n")


def test_events_beyond_the_limit_wait_for_their_turn(live: Live, aws: Any) -> None:
    create(aws, "f", SLOW)
    aws.put_function_concurrency(FunctionName="f", ReservedConcurrentExecutions=1)
    for _ in range(5):
        aws.invoke(FunctionName="f", InvocationType="Event", Payload=b"0.2")
    assert gauge(live, "function_events_waiting") > 0
    assert busy(live) == 1
    until(lambda: sum(found["outcome"] == "ok" for found in lambdas.executions(live, "f")) == 5)
    assert gauge(live, "function_events_waiting") == 0


def test_a_dry_run_runs_nothing(live: Live, aws: Any) -> None:
    create(aws, "f")
    assert aws.invoke(FunctionName="f", InvocationType="DryRun")["StatusCode"] == 204
    assert lambdas.executions(live, "f") == []
    with pytest.raises(aws.exceptions.ResourceNotFoundException):
        aws.invoke(FunctionName="g", InvocationType="DryRun")


@pytest.mark.parametrize("payload", [b"{", b"\xff", b"NaN", b"[" * 100_000])
@pytest.mark.parametrize("kind", ["RequestResponse", "Event", "DryRun"])
def test_a_payload_that_is_no_json_is_refused(aws: Any, payload: bytes, kind: Any) -> None:
    create(aws, "f")
    with pytest.raises(aws.exceptions.InvalidRequestContentException):
        aws.invoke(FunctionName="f", Payload=payload, InvocationType=kind)


def test_a_payload_is_at_most_six_megabytes_and_an_events_one(aws: Any) -> None:
    create(aws, "f", "handler = lambda event: len(event)", Timeout=30)
    most = b'"' + b"x" * ((6 << 20) - 2) + b'"'
    assert json.loads(aws.invoke(FunctionName="f", Payload=most)["Payload"].read()) == len(most) - 2
    with pytest.raises(aws.exceptions.RequestTooLargeException, match="smaller than 6291456 bytes"):
        aws.invoke(FunctionName="f", Payload=most + b" ")
    with pytest.raises(aws.exceptions.RequestTooLargeException):
        aws.invoke(FunctionName="f", Payload=b'"' + b"x" * (1 << 20) + b'"', InvocationType="Event")


def test_what_is_not_there_or_not_supported_is_refused(aws: Any) -> None:
    create(aws, "f")
    calls: list[Callable[[], Any]] = [
        lambda: aws.invoke(FunctionName="g"),
        lambda: aws.invoke(FunctionName="f", Qualifier="1"),
        lambda: aws.invoke(FunctionName="f:live"),
        lambda: aws.update_function_code(FunctionName="g", ZipFile=zipped(app="")),
        lambda: aws.update_function_configuration(FunctionName="g", Timeout=1),
        lambda: aws.put_function_concurrency(FunctionName="g", ReservedConcurrentExecutions=1),
        lambda: aws.get_function_concurrency(FunctionName="g"),
    ]
    for call in calls:
        with pytest.raises(aws.exceptions.ResourceNotFoundException):
            call()
    with pytest.raises(aws.exceptions.InvalidParameterValueException):
        aws.invoke(FunctionName="f", ClientContext="e30=")
    with pytest.raises(aws.exceptions.InvalidParameterValueException):
        aws.update_function_code(FunctionName="f", S3Bucket="bucket", S3Key="key")


# --- limits


def test_no_more_run_than_are_reserved_for_the_function(live: Live, aws: Any) -> None:
    create(aws, "f", SLOW, Timeout=1)
    aws.put_function_concurrency(FunctionName="f", ReservedConcurrentExecutions=1)
    assert aws.get_function_concurrency(FunctionName="f")["ReservedConcurrentExecutions"] == 1
    assert aws.get_function(FunctionName="f")["Concurrency"] == {"ReservedConcurrentExecutions": 1}
    with ThreadPoolExecutor() as threads:
        first = threads.submit(failure, aws, "f", 60)
        until(lambda: busy(live) == 1)
        with pytest.raises(aws.exceptions.TooManyRequestsException) as caught:
            aws.invoke(FunctionName="f")
        assert caught.value.response["Reason"] == "ReservedFunctionConcurrentInvocationLimitExceeded"
        assert first.result()["errorType"] == "Sandbox.Timedout"
    assert invoke(aws, "f", 0) is None
    aws.put_function_concurrency(FunctionName="f", ReservedConcurrentExecutions=0)
    with pytest.raises(aws.exceptions.TooManyRequestsException):
        aws.invoke(FunctionName="f")
    aws.delete_function_concurrency(FunctionName="f")
    assert "ReservedConcurrentExecutions" not in aws.get_function_concurrency(FunctionName="f")
    assert invoke(aws, "f", 0) is None


def test_no_more_run_than_there_are_containers_and_what_is_reserved_is_not_for_others(live: Live, aws: Any) -> None:
    create(aws, "f", SLOW, Timeout=1)
    create(aws, "g", "handler = lambda event: 1")
    with pytest.raises(aws.exceptions.InvalidParameterValueException):
        aws.put_function_concurrency(FunctionName="g", ReservedConcurrentExecutions=CONTAINERS)
    aws.put_function_concurrency(FunctionName="g", ReservedConcurrentExecutions=1)
    with ThreadPoolExecutor() as threads:
        running = [threads.submit(failure, aws, "f", 60) for _ in range(CONTAINERS - 1)]
        until(lambda: busy(live) == CONTAINERS - 1)
        with pytest.raises(aws.exceptions.TooManyRequestsException) as caught:
            aws.invoke(FunctionName="f")
        assert caught.value.response["Reason"] == "ConcurrentInvocationLimitExceeded"
        assert invoke(aws, "g") == 1
        assert {task.result()["errorType"] for task in running} == {"Sandbox.Timedout"}


def test_the_longest_idle_container_makes_room_for_another_function(live: Live, aws: Any) -> None:
    for number in range(CONTAINERS + 1):
        create(aws, f"f{number}")
    assert gauge(live, "function_containers_idle") == CONTAINERS
    assert [invoke(aws, f"f{number}")["calls"] for number in (3, 0, 3)] == [1, 1, 2]


def test_a_warm_container_that_is_gone_is_replaced(live: Live, aws: Any) -> None:
    create(aws, "f")
    assert invoke(aws, "f")["calls"] == 1
    headers = {"Authorization": f"Bearer {KEY}"}
    (session,) = live.client.get("/v1/sessions", headers=headers).json()["sessions"]
    assert session["metadata"] == {"function": "f"}
    assert live.client.delete(f"/v1/sessions/{session['id']}", headers=headers).status_code == 204
    assert invoke(aws, "f")["calls"] == 1


def test_whatever_happens_at_once_nothing_is_left_of_it(live: Live, aws: Any) -> None:
    """Functions come, change, run and go under six clients; every answer is one of Lambda's, and all is given back."""
    fine = {
        "ResourceNotFoundException",
        "ResourceConflictException",
        "TooManyRequestsException",
        "InvalidParameterValueException",
    }
    source = random.Random(7)
    code = [zipped(app=f"handler = lambda event: {number}") for number in range(3)] + [b"PK broken"]

    def act(action: int, name: str, content: bytes) -> str:
        own = client(live.url)
        calls: list[Callable[[], Any]] = [
            lambda: create(own, name, content),
            lambda: own.update_function_code(FunctionName=name, ZipFile=content),
            lambda: own.update_function_configuration(FunctionName=name, Timeout=5),
            lambda: own.delete_function(FunctionName=name),
            lambda: own.put_function_concurrency(FunctionName=name, ReservedConcurrentExecutions=1),
            lambda: own.delete_function_concurrency(FunctionName=name),
            lambda: own.invoke(FunctionName=name, InvocationType="Event"),
            lambda: own.invoke(FunctionName=name),
        ]
        try:
            calls[min(action, len(calls) - 1)]()
        except ClientError as error:
            return str(error.response["Error"]["Code"])
        return "ok"

    with ThreadPoolExecutor(6) as threads:
        orders = [(source.randrange(12), source.choice("fgh"), source.choice(code)) for _ in range(150)]
        said = Counter(threads.map(lambda order: act(*order), orders))
    assert set(said) <= fine | {"ok"}
    assert said["ok"] > 30
    for function in aws.list_functions()["Functions"]:
        aws.delete_function(FunctionName=function["FunctionName"])
    until(lambda: busy(live) == gauge(live, "function_events_waiting") == gauge(live, "sessions") == 0)
    assert gauge(live, "function_containers_idle") == 0
    assert "request_failed" not in live.log
    assert "Traceback" not in live.log


# --- who may


@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [(KEY_NAME, "x" * 20, "InvalidSignatureException"), ("nobody", KEY, "UnrecognizedClientException")],
)
def test_a_wrong_key_is_refused(live: Live, name: str, key: str, kind: str) -> None:
    with pytest.raises(ClientError) as caught:
        client(live.url, name=name, key=key).list_functions()
    assert caught.value.response["Error"]["Code"] == kind
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_a_tampered_body_and_an_expired_date_are_refused(live: Live, aws: Any) -> None:
    create(aws, "f", "handler = lambda event: event")
    sent: list[Any] = []
    aws.meta.events.register("before-send.lambda.Invoke", lambda request, **_: sent.append(request))
    assert invoke(aws, "f", {"amount": 1}) == {"amount": 1}
    (request,) = sent
    headers = {name: value.decode() if isinstance(value, bytes) else value for name, value in request.headers.items()}

    def send(body: bytes, **changes: str) -> httpx.Response:
        return httpx.post(request.url, content=body, headers=headers | changes, trust_env=False)

    assert send(request.body).json() == {"amount": 1}
    for answer in (
        send(b'{"amount": 2}'),
        send(request.body, **{"X-Amz-Date": "20250101T000000Z"}),
        send(request.body, **{"X-Amz-Invocation-Type": "Event"}),
    ):
        assert (answer.status_code, answer.headers["X-Amzn-Errortype"]) == (403, "InvalidSignatureException")
        assert answer.json()["Type"] == "User"


def test_a_bearer_key_is_no_signature(live: Live) -> None:
    answer = live.client.get("/2015-03-31/functions", headers={"Authorization": f"Bearer {KEY}"})
    assert (answer.status_code, answer.headers["X-Amzn-Errortype"]) == (403, "MissingAuthenticationTokenException")


def test_without_keys_any_signature_is_taken_but_none_is_not(local_service: Live) -> None:
    aws = client(local_service.url, name="anybody", key="anything")
    create(aws, "f", "handler = lambda event: 1")
    assert invoke(aws, "f") == 1
    aws.delete_function(FunctionName="f")
    assert local_service.client.get("/2015-03-31/functions").status_code == 403
    foreign = {"Host": "evil.example", "Authorization": "AWS4-HMAC-SHA256 Credential=a/b/c/lambda/aws4_request"}
    answer = local_service.client.get("/2015-03-31/functions", headers=foreign)
    assert (answer.status_code, answer.headers["X-Amzn-Errortype"]) == (403, "AccessDeniedException")


def test_the_body_may_be_larger_than_that_of_other_routes(local_service: Live) -> None:
    """`local_service` takes bodies of 1 MiB elsewhere."""
    aws = client(local_service.url)
    create(aws, "large", zipped(app="handler = lambda event: 1") + b"", Description="x")
    incompressible = bytes((number * number * 2654435761 >> 13) & 0xFF for number in range(3 << 20)).hex()
    aws.update_function_code(FunctionName="large", ZipFile=zipped(app=f"handler = lambda e: 1\n# {incompressible}"))
    assert invoke(aws, "large") == 1
    aws.delete_function(FunctionName="large")


# --- restarts, real handlers


def test_functions_outlive_the_service(state_dir: Path) -> None:
    settings = MORE | {"uid_base": "160300"}
    with serve(state_dir, instance="test-lambda-restart", engine="local", **settings) as live:
        aws = client(live.url)
        made = create(aws, "f", "handler = lambda event: event", Tags={"a": "b"})
        create(aws, "gone", "handler = lambda event: event")
        aws.put_function_concurrency(FunctionName="f", ReservedConcurrentExecutions=1)
        aws.delete_function(FunctionName="gone")
        assert invoke(aws, "f", 1) == 1
        assert live.terminate() == 0
    with serve(state_dir, instance="test-lambda-restart", engine="local", **settings) as live:
        aws = client(live.url)
        (found,) = aws.list_functions()["Functions"]
        del made["ResponseMetadata"]
        assert found == made
        assert aws.get_function(FunctionName="f")["Tags"] == {"a": "b"}
        assert aws.get_function_concurrency(FunctionName="f")["ReservedConcurrentExecutions"] == 1
        answer = aws.invoke(FunctionName="f", Payload=b"2", LogType="Tail")
        assert answer["Payload"].read() == b"2"
        assert "\tInit Duration: " in lambdas.log_of(answer)


def test_idle_containers_end_after_a_while(state_dir: Path) -> None:
    settings = MORE | {"uid_base": "160400", "function_idle_seconds": "2"}
    with serve(state_dir, instance="test-lambda-idle", engine="local", **settings) as live:
        aws = client(live.url)
        create(aws, "f")
        assert invoke(aws, "f")["calls"] == 1
        until(lambda: gauge(live, "sessions") == 0)
        assert gauge(live, "function_containers_idle") == 0
        assert invoke(aws, "f")["calls"] == 1


def test_idle_containers_make_room_for_sessions_and_those_in_use_do_not(state_dir: Path) -> None:
    settings = MORE | {"uid_base": "160600", "max_containers": "3", "pool_size": "1"}
    with (
        serve(state_dir, instance="test-lambda-room", engine="local", **settings) as live,
        ThreadPoolExecutor() as threads,
    ):
        aws = client(live.url)
        create(aws, "slow", SLOW, Timeout=60)
        for name in ("f", "g"):
            create(aws, name)
        assert invoke(aws, "f")["calls"] == 1, "so `g` is unused longest but for `slow`"
        running = threads.submit(invoke, aws, "slow", 8)
        until(lambda: busy(live) == 1)
        headers = {"Authorization": f"Bearer {KEY}"}
        answers = [live.client.post("/v1/sessions", headers=headers, timeout=30) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [201, 201, 429]
        assert gauge(live, "function_containers_idle") == 0
        assert running.result() is None
        assert live.client.post("/v1/sessions", headers=headers, timeout=30).status_code == 201


def test_the_end_of_the_service_waits_for_what_runs(state_dir: Path) -> None:
    with serve(state_dir, instance="test-lambda-end", engine="local", **(MORE | {"uid_base": "160500"})) as live:
        aws = client(live.url)
        create(aws, "f", SLOW)
        with ThreadPoolExecutor() as threads:
            running = threads.submit(invoke, aws, "f", 0.5)
            until(lambda: busy(live) == 1)
            assert live.terminate() == 0
            assert running.result() is None


def test_a_handler_that_is_written_with_powertools_runs_as_it_is(aws: Any) -> None:
    variables = {"POWERTOOLS_TRACE_DISABLED": "true", "POWERTOOLS_LOG_LEVEL": "INFO"}
    create(aws, "orders", lambdas.powertools_zip(), Timeout=30, Environment={"Variables": variables})
    answer = aws.invoke(FunctionName="orders", Payload=json.dumps(lambdas.GATEWAY_EVENT), LogType="Tail")
    said = json.loads(answer["Payload"].read())
    assert (said["statusCode"], said["body"], said["function"], said["left"]) == (200, '{"number":"7"}', "orders", True)
    lines = [json.loads(line) for line in lambdas.log_of(answer).splitlines() if line.startswith("{")]
    (logged,) = [line for line in lines if line.get("message") == "read"]
    assert logged["number"] == "7"
    assert logged["function_request_id"] == answer["ResponseMetadata"]["RequestId"]
    assert logged["function_memory_size"] == "128"
    assert [line["read"] for line in lines if "read" in line] == [[1.0]]


def test_an_invocation_goes_on_when_its_client_is_gone(live: Live, aws: Any) -> None:
    create(aws, "f", SLOW)
    impatient = lambdas.client(live.url, patience_s=0.2)
    with pytest.raises(Exception, match="Read timeout"):
        impatient.invoke(FunctionName="f", Payload=b"1")
    (execution,) = until(lambda: [found for found in lambdas.executions(live, "f") if found["outcome"]])
    assert execution["outcome"] == "ok"
