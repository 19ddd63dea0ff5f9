"""The command `serve`."""

import click

from orchestrator.cli.steps import MISUSED, fail, load
from orchestrator.errors import SandboxError


@click.command()
@click.option("--host", help="Address to listen on, in place of SANDBOX_HOST.")
@click.option("--port", type=int, help="Port to listen on, in place of SANDBOX_PORT.")
@click.option("--engine", type=click.Choice(["docker", "local"]), help="In place of SANDBOX_ENGINE.")
@click.option("--on-exit", type=click.Choice(["keep", "remove"]), help="In place of SANDBOX_ON_EXIT.")
def serve(host: str | None, port: int | None, engine: str | None, on_exit: str | None) -> None:
    """Serve the HTTP API until SIGTERM or Ctrl-C.

    At the end, nothing new is admitted, what runs may finish (SANDBOX_DRAIN_SECONDS), ready containers are removed, and
    sessions stay for the next start to adopt, which must come within ten minutes; with --on-exit remove nothing stays.
    Settings are environment variables; `orchestrator settings` lists them. A start that fails ends with exit code 2.
    """
    chosen = load(host=host, port=port, engine=engine, on_exit=on_exit)
    from orchestrator import log, server

    log.configure(chosen.log_level, chosen.log_format)
    try:
        server.run(chosen)
    except (SandboxError, ExceptionGroup) as error:
        cause = innermost(error)
        if not isinstance(cause, SandboxError):
            raise
        fail(cause.detail, MISUSED)


def innermost(error: BaseException) -> BaseException:
    """Return what was raised first: Litestar puts what its lifespan raises into a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
