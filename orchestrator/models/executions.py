"""Executions: how they are asked for, and what came of them."""

from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta

from orchestrator.models.files import Encoded
from orchestrator.models.network import Network
from orchestrator.models.terms import Env, Id, Language, Request, Requirements, Seconds, Time

Outcome = Literal["ok", "error", "timeout", "oom", "output_limit", "killed", "cancelled", "lost"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
Stream = Literal["stdout", "stderr", "value", "display", "artifact"]


class ExecutionRequest(Request, frozen=True):
    """Run code or a command.

    `code` that defines the handler, in JavaScript exports it, is called with `event` and a context; without
    a handler it is a script. `handler` may be `module.function` of a workspace file, then `code` may be left
    out. `command` is a line for bash, or a list of words.
    With `context_id`, `code` is a cell of that context.
    In the `background` it is not waited for, and may run as long as its session lives. With
    `stdin_open` more may be sent to its stdin after `stdin`.
    """

    language: Language = "python"
    code: str | None = None
    command: str | Annotated[list[str], Meta(min_length=1, max_length=1024)] | None = None
    handler: Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_.]{0,255}\Z")] | None = None
    event: Any = {}
    context: dict[str, Any] = {}
    args: Annotated[list[str], Meta(max_length=1024)] = []
    stdin: str = ""
    files: Annotated[dict[str, str | Encoded], Meta(max_length=1024)] = {}
    env: Env = {}
    timeout_s: Seconds | None = None
    background: bool = False
    stdin_open: bool = False
    context_id: Id | None = None


class StdinRequest(Request, frozen=True):
    """Send text to the stdin of a running execution, and perhaps close it behind that."""

    text: str = ""
    close: bool = False


class PackagesRequest(Request, frozen=True):
    """Install packages for all further executions of a session."""

    packages: Annotated[Requirements, Meta(min_length=1)]
    timeout_s: Seconds | None = None


class OneShotRequest(ExecutionRequest, frozen=True):
    """Run once in a fresh container, which is gone afterwards."""

    template: str | None = None
    network: Network | None = None


class ExecutionError(msgspec.Struct, frozen=True, kw_only=True):
    """What the user's code raised; `stack_trace` has the user's frames only."""

    type: str
    message: str
    stack_trace: list[str] = []


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What an execution consumed, measured outside its reach, children included."""

    wall_s: float
    cpu_s: float
    max_rss_bytes: int


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that an execution made or changed; its content only in the answer to a one-shot execution."""

    path: str
    size_bytes: int
    modified_at: Time
    base64: bytes | None = None


class Execution(msgspec.Struct, kw_only=True):
    """One run of code or a command. `outcome` is null while it runs.

    `truncated` names the streams of which only the beginning was kept, `replaced` those in which
    bytes that are not UTF-8 became U+FFFD. `signal` is what killed the code. `displays` is what a cell
    showed: each an object of MIME types.
    """

    id: str
    session_id: str
    started_at: Time
    language: Language
    background: bool = False
    context_id: str | None = None
    outcome: Outcome | None = None
    exit_code: int | None = None
    signal: int | None = None
    value: Any = None
    error: ExecutionError | None = None
    stdout: str = ""
    stderr: str = ""
    truncated: list[Stream] = []
    replaced: list[Stream] = []
    usage: Usage | None = None
    artifacts: list[Artifact] = []
    displays: list[Any] = []


class ExecutionPage(msgspec.Struct, frozen=True, kw_only=True):
    """The executions of a session that are still known, oldest first; `next` continues after the last one."""

    executions: list[Execution]
    next: str | None = None
