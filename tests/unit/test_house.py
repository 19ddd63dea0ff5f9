"""The house rules: which floor imports which, names, docstrings, and documents that say what the code says."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from orchestrator.metrics import REFUSE_REASONS, Metrics
from orchestrator.settings import describe

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "orchestrator"
AGENT = ROOT / "images" / "agent"

# Every module stands on a floor and imports from its own or a lower one. A new module is entered here.
FLOORS = {
    0: "orchestrator hosts errors settings variables exchange following remote "
    "calls calls.call calls.contexts calls.executions calls.files calls.operations calls.running calls.sessions "
    "models models.contexts models.events models.executions models.files models.network models.operations "
    "models.sessions models.terminals models.terms",
    1: "frames languages log metrics traces output turns",
    2: "engine engine.files engine.attach engine.options engine.docker engine.local isolation channel greeting feeds heartbeat streams contexts cells runs container files terminal recipes "
    "egress egress.addresses egress.policy egress.resolve egress.border egress.relay egress.http egress.socks egress.seal "
    "egress.serve egress.outlet",
    3: "pool bundle executions session admission stdin events work sessions packages functions unpack warm invocations",
    4: "backoff observer plan removals starts attachments reconciler adoption lock",
    5: "service",
    6: "api api.guard api.problems api.bodies api.protocol api.waiting "
    "api.paths api.files api.contexts api.terminal api.sockets api.events "
    "api.seed_files api.executions api.packages api.native "
    "api.operations "
    "api.pages api.specification "
    "api.seed api.seed_words api.seed_problems api.seed_executions "
    "api.aws api.aws_words api.aws_answers api.aws_functions api.signed api.sigv4 "
    "api.mcp api.results api.tools "
    "sdk sdk.awaiting sdk.blocking sdk.methods sdk.twins "
    "otel app",
    7: "beside doctor doctor.examination doctor.host doctor.report server console cli cli.facts cli.once cli.run cli.serve cli.steps cli.terminal __main__",
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names.split()}
FORBIDDEN = "Manager Service Helper Util Impl Base Abstract DTO Entity Factory".split()
ALLOWED = {
    "BaseError": "an error of the base image",
}
# What a file of the agent imports beside the standard library.
FURTHER = {"interactive.py": {"IPython", "traitlets"}}
# Put together here, so that this file does not contain them.
REGISTRIES = [
    ".".join(words)
    for words in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("deb", "debian", "org"),
        ("security", "debian", "org"),
        ("registry", "npmjs", "org"),
        ("proxy", "golang", "org"),
        ("registry-1", "docker", "io"),
        ("ghcr", "io"),
        ("quay", "io"),
    )
]


def modules() -> dict[str, Path]:
    """Return the package's modules by their name below it."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name or "orchestrator"] = path
    return found


MODULES = modules()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Yield every module that a file imports, inside functions too; a relative import is none of ours."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(imported: str) -> str | None:
    """Return which of our modules an import names, None for another's."""
    if imported.partition(".")[0] != "orchestrator":
        return None
    name = imported.removeprefix("orchestrator").removeprefix(".")
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or "orchestrator"


def owned(name: str) -> set[str]:
    return {found for imported in imports(MODULES[name]) if (found := own(imported)) is not None} - {name}


def python_files() -> list[Path]:
    folders = ("orchestrator", "images", "scripts", "bench", "grafana", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_module_stands_on_a_floor() -> None:
    assert set(FLOOR) == set(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    assert [found for found in sorted(owned(name)) if FLOOR[found] > FLOOR[name]] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    TopologicalSorter({name: owned(name) for name in MODULES}).prepare()


def test_the_client_imports_words_only() -> None:
    parts = {name for name in MODULES if name.partition(".")[0] == "sdk"}
    assert [found for found in sorted(set().union(*map(owned, parts)) - parts) if FLOOR[found] > 0] == []


def test_only_one_module_imports_docker() -> None:
    importers = [name for name, path in MODULES.items() if any(i.split(".")[0] == "docker" for i in imports(path))]
    assert importers == ["engine.docker"]


def test_the_environment_is_read_in_few_places() -> None:
    """Settings come from `settings.load`; the engine's own variables and the client's are theirs to read."""
    readers = [name for name, path in MODULES.items() if re.search(r"os\.(environ|getenv)", path.read_text())]
    assert sorted(readers) == sorted(set(readers) & {"cli.steps", "cli.terminal", "engine.docker", "exchange"})


def test_nothing_is_decided_by_the_wall_clock() -> None:
    """A clock that is set must not end sessions; `datetime.now` is for what a client reads, and so are times of spans."""
    found = [name for name, path in MODULES.items() if re.search(r"\btime\.time(_ns)?\(", path.read_text())]
    assert found == ["otel"]


@pytest.mark.parametrize("path", sorted(AGENT.glob("*.py")), ids=lambda path: path.name)
def test_the_agent_imports_the_standard_library_and_itself(path: Path) -> None:
    allowed = sys.stdlib_module_names | FURTHER.get(path.name, set()) | {other.stem for other in AGENT.glob("*.py")}
    assert [name for name in imports(path) if name.partition(".")[0] not in allowed] == []


def test_every_module_says_what_it_is() -> None:
    assert [str(path.relative_to(ROOT)) for path in python_files() if not ast.get_docstring(parsed(path))] == []


def test_no_class_has_a_name_that_says_nothing() -> None:
    found = [
        node.name
        for path in python_files()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef) and node.name not in ALLOWED
        if set(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]+", node.name)) & {*FORBIDDEN, *(f"{w}s" for w in FORBIDDEN)}
    ]
    assert found == []


def table(path: Path, first: str) -> list[list[str]]:
    """Return the rows of a document's tables whose first cell matches, each cell without its backquotes."""
    rows = [line.strip().strip("|").split("|") for line in path.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [row for row in cells if re.fullmatch(first, row[0])]


def test_the_documented_settings_are_the_settings() -> None:
    documented = table(ROOT / "docs" / "configuration.md", r"`SANDBOX_[A-Z_]+`")
    ours = [[f"`{variable}`", f"`{default}`" if default else "", *rest] for variable, default, *rest in describe()]
    assert [row for row in documented if len(row) == 4] == ours


def test_the_documented_metrics_are_the_metrics() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    ours = {family.name for family in registry.collect()}
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert {name for name in ours if not re.search(rf"\b{name}(_total)?\b", text)} == set()


def test_every_reason_of_a_refusal_is_counted_from_the_start() -> None:
    admitting = [path.read_text() for name, path in MODULES.items() if not name.startswith("egress")]
    calls = re.findall(r'refuse\("(\w+)"', "".join(admitting))
    assert len(calls) > 5
    assert {*calls, "functions"} == set(REFUSE_REASONS)


def metrics_in(query: str) -> set[str]:
    """Return the metrics that a query names, each without what a histogram adds to its name."""
    names = re.findall(r"\b(?:sandbox|process|python)_\w+", re.sub(r'"[^"]*"', "", query))
    return {re.sub(r"_seconds_(bucket|sum|count)$", "_seconds", name) for name in names}


def test_dashboard_and_alerts_look_at_documented_metrics_only() -> None:
    dashboard = json.loads((ROOT / "grafana" / "dashboards" / "sandbox.json").read_bytes())
    rules = yaml.safe_load((ROOT / "grafana" / "rules.yml").read_bytes())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    documented = {name for row in table(ROOT / "docs" / "metrics.md", "`.*`") for name in re.findall(r"\w+", row[0])}
    assert len(documented) > 30
    assert set().union(*map(metrics_in, queries)) - documented == set()


def test_panels_and_alerts_say_what_to_do() -> None:
    dashboard = json.loads((ROOT / "grafana" / "dashboards" / "sandbox.json").read_bytes())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert [panel["title"] for panel in panels if len(panel["description"].split()) < 5] == []
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    rules = yaml.safe_load((ROOT / "grafana" / "rules.yml").read_bytes())["groups"][0]["rules"]
    documented = table(ROOT / "docs" / "deployment.md", r"`Sandbox\w+`")
    assert [(f"`{rule['alert']}`", rule["labels"]["severity"]) for rule in rules] == [
        (row[0], row[2]) for row in documented
    ]
    assert [rule["alert"] for rule in rules if not {"summary", "action"} <= set(rule["annotations"])] == []


def test_no_file_names_a_registrys_host() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert len(paths) > 50
    found = [
        (str(path.relative_to(ROOT)), host)
        for path in paths
        if path.is_file()
        for host in REGISTRIES
        if host.encode() in path.read_bytes()
    ]
    assert found == []
