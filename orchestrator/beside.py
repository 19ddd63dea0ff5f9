"""A short life beside a service, for what starts a container of its own and is gone."""

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from orchestrator.settings import Settings

UIDS_OF_SERVICE = 450  # what a service takes from `uid_base` on, at most
UIDS_BESIDE = 28


@contextmanager
def beside(settings: Settings) -> Iterator[Settings]:
    """Yield settings for a short life beside a service: neither its instance, nor its directory, nor its user ids."""
    with tempfile.TemporaryDirectory(prefix="sandbox-") as directory:
        Path(directory).chmod(0o711)  # the local engine's agents pass through it, each as its own user
        yield msgspec.structs.replace(
            settings,
            instance=f"beside-{secrets.token_hex(6)}",
            state_dir=directory,
            on_exit="remove",
            uid_base=settings.uid_base + UIDS_OF_SERVICE + os.getpid() % UIDS_BESIDE,
        )
