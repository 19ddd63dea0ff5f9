"""Functions: what AWS Lambda calls so, by name, each kept in a directory of its own over restarts."""

import asyncio
import base64
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import structlog
from msgspec import Meta

from orchestrator.errors import CodeStorageFull, FunctionChanging, FunctionNotFound, InvalidCode, Unavailable
from orchestrator.models import Env, Language

log = structlog.get_logger()
T = TypeVar("T")
NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}\Z"
ABOUT = "function.json"
# What Lambda's runtime itself sets: a function's own environment may not.
RESERVED_ENV = frozenset(
    "_HANDLER _X_AMZN_TRACE_ID AWS_DEFAULT_REGION AWS_REGION AWS_EXECUTION_ENV AWS_LAMBDA_FUNCTION_NAME "
    "AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_VERSION AWS_LAMBDA_INITIALIZATION_TYPE "
    "AWS_LAMBDA_LOG_GROUP_NAME AWS_LAMBDA_LOG_STREAM_NAME AWS_ACCESS_KEY AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY "
    "AWS_SESSION_TOKEN AWS_LAMBDA_RUNTIME_API LAMBDA_TASK_ROOT LAMBDA_RUNTIME_DIR".split()
)


class Function(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A template, code, and how it is called. `code_sha256` is in base64; `revision` changes with all of them."""

    name: Annotated[str, Meta(pattern=NAME_PATTERN)]
    runtime: str
    language: Language
    template: str
    handler: str
    role: str
    description: str
    timeout_s: Annotated[int, Meta(ge=1)]
    memory_mb: Annotated[int, Meta(ge=1)]
    env: Env
    tags: dict[str, str]
    code_sha256: Annotated[str, Meta(pattern=r"^[A-Za-z0-9+/]{43}=\Z")]
    code_bytes: Annotated[int, Meta(ge=1)]
    revision: str
    modified_at: datetime
    reserved: Annotated[int, Meta(ge=0)] | None = None

    @property
    def code_name(self) -> str:
        """The name of the file that holds the zip."""
        return base64.b64decode(self.code_sha256).hex() + ".zip"


class Functions:
    """All functions by name. What `held` shows is on the disk; a function changes one step at a time."""

    def __init__(self, root: Path, *, storage_bytes: int) -> None:
        self.held: dict[str, Function] = {}
        self._root = root
        self._storage_bytes = storage_bytes
        self._changing: dict[str, int] = {}

    def load(self) -> None:
        """Read what an earlier orchestrator kept. What cannot be read is left out, and left where it is."""
        self._root.mkdir(mode=0o700, exist_ok=True)
        for folder in sorted(self._root.iterdir()):
            try:
                function = read(folder)
            except (OSError, ValueError, msgspec.DecodeError) as error:
                log.warning("function_not_read", folder=str(folder), detail=str(error))
                continue
            if function is None:  # its removal, or its first writing, did not come to the end
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self.held[function.name] = function

    def get(self, name: str) -> Function:
        """Return a function. FunctionNotFound for an unknown one."""
        if (function := self.held.get(name)) is None:
            raise FunctionNotFound(f"Function not found: there is no function {name}")
        return function

    @contextmanager
    def change(self, name: str, *, code_bytes: int = 0) -> Iterator[None]:
        """Hold the function, with room for its code. FunctionChanging or CodeStorageFull when that cannot be."""
        if name in self._changing:
            raise FunctionChanging(f"An update is in progress for {name}: try again when it is done")
        others = sum(function.code_bytes for function in self.held.values() if function.name != name)
        if others + sum(self._changing.values()) + code_bytes > self._storage_bytes:
            raise CodeStorageFull(f"All code together is at most {self._storage_bytes} bytes: delete functions")
        self._changing[name] = code_bytes
        try:
            yield
        finally:
            del self._changing[name]

    async def put(self, function: Function, code: bytes | None = None) -> None:
        """Keep a function, with new code if it has some. Unavailable when it cannot be written."""
        before = self.held.get(function.name)
        await on_disk(write, self._root / function.name, function, code)
        self.held[function.name] = function
        if before is not None and before.code_name != function.code_name:
            (self._root / function.name / before.code_name).unlink(missing_ok=True)

    async def remove(self, name: str) -> None:
        """Forget a function and its code. Unavailable when that cannot be written."""
        function = self.held.pop(name)  # first, so that nobody looks for code that is just being removed
        try:
            await on_disk(erase, self._root / name)
        except Unavailable:
            self.held[name] = function
            raise

    async def code(self, function: Function) -> bytes:
        """Return the zip, as it was uploaded. InvalidCode when it is another by now, Unavailable when it is away."""
        code = await on_disk((self._root / function.name / function.code_name).read_bytes)
        if hash_of(code) != function.code_sha256:
            raise InvalidCode(f"The code of {function.name} on the disk is not what was uploaded: upload it again")
        return code


def hash_of(code: bytes) -> str:
    """Return the code's hash as Lambda shows it."""
    return base64.b64encode(hashlib.sha256(code).digest()).decode()


async def on_disk(work: Callable[..., T], *arguments: Any) -> T:
    """Do the work in a thread; what the disk refuses is Unavailable."""
    try:
        return await asyncio.to_thread(work, *arguments)
    except OSError as error:
        raise Unavailable(f"The state directory does not work: {error.strerror}", retry_after_s=5) from error


def read(folder: Path) -> Function | None:
    """Return the function that the folder holds, None for half of one. ValueError when it cannot be."""
    if not (folder / ABOUT).exists():
        return None
    function = msgspec.json.decode((folder / ABOUT).read_bytes(), type=Function)
    if function.name != folder.name:
        raise ValueError(f"it says that it is {function.name}")
    if (size := (folder / function.code_name).stat().st_size) != function.code_bytes:
        raise ValueError(f"its code has {size} bytes, not {function.code_bytes}")
    return function


def write(folder: Path, function: Function, code: bytes | None) -> None:
    """Write code, then what names it: whenever this is cut off, the folder holds all of one or of the other."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if code is not None:
        replace(folder / function.code_name, code)
    replace(folder / ABOUT, msgspec.json.encode(function))
    sync(folder.parent)


def erase(folder: Path) -> None:
    """Remove what names the code, then the rest."""
    (folder / ABOUT).unlink(missing_ok=True)
    sync(folder)
    shutil.rmtree(folder)


def replace(path: Path, data: bytes) -> None:
    """Write a file in one step: after a crash it is the old one or the new one, never a part."""
    new = path.with_name(f".{path.name}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync(path.parent)


def sync(folder: Path) -> None:
    """Have the names in a folder survive a crash of the machine."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
