"""A live service for tests: `orchestrator serve` in a process of its own, on a free port of this machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

START_S = 60.0
END_S = 30.0
SOON_S = 20.0
POLL_S = 0.05
LOOK_S = 0.01
TAG = os.environ.get("SANDBOX_TEST_TAG", "latest")  # of the images under test, where checkouts share an engine
IMAGE = f"sandbox-python:{TAG}"
OURS = {"image": IMAGE, "host": "127.0.0.1", "uid_base": "50000", "drain_seconds": "2", "log_format": "json"}
OURS["on_exit"] = "remove"  # a test leaves nothing


class Live:
    """A service process with its log. `client` speaks to it without a key."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, instance: str, log: Path) -> None:
        self.process = process
        self.port = port
        self.instance = instance
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self._log = log

    @property
    def log(self) -> str:
        """What the service has logged so far."""
        return self._log.read_text()

    def until_ready(self) -> None:
        """Wait until the service accepts sessions; show its log when it does not."""
        end_at = time.monotonic() + START_S
        while True:
            try:
                if (answer := self.client.get("/ready")).status_code == 200:
                    return
                said = answer.text
            except httpx.TransportError as error:
                said = repr(error)
            if self.process.poll() is not None or time.monotonic() > end_at:
                raise AssertionError(f"the service is not ready ({said}):\n{self.log}")
            time.sleep(POLL_S)

    def terminate(self) -> int:
        """End the service as an operator would; return its exit code."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_S)


def until(look: Callable[[], Any]) -> Any:
    """Look until something is there; return it."""
    end_at = time.monotonic() + SOON_S
    while not (found := look()):
        assert time.monotonic() < end_at, "it never came"
        time.sleep(LOOK_S)
    return found


def environment(**settings: str) -> dict[str, str]:
    """Return this process's environment with these settings and no others."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SANDBOX_")}
    return kept | {f"SANDBOX_{name.upper()}": value for name, value in settings.items()}


def start(folder: Path, *, instance: str, engine: str, **settings: str) -> subprocess.Popen[bytes]:
    """Start a service whose log and state lie in the folder."""
    given = OURS | {"instance": instance, "engine": engine, "state_dir": str(folder)} | settings
    command = [sys.executable, "-m", "orchestrator", "serve"]
    with (folder / f"{instance}.log").open("wb") as log:
        return subprocess.Popen(command, env=environment(**given), stdout=log, stderr=log, stdin=subprocess.DEVNULL)


@contextmanager
def serve(folder: Path, *, instance: str, engine: str, **settings: str) -> Iterator[Live]:
    """Run a service inside this context, from ready to gone."""
    port = free_port()
    process = start(folder, instance=instance, engine=engine, port=str(port), **settings)
    live = Live(process, port, instance, folder / f"{instance}.log")
    try:
        live.until_ready()
        yield live
    finally:
        if process.poll() is None:
            live.terminate()
        live.client.close()


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a temporary directory that the local engine's agents, under users of their own, can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-test-"))
    folder.chmod(0o711)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
