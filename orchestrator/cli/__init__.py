"""The command line: serve, examine the host, run one script, use a terminal, show the settings."""

import click

from orchestrator.cli import facts, run, serve, terminal


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Run untrusted code in warm containers, each execution in a fresh bubblewrap sandbox."""


for command in (serve.serve, run.run, terminal.terminal, facts.doctor, facts.show_settings, facts.version):
    main.add_command(command)
