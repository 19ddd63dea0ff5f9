"""The seed's door: errors in its form, under its codes."""

from typing import Any

import msgspec
from litestar import Request, Response

from orchestrator.api.problems import problem_of

CODES = {  # of those that are not ours in capitals
    "session_not_found": "SESSION_NOT_FOUND",
    "session_ended": "SESSION_EXPIRED",
    "invalid_request": "INVALID_CODE",
    "file_not_found": "FILE_NOT_FOUND",
}


class Said(msgspec.Struct, frozen=True):
    """What went wrong, for programs and for people."""

    code: str
    message: str


class SeedProblem(msgspec.Struct, frozen=True):
    """An error of this door."""

    detail: str
    error: Said


class SeedError(Exception):
    """An error that only the seed's door has."""

    def __init__(self, code: str, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.status_code = status_code


def handle(request: Request[Any, Any, Any], error: Exception) -> Response[SeedProblem]:
    """Answer in the seed's form of an error."""
    if isinstance(error, SeedError):
        code, status_code, detail, retry_after_s = error.code, error.status_code, str(error), None
    else:
        problem = problem_of(request, error)
        code = CODES.get(problem.code, problem.code.upper())
        status_code, detail, retry_after_s = problem.status, problem.detail, problem.retry_after_s
        if problem.code == "session_exists":
            status_code = 400
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    body = SeedProblem(detail, Said(code, detail))
    return Response(body, status_code=status_code, headers=headers)
