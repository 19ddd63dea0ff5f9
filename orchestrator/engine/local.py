"""The weaker engine: the same agent as a process of this host, bubblewrap alone around the user's code."""

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from orchestrator.engine import EngineCall, Receiver, Seen, Spec, Wire
from orchestrator.engine.files import images_dir
from orchestrator.errors import EngineError

PYTHON = "/usr/bin/python3"
ENOUGH = "import sys; sys.exit(sys.version_info < (3, 11))"


class LocalEngine:
    """Agents as child processes. They end with this process: nothing is left to adopt."""

    name = "local"
    host = None
    reattaches = False
    required_layers = frozenset(
        ["seatbelt"]
        if sys.platform == "darwin"
        else "user_namespace inner_seccomp no_new_privs no_capabilities no_network read_only_root pid_namespace limits".split()
    )

    def __init__(self, root: Path, *, record: EngineCall) -> None:
        self._root = root
        self._record = record
        self._agents: dict[str, _Agent] = {}

    async def check(self) -> dict[str, Any]:
        tool = "sandbox-exec" if sys.platform == "darwin" else "bwrap"
        if shutil.which(tool) is None:
            raise EngineError(f"{tool} is missing: on Linux, install the package `bubblewrap`")
        return {"version": "local", "cpus": os.cpu_count() or 1}

    async def start(self, spec: Spec, receiver: Receiver) -> Wire:
        begun = time.monotonic()
        python = interpreter()
        uid = spec.uid if os.geteuid() == 0 and reachable(Path(python)) else None
        home = self._root / spec.name
        home.mkdir(parents=True, mode=0o700)
        shutil.copytree(images_dir() / "agent", home / "agent", ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("scratch", "workspace"):
            (home / part).mkdir(mode=0o700)
        if uid is not None:
            self._root.chmod(0o711)
            for folder, _, files in os.walk(home):
                for path in (folder, *(f"{folder}/{file}" for file in files)):
                    os.chown(path, uid, uid)
        agent = _Agent(spec, home, receiver)
        command = [python, "-I", "-S", "-u", home / "agent", home / "scratch", home / "workspace"]
        # Not `user=`: uvloop does not know it.
        become = None if uid is None else partial(become_user, uid)
        try:
            await asyncio.get_running_loop().subprocess_exec(
                lambda: agent, *map(str, command), env={}, cwd="/", start_new_session=True, preexec_fn=become
            )
        except OSError as error:
            raise EngineError(f"The agent could not be started: {error}") from error
        self._agents[spec.name] = agent
        self._record("start", "ok", time.monotonic() - begun)
        return agent

    async def attach(self, name: str, receiver: Receiver) -> Wire:
        raise EngineError("The local engine cannot attach again: its agents end with the orchestrator")

    async def find(self, name: str) -> Seen | None:
        return next((seen for seen in await self.list() if seen.name == name), None)

    async def hold(self, name: str, image: str, command: list[str], labels: dict[str, str], receiver: Receiver) -> Wire:
        raise EngineError("The local engine has nothing to hold: nobody else sees its agents")

    async def list(self) -> list[Seen]:
        return [
            Seen(name=agent.spec.name, running=agent.running, labels=agent.spec.labels)
            for agent in self._agents.values()
        ]

    async def remove(self, name: str) -> None:
        agent = self._agents.get(name)
        if agent is not None:
            agent.kill()
            await agent.exited.wait()
            self._agents.pop(name, None)
            await asyncio.to_thread(remove_home, agent.home)

    async def close(self) -> None:
        for name in list(self._agents):
            await self.remove(name)


class _Agent(asyncio.SubprocessProtocol):
    """One agent process and its three pipes."""

    def __init__(self, spec: Spec, home: Path, receiver: Receiver) -> None:
        self.spec = spec
        self.home = home
        self.exited = asyncio.Event()
        self._receiver = receiver
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def running(self) -> bool:
        return not self.exited.is_set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._process = cast(asyncio.SubprocessTransport, transport)
        self._stdin = cast(asyncio.WriteTransport, self._process.get_pipe_transport(0))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 1:
            self._receiver.received(data)
        else:
            self._receiver.said(data)

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self._receiver.lost("the agent's output ended")

    def process_exited(self) -> None:
        self.exited.set()
        self._writable.set()
        self._process.close()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def write(self, data: bytes) -> None:
        self._stdin.write(data)

    async def drain(self) -> None:
        await self._writable.wait()

    def close(self) -> None:
        self._stdin.close()

    def kill(self) -> None:
        """Kill the agent with its group; the sandboxes die with it (PDEATHSIG)."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.get_pid(), signal.SIGKILL)


def become_user(uid: int) -> None:
    """Give up root for a user of its own; runs in the child, before its exec."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def interpreter() -> str:
    """Return the Python that runs agents: the system's, which needs nothing bound into the sandbox, or ours."""
    if Path(PYTHON).exists() and subprocess.run([PYTHON, "-c", ENOUGH], check=False).returncode == 0:
        return PYTHON
    return os.path.realpath(sys.executable)


def reachable(path: Path) -> bool:
    """Tell whether every user may run the file."""
    return all(part.stat().st_mode & stat.S_IXOTH for part in (path, *path.resolve().parents))


def remove_home(home: Path) -> None:
    """Remove an agent's directories, locked ones too."""
    subprocess.run(["chmod", "-R", "u+rwX", str(home)], check=False, capture_output=True)
    subprocess.run(["rm", "-rf", "--", str(home)], check=False, capture_output=True)
