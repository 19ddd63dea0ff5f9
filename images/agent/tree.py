"""Directory trees made by hostile code: walked and removed by directory descriptors, so that no link is followed."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

DEPTH = 32  # components of a path
DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
STEP = 64  # entries between two yields


def descend(root: str | Path, parts: list[str], *, make: bool = False) -> int:
    """Return a descriptor of the directory below the root, to be closed by the caller. `make` makes what is missing.

    OSError when a part is missing, or is no directory; a link is none.
    """
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for name in parts:
        try:
            if make:
                try:
                    os.mkdir(name, dir_fd=at)
                except FileExistsError:
                    pass
            below = os.open(name, os.O_RDONLY | DIRECTORY, dir_fd=at)
        finally:
            os.close(at)
        at = below
    return at


def walk(root: str | Path, parts: list[str], *, recursive: bool) -> Iterator[tuple[str, os.stat_result]]:
    """Yield path and facts of what is below a directory; paths count from the root.

    Left out is what vanishes meanwhile, and what lies deeper than DEPTH or behind a locked directory.
    """
    waiting = [parts]
    while waiting:
        here = waiting.pop()
        try:
            at = descend(root, here)
        except OSError:
            if here is parts:
                raise
            continue
        try:
            with os.scandir(at) as entries:
                for entry in entries:
                    try:
                        facts = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    yield "/".join([*here, entry.name]), facts
                    if recursive and stat.S_ISDIR(facts.st_mode) and len(here) + 1 < DEPTH:
                        waiting.append([*here, entry.name])
        finally:
            os.close(at)


def remove_tree(root: Path) -> Iterator[None]:
    """Remove a directory tree, yielding between steps.

    Needs no recursion and no long path: a directory below the root is first moved up beside it, so the working depth
    stays two.
    """
    beside = os.open(root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield from remove_at(beside, root.name)
    finally:
        os.close(beside)


def remove_at(beside: int, name: str) -> Iterator[None]:
    """Remove the directory tree of a name in a directory; see `remove_tree`."""
    waiting = [name]
    moved = 0
    while waiting:
        unlock(beside, waiting[-1])
        at = os.open(waiting[-1], os.O_RDONLY | DIRECTORY, dir_fd=beside)
        deeper = []
        try:
            with os.scandir(at) as entries:
                for count, entry in enumerate(entries):
                    if entry.is_dir(follow_symlinks=False):
                        moved += 1
                        unlock(at, entry.name)  # a directory without write permission cannot be moved
                        os.rename(entry.name, f"{name}.{moved}", src_dir_fd=at, dst_dir_fd=beside)
                        deeper.append(f"{name}.{moved}")
                    else:
                        os.unlink(entry.name, dir_fd=at)
                    if count % STEP == STEP - 1:
                        yield
        finally:
            os.close(at)
        os.rmdir(waiting.pop(), dir_fd=beside)
        waiting += deeper
        yield


def unlock(at: int, name: str) -> None:
    """Give a directory all permissions of its owner; never what a link of this name points to."""
    if os.chmod in os.supports_follow_symlinks:
        os.chmod(name, 0o700, dir_fd=at, follow_symlinks=False)
        return
    held = os.open(name, os.O_PATH | DIRECTORY, dir_fd=at)  # Linux: opens what may not be read, too
    try:
        os.chmod(f"/proc/self/fd/{held}", 0o700)
    finally:
        os.close(held)
