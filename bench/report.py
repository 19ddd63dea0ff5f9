"""What is reported of a run: the figures, and the ratios that this project holds itself to."""

import json

from measured import RESULTS, Figures


def reaches(figures: Figures) -> list[tuple[str, float, str]]:
    """Return the ratios that this project holds itself to, with their bounds."""
    c_ms = figures["C p50 ms"]
    return [
        ("warm p50 / C", figures["warm p50 ms"] / c_ms, "<= 0.5 (aim 0.3)"),
        ("warm p99 / C", figures["warm p99 ms"] / c_ms, "<= 1.2"),
        ("create + first result / C", figures["create + first result p50 ms"] / c_ms, "<= 1.2"),
        (
            "docker run / create + first result",
            figures["docker run p50 ms"] / figures["create + first result p50 ms"],
            ">= 15",
        ),
        ("16 clients rate / C wide rate", figures["16 clients rate /s"] / figures["C wide rate /s"], ">= 1.0"),
        # The two bounds in milliseconds are those of a machine on which C takes 8 ms.
        ("16 clients p99 ms", figures["16 clients p99 ms"], "<= 150 where C is 8 ms"),
        ("16 clients p99 / C", figures["16 clients p99 ms"] / c_ms, "<= 18.75"),
        ("orchestrator CPU per execution ms", figures["orchestrator CPU per execution ms"], "<= 1 where C is 8 ms"),
        ("orchestrator CPU per execution / C", figures["orchestrator CPU per execution ms"] / c_ms, "<= 0.125"),
        ("output at the client p99 ms", figures["output at the client p99 ms"], "<= 10"),
        (
            "orchestrator growth over 100 MiB up and down MiB",
            figures["orchestrator growth over 100 MiB up and down MiB"],
            "<= 16",
        ),
        ("ready container PSS MiB", figures["ready container PSS MiB"], "<= 30"),
        ("lateness of a 1 s timeout, worst ms", figures["lateness of a 1 s timeout, worst ms"], "<= 20"),
    ]


def report(figures: Figures) -> None:
    """Print the tables, and write both as JSON."""
    print(f"\n{'figure':<44}{'median':>12}")
    for name, value in figures.items():
        print(f"{name:<44}{value:>12.2f}")
    print(f"\n{'reach':<44}{'measured':>12}  bound")
    for name, value, bound in reaches(figures):
        print(f"{name:<44}{value:>12.2f}  {bound}")
    rows = [dict(zip(("name", "value", "bound"), row, strict=True)) for row in reaches(figures)]
    (RESULTS / "bench.json").write_text(json.dumps({"figures": figures, "reaches": rows}, indent=1))
