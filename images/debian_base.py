"""A Debian root file system made with debootstrap from the package mirror this host itself uses."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# What decides whether apt can download at all. Credentials (auth.conf) stay out: the image would carry them.
CARRIED = re.compile(r"Acquire::(Check-Valid-Until|Check-Date|Retries|ForceIPv[46]|https?::Proxy(::\S+)?) ")
# Debian's own slim images leave out the same.
UNNEEDED = ("doc", "info", "lintian", "locale", "man")

Follow = Callable[[Iterable[str]], list[str]]


class BaseError(Exception):
    """Why no root file system could be made, and what to do."""


def make(suite: str, tree: Path, follow: Follow) -> None:
    """Fill `tree` with a minimal Debian `suite` whose apt works where the host's does.

    `follow` shows the lines of long steps and returns them.
    """
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise BaseError("only root on Debian or Ubuntu can make one")
    if shutil.which("debootstrap") is None or not Path(KEYRING).exists():
        run(["apt-get", "update"], follow)
        install = ["apt-get", "install", "-y", "--no-install-recommends"]
        run([*install, "debootstrap", "debian-archive-keyring"], follow)
    sources = find_sources(suite, follow)
    mirror = sources.get(suite)
    secure = mirror is not None and mirror.startswith("https:")
    # In a mount namespace of its own, so that an interrupted debootstrap leaves no /proc mounted in the tree.
    command = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--keyring={KEYRING}"]
    command += ["--include=ca-certificates"] if secure else []
    command += [suite, str(tree)]
    command += [mirror] if mirror else []  # without one, debootstrap knows Debian's own
    run(command, follow)
    if sources:
        write_sources(tree, sources)
    settings = [line for line in apt_config() if CARRIED.match(line)]
    (tree / "etc/apt/apt.conf.d/90host").write_text("".join(f"{line}\n" for line in settings))
    if secure:
        trust_local_authorities(tree)
    slim(tree)


def run(command: list[str], follow: Follow) -> None:
    """Run one long step; when it fails, its last line is the reason."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **proxies()}
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        lines = follow(line.strip() for line in process.stdout if line.strip())
    if process.returncode != 0:
        reason = lines[-1] if lines else f"exit code {process.returncode}"
        raise BaseError(f"`{' '.join(command)}` failed: {reason}")


def find_sources(suite: str, follow: Follow) -> dict[str, str]:
    """Where the host's own mirrors offer `suite`, its updates and its security fixes: suite → URI.

    Empty on a host without a Debian mirror (Ubuntu). Apt itself reads its sources and downloads the probe, so every
    format, proxy and authentication it knows works here.
    """
    if not (mirrors := debian_mirrors()):
        run(["apt-get", "update"], follow)
        mirrors = debian_mirrors()
    wanted = (suite, f"{suite}-updates", f"{suite}-security")
    found = {name: next((uri for uri in mirrors if offers(uri, name)), None) for name in wanted}
    return {name: uri for name, uri in found.items() if uri is not None}


def debian_mirrors() -> list[str]:
    fields = ["--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian", "Component: main"]
    return list(dict.fromkeys(output(["apt-get", "indextargets", *fields])))


def offers(uri: str, suite: str) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        release = Path(scratch, "InRelease")
        command = ["/usr/lib/apt/apt-helper", "-oAPT::Sandbox::User=root", "download-file"]
        url = f"{uri.rstrip('/')}/dists/{suite}/InRelease"
        probe = subprocess.run([*command, url, str(release)], capture_output=True, timeout=60, check=False)
        return probe.returncode == 0 and f"\nCodename: {suite}" in release.read_text(errors="replace")


def apt_config() -> list[str]:
    return output(["apt-config", "dump"])


def proxies() -> dict[str, str]:
    """Apt's proxies under the names debootstrap's downloader reads."""
    found = (re.match(r'Acquire::(https?)::Proxy "(http[^"]+)"', line) for line in apt_config())
    return {f"{match[1]}_proxy": match[2] for match in found if match}


def output(command: list[str]) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def write_sources(tree: Path, sources: dict[str, str]) -> None:
    stanzas = (
        f"Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYRING}\n"
        for suite, uri in sources.items()
    )
    (tree / "etc/apt/sources.list").unlink(missing_ok=True)  # debootstrap's, with the first suite only
    (tree / "etc/apt/sources.list.d/debian.sources").write_text("\n".join(stanzas))


def trust_local_authorities(tree: Path) -> None:
    """Let the tree trust what the host trusts beyond Debian's list, or its apt could not read an https mirror."""
    local = Path("/usr/local/share/ca-certificates")
    if local.is_dir() and any(local.rglob("*.crt")):
        shutil.copytree(local, tree / local.relative_to("/"), dirs_exist_ok=True)
        subprocess.run(["chroot", str(tree), "update-ca-certificates"], capture_output=True, check=True)


def slim(tree: Path) -> None:
    """Remove downloads and documentation, and have dpkg leave out the latter from now on; licences stay."""
    share = Path("/usr/share")
    rules = [f"path-exclude={share}/{name}/*" for name in UNNEEDED]
    rules += [f"path-include={share}/doc/*/copyright", f"path-include={share}/locale/locale.alias"]
    (tree / "etc/dpkg/dpkg.cfg.d/slim").write_text("".join(f"{rule}\n" for rule in rules))
    kept = {"copyright", "locale.alias"}
    for top in ("var/cache/apt", "var/lib/apt/lists", *(f"usr/share/{name}" for name in UNNEEDED)):
        for path in sorted((tree / top).rglob("*"), reverse=True):  # children come before their directory
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.name not in kept:
                path.unlink()
