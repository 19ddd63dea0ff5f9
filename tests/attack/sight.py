"""A look at containers and their processes from outside: what the service says is not taken for granted."""

import contextlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import docker
import docker.errors
from docker.utils import kwargs_from_env

INSTANCE_LABEL = "sandbox.instance"
AGENT_MARKS = ("/opt/sandbox/agent", "/agent ")
PAUSE_S = 0.15


@dataclass(frozen=True)
class Process:
    """A process of a container, with its ids on the host."""

    pid: int
    parent: int
    state: str
    command: str


class Sight(Protocol):
    """What the checks need of an engine."""

    def containers(self) -> list[str]:
        """Return the names of all containers of the instance."""

    def holds(self, container: str, path: str) -> bool:
        """Tell whether the container has this file."""

    def processes(self, container: str) -> list[Process]:
        """Return all processes of the container."""

    def clear(self) -> None:
        """Remove what is left of the instance."""


class DockerSight:
    """The Docker Engine, asked by an API client of our own."""

    def __init__(self, instance: str, address: str | None = None) -> None:
        where = kwargs_from_env() if address is None else {"base_url": address}
        self.api = docker.APIClient(**where, version="auto", timeout=60)
        self.instance = instance
        self._filters = {"label": f"{INSTANCE_LABEL}={instance}"}

    def containers(self) -> list[str]:
        return [item["Names"][0].lstrip("/") for item in self.api.containers(all=True, filters=self._filters)]

    def holds(self, container: str, path: str) -> bool:
        try:
            call = self.api.exec_create(container, ["test", "-e", path])["Id"]
            self.api.exec_start(call)
            return bool(self.api.exec_inspect(call)["ExitCode"] == 0)
        except docker.errors.APIError:  # it is gone, or does not run
            return False

    def processes(self, container: str) -> list[Process]:
        top = self.api.top(container, ps_args="-eo pid,ppid,stat,args")
        return [Process(int(row[0]), int(row[1]), row[2], row[3]) for row in top["Processes"]]

    def changes(self, container: str) -> list[str]:
        """Return the paths that differ from the container's image."""
        return sorted(change["Path"] for change in self.api.diff(container) or [])

    def inspect(self, container: str) -> dict[str, Any] | None:
        """Return what the engine tells of a container, None when there is none of this name."""
        try:
            found: dict[str, Any] = self.api.inspect_container(container)
        except docker.errors.NotFound:
            return None
        return found

    def removals(self, since: float, until: float) -> list[str]:
        """Return the names of the instance's containers that were destroyed in a span of the engine's clock."""
        events = self.api.events(
            since=int(since),
            until=int(until) + 1,
            filters={"type": "container", "event": "destroy", **self._filters},
            decode=True,
        )
        return [event["Actor"]["Attributes"]["name"] for event in events if event["timeNano"] >= since * 1e9]

    def remove(self, container: str) -> None:
        """Destroy a container behind the service's back."""
        try:
            self.api.remove_container(container, force=True, v=True)
        except docker.errors.APIError as error:
            if error.status_code not in (404, 409):
                raise

    def clear(self) -> None:
        for container in self.containers():
            self.remove(container)
        self.api.close()


class LocalSight:
    """The agents of the local engine: processes of this host, each with its directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def containers(self) -> list[str]:
        return [path.name for path in self._root.iterdir()] if self._root.exists() else []

    def holds(self, container: str, path: str) -> bool:
        return (self._root / container / path.lstrip("/")).exists()

    def processes(self, container: str) -> list[Process]:
        everything = host_processes()
        found = [process for process in everything if f"{self._root / container}/agent" in process.command]
        for process in found:  # grows while it is walked
            found += [child for child in everything if child.parent == process.pid and child not in found]
        return found

    def clear(self) -> None:
        """End agents that their service left behind; its directory is removed with the rest."""
        for container in self.containers():
            for process in self.processes(container):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)


def host_processes() -> list[Process]:
    """Return every process of this host."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found.append(Process(int(folder.name), int(fields[1]), fields[0].decode(), command))
    return found


def strays(processes: Sequence[Process], preboot: int) -> set[int]:
    """Return the pids that are neither the agent's own nor one of the sandboxes that wait for a job.

    A waiting sandbox is bwrap, below it the init of its pid namespace, below that one interpreter. What user code
    forked looks like an interpreter too: it is known by its place.
    """
    children: dict[int, list[Process]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process)
    known = {process.pid for process in processes}
    roots = [process for process in processes if process.parent not in known]
    agents = [process for process in processes if is_agent(process)]
    allowed = {process.pid for process in roots if "init" in process.command} | {agent.pid for agent in agents[:1]}
    for agent in agents[:1]:
        for outer in children.get(agent.pid, [])[:preboot]:
            chain = [outer, *children.get(outer.pid, [])[:1]]
            chain += children.get(chain[-1].pid, [])[:1] if len(chain) == 2 else []
            allowed |= {process.pid for process in chain if "Z" not in process.state}
    return known - allowed


def is_agent(process: Process) -> bool:
    """Tell whether a process is a container's agent, not its init."""
    return any(mark in process.command + " " for mark in AGENT_MARKS) and "docker-init" not in process.command


def agent_of(processes: Sequence[Process]) -> int | None:
    """Return the pid of the container's agent."""
    return next((process.pid for process in processes if is_agent(process)), None)


def zombies(processes: Sequence[Process]) -> set[int]:
    """Return the pids of the dead that nobody reaped."""
    return {process.pid for process in processes if process.state.startswith("Z")}


def staying(look: Callable[[], set[int]]) -> set[int]:
    """Return what is there in two looks: a process that just starts or just ends is no finding."""
    first = look()
    if not first:
        return first
    time.sleep(PAUSE_S)
    return first & look()


def mark() -> str:
    """Return a file name that no other container has."""
    return f"/workspace/.mark-{secrets.token_hex(8)}"
