"""What the service says of itself: templates, pools, health, isolation."""

from typing import Any, Literal

import msgspec

from orchestrator.models.terms import Language


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


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The process lives. `layers` are the isolation layers last observed active in a container."""

    status: Literal["ok"]
    version: str
    engine: str
    layers: dict[str, bool]


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether sessions are accepted, and why not."""

    ready: bool
    reasons: list[str]


class Isolation(msgspec.Struct, frozen=True, kw_only=True):
    """The layers observed active in a live container, and what its self-test saw."""

    engine: str
    layers: dict[str, bool]
    observed: dict[str, Any]
