"""One tree of errors for the service, its SDK and its CLI: each has a stable code and an HTTP status, in whose order they stand."""

from typing import ClassVar

import msgspec


class Problem(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An error on the wire: a problem document (RFC 9457) with a stable `code`."""

    title: str
    status: int
    detail: str
    code: str
    type: str = "about:blank"
    retry_after_s: int | None = None


class SandboxError(Exception):
    """Anything that this service refuses or fails to do. The text is a sentence that says what to change."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str, *, retry_after_s: int | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s

    def problem(self) -> Problem:
        """Return the problem document."""
        return Problem(
            title=self.title,
            status=self.status,
            detail=self.detail,
            code=self.code,
            retry_after_s=self.retry_after_s,
        )


class InvalidRequest(SandboxError):
    code, status, title = "invalid_request", 400, "Invalid request"


class UnknownTemplate(InvalidRequest):
    code, title = "unknown_template", "Unknown template"


class TimeoutAboveCap(InvalidRequest):
    code, title = "timeout_above_cap", "Timeout above the cap"


class InvalidPath(InvalidRequest):
    code, title = "invalid_path", "Invalid path"


class InvalidCode(InvalidRequest):
    """The zip of a function's code cannot be unpacked."""

    code, title = "invalid_code", "Invalid code"


class CodeStorageFull(InvalidRequest):
    code, title = "code_storage_full", "Code storage full"


class NetworkNotAllowed(InvalidRequest):
    """A session asked for a network that this service or its engine does not give."""

    code, title = "network_not_allowed", "Network not allowed"


class Unauthorized(SandboxError):
    code, status, title = "unauthorized", 401, "Unauthorized"


class ForeignOrigin(SandboxError):
    code, status, title = "foreign_origin", 403, "Foreign origin"


class FileDenied(SandboxError):
    code, status, title = "file_denied", 403, "File denied"


class NotFound(SandboxError):
    code, status, title = "not_found", 404, "Not found"


class SessionNotFound(NotFound):
    code, title = "session_not_found", "Session not found"


class ExecutionNotFound(NotFound):
    code, title = "execution_not_found", "Execution not found"


class ContextNotFound(NotFound):
    code, title = "context_not_found", "Context not found"


class FileNotFound(NotFound):
    code, title = "file_not_found", "File not found"


class FunctionNotFound(NotFound):
    code, title = "function_not_found", "Function not found"


class MethodNotAllowed(SandboxError):
    code, status, title = "method_not_allowed", 405, "Method not allowed"


class SessionExists(SandboxError):
    code, status, title = "session_exists", 409, "Session exists"


class ContextExists(SandboxError):
    code, status, title = "context_exists", 409, "Context exists"


class ContextDead(SandboxError):
    """The process of a context ended: it takes no cells until it is restarted."""

    code, status, title = "context_dead", 409, "Context dead"


class StdinClosed(SandboxError):
    code, status, title = "stdin_closed", 409, "Stdin closed"


class FileConflict(SandboxError):
    """What is at a path is not what the request needs there."""

    code, status, title = "file_conflict", 409, "File conflict"


class FunctionExists(SandboxError):
    code, status, title = "function_exists", 409, "Function exists"


class FunctionChanging(SandboxError):
    """Another request changes the function."""

    code, status, title = "function_changing", 409, "Function changing"


class SessionEnded(SandboxError):
    code, status, title = "session_ended", 410, "Session ended"


class FunctionChanged(SandboxError):
    """The function is not at the revision that the client thinks of."""

    code, status, title = "function_changed", 412, "Function changed"


class BodyTooLarge(SandboxError):
    code, status, title = "body_too_large", 413, "Body too large"


class FileTooLarge(SandboxError):
    code, status, title = "file_too_large", 413, "File too large"


class WorkspaceFull(SandboxError):
    code, status, title = "workspace_full", 413, "Workspace full"


class UnsupportedMediaType(SandboxError):
    code, status, title = "unsupported_media_type", 415, "Unsupported media type"


class RangeNotSatisfiable(SandboxError):
    code, status, title = "range_not_satisfiable", 416, "Range not satisfiable"


class InvalidArchive(SandboxError):
    code, status, title = "invalid_archive", 422, "Invalid archive"


class KeyReused(SandboxError):
    code, status, title = "idempotency_key_reused", 422, "Idempotency key reused"


class PackagesNotInstalled(SandboxError):
    """A session was asked for with packages that pip does not install."""

    code, status, title = "packages_not_installed", 422, "Packages not installed"


class TooManyRequests(SandboxError):
    code, status, title = "too_many_requests", 429, "Too many requests"


class FunctionThrottled(TooManyRequests):
    """As many invocations run as may run at once; `is_reserved` says that the function's own limit is meant."""

    code, title = "function_throttled", "Function throttled"

    def __init__(self, detail: str, *, is_reserved: bool = False, retry_after_s: int | None = 1) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
        self.is_reserved = is_reserved


class BrokenReconciler(SandboxError):
    """The care of containers ended by a fault of ours: the service ends, for whoever restarts it."""


class SettingsError(SandboxError):
    """A wrong setting: the text names the variable, its value and what is allowed."""

    code, title = "wrong_setting", "Wrong setting"


class InstanceHeld(SettingsError):
    """Another orchestrator has the instance."""

    code, title = "instance_held", "Instance held"


class ContainerLost(SandboxError):
    """A container or its agent vanished, or broke the protocol."""

    code, status, title = "container_lost", 502, "Container lost"


class NoAnswer(SandboxError):
    """Said by the SDK: no answer came that it understands. What was asked for may have been done."""

    code, status, title = "no_answer", 502, "No answer"


class ConnectionFailed(NoAnswer):
    """Said by the SDK: the service was not reached, and so nothing was done."""

    code, title = "connection_failed", "Connection failed"


class Unavailable(SandboxError):
    code, status, title = "unavailable", 503, "Unavailable"


class TerminalFailed(Unavailable):
    """The sandbox of a terminal did not start."""

    code, title = "terminal_failed", "Terminal failed"


class ContextFailed(Unavailable):
    """The interpreter of a context did not boot."""

    code, title = "context_failed", "Context failed"


class IsolationError(Unavailable):
    """A container started, but its self-test did not show every layer of isolation."""

    code, title = "isolation_missing", "Isolation missing"


class EngineError(Unavailable):
    """The engine refused, failed or did not answer in time."""

    code, title = "engine_error", "Engine error"


class EngineAway(EngineError):
    """The engine cannot be reached, or gave no answer in time: what was asked for may have been done."""

    code, title = "engine_away", "Engine away"


class NameTaken(EngineError):
    """The engine has a container of this name already."""

    code, title = "name_taken", "Name taken"


class ImageMissing(EngineError):
    """The engine does not have the image of a template."""

    code, title = "image_missing", "Image missing"


def by_code(kind: type[SandboxError] = SandboxError) -> dict[str, type[SandboxError]]:
    """Return an error and all that are kinds of it, by their codes."""
    found = {kind.code: kind}
    for child in kind.__subclasses__():
        for code, one in by_code(child).items():
            found.setdefault(code, one)  # a kind without a code of its own does not stand for its parent's
    return found


def from_problem(problem: Problem) -> SandboxError:
    """Return the error that a problem document stands for; of an unknown code, the tree's root."""
    kind = by_code().get(problem.code, SandboxError)
    return kind(problem.detail, retry_after_s=problem.retry_after_s)
