"""Packs and unpacks tar archives of the workspace. Runs in a sandbox: what is hostile in one meets nothing but itself."""

import lzma
import os
import shutil
import stat
import sys
import tarfile
import zlib

WORKSPACE = "/workspace"
DEPTH, NAME_LIMIT = 32, 255  # parts of a path, bytes of a part
BROKEN = (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError)


class Refusal(Exception):
    """What an archive may not hold."""


def pack(path: str) -> None:
    """Write a tar of a directory to stdout. Sockets, devices and what cannot be read are left out."""
    root = os.path.join(WORKSPACE, path)
    if not os.path.isdir(root):
        raise FileNotFoundError("There is no such directory")
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for folder, folders, names in os.walk(root):
            for name in sorted(names) + sorted(folders):
                try:
                    add(tar, os.path.join(folder, name), root)
                except (PermissionError, FileNotFoundError):
                    continue


def add(tar: tarfile.TarFile, place: str, root: str) -> None:
    """Add one file, directory or link under its path below the root; its owner is nobody in particular."""
    entry = tar.gettarinfo(place, os.path.relpath(place, root))
    if not (entry.isreg() or entry.islnk() or entry.isdir() or entry.issym()):
        return
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode &= 0o777
    if entry.isdir() or entry.issym():
        tar.addfile(entry)
        return
    entry.type = tarfile.REGTYPE  # several names of one file become several files
    with open(place, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        facts = os.fstat(file.fileno())
        if stat.S_ISREG(facts.st_mode):  # else code that runs beside has just put a pipe there
            entry.size = facts.st_size
            tar.addfile(entry, file)


def unpack(path: str, limit: int, staged: str) -> dict[str, int]:
    """Unpack the tar on stdin, plain or compressed, below a directory: all of it, or nothing.

    `staged` names the directory where it lies until it is whole; who kills us removes that. Refusal for what it may not hold;
    OSError when it holds more than `limit` bytes.
    """
    root = os.path.join(WORKSPACE, path)
    staged = os.path.join(WORKSPACE, staged)
    os.mkdir(staged)
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|*") as tar:
            count = extract(tar, staged, limit)
        os.makedirs(root, exist_ok=True)
        merge(staged, root)
    except BROKEN as error:
        raise Refusal(f"It is no tar, or a broken one: {error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return {"files": count}


def extract(tar: tarfile.TarFile, staged: str, limit: int) -> int:
    """Write every entry below a new directory, return how many files there were."""
    kinds: dict[str, str] = {}
    total = 0
    for entry in tar:
        total += entry.size
        if total > limit:
            raise OSError(f"The archive holds more than {limit} bytes")
        name = checked(entry, kinds)
        place = os.path.join(staged, name)
        if entry.isdir():
            kinds[name] = "directory"
            os.makedirs(place, exist_ok=True)
            continue
        os.makedirs(os.path.dirname(place), exist_ok=True)
        if entry.issym():
            kinds[name] = "link"
            os.symlink(entry.linkname, place)
            continue
        kinds[name] = "file"
        data = tar.extractfile(entry)
        assert data is not None
        with open(place, "xb") as file:
            shutil.copyfileobj(data, file)
            os.fchmod(file.fileno(), entry.mode & 0o777 | 0o600)
    if not kinds:
        raise Refusal("The archive is empty, or no tar")
    return len([kind for kind in kinds.values() if kind != "directory"])


def checked(entry: tarfile.TarInfo, kinds: dict[str, str]) -> str:
    """Return the path of an entry; Refusal when it, or what it stands for, could lead out. `kinds`: what came before."""
    shown = ascii(entry.name[:99])
    name = os.path.normpath(entry.name)
    parts = name.split("/")
    if entry.name.startswith("/") or ".." in entry.name.split("/"):
        raise Refusal(f"The path {shown} leads out of the archive")
    if len(parts) > DEPTH or max(len(os.fsencode(part)) for part in parts) > NAME_LIMIT:
        raise Refusal(f"The path {shown} has more than {DEPTH} parts, or one longer than {NAME_LIMIT} bytes")
    if any(kinds.get("/".join(parts[:count]), "directory") != "directory" for count in range(1, len(parts))):
        raise Refusal(f"The path {shown} leads through a link or a file")
    if not (entry.isreg() or entry.isdir() or entry.issym()):
        raise Refusal(f"{shown} is neither file nor directory nor symbolic link")
    if entry.mode & 0o7000:
        raise Refusal(f"{shown} has a set-user-id, set-group-id or sticky bit")
    if name in kinds and not (entry.isdir() and kinds[name] == "directory"):
        raise Refusal(f"{shown} is in the archive twice")
    if entry.issym():
        target = os.path.normpath(os.path.join(os.path.dirname(name), entry.linkname))
        if entry.linkname.startswith("/") or target.split("/")[0] == "..":
            raise Refusal(f"The link {shown} leads out of the archive")
    return name


def merge(source: str, target: str) -> None:
    """Move what is in one directory into another; directories that are in both are merged."""
    for name in os.listdir(source):
        inner, outer = os.path.join(source, name), os.path.join(target, name)
        both = all(os.path.isdir(place) and not os.path.islink(place) for place in (inner, outer))
        if both:
            merge(inner, outer)
        else:
            os.rename(inner, outer)
