"""What this host can isolate, item by item; the last word has a real container's self-test."""

import asyncio
import os
import platform
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
from prometheus_client import CollectorRegistry

from orchestrator import isolation
from orchestrator.container import Container
from orchestrator.engine import Engine
from orchestrator.errors import ImageMissing, IsolationError, SandboxError
from orchestrator.metrics import Metrics
from orchestrator.recipes import Recipe, limits_of, recipes, spec_of
from orchestrator.service import make_engine
from orchestrator.settings import Settings

Status = Literal["ok", "warning", "MISSING", "skipped"]
FILES = {
    "clone": "/proc/sys/kernel/unprivileged_userns_clone",
    "namespaces": "/proc/sys/user/max_user_namespaces",
    "apparmor": "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "actions": "/proc/sys/kernel/seccomp/actions_avail",
    "status": "/proc/self/status",
    "mounts": "/proc/self/mounts",
    "core_pattern": "/proc/sys/kernel/core_pattern",
}
BWRAP_WANTED = (0, 8)  # from here on it has --disable-userns
UIDS_OF_SERVICE = 450  # what a service takes from `uid_base` on, at most
UIDS_BESIDE = 28


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at; `hint` says what to change."""

    about: Literal["host", "engine", "container"]
    name: str
    status: Status
    detail: str = ""
    hint: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All findings. `ok` when a container came up with every layer that its engine requires."""

    engine: str
    ok: bool
    findings: list[Finding]


# The checks are pure functions over what was read; None stands for a file that does not exist.


def check_user_namespaces(clone: str | None, namespaces: str | None, apparmor: str | None) -> Finding:
    """Judge whether processes without root may make user namespaces, which bubblewrap needs."""
    obstacles = []
    if clone is not None and clone.strip() == "0":
        obstacles.append("kernel.unprivileged_userns_clone=0: set it to 1")
    if namespaces is None:
        obstacles.append("the kernel has no user namespaces: it needs CONFIG_USER_NS")
    elif namespaces.strip() == "0":
        obstacles.append("user.max_user_namespaces=0: set it to 10000 or more")
    if apparmor is not None and apparmor.strip() == "1":
        obstacles.append(
            "kernel.apparmor_restrict_unprivileged_userns=1: set it to 0, or load a profile that allows them"
        )
    if obstacles:
        return _host("user namespaces", "warning", "perhaps not for everyone", "; ".join(obstacles))
    return _host("user namespaces", "ok", "open to processes without root")


def check_seccomp(actions: str | None, status: str) -> Finding:
    """Judge whether the kernel filters system calls, and tells how many filters a process has."""
    if actions is None or "errno" not in actions.split():
        return _host("seccomp", "warning", "no filters", "the kernel needs CONFIG_SECCOMP_FILTER")
    if "Seccomp_filters:" not in status:
        hint = "use a kernel from 5.9 on: this one does not report Seccomp_filters, so the self-test cannot count them"
        return _host("seccomp", "warning", "filters, but uncounted", hint)
    return _host("seccomp", "ok", "filters, and reports their number")


def check_cgroup(mounts: str) -> Finding:
    """Tell the version of the control groups that are mounted."""
    points = {(fields[1], fields[2]) for line in mounts.splitlines() if len(fields := line.split()) > 2}
    if ("/sys/fs/cgroup", "cgroup2") in points:
        return _host("cgroup", "ok", "version 2")
    if any(kind == "cgroup" for _, kind in points):
        return _host("cgroup", "ok", "version 1")
    return _host("cgroup", "warning", "none mounted", "mount cgroup2 at /sys/fs/cgroup: Docker's limits need it")


def check_core_pattern(pattern: str | None, *, engine: str) -> Finding:
    """Judge whether the dump of a sandboxed program would be handed to a program of the host, run as its root."""
    if pattern is None or not pattern.startswith("|"):
        return _host("core dumps", "ok", "not piped to a program of this host")
    receiver = pattern[1:].strip().partition(" ")[0]
    if engine == "docker":
        return _host("core dumps", "ok", f"piped to {receiver}, but not from containers: their core limit is 1")
    hint = "set kernel.core_pattern=core, or start the service with `ulimit -c 1`"
    return _host("core dumps", "warning", f"those of sandboxes too are piped to {receiver}", hint)


def check_bwrap(version: str | None, *, engine: str) -> Finding:
    """Judge the host's bubblewrap; containers bring their own. `version` is what `bwrap --version` says."""
    if engine == "docker":
        return _host("bubblewrap", "skipped", "the image brings its own")
    if version is None:
        return _host("bubblewrap", "MISSING", "not installed", "install the package `bubblewrap`")
    number = version.split()[-1] if version.split() else "?"
    if _numbers(number) < BWRAP_WANTED:
        hint = "use 0.8 or newer: older ones cannot forbid user namespaces within the sandbox"
        return _host("bubblewrap", "warning", f"version {number}", hint)
    return _host("bubblewrap", "ok", f"version {number}")


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


def host_findings(texts: Mapping[str, str | None], bwrap: str | None, *, system: str, engine: str) -> list[Finding]:
    """Judge the host by the texts of FILES and the output of `bwrap --version`."""
    if system != "Linux":
        hint = "containers run in the engine's own Linux: see what they report"
        return [_host("platform", "warning", system, hint)]
    return [
        _host("platform", "ok", system),
        check_user_namespaces(texts["clone"], texts["namespaces"], texts["apparmor"]),
        check_seccomp(texts["actions"], texts["status"] or ""),
        check_cgroup(texts["mounts"] or ""),
        check_core_pattern(texts["core_pattern"], engine=engine),
        check_bwrap(bwrap, engine=engine),
    ]


def _host(name: str, status: Status, detail: str, hint: str = "") -> Finding:
    return Finding(about="host", name=name, status=status, detail=detail, hint=hint)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


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


@contextmanager
def beside(settings: Settings) -> Iterator[Settings]:
    """Yield settings for a short life beside a service: neither its instance, nor its directory, nor its user ids."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        Path(directory).chmod(0o711)  # the local engine's agents pass through it, each as its own user
        yield msgspec.structs.replace(
            settings,
            instance=f"beside-{secrets.token_hex(6)}",
            state_dir=directory,
            on_exit="remove",
            uid_base=settings.uid_base + UIDS_OF_SERVICE + os.getpid() % UIDS_BESIDE,
        )


def read(path: str) -> str | None:
    """Return a file's text, None when there is none to be had."""
    try:
        return Path(path).read_text()
    except OSError:
        return None


def bwrap_version() -> str | None:
    """Return what `bwrap --version` says, None where it is not installed."""
    if shutil.which("bwrap") is None:
        return None
    return subprocess.run(["bwrap", "--version"], check=False, capture_output=True, text=True).stdout


def pretty(report: Report) -> str:
    """Return the report for people."""
    lines: list[str] = []
    for finding in report.findings:
        if finding.about not in lines:
            lines.append(finding.about)
        text = ": ".join(part for part in (finding.detail, finding.hint) if part)
        lines.append(f"  {finding.status:<8} {finding.name:<16} {text}".rstrip())
    verdict = "can be served, with every layer that it requires" if report.ok else "cannot be served"
    lines.append(f"On the engine {report.engine} sessions {verdict}.")
    return "\n".join(lines)
