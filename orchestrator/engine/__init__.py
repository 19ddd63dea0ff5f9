"""Where containers come from: the seam that Docker and the host itself stand behind."""

from collections.abc import Callable
from typing import Any, Protocol

import msgspec


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """One container to start; sizes in bytes. `labels` are what a later orchestrator knows it by."""

    name: str
    image: str
    uid: int
    cpus: float
    memory_bytes: int
    workspace_bytes: int
    scratch_bytes: int
    labels: dict[str, str]
    runtime: str | None = None
    apparmor_profile: str | None = None


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A container of our instance as the engine lists it; `running` is false for every other state."""

    name: str
    running: bool
    labels: dict[str, str]


class Wire(Protocol):
    """The attached byte stream to one agent."""

    def write(self, data: bytes) -> None:
        """Queue bytes for the agent's stdin."""

    async def drain(self) -> None:
        """Wait until the queue is short again."""

    def close(self) -> None:
        """Detach; the container goes on."""


class Receiver(Protocol):
    """Who listens to a wire."""

    def received(self, data: bytes) -> None:
        """Take bytes of the agent's stdout."""

    def said(self, text: bytes) -> None:
        """Take bytes of the agent's stderr."""

    def lost(self, reason: str) -> None:
        """Learn that the stream ended."""


class Engine(Protocol):
    """Start, attach, list, remove. Every call has a deadline and raises EngineError; EngineAway when no answer came.

    `reattaches` tells whether a container outlives its attachment, and this process: then it can be attached again.
    """

    name: str
    reattaches: bool
    required_layers: frozenset[str]

    @property
    def host(self) -> str | None:
        """The host that the engine is on, when that is another than ours."""

    async def check(self) -> dict[str, Any]:
        """Return facts about the engine (version, cpus, ...); EngineError when it cannot serve."""

    async def start(self, spec: Spec, receiver: Receiver) -> Wire:
        """Create a container, attach to it, start it. A container that was created may exist after an error."""

    async def attach(self, name: str, receiver: Receiver) -> Wire:
        """Attach to a running container."""

    async def find(self, name: str) -> Seen | None:
        """Return a container by its name, None when there is none."""

    async def hold(self, name: str, image: str, command: list[str], labels: dict[str, str], receiver: Receiver) -> Wire:
        """Run a program that ends, and is gone, when this wire closes. NameTaken when there is one of this name."""

    async def list(self) -> list[Seen]:
        """Return all containers of our instance."""

    async def remove(self, name: str) -> None:
        """Destroy a container: afterwards it is gone. One that was gone already is success."""

    async def close(self) -> None:
        """Let go of the engine's own resources."""


EngineCall = Callable[[str, str, float], None]
