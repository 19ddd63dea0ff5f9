"""Print "HOST VERSION" of the first Docker Engine that answers; standard library only, it runs before any set-up.

Asked are the hosts given as arguments; else DOCKER_HOST; else the docker command's context and the usual sockets.
"""

import hashlib
import http.client
import json
import os
import socket
import sys
from pathlib import Path


def main() -> int:
    """Return 0 when an engine was found, 1 when none was; an engine that is there but refuses is named on stderr."""
    for host in sys.argv[1:] or candidates():
        try:
            print(host, version(host))
        except (FileNotFoundError, ConnectionRefusedError):
            continue
        except PermissionError:
            print(f"engine: {host} is closed to you: join the group docker, log in again", file=sys.stderr)
        except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
            print(f"engine: {host} does not answer as a Docker Engine: {error!r}", file=sys.stderr)
        else:
            return 0
    return 1


def candidates() -> list[str]:
    if named := os.environ.get("DOCKER_HOST"):
        return [named]
    home = Path.home() / ".docker"
    directories = ["/var/run", os.environ.get("XDG_RUNTIME_DIR"), home / "run", home / "desktop"]
    sockets = [f"unix://{directory}/docker.sock" for directory in directories if directory]
    return [*context(Path(os.environ.get("DOCKER_CONFIG") or home)), *sockets]


def context(settings: Path) -> list[str]:
    """The endpoint of the docker command's current context: Docker Desktop, Colima and others put theirs there."""
    try:
        named = os.environ.get("DOCKER_CONTEXT")
        name = named or json.loads((settings / "config.json").read_text())["currentContext"]
        meta = settings / "contexts/meta" / hashlib.sha256(name.encode()).hexdigest() / "meta.json"
        return [json.loads(meta.read_text())["Endpoints"]["docker"]["Host"]]
    except (OSError, ValueError, KeyError):
        return []


def version(host: str) -> str:
    if not host.startswith("unix://"):
        return "unknown"  # tcp and ssh come with credentials: whoever named them is taken at their word
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(5)
    connection.sock.connect(host.removeprefix("unix://"))
    connection.request("GET", "/version")
    answer = json.load(connection.getresponse())
    connection.close()
    return str(answer["Version"])


if __name__ == "__main__":
    sys.exit(main())
