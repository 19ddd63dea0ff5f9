"""A call: what to ask the service for, the type of the answer, how long it may take; and what calls are made of."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from orchestrator import errors, models

T = TypeVar("T")
UNSET = msgspec.UNSET
EXECUTION_TIMEOUT_S = 300.0  # what an execution gets that names no timeout, unless the service is set otherwise
Key = Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,255}\Z")]


class Call(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """One request and the type of its answer, `bytes` for what is no JSON. `runs_s` is how long what it starts may run.

    With a `key` the service does it once, however often it is sent. With `goes_on`, what it is about outlives its
    connection: events that are cut off can be had from there on.
    """

    method: str
    path: str
    answer: type[T]
    body: bytes | None = None
    media_type: str = "application/json"
    query: dict[str, str | int] = {}
    headers: dict[str, str] = {}
    key: str | None = None
    runs_s: float = 0.0
    goes_on: bool = False
    statuses: frozenset[int] = frozenset({200, 201, 204})


def execution_of(
    path: str,
    kind: type[models.ExecutionRequest] | type[models.PackagesRequest],
    fields: dict[str, Any],
    *,
    event: Any = UNSET,
    key: str | None = None,
) -> Call[models.Execution]:
    """Return the call of an execution, which is waited for."""
    try:
        msgspec.convert(key, Key | None)
    except msgspec.ValidationError:
        raise errors.InvalidRequest("An idempotency_key is 1 to 255 ASCII characters without spaces") from None
    timeout_s = fields["timeout_s"]
    runs_s = EXECUTION_TIMEOUT_S if timeout_s is None else timeout_s
    body = body_of(kind, fields, event=event)
    return Call(method="POST", path=path, answer=models.Execution, body=body, key=key, runs_s=runs_s)


def body_of(kind: type[msgspec.Struct], fields: dict[str, Any], *, event: Any = UNSET) -> bytes:
    """Return what was given as JSON; InvalidRequest, before anything is sent, for what the service would refuse."""
    given = {name: value for name, value in fields.items() if value is not None}
    if event is not UNSET:
        given["event"] = event
    try:
        msgspec.convert(given, kind)
        return json.dumps(msgspec.to_builtins(given), allow_nan=False).encode()
    except msgspec.ValidationError as error:
        raise errors.InvalidRequest(str(error)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise errors.InvalidRequest(f"JSON cannot carry what was given: {error}") from None


def files_of(files: Mapping[str, str | bytes] | None) -> dict[str, Any] | None:
    """Return files as they travel in JSON: text as it is, bytes in base64."""
    if files is None:
        return None
    return {path: what if isinstance(what, str) else {"base64": what} for path, what in files.items()}


def page_of(limit: int, after: str | None) -> dict[str, str | int]:
    """Return the query for a page: so many, behind the one that is named."""
    return {"limit": limit} if after is None else {"limit": limit, "after": after}


def path_of(session_id: str, *rest: str) -> str:
    """Return the path of a session, or of something of it; InvalidRequest for what cannot be an id."""
    try:
        ids = msgspec.convert([session_id, *rest], list[models.Id])
    except msgspec.ValidationError as error:
        raise errors.InvalidRequest(f"{session_id!r} is no id: {error}") from None
    return "/".join(["/v1/sessions", *ids])


def file_path_of(session_id: str, path: str) -> str:
    """Return the path of a file of a session."""
    return f"{path_of(session_id, 'files')}/{quote(path, safe='/')}"
