"""The command `terminal`."""

import os

import click

from orchestrator.cli.steps import NOT_RUN, fail, run_to_end
from orchestrator.errors import SandboxError


@click.command()
@click.argument("session")
@click.option("--command", "-c", metavar="LINE", help="A line for bash in the place of a login shell.")
@click.option(
    "--url", envvar="SANDBOX_URL", show_envvar=True, help="The running service; http://localhost:8000 unless given."
)
@click.option("--api-key", envvar="SANDBOX_API_KEY", show_envvar=True, help="The service's key.")
def terminal(session: str, command: str | None, url: str | None, api_key: str | None) -> None:
    """Use a terminal in a SESSION of a running service.

    It ends with its program, whose exit code becomes this command's; Ctrl-] leaves it at any time, which kills what runs in
    it. Exit code 3 is said when there is no such session or service.
    """
    from orchestrator import console
    from orchestrator.sdk import SandboxClient

    async def use() -> int:
        async with SandboxClient(url, api_key=api_key) as client:
            term = os.environ.get("TERM") or "dumb"
            end = await console.attach(client, session, command=command, term=term)
            return 0 if end is None else end.exit_code

    try:
        code = run_to_end(use())
    except SandboxError as error:
        fail(error.detail, NOT_RUN)
    raise click.exceptions.Exit(code)
