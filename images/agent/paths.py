"""What a path of the workspace may be, and what is told of the file there.

A path has at most DEPTH components of at most 255 bytes, none of them blank, `.` or `..`, has no control characters, and is
relative to the workspace.
"""

import os
import stat
from typing import Any

from streams import Refused
from tree import DEPTH

NAME_LIMIT = 255  # bytes
TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "link"}


def parts_of(path: str) -> list[str]:
    """Return the components of a path. Refused for one that could lead out, or that nobody can mean."""
    parts = path.split("/")
    if path.startswith("/"):
        raise Refused("invalid_path", "A path is relative to the workspace: leave out the slash at its beginning")
    if any(part.strip() in ("", ".", "..") for part in parts):
        raise Refused("invalid_path", "A path has no empty or blank part, no `.` and no `..`")
    if any(letter < " " or letter == "\x7f" for letter in path):
        raise Refused("invalid_path", "A path has no control characters")
    if len(parts) > DEPTH or any(len(part.encode("utf-8", "surrogatepass")) > NAME_LIMIT for part in parts):
        raise Refused("invalid_path", f"A path has at most {DEPTH} parts of at most {NAME_LIMIT} bytes")
    return parts


def described(path: str, facts: os.stat_result) -> dict[str, Any]:
    """Return what is told of a file."""
    kind = TYPES.get(stat.S_IFMT(facts.st_mode), "other")
    size = facts.st_size if kind == "file" else 0
    return {"path": path, "type": kind, "size_bytes": size, "modified_s": max(0.0, facts.st_mtime)}


def printable(path: str) -> str:
    """Return a path as text; bytes that are not UTF-8 become U+FFFD."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def is_plain(facts: os.stat_result) -> bool:
    """Tell whether it is a file that has this one name only."""
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1


def not_plain(facts: os.stat_result) -> Refused:
    if stat.S_ISREG(facts.st_mode):
        return Refused("file_conflict", "The file has several names (hard links): copy it first")
    kind = TYPES.get(stat.S_IFMT(facts.st_mode), "special file")
    return Refused("file_conflict", f"It is a {kind}, no file")


def exists(at: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=at, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
