"""The seed's door: files of a session."""

import base64
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import msgspec
from litestar import Request, get, post
from litestar.datastructures import UploadFile
from litestar.enums import RequestEncodingType
from litestar.params import Body, Parameter
from litestar.response import Stream
from litestar.status_codes import HTTP_200_OK

from orchestrator import models
from orchestrator.api.files import path_behind, read_whole, send_file
from orchestrator.api.guard import ACCEPTS, ANY
from orchestrator.api.paths import Sid
from orchestrator.errors import FileNotFound, FileTooLarge
from orchestrator.files import Workspace
from orchestrator.service import Orchestrator

FORM = {ACCEPTS: RequestEncodingType.MULTI_PART.value}
PIECE = 1 << 16  # bytes
READ_LIMIT = 1 << 20  # bytes of one answer of `readfile`
PAGE = 1000


class Upload(msgspec.Struct):
    """The form of an upload."""

    file: UploadFile


class NewFile(models.Request, frozen=True):
    """A text file to write: `w` replaces what is there, `a` appends to it."""

    content: str
    filename: str
    mode: Literal["w", "a"] = "w"


class Written(msgspec.Struct, frozen=True):
    """What was written; sizes are in bytes."""

    filename: str
    size: int


class Piece(msgspec.Struct, frozen=True):
    """A part of a file: text, or base64 where it is no text."""

    content: str
    is_binary: bool
    offset: int
    size: int
    is_eof: bool


@post("/upload/{sid:str}", status_code=HTTP_200_OK, opt=FORM, summary="Upload a file")
async def upload(
    service: Orchestrator,
    sid: Sid,
    data: Annotated[Upload, Body(media_type=RequestEncodingType.MULTI_PART)],
    filename: str | None = None,
) -> Written:
    """Write the form's `file` under the name given, or its own."""
    session = service.sessions.get(sid)

    async def pieces() -> AsyncIterator[bytes]:
        while piece := await data.file.read(PIECE):
            yield piece

    name = data.file.filename if filename is None else filename
    with session.in_use() as workspace:
        file = await workspace.write(name, pieces(), limit=service.workspace_bytes(session))
    return Written(filename=name, size=file.size_bytes)


@get(["/download/{sid:str}/{path:path}"], media_type=ANY, summary="Download a file")
async def download(service: Orchestrator, request: Request[Any, Any, Any], sid: Sid) -> Stream:
    """Send a file."""
    return await send_file(service.sessions.get(sid), path_of(request, "download"), None)


@post("/create/{sid:str}", status_code=HTTP_200_OK, summary="Write a text file")
async def create(service: Orchestrator, sid: Sid, data: NewFile) -> Written:
    """Write a text, or append it to a file."""
    session = service.sessions.get(sid)
    limit = service.workspace_bytes(session)

    async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    with session.in_use() as workspace:
        before = await existing(workspace, data.filename, limit) if data.mode == "a" else b""
        file = await workspace.write(data.filename, pieces(before, data.content.encode()), limit=limit)
    return Written(filename=data.filename, size=file.size_bytes)


@get(["/files/{sid:str}", "/files/{sid:str}/{path:path}"], summary="List files")
async def list_files(
    service: Orchestrator, request: Request[Any, Any, Any], sid: Sid, *, recursive: bool = False
) -> dict[str, Any]:
    """List a directory of the workspace; names count from there."""
    with service.sessions.get(sid).in_use() as workspace:
        files = await all_files(workspace, path_of(request, "files"), recursive=recursive)
    return {"files": files}


@get("/readfile/{sid:str}/{path:path}", summary="Read a part of a file")
async def read_file(
    service: Orchestrator,
    request: Request[Any, Any, Any],
    sid: Sid,
    offset: Annotated[int, Parameter(ge=0, description="where to begin, in bytes")] = 0,
    buffer_size: Annotated[int, Parameter(ge=1, le=READ_LIMIT, description="bytes to read")] = PIECE,
) -> Piece:
    """Read a part of a file, as text where it is UTF-8, else as base64."""
    with service.sessions.get(sid).in_use() as workspace:
        opened = await workspace.read(path_of(request, "readfile"), start=offset, length=buffer_size)
        data = await read_whole(opened)
    size = opened.file.size_bytes
    try:
        content, is_binary = data.decode(), b"\0" in data
    except UnicodeDecodeError:
        content, is_binary = "", True
    return Piece(
        content=base64.b64encode(data).decode() if is_binary else content,
        is_binary=is_binary,
        offset=offset,
        size=size,
        is_eof=offset + len(data) >= size,
    )


handlers = [upload, download, create, list_files, read_file]


def path_of(request: Request[Any, Any, Any], route: str) -> str:
    """Return the path behind a session's id, as the client wrote it; empty where there is none."""
    rest = request.scope["raw_path"].partition(f"/{route}/".encode())[2]
    return path_behind(rest.partition(b"/")[2])


async def existing(workspace: Workspace, path: str, limit: int) -> bytes:
    """Return what is in a file; nothing when it does not exist."""
    try:
        opened = await workspace.read(path)
    except FileNotFound:
        return b""
    if opened.file.size_bytes > limit:
        raise FileTooLarge("The file is too large to append to")
    return await read_whole(opened)


async def all_files(workspace: Workspace, path: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Return every file below a directory in the seed's names."""
    found, after = [], None
    while True:
        page = await workspace.list(path, recursive=recursive, limit=PAGE, after=after)
        found += [
            {
                "filename": file.path[len(path) :].removeprefix("/"),
                "size": file.size_bytes,
                "type": file.type,
                "modified_at": file.modified_at,
            }
            for file in page.files
        ]
        if (after := page.next) is None:
            return found
