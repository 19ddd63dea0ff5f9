"""The calls about files of a workspace."""

from orchestrator import models
from orchestrator.calls.call import Call, body_of, file_path_of, page_of, path_of


def list_files(
    session_id: str, path: str = "", *, recursive: bool = False, limit: int = 1000, after: str | None = None
) -> Call[models.FilePage]:
    """List a directory of a session's workspace in the order of the paths; `after` continues with a page's `next`."""
    query = {"path": path, "recursive": str(recursive).lower()} | page_of(limit, after)
    return Call(method="GET", path=path_of(session_id, "files"), answer=models.FilePage, query=query)


def read_file(session_id: str, path: str) -> Call[bytes]:
    """Read a file of the workspace. errors.FileNotFound, or FileConflict for what is no plain file."""
    return Call(method="GET", path=file_path_of(session_id, path), answer=bytes)


def write_file(session_id: str, path: str, content: bytes | str) -> Call[models.File]:
    """Write a file of the workspace, and make the directories above it; one that is there already is replaced."""
    body = content.encode() if isinstance(content, str) else bytes(content)
    return Call(
        method="PUT",
        path=file_path_of(session_id, path),
        answer=models.File,
        body=body,
        media_type="application/octet-stream",
    )


def make_directory(session_id: str, path: str) -> Call[models.File]:
    """Make a directory of the workspace, and those above it."""
    body = body_of(models.NewDirectory, {"type": "directory"})
    return Call(method="POST", path=file_path_of(session_id, path), answer=models.File, body=body)


def rename_file(session_id: str, path: str, new_path: str, *, overwrite: bool = False) -> Call[models.File]:
    """Move a file or directory of the workspace; what is at the new path is replaced only with `overwrite`."""
    body = body_of(models.Move, {"path": new_path, "overwrite": overwrite})
    return Call(method="PATCH", path=file_path_of(session_id, path), answer=models.File, body=body)


def delete_file(session_id: str, path: str, *, recursive: bool = False) -> Call[None]:
    """Delete a file or directory of the workspace; one that is not empty only with `recursive`."""
    query: dict[str, str | int] = {"recursive": str(recursive).lower()}
    return Call(method="DELETE", path=file_path_of(session_id, path), answer=type(None), query=query)


def read_archive(session_id: str, path: str = "") -> Call[bytes]:
    """Read a directory of the workspace as a tar."""
    return Call(method="GET", path=path_of(session_id, "archive"), answer=bytes, query={"path": path})


def write_archive(session_id: str, archive: bytes, *, path: str = "") -> Call[models.Unpacked]:
    """Unpack a tar, plain or compressed, below a directory of the workspace: all of it, or nothing."""
    return Call(
        method="POST",
        path=path_of(session_id, "archive"),
        answer=models.Unpacked,
        body=archive,
        media_type="application/x-tar",
        query={"path": path},
    )
