"""An examination: of the host, of the engine, and of one container that is started for it."""

import asyncio
import platform
from collections.abc import Mapping
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from orchestrator import isolation
from orchestrator.beside import beside
from orchestrator.container import Container
from orchestrator.doctor.host import FILES, bwrap_version, host_findings, read
from orchestrator.doctor.report import Finding, Report
from orchestrator.engine import Engine
from orchestrator.errors import ImageMissing, IsolationError, SandboxError
from orchestrator.metrics import Metrics
from orchestrator.recipes import Recipe, limits_of, recipes, spec_of
from orchestrator.service import make_engine
from orchestrator.settings import Settings


async def examine(settings: Settings) -> Report:
    """Look at the host, the engine and one container that is started for it and removed again."""
    texts = {name: read(path) for name, path in FILES.items()}
    found = host_findings(texts, bwrap_version(), system=platform.system(), engine=settings.engine)
    with beside(settings) as own:
        more, ok = await try_engine(own)
    return Report(engine=settings.engine, ok=ok, findings=found + more)


async def try_engine(settings: Settings) -> tuple[list[Finding], bool]:
    """Ask the engine for its facts and start a container on it; return whether sessions can be served."""
    engine = make_engine(settings, Metrics(CollectorRegistry()))
    try:
        facts = await engine.check()
    except SandboxError as error:
        return [Finding(about="engine", name=settings.engine, status="MISSING", hint=error.detail)], False
    try:
        more, ok = await try_container(settings, engine, next(iter(recipes(settings).values())))
    finally:
        await engine.close()
    return [*engine_findings(settings.engine, facts), *more], ok


def engine_findings(engine: str, facts: Mapping[str, Any]) -> list[Finding]:
    """Show the engine's facts, its version first."""
    rows = {engine: facts["version"], **facts}
    if engine == "docker":
        rows["seccomp"] = True  # an engine without is refused by its check
    return [
        Finding(about="engine", name=name, status="ok", detail=_shown(value))
        for name, value in rows.items()
        if name != "version"
    ]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else str(value)


async def try_container(settings: Settings, engine: Engine, recipe: Recipe) -> tuple[list[Finding], bool]:
    """Start one container, judge its layers, remove it."""
    spec = spec_of(settings, recipe, uid=settings.uid_base)
    container = Container(spec, recipe.template.name, output_limit=settings.max_output, on_lost=lambda _: None)
    image = Finding(about="engine", name="image", status="ok", detail=spec.image)
    started = Finding(about="container", name="start", status="ok", detail="its self-test ran")
    try:
        async with asyncio.timeout(settings.start_timeout_seconds):
            await container.start(engine, limits_of(settings, recipe))
    except IsolationError:
        pass  # its layers tell more
    except ImageMissing as error:
        return [msgspec.structs.replace(image, status="MISSING", hint=error.detail)], False
    except TimeoutError:
        hint = f"it gave no sign of life within {settings.start_timeout_seconds:g} s"
        started = msgspec.structs.replace(started, status="MISSING", detail="", hint=hint)
    except SandboxError as error:
        started = msgspec.structs.replace(started, status="MISSING", detail="", hint=error.detail)
    finally:
        container.close("it was only a test")
        await engine.remove(spec.name)
    layers = check_layers(container.layers, engine.required_layers)
    found = [image, started, *layers] if layers and settings.engine == "docker" else [started, *layers]
    return found, all(finding.status != "MISSING" for finding in found)


def check_layers(layers: Mapping[str, bool], required: frozenset[str]) -> list[Finding]:
    """Judge what a container's self-test showed, layer by layer."""
    found = []
    for name, active in layers.items():
        if active:
            found.append(Finding(about="container", name=name, status="ok"))
        elif name in required:
            found.append(Finding(about="container", name=name, status="MISSING", hint=isolation.HINTS[name]))
        else:
            found.append(Finding(about="container", name=name, status="skipped", detail="this engine does without"))
    return found
