"""The native door's files: the workspace of a session, streamed both ways."""

import mimetypes
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any
from urllib.parse import quote, unquote_to_bytes

from litestar import Request, Response, delete, get, head, patch, post, put, route
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import Parameter
from litestar.response import Stream
from litestar.status_codes import HTTP_200_OK, HTTP_201_CREATED, HTTP_204_NO_CONTENT, HTTP_206_PARTIAL_CONTENT

from orchestrator import errors
from orchestrator.api.guard import ACCEPTS, ANY, TAKES
from orchestrator.api.paths import Sid
from orchestrator.files import Download
from orchestrator.models import File, FilePage, Move, NewDirectory, Unpacked
from orchestrator.service import Orchestrator
from orchestrator.session import Session

Directory = Annotated[str, Parameter(description="a directory of the workspace; left out, the workspace itself")]
PageSize = Annotated[int, Parameter(ge=1, le=1000, description="files of one page")]
HttpRequest = Request[Any, Any, Any]
BYTES, TAR = "application/octet-stream", "application/x-tar"
RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
TWICE = re.compile(r"%(00|2e|2f|5c)", re.IGNORECASE)  # null byte, dot, slash, backslash
STREAMED = {ACCEPTS: ANY}
PART = ResponseSpec(bytes, media_type=ANY, generate_examples=False, description="The part that `Range` asks for")
LIST_PATH = "/sessions/{sid:str}/files"
PATH = f"{LIST_PATH}/{{path:path}}"


@get(LIST_PATH, summary="List files")
async def list_files(
    service: Orchestrator,
    sid: Sid,
    *,
    path: Directory = "",
    recursive: bool = False,
    limit: PageSize = 1000,
    after: str | None = None,
) -> FilePage:
    """List a directory of the workspace in the order of the paths; `after` continues behind a path."""
    with service.sessions.get(sid).in_use() as workspace:
        return await workspace.list(path, recursive=recursive, limit=limit, after=after)


@route(LIST_PATH, http_method=["PUT", "POST", "PATCH", "DELETE"], opt=STREAMED, include_in_schema=False)
async def refuse_no_path(service: Orchestrator, sid: Sid) -> None:
    """Say what is missing where a path is empty."""
    service.sessions.get(sid)
    raise errors.InvalidPath("Name a file of the workspace behind `files/`")


@get(PATH, media_type=ANY, responses={HTTP_206_PARTIAL_CONTENT: PART}, summary="Read a file")
async def read_file(service: Orchestrator, request: HttpRequest, sid: Sid) -> Stream:
    """Send a file, or the part of it that a `Range` header with one range asks for. No link is followed."""
    return await send_file(service.sessions.get(sid), path_of(request), request.headers.get("range"))


@head(PATH, summary="Read what a path is")
async def read_facts(service: Orchestrator, request: HttpRequest, sid: Sid) -> Response[None]:
    """Tell size and time of a file; `X-File-Type` says what it is."""
    path = path_of(request)
    with service.sessions.get(sid).in_use() as workspace:
        file = await workspace.stat(path)
    size = {"Content-Length": str(file.size_bytes), "Content-Type": media_type_of(path)}
    return Response(None, headers=headers_of(file) | size)


@put(
    PATH,
    status_code=HTTP_201_CREATED,
    opt=STREAMED | {TAKES: (bytes, BYTES)},
    request_max_body_size=None,
    summary="Write a file",
)
async def write_file(service: Orchestrator, request: HttpRequest, sid: Sid) -> File:
    """Write the body, of any media type, to a file, and make the directories above it.

    It replaces a file of this name once it has arrived in full; of a transfer that breaks off nothing is left.
    """
    session = service.sessions.get(sid)
    limit = service.workspace_bytes(session)
    check_length(request, limit)
    with session.in_use() as workspace:
        return await workspace.write(path_of(request), used(session, request.stream()), limit=limit)


@post(PATH, status_code=HTTP_201_CREATED, summary="Make a directory")
async def make_directory(service: Orchestrator, request: HttpRequest, sid: Sid, data: NewDirectory) -> File:  # noqa: ARG001 - its type is all it says
    """Make a directory, and those above it; one that is there already is left alone."""
    with service.sessions.get(sid).in_use() as workspace:
        return await workspace.make_directory(path_of(request))


@patch(PATH, summary="Rename a file")
async def rename_file(service: Orchestrator, request: HttpRequest, sid: Sid, data: Move) -> File:
    """Move a file or directory to another path."""
    with service.sessions.get(sid).in_use() as workspace:
        return await workspace.rename(path_of(request), data.path, overwrite=data.overwrite)


@delete(PATH, status_code=HTTP_204_NO_CONTENT, summary="Delete a file")
async def delete_file(service: Orchestrator, request: HttpRequest, sid: Sid, *, recursive: bool = False) -> None:
    """Delete a file, a link, or a directory; one that is not empty only with `recursive`."""
    with service.sessions.get(sid).in_use() as workspace:
        await workspace.delete(path_of(request), recursive=recursive)


@get("/sessions/{sid:str}/archive", media_type=TAR, summary="Download an archive")
async def read_archive(service: Orchestrator, sid: Sid, path: Directory = "") -> Stream:
    """Send a tar of a directory, made inside a sandbox."""
    session = service.sessions.get(sid)
    with session.in_use() as workspace:
        body = await begun(workspace.pack(path))
    headers = {"Content-Disposition": 'attachment; filename="archive.tar"'}
    return Stream(used(session, body), headers=headers, media_type=TAR)


@post(
    "/sessions/{sid:str}/archive",
    status_code=HTTP_200_OK,
    opt=STREAMED | {TAKES: (bytes, TAR)},
    request_max_body_size=None,
    summary="Upload an archive",
)
async def write_archive(service: Orchestrator, request: HttpRequest, sid: Sid, path: Directory = "") -> Unpacked:
    """Unpack a tar, plain or compressed, below a directory, inside a sandbox: all of it, or nothing."""
    session = service.sessions.get(sid)
    limit = service.workspace_bytes(session)
    check_length(request, limit)
    with session.in_use() as workspace:
        return Unpacked(files=await workspace.unpack(path, used(session, request.stream()), limit=limit))


handlers = [
    list_files,
    refuse_no_path,
    read_file,
    read_facts,
    write_file,
    make_directory,
    rename_file,
    delete_file,
    read_archive,
    write_archive,
]


async def send_file(session: Session, path: str, wanted: str | None) -> Stream:
    """Return the answer that sends a file, or the range of it that is `wanted`."""
    with session.in_use() as workspace:
        file = await workspace.stat(path)
        part = range_of(wanted, file.size_bytes)
        start, length = part or (0, None)
        download = await workspace.read(path, start=start, length=length)
    size = download.file.size_bytes
    length = max(0, size - start if length is None else min(length, size - start))
    headers = headers_of(download.file) | {"Content-Length": str(length)}
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{size}"
    status = HTTP_200_OK if part is None else HTTP_206_PARTIAL_CONTENT
    body = exactly(used(session, download.chunks()), length)
    return Stream(body, status_code=status, headers=headers, media_type=media_type_of(path))


async def read_whole(download: Download) -> bytes:
    """Return all bytes of a file that is small enough."""
    return b"".join([chunk async for chunk in download.chunks()])


def path_of(request: HttpRequest) -> str:
    """Return the path as the client wrote it: the server's reading of it has lost empty parts and dots."""
    return path_behind(request.scope["raw_path"].partition(b"/files/")[2])


def path_behind(raw: bytes) -> str:
    """Return a path that was percent-encoded once. InvalidPath for one that says something else to others."""
    try:
        path = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise errors.InvalidPath("A path is UTF-8, percent-encoded") from None
    if TWICE.search(path):
        raise errors.InvalidPath("The path is encoded twice: what is left of it could mean another file to others")
    return path


def range_of(text: str | None, size: int) -> tuple[int, int] | None:
    """Return start and length of the one range that is asked for; several, or none that makes sense, mean the whole.

    RFC 9110, 14.2. RangeNotSatisfiable when it lies outside.
    """
    match = RANGE.fullmatch(text.strip()) if text else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(0, size - int(match[2])), size
    else:
        start, end = int(match[1]), min(size, int(match[2]) + 1) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= size or (not match[1] and int(match[2]) == 0):
        raise errors.RangeNotSatisfiable(f"The file has {size} bytes: ask for a part of them")
    return start, end - start


def headers_of(file: File) -> dict[str, str]:
    """Return what is told of a file that is sent. A browser shall save it, never show it: whose it is is unknown."""
    return {
        "Accept-Ranges": "bytes",
        "Last-Modified": f"{file.modified_at:%a, %d %b %Y %H:%M:%S} GMT",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.path.rpartition('/')[2], safe='')}",
        "Content-Security-Policy": "sandbox",
        "X-File-Type": file.type,
    }


def media_type_of(path: str) -> str:
    """Return the media type that a name suggests."""
    return mimetypes.guess_type(path, strict=False)[0] or BYTES


def check_length(request: HttpRequest, limit: int) -> None:
    """Refuse a body that says itself that it is too long."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise errors.FileTooLarge(f"The workspace holds {limit} bytes: send less")


async def used(session: Session, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pass bytes on; while they flow the session is not idle."""
    with session.in_use():
        async for chunk in chunks:
            session.touch()
            yield chunk


async def begun(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Wait for the first bytes, so that a refusal comes before the answer's head."""
    first = await anext(chunks, b"")

    async def whole() -> AsyncIterator[bytes]:
        yield first
        async for chunk in chunks:
            yield chunk

    return whole()


async def exactly(chunks: AsyncIterator[bytes], length: int) -> AsyncIterator[bytes]:
    """Pass on as many bytes as were announced; of a file that shrinks meanwhile the transfer breaks off."""
    left = length
    async for chunk in chunks:
        if left:
            yield chunk[:left]
            left -= len(chunk[:left])
    if left:
        raise errors.ContainerLost("The file shrank while it was sent")
