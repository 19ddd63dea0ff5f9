"""The words of the HTTP contract: requests and responses, shared by server, SDK and CLI."""

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from orchestrator.errors import Problem

ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}\Z"
TERM_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9+._-]{0,62}\Z"
NAME_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z"

Id = Annotated[str, Meta(pattern=ID_PATTERN, description="1 to 63 letters, digits, `_` or `-`")]
EnvName = Annotated[str, Meta(pattern=NAME_PATTERN)]
EnvText = Annotated[str, Meta(pattern=r"^[^\x00]*\Z", max_length=32768)]  # a null byte fits no environment
Env = Annotated[dict[EnvName, EnvText], Meta(max_length=256)]
Metadata = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=32)
]
Seconds = Annotated[float, Meta(gt=0, description="seconds")]
HostPattern = Annotated[
    str,
    Meta(min_length=1, max_length=280, description="a host with ports, such as `example.com:443` or `*.example.com`"),
]
HeaderName = Annotated[str, Meta(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}\Z")]
HeaderText = Annotated[str, Meta(pattern=r"^[\x21-\x7e](?:[\x20-\x7e]*[\x21-\x7e])?\Z", max_length=4096)]
Headers = Annotated[dict[HeaderName, HeaderText], Meta(min_length=1, max_length=16)]
Language = Literal["python", "javascript", "shell"]
Outcome = Literal["ok", "error", "timeout", "oom", "output_limit", "killed", "cancelled", "lost"]
Source = Literal["warm", "cold"]
EndReason = Literal["closed", "expired", "idle", "lost", "drained"]
Stream = Literal["stdout", "stderr", "value", "display", "artifact"]
ContextLanguage = Literal["python"]
ContextState = Literal["starting", "idle", "busy", "dead"]
EventKind = Literal["started", "stdout", "stderr", "display", "artifact", "done"]
OUTCOMES: tuple[Outcome, ...] = ("ok", "error", "timeout", "oom", "output_limit", "killed", "cancelled", "lost")
LANGUAGES: tuple[Language, ...] = ("python", "javascript", "shell")
END_REASONS: tuple[EndReason, ...] = ("closed", "expired", "idle", "lost", "drained")


Requirements = Annotated[
    list[Annotated[str, Meta(max_length=200, description="a package's name with versions, such as `requests==2.*`")]],
    Meta(max_length=64),
]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client sends: an unknown field is refused."""


class AllowedHost(Request, frozen=True):
    """Hosts that may be reached by plain HTTP, and headers that are added on the way, out of the code's sight."""

    host: HostPattern
    headers: Headers


class NetworkRules(Request, frozen=True):
    """Hosts that a session may reach, as patterns with ports; what is denied is so whatever is allowed."""

    allow: Annotated[list[HostPattern | AllowedHost], Meta(max_length=64)] = []
    deny: Annotated[list[HostPattern], Meta(max_length=64)] = []


Network = Literal["none", "public"] | NetworkRules
EgressProtocol = Literal["connect", "http", "socks5"]


class SessionRequest(Request, frozen=True):
    """Start a session; without `id` it gets one."""

    id: Id | None = None
    template: str | None = None
    ttl_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    env: Env = {}
    metadata: Metadata = {}
    network: Network | None = None
    packages: Requirements = []


class SessionPatch(Request, frozen=True):
    """Extend a session: its life counts anew from now. A network that is given replaces the one before."""

    ttl_s: Seconds | None = None
    idle_timeout_s: Seconds | None = None
    metadata: Metadata | None = None
    network: Network | None = None


class Encoded(Request, frozen=True):
    """The content of a file that is no text."""

    base64: bytes


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


class ShownHost(msgspec.Struct, frozen=True, kw_only=True):
    """Allowed hosts with the names of the headers that are added for them."""

    host: str
    headers: list[str]


class ShownRules(msgspec.Struct, frozen=True, kw_only=True):
    """The rules of a session's network as they may be seen."""

    allow: list[str | ShownHost]
    deny: list[str]


ShownNetwork = Literal["none", "public"] | ShownRules


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A client's named use of one container."""

    id: str
    template: str
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime
    idle_timeout_s: float
    executions: int
    source: Source
    network: ShownNetwork
    metadata: dict[str, str]
    layers: dict[str, bool]


class SessionPage(msgspec.Struct, frozen=True, kw_only=True):
    """Sessions in the order of their ids; `next` continues after the last one."""

    sessions: list[Session]
    next: str | None = None


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


class File(msgspec.Struct, frozen=True, kw_only=True):
    """Something in the workspace; `path` counts from there. Only a file has a size. Bytes of its path that are not
    UTF-8 became U+FFFD.
    """

    path: str
    type: Literal["file", "directory", "link", "other"]
    size_bytes: int
    modified_at: datetime


class FilePage(msgspec.Struct, frozen=True, kw_only=True):
    """Files in the order of their paths; `next` continues after the last one."""

    files: list[File]
    next: str | None = None


class NewDirectory(Request, frozen=True):
    """What to make at a path: a directory, and those above it."""

    type: Literal["directory"]


class Move(Request, frozen=True):
    """Where a file or directory is to be; what is there already is replaced only when `overwrite` says so."""

    path: str
    overwrite: bool = False


class Unpacked(msgspec.Struct, frozen=True, kw_only=True):
    """How many files an archive had."""

    files: int


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A file that an execution made or changed; its content only in the answer to a one-shot execution."""

    path: str
    size_bytes: int
    modified_at: datetime
    base64: bytes | None = None


class Execution(msgspec.Struct, kw_only=True):
    """One run of code or a command. `outcome` is null while it runs.

    `truncated` names the streams of which only the beginning was kept, `replaced` those in which
    bytes that are not UTF-8 became U+FFFD. `signal` is what killed the code. `displays` is what a cell
    showed: each an object of MIME types.
    """

    id: str
    session_id: str
    started_at: datetime
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


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What the SDK makes of one event: `text` of `stdout` and `stderr`, else `item`, `artifact` or `execution`."""

    id: int
    kind: EventKind
    text: str = ""
    item: dict[str, Any] | None = None
    artifact: Artifact | None = None
    execution: Execution | None = None


class EventText(msgspec.Struct, frozen=True, kw_only=True):
    """What a `stdout` or `stderr` event carries."""

    text: str


class ContextRequest(Request, frozen=True):
    """Start a context; without `id` it gets one."""

    id: Id | None = None
    language: ContextLanguage = "python"


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """An interpreter that stays: its executions share variables. `detail` says why it is dead."""

    id: str
    session_id: str
    language: ContextLanguage
    state: ContextState
    created_at: datetime
    executions: int
    detail: str | None = None


class ContextPage(msgspec.Struct, frozen=True, kw_only=True):
    """The contexts of a session, oldest first."""

    contexts: list[Context]


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A named recipe for containers. `languages` is null until a container of it has told which its image has."""

    name: str
    image: str
    pool_size: int
    cpu_quota: float
    memory_kb: int
    workspace_kb: int
    network: str
    languages: list[Language] | None


class TemplatePage(msgspec.Struct, frozen=True, kw_only=True):
    """All templates."""

    templates: list[Template]


class PoolState(msgspec.Struct, frozen=True, kw_only=True):
    """The pool of one template: `target` containers are kept `ready`."""

    template: str
    target: int
    ready: int
    starting: int
    waiting: int
    hits: int
    misses: int


class PoolPage(msgspec.Struct, frozen=True, kw_only=True):
    """The pools of all templates, and the cap on all containers together.

    `quarantined` names the containers that the engine refuses to remove; they count until they are gone.
    """

    pools: list[PoolState]
    containers: int
    quarantined: list[str]
    max_containers: int


Extent = Annotated[int, Meta(ge=1, le=1000)]


class Resize(msgspec.Struct, frozen=True, kw_only=True, tag="resize", forbid_unknown_fields=True):
    """Said by the client of a terminal: its size, in characters."""

    cols: Extent
    rows: Extent


class Exit(msgspec.Struct, frozen=True, kw_only=True, tag="exit"):
    """Said to the client of a terminal: its program has ended."""

    exit_code: int
    signal: int | None


class Trouble(msgspec.Struct, frozen=True, kw_only=True, tag="error"):
    """Said to the client of a terminal: what is wrong with what it sent, or why the terminal ends."""

    problem: Problem


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The process lives. `layers` are the isolation layers last observed active in a container."""

    status: Literal["ok"]
    version: str
    engine: str
    layers: dict[str, bool]


class EgressConnection(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that is open; `bytes_in` came from the host, `bytes_out` went there."""

    host: str
    port: int
    address: str | None
    protocol: EgressProtocol
    opened_at: datetime
    bytes_in: int
    bytes_out: int


class EgressRefusal(msgspec.Struct, frozen=True, kw_only=True):
    """A connection that was not made, and why; `decision` and `reason` are those of the metrics."""

    at: datetime
    host: str
    port: int | None
    decision: Literal["refused", "failed", "limited"]
    reason: str
    message: str


class EgressCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What a session's network carried since the session, or this service, began."""

    allowed: int
    refused: int
    failed: int
    limited: int
    bytes_in: int
    bytes_out: int


class SessionNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """What a session may reach, what it is connected to, what it was refused last."""

    policy: ShownNetwork
    connections: list[EgressConnection]
    counters: EgressCounters
    refusals: list[EgressRefusal]


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether sessions are accepted, and why not."""

    ready: bool
    reasons: list[str]


class Isolation(msgspec.Struct, frozen=True, kw_only=True):
    """The layers observed active in a live container, and what its self-test saw."""

    engine: str
    layers: dict[str, bool]
    observed: dict[str, Any]
