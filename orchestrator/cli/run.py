"""The command `run`: its options, what it writes, its exit codes."""

from pathlib import Path
from typing import Any, TextIO

import click
import msgspec

from orchestrator.cli.once import run_here, run_remote
from orchestrator.cli.steps import CODE_FAILED, MISUSED, NOT_RUN, TIMED_OUT, fail, load, run_to_end
from orchestrator.errors import InvalidRequest, SandboxError, SettingsError
from orchestrator.models import LANGUAGES, Event, Execution, Language

EXIT_CODES = {"ok": 0, "timeout": TIMED_OUT, "lost": NOT_RUN, "cancelled": NOT_RUN}
ENDINGS: dict[str, Language] = {".js": "javascript", ".mjs": "javascript", ".cjs": "javascript", ".sh": "shell"}


@click.command()
@click.argument("script", type=click.File(encoding="utf-8"))
@click.option("--language", type=click.Choice(LANGUAGES), help="The script's; unless given, its name's ending tells.")
@click.option("--event", metavar="JSON", help="The handler's event; {} unless given.")
@click.option(
    "--event-file",
    type=click.File(encoding="utf-8"),
    metavar="FILE",
    help="Read the event from a file, or - for stdin.",
)
@click.option("--context", metavar="JSON", help="Facts to add to the handler's context: a JSON object.")
@click.option("--timeout", type=float, metavar="S", help="Seconds; the service's SANDBOX_TIMEOUT_SECONDS unless given.")
@click.option(
    "--format",
    "style",
    type=click.Choice(["json", "yaml", "pretty"]),
    default="json",
    show_default=True,
    help="How the value is written; `pretty` is JSON with indentation.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write the value to a file, not to stdout.",
)
@click.option("--quiet", is_flag=True, help="Do not show what the code printed.")
@click.option("--stream", "is_streamed", is_flag=True, help="Show what the code prints when it prints it.")
@click.option(
    "--url",
    envvar="SANDBOX_URL",
    show_envvar=True,
    help="A running service; without one, a container is started here.",
)
@click.option("--api-key", envvar="SANDBOX_API_KEY", show_envvar=True, help="The service's key.")
def run(
    script: TextIO,
    language: Language | None,
    event: str | None,
    event_file: TextIO | None,
    context: str | None,
    timeout: float | None,
    style: str,
    output: Path | None,
    quiet: bool,  # noqa: FBT001 - click passes options by name
    is_streamed: bool,  # noqa: FBT001 - the same
    url: str | None,
    api_key: str | None,
) -> None:
    """Run a SCRIPT once in a sandbox (- is stdin), and print what its `handler` returned.

    It is Python, but JavaScript when its name ends in .js, .mjs or .cjs, and shell when it ends in .sh.

    The value alone goes to stdout, so that it can be piped on. What the code printed, to stdout or to stderr, goes to
    stderr, unless --quiet; one more line there tells why there is no value.

    \b
    Exit codes:
      0    the value was written
      1    the code raised, exited with another code than 0, or was killed at a limit
      2    wrong options or settings
      3    not run, or not to its end: no service, no engine, no container
      124  the timeout was exceeded
    """  # noqa: D301 - the escape is click's mark for a paragraph that it is not to wrap
    if event is not None and event_file is not None:
        raise click.UsageError("Give --event or --event-file, not both.")
    given_event = read_text(event_file, "--event-file") if event_file is not None else event
    fields = {
        "code": read_text(script, "SCRIPT"),
        "language": language or ENDINGS.get(Path(script.name).suffix, "python"),
        "event": {} if given_event is None else parse(given_event, "--event"),
        "context": {} if context is None else parse(context, "--context"),
        "timeout_s": timeout,
    }
    try:
        show = show_event if is_streamed and not quiet else None
        execution = run_remote(fields, url, api_key, show) if url else run_to_end(run_here(load(), fields, show))
    except (InvalidRequest, SettingsError) as error:
        fail(error.detail, MISUSED)
    except SandboxError as error:
        fail(error.detail, NOT_RUN)
    if not quiet and show is None:
        click.echo(execution.stdout, err=True, nl=False)
        click.echo(execution.stderr, err=True, nl=False)
    if execution.outcome != "ok":
        fail(explain(execution), EXIT_CODES.get(str(execution.outcome), CODE_FAILED))
    write(render(execution.value, style), output)


def show_event(event: Event) -> None:
    """Show what the code printed."""
    click.echo(event.text, err=True, nl=False)


def read_text(file: TextIO, name: str) -> str:
    """Read a file that an option names; a usage error when it is no text."""
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{name}: {file.name} is no UTF-8 text: {error.reason}.") from None


def parse(text: str, name: str) -> Any:
    """Parse an option's JSON; a usage error when it is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise click.UsageError(f"{name} is no JSON: {error}.") from None


def explain(execution: Execution) -> str:
    """Tell why an execution has no value."""
    if execution.error is not None:
        return f"{execution.outcome}: {execution.error.type}: {execution.error.message}"
    if execution.outcome == "error":
        return f"error: exit code {execution.exit_code}"
    return str(execution.outcome)


def render(value: Any, style: str) -> str:
    """Return the value as text, with a newline at its end."""
    if style == "yaml":
        import yaml

        return yaml.safe_dump(value, allow_unicode=True, sort_keys=False)
    text = msgspec.json.encode(value)
    return (msgspec.json.format(text, indent=2) if style == "pretty" else text).decode() + "\n"


def write(text: str, output: Path | None) -> None:
    """Write to a file, or to stdout."""
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"{output} cannot be written: {error.strerror}", MISUSED)
