"""The seed's door: what its clients send and receive."""

from typing import Annotated, Any, Literal

import msgspec

from orchestrator import models
from orchestrator.models import Seconds


class NewSession(models.Request, frozen=True):
    """What the seed lets a session ask for. Limits are the template's: they are accepted, not applied."""

    size: int | None = None
    allow_network: bool | None = None
    cpu_quota: float | None = None
    memory_limit: int | None = None
    timeout: Seconds | None = None


class Code(models.Request, frozen=True):
    """Code to execute."""

    code: str
    event: Any = {}
    timeout: Seconds | None = None
    filename: str | None = None
    args: list[str] = []
    script_type: Literal["python", "shell"] = "python"
    output_params: list[Annotated[str, msgspec.Meta(pattern=models.NAME_PATTERN)]] = []


class Command(models.Request, frozen=True):
    """A command, or code with its event."""

    command: str | None = None
    args: list[str] = []
    code: str | None = None
    event: Any = {}
    timeout: Seconds | None = None


class Handler(models.Request, frozen=True):
    """A handler to call once, without a session."""

    handler_code: str
    event: Any = {}
    context: dict[str, Any] = {}
    timeout: Seconds | None = None


class CleanUp(models.Request, frozen=True):
    """`force` ends sessions in which something runs as well."""

    force: bool = False


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What an execution consumed."""

    duration_ms: float
    cpu_time_ms: float
    memory_peak_mb: float


class Outcome(msgspec.Struct, kw_only=True):
    """An execution in both families of names that the seed's documents use."""

    stdout: str
    stderr: str
    exit_code: int
    returncode: int
    result: Any
    execution_time: float
    metrics: Figures
    output_variables: Any = msgspec.UNSET
