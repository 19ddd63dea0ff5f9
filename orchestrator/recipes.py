"""From a template to a container: what to start, and the limits inside it."""

import secrets
from typing import Any

import msgspec

from orchestrator import models
from orchestrator.engine import Spec
from orchestrator.models import Language, Template
from orchestrator.settings import PREBOOT, Settings

TEMPLATE_LABEL, UID_LABEL = "sandbox.template", "sandbox.uid"
AGENT_HEADROOM = 48 << 20  # bytes of the container's memory that are the agent's
WAITING = 16 << 20  # bytes that a waiting sandbox of another language than Python takes beyond that
OPEN_FILES = 256


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What the reconciler needs to start a container of a template."""

    template: Template
    preboot: dict[Language, int]
    wheels: str | None = None
    runtime: str | None


def recipes(settings: Settings) -> dict[str, Recipe]:
    """Return what each template's containers are made from."""
    made = {}
    for name, table in settings.read_templates().items():
        template = models.Template(
            name=name,
            image=str(table.image),
            pool_size=int(table.pool_size or 0),
            cpu_quota=float(table.cpu_quota or settings.cpu_quota),
            memory_kb=int(table.memory_kb or settings.memory_limit),
            workspace_kb=int(table.workspace_kb or settings.workspace_limit),
            network="public" if settings.allow_network and settings.engine == "docker" else "none",
            languages=None,
        )
        preboot = by_language(PREBOOT) | by_language(settings.preboot) | by_language(table.preboot or {})
        made[name] = Recipe(template=template, preboot=preboot, wheels=table.wheels, runtime=table.runtime)
    return made


def by_language(preboot: int | dict[Language, int]) -> dict[Language, int]:
    """Return how many sandboxes of each language wait; a number alone is Python's."""
    return {"python": preboot} if isinstance(preboot, int) else preboot


def spec_of(settings: Settings, recipe: Recipe, *, uid: int) -> Spec:
    """Return the container to start for a recipe, under a new name of ours."""
    template = recipe.template
    workspace, scratch = template.workspace_kb << 10, settings.scratch_limit << 10
    waiting = WAITING * sum(count for language, count in recipe.preboot.items() if language != "python")
    return Spec(
        name=f"sandbox-{settings.instance}-{secrets.token_hex(6)}",
        image=template.image,
        uid=uid,
        cpus=template.cpu_quota,
        memory_bytes=(template.memory_kb << 10) + AGENT_HEADROOM + waiting + workspace + scratch,
        workspace_bytes=workspace,
        scratch_bytes=scratch,
        labels={TEMPLATE_LABEL: template.name, UID_LABEL: str(uid)},
        runtime=recipe.runtime,
        apparmor_profile=settings.apparmor_profile,
    )


def limits_of(settings: Settings, recipe: Recipe) -> dict[str, Any]:
    """Return the limits that the agent puts on every execution."""
    template = recipe.template
    return {
        "memory_bytes": template.memory_kb << 10,
        "file_bytes": template.workspace_kb << 10,
        "processes": settings.processes,
        "open_files": OPEN_FILES,
        "keep_bytes": settings.max_output,
        "drain_bytes": settings.drain_output,
        "display_bytes": settings.max_display,
        "preboot": recipe.preboot,
        "wheels": recipe.wheels,
    }
