"""The commands that tell facts: `doctor`, `settings` and `version`."""

import click
import msgspec

from orchestrator import __version__, settings
from orchestrator.cli.steps import CODE_FAILED, fail, load, run_to_end
from orchestrator.errors import SandboxError


@click.command()
@click.option("--engine", type=click.Choice(["docker", "local"]), help="In place of SANDBOX_ENGINE.")
@click.option("--format", "style", type=click.Choice(["pretty", "json"]), default="pretty", show_default=True)
def doctor(engine: str | None, style: str) -> None:
    """Tell what this host can isolate, item by item.

    At the end a real container is started, and what its self-test observed is listed layer by layer. The exit code is
    0 when sessions can be served with every layer that the engine requires, else 1.
    """
    from orchestrator import log
    from orchestrator.doctor.examination import examine
    from orchestrator.doctor.report import pretty

    chosen = load(engine=engine)
    log.configure("error", chosen.log_format)
    try:
        report = run_to_end(examine(chosen))
    except SandboxError as error:
        fail(error.detail, CODE_FAILED)
    click.echo(msgspec.json.encode(report) if style == "json" else pretty(report))
    raise click.exceptions.Exit(0 if report.ok else CODE_FAILED)


@click.command("settings")
def show_settings() -> None:
    """List the settings: environment variables with their defaults, what they take and what they mean."""
    rows = settings.describe()
    width, default_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    for variable, default, allowed, about in rows:
        click.echo(f"{variable:<{width}}  {default:<{default_width}}  {about} ({allowed})")


@click.command()
def version() -> None:
    """Print the version."""
    click.echo(__version__)
