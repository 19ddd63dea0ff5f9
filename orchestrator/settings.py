"""Every setting: its variable is the field's name in capitals behind `SANDBOX_`. Read once, at the start."""

import ipaddress
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_type_hints

import msgspec
from msgspec import Meta

from orchestrator.errors import SettingsError
from orchestrator.hosts import BadPattern, Pattern, parse_pattern
from orchestrator.models import ID_PATTERN, Language
from orchestrator.variables import allowed, parse, shown

PREFIX = "SANDBOX_"
CLIENT = {"SANDBOX_URL", "SANDBOX_API_KEY"}  # what the SDK reads, and `orchestrator run`
OTLP_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"  # OpenTelemetry's own name for SANDBOX_OTLP_ENDPOINT
Positive = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(pattern=ID_PATTERN)]
Preboot = Annotated[int, Meta(ge=1, le=16)] | dict[Language, Annotated[int, Meta(ge=0, le=16)]]
PREBOOT = 2


class TemplateTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A template as the templates file writes it; what is left out comes from the settings."""

    image: str | None = None
    pool_size: Annotated[int, Meta(ge=0, le=400)] | None = None
    cpu_quota: Positive | None = None
    memory_kb: Annotated[int, Meta(ge=32768)] | None = None
    workspace_kb: Annotated[int, Meta(ge=1024)] | None = None
    preboot: Preboot | None = None
    wheels: Annotated[str, Meta(pattern=r"^/[^\x00]*\Z")] | None = None
    runtime: str | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The service's settings, in the order of docs/configuration.md."""

    host: Annotated[str, Meta(description="address to listen on; one that is not loopback needs API keys")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(ge=1, le=65535, description="port to listen on")] = 8000
    api_keys: Annotated[
        dict[Name, Annotated[str, Meta(min_length=16)]],
        Meta(description="`name:key` pairs, separated by commas; keys of 16+ characters"),
    ] = {}
    allow_unauthenticated: Annotated[bool, Meta(description="serve a non-loopback address without API keys")] = False
    engine: Annotated[
        Literal["docker", "local"], Meta(description="where containers come from; `local` is bubblewrap alone")
    ] = "docker"
    instance: Annotated[
        Name, Meta(description="which containers of the engine are ours; one orchestrator per instance")
    ] = "default"
    image: Annotated[str, Meta(description="image of the default template")] = "sandbox-python:latest"
    templates_file: Annotated[str | None, Meta(description="TOML file with one table per further template")] = None
    uid_base: Annotated[
        int, Meta(ge=1000, description="first user id of containers; each running container has its own above it")
    ] = 60706
    apparmor_profile: Annotated[
        Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,128}\Z")] | None,
        Meta(description="AppArmor profile of all containers, loaded on the engine's host; left out, the engine's own"),
    ] = None
    state_dir: Annotated[
        str, Meta(description="directory for the instance lock, Lambda functions and the local engine's files")
    ] = "/tmp/sandbox-orchestrator"  # noqa: S108 - `file_lock` makes it safe

    cpu_quota: Annotated[Positive, Meta(description="cores that a container may use, never more than the host has")] = (
        2.0
    )
    memory_limit: Annotated[int, Meta(ge=32768, description="KB that user code may use")] = 131072
    workspace_limit: Annotated[int, Meta(ge=1024, description="KB of files that a session may keep in /workspace")] = (
        65536
    )
    scratch_limit: Annotated[int, Meta(ge=1024, description="KB of /tmp and /dev/shm of all executions together")] = (
        65536
    )
    allow_network: Annotated[
        bool, Meta(description="sessions may reach the network, and by default all that is public; Docker engine only")
    ] = True
    egress_allow: Annotated[
        str, Meta(description="patterns of hosts, separated by commas, that sessions may reach at most")
    ] = "*"
    egress_deny: Annotated[
        str, Meta(description="patterns of hosts, separated by commas, that no session may reach")
    ] = ""
    egress_connections: Annotated[int, Meta(ge=1, le=128, description="connections of one session at once")] = 32
    egress_max_connections: Annotated[int, Meta(ge=1, description="connections of all sessions at once")] = 512
    egress_bytes: Annotated[int, Meta(ge=1024, description="bytes that a session may receive, and as many sent")] = (
        1 << 34
    )
    egress_connect_seconds: Annotated[Positive, Meta(description="longest look-up and connect of one connection")] = (
        10.0
    )
    egress_idle_seconds: Annotated[Positive, Meta(description="silence that ends a connection")] = 300.0
    egress_total_seconds: Annotated[Positive, Meta(description="longest life of a connection")] = 3600.0
    timeout_seconds: Annotated[Positive, Meta(description="timeout of an execution that names none")] = 300.0
    max_timeout_seconds: Annotated[Positive, Meta(description="longest timeout that an execution may ask for")] = 3600.0
    max_output: Annotated[int, Meta(ge=1024, description="bytes kept of stdout, of stderr and of the value")] = 1048576
    drain_output: Annotated[int, Meta(ge=1024, description="bytes of one stream that end an execution")] = 16777216
    max_display: Annotated[int, Meta(ge=1024, description="bytes kept of what a cell of a context displays")] = 8388608
    processes: Annotated[int, Meta(ge=8, le=128, description="processes and threads of one execution")] = 64
    max_body: Annotated[int, Meta(ge=1024, description="bytes of a request body")] = 8388608

    pool_size: Annotated[int, Meta(ge=0, le=400, description="containers kept ready for the default template")] = 2
    preboot: Annotated[
        Preboot, Meta(description="sandboxes that wait in every container: of Python, or `language:number` pairs")
    ] = PREBOOT
    max_containers: Annotated[int, Meta(ge=1, le=450, description="containers in all, those that start included")] = 64
    max_age_seconds: Annotated[Positive, Meta(description="life of a ready container that nobody takes")] = 3600.0
    acquire_timeout_seconds: Annotated[Positive, Meta(description="longest wait for a container")] = 30.0
    ttl_seconds: Annotated[Positive, Meta(description="life of a session that names none")] = 3600.0
    max_ttl_seconds: Annotated[Positive, Meta(description="longest life that a session may ask for")] = 86400.0
    idle_timeout_seconds: Annotated[Positive, Meta(description="silence that ends a session that names none")] = 600.0
    session_executions: Annotated[int, Meta(ge=1, le=64, description="executions of one session that run at once")] = 4
    session_background: Annotated[
        int, Meta(ge=0, le=64, description="executions that one session may run in the background, beside those")
    ] = 8
    session_contexts: Annotated[int, Meta(ge=0, le=16, description="contexts of one session")] = 4
    max_executions: Annotated[int, Meta(ge=1, description="executions of all sessions that run or queue at once")] = 256
    max_waiting: Annotated[int, Meta(ge=0, description="sessions that wait for a container at once")] = 256
    session_terminals: Annotated[
        int, Meta(ge=1, le=16, description="terminals of one session that are open at once")
    ] = 4
    session_streams: Annotated[
        int, Meta(ge=1, description="streams of events of one session that are open at once")
    ] = 16
    max_streams: Annotated[int, Meta(ge=1, description="streams of events of all sessions that are open at once")] = 256
    stream_heartbeat_seconds: Annotated[
        Positive, Meta(description="silence after which a stream of events gets a comment, so that it stays open")
    ] = 10.0

    function_containers: Annotated[
        int, Meta(ge=1, le=450, description="containers of Lambda functions, and invocations that run at once")
    ] = 16
    function_idle_seconds: Annotated[
        Positive, Meta(description="silence that ends the container of a Lambda function")
    ] = 300.0
    function_storage: Annotated[
        int, Meta(ge=1024, description="bytes of all Lambda functions' code in the state directory")
    ] = 1073741824

    engine_timeout_seconds: Annotated[Positive, Meta(description="deadline of one call to the engine")] = 15.0
    start_timeout_seconds: Annotated[Positive, Meta(description="deadline of a container's start and self-test")] = 30.0
    heartbeat_seconds: Annotated[Positive, Meta(description="time between two pings of a container's agent")] = 5.0
    heartbeat_misses: Annotated[int, Meta(ge=1, description="unanswered pings that make a container lost")] = 3
    reconcile_seconds: Annotated[
        Positive, Meta(description="time between two looks at the engine when nothing happens")
    ] = 5.0
    reattach_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=540,
            description="longest time that a container whose stream broke, as by an upgrade of the engine, is waited for",
        ),
    ] = 120.0
    grace_seconds: Annotated[
        Positive, Meta(description="time beyond its timeout after which an execution's container is destroyed")
    ] = 5.0
    drain_seconds: Annotated[
        Positive, Meta(description="time that running executions get at the end of the service")
    ] = 20.0
    on_exit: Annotated[
        Literal["keep", "remove"],
        Meta(description="what becomes of sessions at the end of the service; `local` can only remove them"),
    ] = "keep"

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least level that is logged")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "json", "console"], Meta(description="`auto`: JSON unless stderr is a terminal")
    ] = "auto"
    otlp_endpoint: Annotated[
        str | None,
        Meta(description="receiver of traces by OTLP/HTTP, such as `http://localhost:4318`; none: no traces"),
    ] = None

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work or are not safe; msgspec turns ValueError into its own."""
        if self.timeout_seconds > self.max_timeout_seconds:
            raise ValueError("SANDBOX_TIMEOUT_SECONDS is above SANDBOX_MAX_TIMEOUT_SECONDS")
        if self.ttl_seconds > self.max_ttl_seconds:
            raise ValueError("SANDBOX_TTL_SECONDS is above SANDBOX_MAX_TTL_SECONDS")
        if self.drain_output < self.max_output:
            raise ValueError("SANDBOX_DRAIN_OUTPUT is below SANDBOX_MAX_OUTPUT")
        for name, text in (("ALLOW", self.egress_allow), ("DENY", self.egress_deny)):
            try:
                patterns_of(text)
            except BadPattern as error:
                raise ValueError(f"SANDBOX_EGRESS_{name}: {error}") from None
        if self.otlp_endpoint is not None and not re.match(r"https?://[^/\s]+", self.otlp_endpoint):
            raise ValueError(f"SANDBOX_OTLP_ENDPOINT={self.otlp_endpoint} is no address that begins with http://")
        if not (is_loopback(self.host) or self.api_keys or self.allow_unauthenticated):
            raise ValueError(
                f"SANDBOX_HOST={self.host} is not a loopback address: set SANDBOX_API_KEYS, "
                "or SANDBOX_ALLOW_UNAUTHENTICATED=true when something in front checks who calls"
            )

    def read_templates(self) -> dict[str, TemplateTable]:
        """Return all templates by name; the first is the default. SettingsError for a bad templates file."""
        default = TemplateTable(
            image=self.image,
            pool_size=self.pool_size,
            cpu_quota=self.cpu_quota,
            memory_kb=self.memory_limit,
            workspace_kb=self.workspace_limit,
            preboot=self.preboot,
        )
        found = {"python": default}
        if self.templates_file is not None:
            try:
                tables = tomllib.loads(Path(self.templates_file).read_text())
                more = msgspec.convert(tables, dict[Name, TemplateTable])
            except (OSError, ValueError) as error:
                raise SettingsError(f"SANDBOX_TEMPLATES_FILE={self.templates_file}: {error}") from None
            for name, table in more.items():
                given = {key: value for key, value in msgspec.structs.asdict(table).items() if value is not None}
                fallback = found.get(name) or msgspec.structs.replace(default, pool_size=0)
                found[name] = msgspec.structs.replace(fallback, **given)
        return found


def patterns_of(text: str) -> list[Pattern]:
    """Return the patterns of hosts of a setting. BadPattern when one is none."""
    return [parse_pattern(part.strip()) for part in text.split(",") if part.strip()]


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load(environ: Mapping[str, str]) -> Settings:
    """Read the settings; SettingsError, in one line, names the variable, its value and what is allowed."""
    hints = get_type_hints(Settings, include_extras=True)
    values = {}
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable.startswith(PREFIX + "TEST_") or variable in CLIENT:
            continue
        field = variable.removeprefix(PREFIX).lower()
        if field not in hints:
            raise SettingsError(f"{variable} is no setting; see docs/configuration.md for those that are")
        try:
            values[field] = parse(text, hints[field])
        except (msgspec.ValidationError, ValueError) as error:
            said = "(hidden)" if field == "api_keys" else repr(text)
            raise SettingsError(f"{variable}={said} is not allowed: {error}; {allowed(hints[field])}") from None
    if endpoint := environ.get(OTLP_ENDPOINT):
        values.setdefault("otlp_endpoint", endpoint)
    try:
        return msgspec.convert(values, Settings)
    except msgspec.ValidationError as error:
        raise SettingsError(str(error)) from None


def describe() -> list[tuple[str, str, str, str]]:
    """Return variable, default, what is allowed and meaning of every setting, for docs and help."""
    rows = []
    hints = get_type_hints(Settings, include_extras=True)
    for field in msgspec.structs.fields(Settings):
        kind = hints[field.name]
        about = [meta.description for meta in kind.__metadata__ if isinstance(meta, Meta) and meta.description]
        default = field.default if field.default is not msgspec.NODEFAULT else cast(Any, field.default_factory)()
        rows.append((PREFIX + field.name.upper(), shown(default), allowed(kind), about[-1]))
    return rows
