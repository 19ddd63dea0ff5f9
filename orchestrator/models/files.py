"""Files of the workspace."""

from typing import Literal

import msgspec

from orchestrator.models.terms import Request, Time


class Encoded(Request, frozen=True):
    """The content of a file that is no text."""

    base64: bytes


class File(msgspec.Struct, frozen=True, kw_only=True):
    """Something in the workspace; `path` counts from there. Only a file has a size. Bytes of its path that are not
    UTF-8 became U+FFFD.
    """

    path: str
    type: Literal["file", "directory", "link", "other"]
    size_bytes: int
    modified_at: Time


class FilePage(msgspec.Struct, frozen=True, kw_only=True):
    """Files in the order of their paths; `next` continues after the last one."""

    files: list[File]
    next: str | None = None


class NewDirectory(Request, frozen=True):
    """What to make at a path: a directory, and those above it."""

    type: Literal["directory"]


class Move(Request, frozen=True):
    """Where a file or directory is to be; what is there already is replaced only when `overwrite` says so."""

    path: str
    overwrite: bool = False


class Unpacked(msgspec.Struct, frozen=True, kw_only=True):
    """How many files an archive had."""

    files: int
