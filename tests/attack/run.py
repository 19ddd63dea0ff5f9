"""`make attack`: run every hostile case against a live service, then show that the runner can fail."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.attack import beyond, chaos, code, controls, files, lifecycle, web
from tests.attack.cases import VERDICTS, Case, Failed, NotApplicable, Verdict, load, select
from tests.attack.live import Live, serve


@dataclass(frozen=True)
class Result:
    """How one case ended, and why."""

    case: Case
    verdict: Verdict
    reason: str
    took_s: float

    def __str__(self) -> str:
        word = self.verdict.upper() if self.verdict == "fail" else self.verdict
        line = f"{word:<6} {self.case.id:<9} {self.took_s:6.1f} s  {self.case.group}"
        return f"{line}: {self.reason}" if self.reason else line


def attempt(live: Live, case: Case, *, short: bool) -> str | None:
    """Run one case against the service; the exception that it raises is its verdict, what it returns a figure."""
    match case.kind:
        case "code":
            code.run(live, case)
        case "http":
            (files if case.group == "files" else web).run(live, case, short=short)
        case "file":
            files.run(live, case, short=short)
        case "lifecycle":
            return lifecycle.run(live, case, short=short)
    return None


def judge(live: Live, case: Case, *, short: bool) -> Result:
    """Run one case and return its verdict."""
    begun = time.monotonic()
    verdict: Verdict = "pass"
    reason = ""
    try:
        reason = attempt(live, case, short=short) or ""
    except NotApplicable as error:
        verdict, reason = "n/a", str(error)
    except Failed as error:
        verdict, reason = "fail", str(error)
    except Exception as error:  # noqa: BLE001 - one case that breaks must not hide the others
        verdict, reason = "fail", f"{type(error).__name__}: {error}"
    return Result(case, verdict, " ".join(reason.split())[:600], time.monotonic() - begun)


def run_all(cases: Iterable[Case], engine: str, *, short: bool) -> Iterator[Result]:
    """Yield the result of each case, all of them against one service."""
    with serve(engine) as live:
        for case in cases:
            yield judge(live, case, short=short)


def main() -> int:
    """Run the cases that the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.attack.run", description=__doc__)
    parser.add_argument("--engine", choices=["docker", "local"], default="docker")
    parser.add_argument("--only", metavar="ID,GROUP", help="cases and groups, separated by commas")
    parser.add_argument("--short", action="store_true", help="fewer rounds of what is slow")
    parser.add_argument("--no-controls", action="store_true", help="leave out the same cases against plain containers")
    options = parser.parse_args()
    try:
        cases = select([*load(), *beyond.CASES, *chaos.CASES], options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.engine == "local":
        cases = [case for case in cases if case.kind == "code"]
    counts: Counter[Verdict] = Counter()
    for result in run_all(cases, options.engine, short=options.short):
        counts[result.verdict] += 1
        print(result, flush=True)
    print(
        f"\n{len(cases)} cases on the {options.engine} engine: "
        + ", ".join(f"{counts[word]} {word}" for word in VERDICTS)
    )
    failed = counts["fail"] > 0
    if options.engine == "docker" and not options.no_controls:
        failed |= not controls.report(cases)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
