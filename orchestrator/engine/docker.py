"""Containers from a Docker Engine. The only importer of docker-py."""

import asyncio
import math
import os
import re
import ssl
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import docker
import docker.errors
import docker.utils
import requests.exceptions

from orchestrator.engine import EngineCall, Receiver, Seen, Spec, Wire
from orchestrator.engine.attach import attach
from orchestrator.engine.files import images_dir
from orchestrator.engine.options import container_options, lock_options
from orchestrator.errors import EngineAway, EngineError, ImageMissing, NameTaken

T = TypeVar("T")
THREADS = 16
OLDEST = (20, 10)
AGENT = ["python3", "-I", "-S", "-u", "/opt/sandbox/agent"]
GONE = 404
CONFLICT = 409  # "removal of container ... is already in progress"
NOBODY = "65534:65534"
GOING_LOOKS, GOING_S = 20, 0.1
INSTANCE_LABEL = "sandbox.instance"


class DockerEngine:
    """One Docker Engine, by `DOCKER_HOST` or the first socket that exists."""

    name = "docker"
    reattaches = True
    required_layers = frozenset(
        "container user_namespace outer_seccomp inner_seccomp no_new_privs no_capabilities "
        "no_network read_only_root own_uid pid_namespace limits".split()
    )

    def __init__(self, instance: str, *, timeout_s: float, record: EngineCall) -> None:
        self._instance = instance
        self._timeout_s = timeout_s
        self._record = record
        self._threads = ThreadPoolExecutor(THREADS, "engine")
        self._cpus = 1.0
        self._seccomp = (images_dir() / "seccomp" / "outer.json").read_text()

    @cached_property
    def _url(self) -> str:
        url = os.environ.get("DOCKER_HOST") or find_socket()
        if url is None:
            raise EngineError("No Docker Engine was found: start one, or set DOCKER_HOST")
        if not url.startswith(("unix://", "tcp://", "http://", "https://")):
            raise EngineError(f"DOCKER_HOST={url} is not supported: use a unix:// or tcp:// address")
        return url

    @property
    def host(self) -> str | None:
        where = urllib.parse.urlsplit(self._url)
        return None if where.scheme == "unix" else where.hostname

    @cached_property
    def _tls(self) -> docker.tls.TLSConfig | None:
        if not os.environ.get("DOCKER_TLS_VERIFY"):
            return None
        folder = Path(os.environ.get("DOCKER_CERT_PATH") or Path.home() / ".docker")
        pair = (str(folder / "cert.pem"), str(folder / "key.pem"))
        return docker.tls.TLSConfig(client_cert=pair, ca_cert=str(folder / "ca.pem"), verify=True)

    @cached_property
    def _api(self) -> docker.APIClient:
        tls = self._tls or False
        try:
            return docker.APIClient(
                self._url, version="auto", timeout=math.ceil(self._timeout_s), tls=tls, num_pools=THREADS
            )
        except docker.errors.DockerException as error:
            first: BaseException = error
            while first.__context__ is not None:
                first = first.__context__
            raise EngineAway(
                f"No Docker Engine answers at {self._url} ({first}): start one, set DOCKER_HOST, or join its group"
            ) from error

    async def check(self) -> dict[str, Any]:
        info = await self._call("info", self._info)
        version = str(info["ServerVersion"])
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
            raise EngineError(f"Docker Engine {version} is too old: version 20.10 or newer is needed")
        options = " ".join(info.get("SecurityOptions") or [])
        if "seccomp" not in options:
            raise EngineError("This Docker Engine has no seccomp: its kernel needs CONFIG_SECCOMP_FILTER")
        self._cpus = float(info["NCPU"])
        return {
            "version": version,
            "cpus": info["NCPU"],
            "cgroup": str(info.get("CgroupVersion", "1")),
            "rootless": "rootless" in options,
            "apparmor": "apparmor" in options,
            "runtimes": sorted(info.get("Runtimes") or {}),
        }

    async def start(self, spec: Spec, receiver: Receiver) -> Wire:
        await self._call("create", lambda: self._create(spec))
        wire = await self.attach(spec.name, receiver)
        try:
            await self._call("start", lambda: self._api.start(spec.name))
        except BaseException:  # cancelled as well: no stream is left behind
            wire.close()
            raise
        return wire

    async def attach(self, name: str, receiver: Receiver) -> Wire:
        tls = None
        if self._tls is not None:
            tls = ssl.create_default_context(cafile=self._tls.ca_cert)
            tls.load_cert_chain(*(self._tls.cert or ()))
        version = await self._call("version", lambda: self._api.api_version)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_s):
                wire = await attach(self._url, version, name, receiver, tls=tls)
        except (OSError, TimeoutError) as error:
            self._record("attach", "error", time.monotonic() - begun)
            raise EngineAway(
                f"The engine did not attach to a container: {str(error) or 'no answer in time'}"
            ) from error
        self._record("attach", "ok", time.monotonic() - begun)
        return wire

    async def find(self, name: str) -> Seen | None:
        def call() -> Seen | None:
            try:
                found = self._api.inspect_container(name)
            except docker.errors.NotFound:
                return None
            labels = dict(found["Config"]["Labels"] or {})
            return Seen(name=name, running=bool(found["State"]["Running"]), labels=labels)

        return await self._call("find", call)

    async def hold(self, name: str, image: str, command: list[str], labels: dict[str, str], receiver: Receiver) -> Wire:
        def create() -> None:
            host = self._api.create_host_config(**lock_options())
            # Not `detach`: so it has StdinOnce, and its stdin ends with its only client.
            self._api.create_container(
                image,
                command,
                entrypoint=[],
                name=name,
                user=NOBODY,
                stdin_open=True,
                labels=labels,
                host_config=host,
            )

        await self._call("create", create)
        wire = await self.attach(name, receiver)
        try:
            await self._call("start", lambda: self._api.start(name))
        except BaseException:  # cancelled as well: what was not started would stay
            wire.close()
            raise
        return wire

    async def list(self) -> list[Seen]:
        filters = {"label": f"{INSTANCE_LABEL}={self._instance}"}
        found = await self._call("list", lambda: self._api.containers(all=True, filters=filters))
        return [
            Seen(
                name=item["Names"][0].lstrip("/"),
                running=item["State"] == "running",
                labels=item["Labels"],
            )
            for item in found
        ]

    async def remove(self, name: str) -> None:
        def call() -> None:
            for _ in range(GOING_LOOKS):
                try:
                    self._api.remove_container(name, force=True, v=True)
                    return
                except docker.errors.APIError as error:
                    if error.status_code == GONE:
                        return
                    if error.status_code != CONFLICT:
                        raise
                time.sleep(GOING_S)  # it is just going: gone is only what is not there any more
            raise docker.errors.DockerException(f"its removal was begun before and does not end: {name}")

        await self._call("remove", call)

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(self, name: str, function: Callable[[], T]) -> T:
        """Run one call to the engine in a thread; EngineError when it fails or exceeds its deadline."""
        begun = time.monotonic()
        result = "error"
        try:
            async with asyncio.timeout(self._timeout_s):
                value = await asyncio.get_running_loop().run_in_executor(self._threads, function)
            result = "ok"
        except TimeoutError:
            result = "timeout"
            raise EngineAway(
                f"The engine did not answer `{name}` within {self._timeout_s:g} s", retry_after_s=5
            ) from None
        except docker.errors.ImageNotFound as error:
            raise ImageMissing(f"The image is missing: {error.explanation}; build it with `make image`") from error
        except docker.errors.DockerException as error:
            is_taken = name == "create" and getattr(error, "status_code", None) == CONFLICT
            kind = NameTaken if is_taken else EngineError
            raise kind(f"The engine failed to `{name}`: {error}", retry_after_s=5) from error
        except requests.exceptions.RequestException as error:
            raise EngineAway(f"The engine could not be asked to `{name}`: {error}", retry_after_s=5) from error
        finally:
            self._record(name, result, time.monotonic() - begun)
        return value

    def _info(self) -> dict[str, Any]:
        return dict(self._api.info())

    def _create(self, spec: Spec) -> None:
        """Create the container; docs/architecture.md ("The container") has the reason for each option."""
        user = f"{spec.uid}:{spec.uid}"
        host = self._api.create_host_config(**container_options(spec, cpus=self._cpus, seccomp=self._seccomp))
        # docker-py has no parameter for these: bwrap must be able to mount a fresh /proc.
        host |= {"MaskedPaths": [], "ReadonlyPaths": []}
        self._api.create_container(
            spec.image,
            AGENT,
            entrypoint=[],
            name=spec.name,
            user=user,
            hostname="sandbox",
            stdin_open=True,
            detach=True,  # else StdinOnce: the container would end with its first client
            labels=spec.labels | {INSTANCE_LABEL: self._instance},
            host_config=host,
        )


def find_socket() -> str | None:
    """Return the address of the first Docker socket that exists: system, rootless, Docker Desktop."""
    candidates = [Path("/var/run/docker.sock"), Path.home() / ".docker" / "run" / "docker.sock"]
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        candidates.insert(1, Path(runtime) / "docker.sock")
    return next((f"unix://{path}" for path in candidates if path.exists()), None)
