"""One orchestrator for each instance: a lock on this machine's files, and one on the engine, wherever who holds it runs."""

import asyncio
import fcntl
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import structlog

from orchestrator.engine import Engine, Wire
from orchestrator.errors import EngineError, ImageMissing, InstanceHeld, NameTaken, SettingsError
from orchestrator.settings import Settings

log = structlog.get_logger()
HOLDER_LABEL = "sandbox.holder"
BEAT_S = 3.0
SILENCE_S = 15  # after so long without a beat, the lock's container ends: whoever held it is gone, or cannot be heard
TAKEN_S = 8.0  # who has just died lets go within this time
LOOK_S = 0.3
AGAIN_S = 1.0  # between two tries to have a lost lock back
PROGRAM = f"import os, select\nwhile select.select([0], [], [], {SILENCE_S})[0] and os.read(0, 4096): pass"


@contextmanager
def file_lock(settings: Settings) -> Iterator[None]:
    """Hold the instance on this machine: a second orchestrator would remove this one's containers. SettingsError when held."""
    directory = Path(settings.state_dir)
    path = directory / f"{settings.instance}.lock"
    try:
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        if (owner := directory.stat().st_uid) != os.geteuid():
            raise SettingsError(
                f"SANDBOX_STATE_DIR={directory} belongs to user {owner}: choose a directory of your own"
            )
        # Not through a link: the default lies in a directory where everybody may write.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(f"SANDBOX_STATE_DIR={directory} cannot be used: {error.strerror}: {path}") from None
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InstanceHeld(
                f"Another orchestrator runs as SANDBOX_INSTANCE={settings.instance}: stop it, or choose another name"
            ) from None
        yield
    finally:
        os.close(fd)


class EngineLock:
    """A container with a fixed name, which ends by itself when its stdin closes or falls silent: it lives, so it is held.

    A holder that is killed lets go at once, for its connection closes; one that cannot reach the engine, after
    SILENCE_S. A lock that was lost, as by a restart of the engine, is taken again; when somebody else has it by then,
    `on_taken` ends this process: its containers are the other's.
    """

    def __init__(self, engine: Engine, instance: str, image: str, *, on_taken: Callable[[InstanceHeld], None]) -> None:
        self.name = f"sandbox-lock-{instance}"
        self._engine = engine
        self._instance = instance
        self._image = image
        self._on_taken = on_taken
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._wire: Wire | None = None
        self._ended = asyncio.Event()

    async def acquire(self) -> None:
        """Take the lock. InstanceHeld when another orchestrator has it and does not let go; EngineError."""
        until = time.monotonic() + TAKEN_S
        idle_looks = 0
        while True:
            if (seen := await self._engine.find(self.name)) is not None:
                holder = seen.labels.get(HOLDER_LABEL, "somebody")
                idle_looks = 0 if seen.running else idle_looks + 1
                # One that does not run is just being started or just going; one that stays so is a dead one's.
                if holder == self._holder or idle_looks > 2:
                    await self._engine.remove(self.name)
                elif time.monotonic() > until:
                    raise InstanceHeld(
                        f"Another orchestrator ({holder}) runs as SANDBOX_INSTANCE={self._instance} on this engine: "
                        "stop it, or choose another name"
                    )
            try:
                self._ended.clear()
                command = ["python3", "-I", "-S", "-c", PROGRAM]
                labels = {HOLDER_LABEL: self._holder, "sandbox.lock": self._instance}
                self._wire = await self._engine.hold(self.name, self._image, command, labels, self)
                return
            except NameTaken:
                await asyncio.sleep(LOOK_S)

    async def keep(self) -> None:
        """Hold the lock until cancelled; take it again when it was lost."""
        while True:
            if self._wire is None:
                try:
                    await self.acquire()
                    log.info("instance_held", lock=self.name)
                except InstanceHeld as error:
                    self._on_taken(error)
                except EngineError as error:
                    log.debug("instance_not_held", detail=error.detail)
                    await asyncio.sleep(AGAIN_S)
                    continue
            try:
                async with asyncio.timeout(BEAT_S):
                    await self._ended.wait()
                log.warning("instance_lock_lost", lock=self.name)
                self._wire = None
            except TimeoutError:
                if self._wire is not None:
                    self._wire.write(b"\n")

    def release(self) -> None:
        """Let go."""
        if self._wire is not None:
            self._wire.close()

    def received(self, data: bytes) -> None:
        """Hear nothing: the lock's container has nothing to say."""

    def said(self, text: bytes) -> None:
        """Pass over what it complains of."""

    def lost(self, reason: str) -> None:  # noqa: ARG002 - a receiver's method
        self._ended.set()


@asynccontextmanager
async def engine_lock(engine: Engine, settings: Settings, *, alone: bool) -> AsyncIterator[None]:
    """Hold the instance on its engine inside this context. InstanceHeld when another orchestrator does."""
    if alone or not engine.reattaches:  # nobody else can have its name, or sees its containers
        yield
        return
    lock = EngineLock(engine, settings.instance, settings.image, on_taken=end_at_once)
    try:
        await lock.acquire()
    except ImageMissing as error:  # nobody holds it; without the image there is nothing that another could start either
        log.warning("instance_not_held", detail=error.detail)
    task = asyncio.create_task(lock.keep())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        lock.release()


def end_at_once(error: InstanceHeld) -> None:
    """End this process without a look back: what it would clean up belongs to another by now."""
    log.critical("instance_taken", detail=error.detail)
    os._exit(1)
