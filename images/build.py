"""Build the sandbox images: `python images/build.py python` makes `sandbox-python:latest`.

An image is `images/NAME/Dockerfile`; the default of its `ARG BASE=` says what it stands on: another of our images, or
one to pull. A Debian image that cannot be pulled is made here with debootstrap, under the tag `sandbox-base:SUITE`.
"""

import argparse
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import docker
import requests
import urllib3
from docker.errors import DockerException, ImageNotFound
from docker.utils import kwargs_from_env

import debian_base

IMAGES = Path(__file__).resolve().parent
HOST_CA = Path("/etc/ssl/certs/ca-certificates.crt")  # packages of Python may come through a proxy that it vouches for
REPOSITORY_FILES = ("LICENSE", "README.md", "pyproject.toml", "requirements-service.lock")
BUILD_LABEL = "sandbox.build"  # on each of our images: the hash of all that went into it
PULL_SILENCE_S = 20  # a registry that says nothing for so long counts as unreachable
BUILD_SILENCE_S = 900  # one quiet build step, for example an apt-get on a slow line
ENGINE_ERRORS = (DockerException, requests.RequestException, urllib3.exceptions.HTTPError)


class BuildError(Exception):
    """Why an image cannot be had, and what to do."""


def main() -> int:
    """Build the named images and what they stand on; return the exit code."""
    parser = argparse.ArgumentParser(description="Build sandbox-NAME:TAG from images/NAME/Dockerfile.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    parser.add_argument("--fresh", action="store_true", help="renew the base and all packages")
    parser.add_argument("--tag", default="latest", help="another tag, for two checkouts that share an engine")
    options = parser.parse_args()
    try:
        engine = docker.APIClient(**kwargs_from_env(), version="auto", timeout=BUILD_SILENCE_S)
        for name in options.names:
            build(engine, name, options.tag, fresh=options.fresh)
    except BuildError as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    except ENGINE_ERRORS as error:
        print(f"images: the Docker Engine failed ({brief(error)}): see `make engine`", file=sys.stderr)
        return 1
    return 0


def build(engine: docker.APIClient, name: str, version: str, *, fresh: bool) -> dict[str, Any]:
    """Make `sandbox-NAME:VERSION`, unless it is there and made of the same; return what the engine tells about it."""
    dockerfile = IMAGES / name / "Dockerfile"
    if not dockerfile.is_file():
        known = ", ".join(sorted(path.parent.name for path in IMAGES.glob("*/Dockerfile")))
        raise BuildError(f"images/{name}/Dockerfile does not exist; the images are: {known}")
    base, base_id = find_base(engine, dockerfile, version, fresh=fresh)
    place, context = pack(name)
    digest = hashlib.sha256(f"{base} {base_id} ".encode() + context).hexdigest()
    tag = f"sandbox-{name}:{version}"
    image = inspect(engine, tag)
    if not fresh and image and (image["Config"]["Labels"] or {}).get(BUILD_LABEL) == digest:
        say(f"{tag} is up to date")
        return image
    say(f"building {tag} on {base}")
    started = time.monotonic()
    events = engine.build(
        fileobj=io.BytesIO(context),
        custom_context=True,
        dockerfile=place,
        tag=tag,
        buildargs={"BASE": base},
        labels={BUILD_LABEL: digest},
        nocache=fresh,
        rm=True,
        forcerm=True,
        decode=True,
    )
    try:
        follow(texts(events))
    except BuildError as error:
        raise BuildError(f"{tag} was not built: {error}; above is the end of its output") from error
    image = inspect(engine, tag)
    if image is None:
        raise BuildError(f"{tag}: the build ended without an image; run it again")
    say(f"built {tag}: {image['Size'] / 1e6:.0f} MB in {time.monotonic() - started:.0f} s")
    return image


def find_base(engine: docker.APIClient, dockerfile: Path, version: str, *, fresh: bool) -> tuple[str, str]:
    """Have the image at hand that the Dockerfile stands on; return its tag and id."""
    default = re.search(r"^ARG BASE=(\S+)", dockerfile.read_text(), re.MULTILINE)
    if default is None:
        raise BuildError(f"{dockerfile} names no base: `ARG BASE=...` is missing before `FROM ${{BASE}}`")
    tag = default[1]
    ours = re.fullmatch(r"sandbox-([a-z0-9-]+)(:latest)?", tag)
    if ours:
        return f"sandbox-{ours[1]}:{version}", build(engine, ours[1], version, fresh=fresh)["Id"]
    debian = re.fullmatch(r"debian:([a-z]+)(-slim)?", tag)
    made_here = f"sandbox-base:{debian[1]}" if debian else None
    for candidate in () if fresh else (tag, made_here):
        if candidate and (image := inspect(engine, candidate)):
            return candidate, image["Id"]
    reason = pull(engine, tag)
    if reason is None:
        return tag, engine.inspect_image(tag)["Id"]
    if debian is None or made_here is None:
        raise BuildError(f"{tag} cannot be pulled ({reason}): give the engine that image with `docker load`")
    say(f"{tag} cannot be pulled ({reason}): making {made_here} from Debian's packages")
    started = time.monotonic()
    try:
        make_base(engine, debian[1], made_here)
    except debian_base.BaseError as error:
        raise BuildError(f"no base image: {error}; or give the engine {tag} with `docker load`") from error
    image = engine.inspect_image(made_here)
    say(f"made {made_here}: {image['Size'] / 1e6:.0f} MB in {time.monotonic() - started:.0f} s")
    return made_here, image["Id"]


def pull(engine: docker.APIClient, tag: str) -> str | None:
    """Pull an image; return why that failed, or None."""
    say(f"pulling {tag}")
    patience, engine.timeout = engine.timeout, PULL_SILENCE_S
    try:
        follow(texts(engine.pull(tag, stream=True, decode=True)))
    except (BuildError, *ENGINE_ERRORS) as error:
        return brief(error)
    finally:
        engine.timeout = patience
    return None


def make_base(engine: docker.APIClient, suite: str, tag: str) -> None:
    # Not in /tmp: that may be small, or mounted without exec and devices.
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="sandbox-base-") as scratch:
        tree = Path(scratch, suite)
        debian_base.make(suite, tree, follow)
        command = ["tar", "--numeric-owner", "--exclude=./dev/*", "-C", str(tree), "-c", "."]
        name, _, version = tag.partition(":")
        with subprocess.Popen(command, stdout=subprocess.PIPE) as tar:
            engine.import_image_from_stream(tar.stdout, name, version, changes=['CMD ["bash"]'])
        if tar.returncode != 0:
            raise BuildError(f"tar of the base failed with exit code {tar.returncode}: is /var/tmp full?")


def pack(name: str) -> tuple[str, bytes]:
    """Return the Dockerfile's place in the build context, and the context: a tar that depends on nothing but names,
    contents and x bits.

    The context is images/, or the repository where the Dockerfile says `# context: repository`. Left out are other
    images' directories and the files directly in images/, which belong to the host. The modes are fixed here because
    a container's uid is never the owner: a checkout under a strict umask must stay readable.
    """
    own = IMAGES / name / "Dockerfile"
    whole = "# context: repository" in own.read_text()
    root = IMAGES.parent if whole else IMAGES
    paths = sorted(IMAGES.glob("*/**/*"))
    if whole:
        paths += sorted([*(root / "orchestrator").glob("**/*"), *(root / name for name in REPOSITORY_FILES)])
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        if whole and HOST_CA.exists():
            tar.add(HOST_CA.resolve(), "host-ca.crt", filter=anonymous)
        for path in paths:
            image = path.relative_to(IMAGES).parts[0] if path.is_relative_to(IMAGES) else name
            foreign = image != name and (IMAGES / image / "Dockerfile").exists()
            if not path.is_file() or foreign or "__pycache__" in path.parts:
                continue
            content = path.read_bytes()
            entry = tarfile.TarInfo(str(path.relative_to(root)))
            entry.size = len(content)
            entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            tar.addfile(entry, io.BytesIO(content))
    return str(own.relative_to(root)), packed.getvalue()


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Take from an entry what depends on the host: owner and time."""
    plain = tarfile.TarInfo(entry.name)
    plain.size, plain.mode = entry.size, 0o644
    return plain


def inspect(engine: docker.APIClient, tag: str) -> dict[str, Any] | None:
    try:
        image: dict[str, Any] = engine.inspect_image(tag)
    except ImageNotFound:
        return None
    return image


def texts(events: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The readable lines in the engine's answer to a build or a pull."""
    for event in events:
        if "error" in event:
            raise BuildError(event["error"].strip())
        text = event.get("stream") or " ".join(event.get(key) or "" for key in ("id", "status", "progress"))
        yield from filter(None, map(str.strip, text.splitlines()))


def follow(lines: Iterable[str]) -> list[str]:
    """Show that a long step lives: one line rewritten on a terminal, else one every 5 s. Return the lines."""
    started = shown = time.monotonic()
    seen: list[str] = []
    try:
        for line in lines:
            seen.append(line)
            now = time.monotonic()
            if sys.stdout.isatty():
                print(f"\r\x1b[K  {now - started:3.0f} s  {line[:80]}", end="", flush=True)
            elif now - shown >= 5:
                print(f"  {now - started:3.0f} s  {line[:80]}", flush=True)
                shown = now
    except BuildError:
        print(*(f"  {line}" for line in seen[-15:]), sep="\n", flush=True)
        raise
    finally:
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)
    return seen


def brief(error: Exception) -> str:
    """The last part of a chained message, which names the cause."""
    return str(getattr(error, "explanation", None) or error).strip().splitlines()[-1][-160:]


def say(line: str) -> None:
    print(f"images: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
