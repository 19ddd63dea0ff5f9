"""A report: what was found, and how it is shown."""

from typing import Literal

import msgspec

Status = Literal["ok", "warning", "MISSING", "skipped"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at; `hint` says what to change."""

    about: Literal["host", "engine", "container"]
    name: str
    status: Status
    detail: str = ""
    hint: str = ""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All findings. `ok` when a container came up with every layer that its engine requires."""

    engine: str
    ok: bool
    findings: list[Finding]


def pretty(report: Report) -> str:
    """Return the report for people."""
    lines: list[str] = []
    for finding in report.findings:
        if finding.about not in lines:
            lines.append(finding.about)
        text = ": ".join(part for part in (finding.detail, finding.hint) if part)
        lines.append(f"  {finding.status:<8} {finding.name:<16} {text}".rstrip())
    verdict = "can be served, with every layer that it requires" if report.ok else "cannot be served"
    lines.append(f"On the engine {report.engine} sessions {verdict}.")
    return "\n".join(lines)
