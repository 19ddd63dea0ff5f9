"""The OpenAPI document is valid, and the live service keeps it under whatever schemathesis makes of it."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import HealthCheck, settings
from openapi_spec_validator import validate
from requests import PreparedRequest
from requests.auth import AuthBase
from schemathesis import GenerationMode
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import missing_required_header, positive_data_acceptance, unsupported_method

from orchestrator.api.specification import REFUSALS
from tests.live import Live, serve

KEY_NAME, KEY = "tester", "key-of-the-specifications-test"
EXAMPLES = int(os.environ.get("SANDBOX_TEST_EXAMPLES", "2"))
SESSION, CONTEXT = "held", "cells"
DOCS = Path(__file__).resolve().parents[2] / "docs"
SPECIFICATION = DOCS / "openapi.json"
API = schemathesis.openapi.from_path(SPECIFICATION)
ENOUGH = 6  # requests of one operation that succeed: some take a container each
schemathesis.serializer.alias("application/x-tar", "application/octet-stream")
LONGEST_S = 0.5  # of an execution


class Signed(AuthBase):
    """Signs as an AWS SDK does."""

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        asked = AWSRequest(request.method, request.url, data=request.body, headers={})
        SigV4Auth(Credentials(KEY_NAME, KEY), "lambda", "eu-west-1").add_auth(asked)
        request.headers.update(asked.headers)
        return request


@pytest.fixture(scope="module")
def live(state_dir: Path) -> Iterator[Live]:
    """A service with a key and room for what the examples leave."""
    more = {"api_keys": f"{KEY_NAME}:{KEY}", "uid_base": "190000", "stream_heartbeat_seconds": "1"}
    with serve(state_dir, instance="test-specification", engine="local", **more) as live:
        live.client.headers["Authorization"] = f"Bearer {KEY}"
        yield live


@pytest.fixture(scope="module")
def document(live: Live) -> Any:
    return live.client.get("/openapi.json").json()


def test_the_specification_is_valid(document: Any) -> None:
    validate(document)


def test_what_is_refused_is_said_of_operations_that_exist(document: Any) -> None:
    ends = {operation["operationId"] for path in document["paths"].values() for operation in path.values()}
    names = {name: "".join(map(str.capitalize, name.split("_"))) for name in REFUSALS}
    assert [name for name, end in names.items() if not any(operation.endswith(end) for operation in ends)] == []


def test_every_operation_of_the_native_door_names_its_refusals(document: Any) -> None:
    """Behind a key, 401; of a session, 404 and 410; with a body, 400, 413 and 415: each as a problem document."""
    for path, methods in document["paths"].items():
        for operation in methods.values() if path.startswith("/v1/") else ():
            expected = {"401"} | ({"404", "410"} if "{sid}" in path else set())
            expected |= {"400", "413", "415"} if "requestBody" in operation else set()
            assert expected <= set(operation["responses"]), operation["operationId"]
    for answer in document["components"]["responses"].values():
        assert set(answer["content"]) == {"application/problem+json"}


def test_the_specification_in_the_documents_is_served(document: Any) -> None:
    assert json.loads(SPECIFICATION.read_bytes()) == document


def test_the_reference_is_what_its_script_writes(tmp_path: Path) -> None:
    """If it is not: `.venv/bin/python -m scripts.reference`."""
    subprocess.run([sys.executable, "-m", "scripts.reference", str(tmp_path)], cwd=DOCS.parent, check=True)
    for name in ("openapi.json", "api-reference.md"):
        assert (DOCS / name).read_text() == (tmp_path / name).read_text()


@pytest.fixture(scope="module")
def taken() -> Counter[str]:
    """How many requests of each operation succeeded."""
    return Counter()


def have(live: Live, path: str, body: dict[str, Any]) -> None:
    answer = live.client.post(path, json=body)
    assert answer.status_code in (201, 409), answer.text


def prepare(live: Live, case: Any) -> None:
    """Give the request a session and a context that exist, where it may have them, and no time to waste."""
    path = case.meta.components.get(ParameterLocation.PATH)
    if path is not None and path.mode is GenerationMode.POSITIVE:
        names = {"sid": SESSION, "cid": CONTEXT}
        case.path_parameters |= {name: names[name] for name in case.path_parameters if name in names}
        if "sid" in case.path_parameters:
            have(live, "/v1/sessions", {"id": SESSION})
        if "cid" in case.path_parameters:
            have(live, f"/v1/sessions/{SESSION}/contexts", {"id": CONTEXT})
    if isinstance(case.body, dict):
        for name in {"timeout_s", "timeout"} & case.body.keys():
            if isinstance(case.body[name], (int, float)) and case.body[name] > LONGEST_S:
                case.body[name] = LONGEST_S


@API.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_the_service_keeps_its_specification(case: Any, live: Live, taken: Counter[str]) -> None:
    """What fits and what does not, for every operation: answered as it says, and never by a fault of the service."""
    label = case.operation.label
    if case.meta.generation.mode is GenerationMode.POSITIVE and taken[label] >= ENOUGH:
        return
    prepare(live, case)
    excluded: list[Any] = [positive_data_acceptance]  # a schema cannot say what `code` may go with
    if label == "GET /v1/sessions/{sid}/files":
        excluded.append(unsupported_method)  # a PUT without a path is told so
    headers, auth = {"Authorization": f"Bearer {KEY}"}, None
    if "lambda" in case.operation.tags:
        excluded.append(missing_required_header)  # 403 on Lambda's wire, not 401
        headers, auth = {}, Signed() if "Authorization" in case.headers else None
    answer = case.call_and_validate(live.url, auth=auth, headers=headers, timeout=20, excluded_checks=excluded)
    if answer.status_code < 400:
        taken[label] += 1
    for made in answer.headers.get("location", ()):
        live.client.delete(made)
