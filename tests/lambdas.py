"""What tests of AWS Lambda's wire share: boto3 as anybody has it, functions, and the zips that they are."""

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from tests.live import Live

KEY_NAME, KEY = "ci", "0123456789abcdef0123"
ROLE = f"arn:aws:iam::{'0' * 12}:role/any"
REGION = "eu-west-1"
ECHO = """
import os

def handler(event, context):
    print("called")
    with open("/workspace/calls", "a") as file:
        file.write("x")
    return {
        "event": event,
        "calls": os.path.getsize("/workspace/calls"),
        "env": dict(os.environ),
        "context": {name: value for name, value in vars(context).items() if not name.startswith("_")},
        "left_ms": context.get_remaining_time_in_millis(),
    }
"""


def client(url: str, *, key: str = KEY, name: str = KEY_NAME, patience_s: float = 60, validates: bool = True) -> Any:
    """Return an unmodified client of the service; it tries once, and checks what it sends if it `validates`."""
    return boto3.client(
        "lambda",
        endpoint_url=url,
        region_name=REGION,
        aws_access_key_id=name,
        aws_secret_access_key=key,
        config=Config(retries={"max_attempts": 0}, read_timeout=patience_s, parameter_validation=validates),
    )


def zipped(*folders: Path, **files: str) -> bytes:
    """Return a zip of files by their names, of modules without their ending, and of whole packages."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name if "." in name else f"{name}.py", text)
        for folder in folders:
            for path in folder.rglob("*") if folder.is_dir() else [folder]:
                if path.suffix in (".py", ".json"):
                    archive.write(path, path.relative_to(folder.parent))
    return held.getvalue()


def entries(*infos: zipfile.ZipInfo) -> bytes:
    """Return a zip of these entries, however strange; each has one byte."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for info in infos:
            archive.writestr(info, b"x")
    return held.getvalue()


def create(of: Any, name: str, code: str | bytes = ECHO, **more: Any) -> Any:
    """Create a function of one module `app`, or of a zip."""
    given = {"Runtime": "python3.11", "Role": ROLE, "Handler": "app.handler"} | more
    content = code if isinstance(code, bytes) else zipped(app=code)
    return of.create_function(FunctionName=name, Code={"ZipFile": content}, **given)


def invoke(of: Any, name: str, event: Any = None, **more: Any) -> Any:
    """Invoke a function, return what it returned. Its error is a failure."""
    answer = of.invoke(FunctionName=name, Payload=json.dumps(event).encode(), **more)
    payload = json.loads(answer["Payload"].read())
    assert "FunctionError" not in answer, payload
    return payload


def failure(of: Any, name: str, event: Any = None) -> dict[str, Any]:
    """Invoke a function that fails; return its error."""
    answer = of.invoke(FunctionName=name, Payload=json.dumps(event).encode())
    assert (answer["StatusCode"], answer.get("FunctionError")) == (200, "Unhandled")
    error: dict[str, Any] = json.loads(answer["Payload"].read())
    assert set(error) == {"errorMessage", "errorType", "requestId", "stackTrace"}
    assert error["requestId"] == answer["ResponseMetadata"]["RequestId"]
    return error


def log_of(answer: Any) -> str:
    """Return the log that came with an invocation."""
    return base64.b64decode(answer["LogResult"]).decode()


def executions(live: Live, function: str) -> list[Any]:
    """Return what the sessions of a function have executed, but for the unpacking of its code."""
    headers = {"Authorization": f"Bearer {KEY}"}
    sessions = live.client.get("/v1/sessions?limit=1000", headers=headers).json()["sessions"]
    mine = [session["id"] for session in sessions if session["metadata"].get("function") == function]
    found = [live.client.get(f"/v1/sessions/{sid}/executions", headers=headers).json()["executions"] for sid in mine]
    return [execution for page in found for execution in page[1:]]


def site_packages() -> Path:
    """Return where this environment's packages lie."""
    import aws_lambda_powertools

    return Path(aws_lambda_powertools.__file__).parents[1]


POWERTOOLS = """
from aws_lambda_powertools import Logger, Metrics, Tracer
from aws_lambda_powertools.event_handler import APIGatewayRestResolver
from aws_lambda_powertools.metrics import MetricUnit
from aws_lambda_powertools.utilities.data_classes import APIGatewayProxyEvent, event_source
from aws_lambda_powertools.utilities.typing import LambdaContext

logger = Logger(service="orders")
metrics = Metrics(namespace="shop", service="orders")
tracer = Tracer(service="orders")
app = APIGatewayRestResolver()


@app.get("/orders/<number>")
@tracer.capture_method
def order(number: str) -> dict:
    metrics.add_metric(name="read", unit=MetricUnit.Count, value=1)
    logger.info("read", extra={"number": number})
    return {"number": number}


@logger.inject_lambda_context(log_event=True)
@tracer.capture_lambda_handler
@metrics.log_metrics(capture_cold_start_metric=True)
@event_source(data_class=APIGatewayProxyEvent)
def handler(event: APIGatewayProxyEvent, context: LambdaContext) -> dict:
    answer = app.resolve(event.raw_event, context)
    return answer | {"function": context.function_name, "left": context.get_remaining_time_in_millis() > 0}
"""
GATEWAY_EVENT = {
    "resource": "/orders/{number}",
    "path": "/orders/7",
    "httpMethod": "GET",
    "headers": {"Accept": "application/json"},
    "multiValueHeaders": {},
    "queryStringParameters": None,
    "multiValueQueryStringParameters": None,
    "pathParameters": {"number": "7"},
    "stageVariables": None,
    "requestContext": {
        "resourcePath": "/orders/{number}",
        "httpMethod": "GET",
        "path": "/orders/7",
        "stage": "test",
        "requestId": "00000000-0000-0000-0000-000000000000",
        "identity": {"sourceIp": "127.0.0.1"},
    },
    "body": None,
    "isBase64Encoded": False,
}


def powertools_zip() -> bytes:
    """Return a function that is written with Powertools, with what it needs from this environment."""
    site = site_packages()
    needed = [
        site / name for name in ("aws_lambda_powertools", "aws_xray_sdk", "wrapt", "jmespath", "typing_extensions.py")
    ]
    return zipped(*needed, app=POWERTOOLS)
