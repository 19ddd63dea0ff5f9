"""The words of AWS Lambda's wire: what its clients send, what they are told, and its errors."""

import platform
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from orchestrator import errors
from orchestrator.functions import RESERVED_ENV, Function
from orchestrator.models import EnvText

ACCOUNT = "000000000000"
VERSION = "$LATEST"
NAME = re.compile(
    r"(?:(?:arn:aws[a-z-]*:lambda:[a-z0-9-]+:)?\d{12}:function:)?([A-Za-z0-9_-]{1,64})(?::([A-Za-z0-9$_-]{1,128}))?"
)
PAGE = 50  # functions of one page, as there
ZIP_LIMIT = 50 << 20  # bytes of a function's zip
ENV_LIMIT = 4096  # bytes of names and values
ARCHITECTURE = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "arm64", "arm64": "arm64"}[platform.machine()]
TYPES: dict[str, tuple[str, int]] = {
    # Our code → the type that its clients know, and its status there.
    "invalid_request": ("InvalidParameterValueException", 400),
    "invalid_code": ("InvalidParameterValueException", 400),
    "timeout_above_cap": ("InvalidParameterValueException", 400),
    "unknown_template": ("InvalidParameterValueException", 400),
    "unauthorized": ("AccessDeniedException", 403),
    "not_found": ("ResourceNotFoundException", 404),
    "function_not_found": ("ResourceNotFoundException", 404),
    "function_exists": ("ResourceConflictException", 409),
    "function_changing": ("ResourceConflictException", 409),
    "function_changed": ("PreconditionFailedException", 412),
    "code_storage_full": ("CodeStorageExceededException", 400),
    "body_too_large": ("RequestTooLargeException", 413),
    "too_many_requests": ("TooManyRequestsException", 429),
    "function_throttled": ("TooManyRequestsException", 429),
    "unsupported_media_type": ("UnsupportedMediaTypeException", 415),
    "unavailable": ("ServiceException", 503),
}


class AwsError(Exception):
    """An error that only this wire has."""

    def __init__(self, kind: str, status: int, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.message = message


class AwsProblem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error on this wire; its kind is in a header."""

    Type: Literal["User", "Service"]
    Message: str
    message: str
    Reason: str | None = None


class Words(msgspec.Struct, frozen=True, kw_only=True, rename="pascal", forbid_unknown_fields=True):
    """What a client sends. A field that would change what the function does and is not known here is refused."""


class Environment(Words, frozen=True):
    variables: dict[Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9_]{1,127}\Z")], EnvText] = {}


class FunctionCode(Words, frozen=True):
    zip_file: bytes


class Tracing(Words, frozen=True):
    mode: Literal["PassThrough"] = "PassThrough"


Timeout = Annotated[int, Meta(ge=1, le=900)]
Memory = Annotated[int, Meta(ge=128, le=10240)]
Handler = Annotated[str, Meta(pattern=r"^[^\s]{1,128}\Z")]
Text = Annotated[str, Meta(max_length=256)]
Role = Annotated[
    str, Meta(pattern=r"^arn:(aws[a-zA-Z-]*)?:iam::\d{12}:role/?[a-zA-Z_0-9+=,.@\-_/]+\Z", max_length=10000)
]
Architectures = Annotated[list[Literal["x86_64", "arm64"]], Meta(min_length=1, max_length=1)]
Tags = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=128)], Annotated[str, Meta(max_length=256)]], Meta(max_length=50)
]


class CreateFunction(Words, frozen=True):
    function_name: str
    runtime: str
    role: Role
    handler: Handler
    code: FunctionCode
    description: Text = ""
    timeout: Timeout = 3
    memory_size: Memory = 128
    environment: Environment = Environment()
    tags: Tags = {}
    architectures: Architectures | None = None
    package_type: Literal["Zip"] = "Zip"
    tracing_config: Tracing = Tracing()
    publish: Literal[False] = False


class UpdateCode(Words, frozen=True):
    zip_file: bytes
    architectures: Architectures | None = None
    revision_id: str | None = None
    dry_run: bool = False
    publish: Literal[False] = False


class UpdateConfiguration(Words, frozen=True):
    runtime: str | None = None
    role: Role | None = None
    handler: Handler | None = None
    description: Text | None = None
    timeout: Timeout | None = None
    memory_size: Memory | None = None
    environment: Environment | None = None
    tracing_config: Tracing = Tracing()
    revision_id: str | None = None


class Concurrency(Words, frozen=True):
    reserved_concurrent_executions: Annotated[int, Meta(ge=0)]


def name_of(text: str, *, qualifier: str | None = None) -> str:
    """Return the name in a name or an ARN. A version or alias but `$LATEST` is nowhere to be found."""
    found = NAME.fullmatch(text)
    if found is None:
        raise errors.InvalidRequest(f"{text[:200]!r} is no name or ARN of a function")
    if (qualifier or found[2] or VERSION) != VERSION:
        raise errors.FunctionNotFound(f"Function not found: {found[1]} has no version or alias but {VERSION}")
    return found[1]


def arn_of(name: str, region: str) -> str:
    """Return the function's ARN, in the region that the client thinks it speaks to."""
    return f"arn:aws:lambda:{region}:{ACCOUNT}:function:{name}"


def check_architectures(architectures: Sequence[str] | None) -> None:
    """Refuse another machine's code."""
    if architectures and list(architectures) != [ARCHITECTURE]:
        raise errors.InvalidRequest(f"`Architectures` is {ARCHITECTURE} on this host")


def check_environment(variables: dict[str, str]) -> None:
    """Refuse names that are the runtime's, and more than Lambda would take."""
    if taken := sorted(set(variables) & RESERVED_ENV):
        raise errors.InvalidRequest(f"Reserved keys used in this request: {', '.join(taken)}: choose others")
    if sum(len(name.encode()) + len(value.encode()) for name, value in variables.items()) > ENV_LIMIT:
        raise errors.InvalidRequest(f"The environment variables are above {ENV_LIMIT} bytes: make them fewer")


def configuration(function: Function, region: str) -> dict[str, Any]:
    """Return the function's configuration as Lambda words it."""
    return {
        "FunctionName": function.name,
        "FunctionArn": arn_of(function.name, region),
        "Runtime": function.runtime,
        "Role": function.role,
        "Handler": function.handler,
        "CodeSize": function.code_bytes,
        "CodeSha256": function.code_sha256,
        "Description": function.description,
        "Timeout": function.timeout_s,
        "MemorySize": function.memory_mb,
        "LastModified": function.modified_at.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "+0000",
        "Version": VERSION,
        "Environment": {"Variables": function.env},
        "TracingConfig": {"Mode": "PassThrough"},
        "RevisionId": function.revision,
        "State": "Active",
        "LastUpdateStatus": "Successful",
        "PackageType": "Zip",
        "Architectures": [ARCHITECTURE],
    }
