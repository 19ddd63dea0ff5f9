"""The seal on what an agent keeps of its session's network: whoever took an agent over cannot write itself another.

The key lies in the state directory. When it is lost, so are the networks of the sessions that are adopted then.
"""

import hmac
import os
import secrets
from pathlib import Path

import msgspec

from orchestrator.models import ShownNetwork

KEY_BYTES = 32


class Seal:
    """One key of one instance, made when it is first needed. The network `none` needs no seal."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._key = b""

    def of(self, owner: str, network: ShownNetwork) -> str:
        """Return the seal on a network of one container's session."""
        if network == "none":
            return ""
        said = msgspec.json.encode([owner, network], order="deterministic")
        return hmac.new(self._load(), said, "sha256").hexdigest()

    def fits(self, seal: str, owner: str, network: ShownNetwork) -> bool:
        """Tell whether a seal is the one of this network."""
        return hmac.compare_digest(seal.encode(), self.of(owner, network).encode())

    def _load(self) -> bytes:
        if not self._key:
            try:
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                pass
            else:
                with os.fdopen(fd, "wb") as file:
                    file.write(secrets.token_bytes(KEY_BYTES))
            with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                self._key = file.read()
        return self._key
