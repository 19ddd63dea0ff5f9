"""What every command does: read the settings, run to an end, fail in one line."""

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any, NoReturn, TypeVar

import click

from orchestrator import settings
from orchestrator.errors import SettingsError
from orchestrator.settings import Settings

T = TypeVar("T")
CODE_FAILED, MISUSED, NOT_RUN, TIMED_OUT, INTERRUPTED = 1, 2, 3, 124, 130


def fail(text: str, code: int) -> NoReturn:
    """End with one line on stderr."""
    click.echo(f"orchestrator: {' '.join(text.split())}", err=True)
    raise click.exceptions.Exit(code)


def load(**overrides: str | int | None) -> Settings:
    """Read the settings from the environment; options that were given take its place."""
    given = {f"SANDBOX_{name.upper()}": str(value) for name, value in overrides.items() if value is not None}
    try:
        return settings.load(os.environ | given)
    except SettingsError as error:
        fail(error.detail, MISUSED)


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine. Ctrl-C and SIGTERM cancel it, so that it cleans up behind itself."""

    async def with_signals() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(with_signals())
    except (KeyboardInterrupt, asyncio.CancelledError):
        raise click.exceptions.Exit(INTERRUPTED) from None
