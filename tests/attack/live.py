"""A service of our own to attack: a process with its log, its instance and its keys."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.attack.cases import Failed, check
from tests.attack.sight import DockerSight, LocalSight, Sight
from tests.live import IMAGE, environment, free_port

ROOT = Path(__file__).parents[2]
KEY = "the-key-of-the-attacks"
FIRST_UID = 40000
UIDS = 500  # user ids of one service; the next one's begin behind them
START_S = 60.0
END_S = 60.0
PREBOOT = 2
SETTINGS: dict[str, object] = {
    "host": "127.0.0.1",
    "image": IMAGE,
    "api_keys": f"attacker:{KEY}",
    "pool_size": 2,
    "preboot": PREBOOT,
    "max_containers": 12,
    "grace_seconds": 2,
    "heartbeat_seconds": 1,
    "reconcile_seconds": 1,
    "drain_seconds": 5,
    "on_exit": "remove",
    "log_format": "json",
}
_numbers = itertools.count()
Json = dict[str, Any]


class Live:
    """One service process. `client` carries the key; `sight` looks at its containers from outside."""

    def __init__(self, engine: str, settings: dict[str, object], environ: dict[str, str]) -> None:
        self.engine = engine
        self.port = free_port()
        self.key: str | None = KEY
        number = next(_numbers)
        self.instance = str(settings.get("instance", f"attack-{os.getpid()}-{number}"))
        self.folder = Path(tempfile.mkdtemp(prefix="sandbox-attack-"))
        self.folder.chmod(0o711)
        own = {
            "port": self.port,
            "engine": engine,
            "instance": self.instance,
            "state_dir": self.folder / "state",
            "uid_base": FIRST_UID + UIDS * number,
        }
        self.settings = SETTINGS | own | settings
        self._environ = environ
        self.log = self.folder / "service.log"
        self.sight: Sight = (
            DockerSight(self.instance, environ.get("DOCKER_HOST"))
            if engine == "docker"
            else LocalSight(Path(str(self.settings["state_dir"]), self.instance))
        )
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", timeout=60, headers=bearer(self.key), trust_env=False
        )

    # --- process

    def start(self, *, ready: bool = True) -> None:
        """Start the process, wait until it is ready for sessions, or only until it answers."""
        settings = {name: str(value) for name, value in self.settings.items() if value is not None}
        command = [sys.executable, "-m", "orchestrator", "serve"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=environment(**settings) | self._environ,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until(lambda: self.is_ready() if ready else self.answers(), START_S, "the service did not start", self._ended)

    def answers(self) -> bool:
        """Tell whether the process answers at all."""
        try:
            return self.client.get("/health", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def is_ready(self) -> bool:
        """Tell whether the service accepts sessions and its pools are full."""
        try:
            if self.client.get("/ready", timeout=5).status_code != 200:
                return False
            pools = self.client.get("/v1/pool", timeout=5).json()["pools"]
        except httpx.HTTPError:
            return False
        return all(pool["ready"] == pool["target"] for pool in pools)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        self.process.send_signal(number)

    def end(self) -> int:
        """End the process in the ordinary way; return its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise Failed(f"the service did not end within {END_S:g} s of SIGTERM") from None

    def close(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(END_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.client.close()
        self.sight.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def memory(self, field: str = "VmRSS") -> int:
        """Return bytes of the process's memory: `VmRSS` now, `VmHWM` at its peak."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(field + ":"))

    def forget_peak(self) -> None:
        """Let the peak of memory begin anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def files(self) -> int:
        """Return how many descriptors the process has open."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def threads(self) -> int:
        """Return how many threads the process has."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/task").iterdir())

    def _ended(self) -> str | None:
        code = self.process.poll()
        return None if code is None else f"the service ended with {code}: {self.log.read_text()[-800:]}"

    # --- what it tells

    def log_lines(self, since: int = 0) -> list[bytes]:
        """Return the lines of the log behind a position."""
        return self.log.read_bytes()[since:].splitlines()

    def events(self, name: str, since: int = 0) -> list[Json]:
        """Return the log's events of one name behind a position."""
        found = []
        for line in self.log_lines(since):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and event.get("event") == name:
                found.append(event)
        return found

    def log_size(self) -> int:
        """Return the position behind what is logged now."""
        return self.log.stat().st_size

    def samples(self) -> dict[str, float]:
        """Return all samples of /metrics by name and labels as they are written there."""
        answer = self.client.get("/metrics")
        check(answer.status_code == 200, f"/metrics answered {answer.status_code}")
        lines = [line for line in answer.text.splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def metric(self, sample: str) -> float:
        """Return the value of one sample, 0 when it has none yet."""
        return self.samples().get(sample, 0.0)

    def pool(self) -> Json:
        """Return what GET /v1/pool tells of the first pool."""
        pool: Json = self.client.get("/v1/pool").json()["pools"][0]
        return pool

    # --- use

    @contextmanager
    def session(self, **body: Any) -> Iterator[str]:
        """Start a session, yield its id, end it."""
        sid = self.open(**body)
        try:
            yield sid
        finally:
            self.client.delete(f"/v1/sessions/{sid}")

    def open(self, **body: Any) -> str:
        """Start a session; return its id."""
        answer = self.client.post("/v1/sessions", json=body)
        check(answer.status_code == 201, f"no session: {answer.status_code} {answer.text[:200]}")
        return str(answer.json()["id"])

    def execute(self, sid: str, code: str, *, timeout_s: float = 5.0, **more: Any) -> Json:
        """Execute Python code in a session; return the execution, read by a strict parser."""
        body = {"code": code, "timeout_s": timeout_s, **more}
        answer = self.client.post(f"/v1/sessions/{sid}/executions", json=body, timeout=timeout_s + 30)
        check(answer.status_code == 200, f"an execution was answered by {answer.status_code} {answer.text[:200]}")
        return strict(answer.content)

    def is_usable(self, sid: str) -> None:
        """Check that the session runs ordinary code."""
        execution = self.execute(sid, "print(6 * 7)", timeout_s=10)
        told = (execution["outcome"], execution["stdout"])
        check(told == ("ok", "42\n"), f"the session is not usable: {told} {execution['error']} {execution['stderr']}")


@contextmanager
def serve(
    engine: str = "docker", *, ready: bool = True, environ: dict[str, str] | None = None, **settings: object
) -> Iterator[Live]:
    """Run a service with these settings; afterwards nothing of it is left."""
    live = Live(engine, settings, environ or {})
    try:
        live.start(ready=ready)
        yield live
    finally:
        live.close()


def until(
    holds: Callable[[], object], within_s: float, reason: str, hopeless: Callable[[], str | None] = lambda: None
) -> float:
    """Wait until it holds; return the seconds that took. Failed with the reason when it does not in time."""
    begun = time.monotonic()
    while not holds():
        if word := hopeless():
            raise Failed(word)
        if time.monotonic() - begun > within_s:
            raise Failed(f"{reason} within {within_s:g} s")
        time.sleep(0.05)
    return time.monotonic() - begun


def strict(body: bytes) -> Json:
    """Parse JSON as the standard has it: no NaN, no Infinity."""

    def refuse(constant: str) -> None:
        raise Failed(f"the answer has {constant}, which is no JSON")

    try:
        document = json.loads(body.decode(), parse_constant=refuse)
    except ValueError as error:
        raise Failed(f"the answer is no JSON: {error}") from None
    check(isinstance(document, dict), "the answer is no JSON object")
    return dict(document)


def bearer(key: str | None) -> dict[str, str]:
    """Return the header that carries a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}
