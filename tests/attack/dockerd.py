"""A Docker Engine of our own that may be stopped, killed and frozen: beside the others, with nothing in common but images."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import docker
import docker.errors
from docker.utils import kwargs_from_env

from tests.attack.cases import Failed, NotApplicable
from tests.live import IMAGE

START_S = 60.0
PROGRAM_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))


class Dockerd:
    """One dockerd with its own socket, data root, exec root and pid file, and no bridge. `address` is its DOCKER_HOST."""

    def __init__(self, folder: Path, *, live_restore: bool) -> None:
        self.address = f"unix://{folder}/docker.sock"
        self._folder = folder
        self._live_restore = live_restore
        (folder / "daemon.json").write_text("{}")  # not the host's

    def start(self) -> float:
        """Start it; return after how many seconds it answered."""
        folder = self._folder
        begun = time.monotonic()
        # In a network namespace of its own: one without a bridge removes docker0, which belongs to the host's engine.
        command: list[str | Path] = [
            "unshare",
            "--net",
            "dockerd",
            "--host",
            self.address,
            "--config-file",
            folder / "daemon.json",
        ]
        command += ["--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "docker.pid"]
        command += ["--bridge", "none", "--iptables=false", "--ip6tables=false", "--ip-masq=false"]
        if self._live_restore:
            command.append("--live-restore")
        with (folder / "dockerd.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PATH": PROGRAM_PATH},
                start_new_session=True,
            )
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() - begun > START_S:
                raise Failed(f"dockerd did not start: {(folder / 'dockerd.log').read_text()[-400:]}")
            time.sleep(0.05)
        return time.monotonic() - begun

    def stop(self) -> None:
        """End it in the ordinary way. Without live-restore its containers end with it."""
        self._process.terminate()
        self._process.wait(START_S)

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Let it accept calls and answer none; the attached streams, which go through it, stand still as well."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._process.send_signal(signal.SIGCONT)

    def load(self, image: str) -> None:
        """Copy an image from the engine at hand."""
        outer = docker.APIClient(**kwargs_from_env(), version="auto", timeout=60)
        inner = docker.APIClient(self.address, version="auto", timeout=60)
        try:
            content = outer.get_image(image)
            for _ in inner.load_image(content):
                pass
            for _ in content:  # what was not read of it keeps the connection from being closed
                pass
        finally:
            outer.close()
            inner.close()

    def close(self) -> None:
        """Leave nothing of it: no container, no process, no mount."""
        if self._process.poll() is not None:
            self.start()
        self.thaw()
        api = docker.APIClient(self.address, version="auto", timeout=60)
        for container in api.containers(all=True):
            with contextlib.suppress(docker.errors.APIError):
                api.remove_container(container["Id"], force=True)
        api.close()
        self.stop()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            target = line.split()[1]
            if target.startswith(f"{self._folder}/"):
                subprocess.run(["umount", "-l", target], check=False)

    def _answers(self) -> bool:
        """Ping it. Not by docker-py: a client that is not answered leaves its socket open."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            try:
                connection.connect(self.address.removeprefix("unix://"))
                connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                return b" 200 " in connection.recv(64)
            except OSError:
                return False


@contextmanager
def dockerd(*, live_restore: bool) -> Iterator[Dockerd]:
    """Run a Docker Engine that has the image under test. NotApplicable where that cannot be."""
    if os.geteuid() != 0 or shutil.which("dockerd", path=PROGRAM_PATH) is None:
        raise NotApplicable("needs root, and a dockerd to start beside the one at hand")
    folder = Path(tempfile.mkdtemp(prefix="sandbox-dockerd-"))
    engine = Dockerd(folder, live_restore=live_restore)
    try:
        engine.start()
        try:
            engine.load(IMAGE)
            yield engine
        finally:
            engine.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
