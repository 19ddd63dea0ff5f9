"""How code that is a zip gets into a workspace: unpacked inside a sandbox, never by us."""

from collections.abc import AsyncIterator

from orchestrator.models import ExecutionRequest

ZIP = ".code.zip"
PIECE = 1 << 20  # bytes of the zip that are sent at once
STEP_S = 60.0
ENTRIES = 4000  # a workspace has 4096 inodes
# The zip is hostile, and so might be what reads it: this runs in the container that is to run the code.
UNPACK = """
import os, stat, zipfile

class Refused(Exception):
    pass

def check(infos, limit):
    if len(infos) > limit["entries"]:
        raise Refused(f"it has more than {limit['entries']} entries")
    if sum(info.file_size for info in infos) > limit["bytes"]:
        raise Refused(f"Unzipped size must be smaller than {limit['bytes']} bytes")
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        parts = info.filename.removesuffix("/").split("/")
        if {"", ".", ".."} & set(parts) or "\\\\" in info.filename:
            raise Refused(f"{info.filename!r} leads out of it")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise Refused(f"{info.filename!r} is neither a file nor a directory")
        if info.flag_bits & 1:
            raise Refused(f"{info.filename!r} is encrypted")

def place(archive, info):
    if info.is_dir():
        os.makedirs(info.filename, exist_ok=True)
        return
    if folder := os.path.dirname(info.filename):
        os.makedirs(folder, exist_ok=True)
    with archive.open(info) as source, open(info.filename, "wb") as target:
        while data := source.read(65536):
            target.write(data)
    os.chmod(info.filename, (info.external_attr >> 16) & 0o755 | 0o600)

def handler(limit):
    os.chdir("/workspace")
    try:
        with open(limit["zip"], "rb") as file:
            os.unlink(limit["zip"])
            with zipfile.ZipFile(file) as archive:
                infos = archive.infolist()
                check(infos, limit)
                for info in infos:
                    place(archive, info)
    except Refused as error:
        return str(error)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeError, ValueError):
        return "it is no zip file, or a damaged one"
    except OSError as error:
        return f"it cannot be unpacked: {error.strerror}"
    except Exception as error:
        return f"it cannot be unpacked: {type(error).__name__}"
    return ""
"""


async def pieces(code: bytes) -> AsyncIterator[bytes]:
    """Yield the zip piece by piece."""
    for start in range(0, len(code), PIECE):
        yield code[start : start + PIECE]


def unpacking(*, limit_bytes: int) -> ExecutionRequest:
    """Return the execution that unpacks; its value says what is wrong with the zip, and is empty when nothing is."""
    limits = {"zip": ZIP, "bytes": limit_bytes, "entries": ENTRIES}
    return ExecutionRequest(code=UNPACK, event=limits, timeout_s=STEP_S)
