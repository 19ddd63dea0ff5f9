"""The documents are true: examples run as printed, tables are what the code says, names and links exist.

The tables of settings are compared in test_house.py.
"""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client

from orchestrator import errors, models, settings
from tests.live import Live, environment, serve
from tests.wheels import write_wheel

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CHINESE = ROOT / "README_zh.md"
API = (ROOT / "docs" / "api.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
MEASURED = {"execution_time", "metrics"}  # of the seed's result: different each time
WEBSOCKETS = """
from orchestrator.app import create_app
from orchestrator.settings import Settings
for route in create_app(Settings(engine="local")).routes:
    if route.scope_type == "websocket":
        print(route.path_format)
"""
# In the place of curl, where a bare machine has none.
CURL = """#!{python}
import argparse, urllib.request
parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("-X")
parser.add_argument("-H", action="append", default=[])
parser.add_argument("-d", default="")
given = parser.parse_args()
headers = dict(header.split(": ", 1) for header in given.H)
request = urllib.request.Request(given.url, given.d.encode() or None, headers, method=given.X)
print(urllib.request.urlopen(request, timeout=30).read().decode(), end="")
"""


NOT_RUN = re.compile(r"<!-- not run: \S.* -->\n\Z")
SNIPPETS = ("bash", "sh", "shell", "console", "python")


@pytest.fixture(scope="module")
def wheels_service(state_dir: Path) -> Iterator[Live]:
    """A service without keys whose containers find a package to install."""
    folder = state_dir / "wheels-of-documents"
    folder.mkdir()
    write_wheel(folder, "requests", "2.0", "")
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    (state_dir / "documents.toml").write_text(f'[python]\nwheels = "{folder}"\n')
    more = {"templates_file": str(state_dir / "documents.toml"), "uid_base": "190200"}
    with serve(state_dir, instance="test-docs", engine="local", **more) as live:
        yield live


def snippets(text: str) -> list[tuple[str, str]]:
    """Return language and text of the shell and Python snippets that are not marked as not to be run."""
    blocks = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [
        (block[1], block[2]) for block in blocks if block[1] in SNIPPETS and not NOT_RUN.search(text[: block.start()])
    ]


def fences(text: str, language: str) -> list[str]:
    """Return the code blocks of a document that are marked with a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def first_cells(text: str) -> list[str]:
    """Return the first cell of every table row."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]


def section(text: str, heading: str) -> str:
    """Return what stands below a heading, up to the next of any level."""
    return re.split(r"^#+ ", text.split(f"\n{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def run(live: Live, command: list[str], folder: Path) -> str:
    """Run a command in the folder as a reader would, but against this service; return what it prints."""
    if shutil.which("curl") is None:
        (folder / "curl").write_text(CURL.format(python=sys.executable))
        (folder / "curl").chmod(0o755)
    variables = environment(url=live.url)
    more = {"PYTHONPATH": str(ROOT), "PATH": f"{variables['PATH']}:{folder}", "no_proxy": "localhost,127.0.0.1"}
    ended = subprocess.run(
        command, check=False, cwd=folder, env=variables | more, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def here(live: Live, example: str) -> str:
    """Return an example with this service's port and this environment's command line."""
    return example.replace("localhost:8000", f"localhost:{live.port}").replace(
        ".venv/bin/orchestrator", f"{sys.executable} -m orchestrator"
    )


def test_the_readmes_curl_examples_print_what_it_says(local_service: Live, tmp_path: Path) -> None:
    execute, end = (example for example in fences(README, "bash") if example.startswith("curl"))
    printed, _ = fences(README, "json")

    answer = json.loads(run(local_service, ["bash", "-c", here(local_service, execute)], tmp_path))
    ended = json.loads(run(local_service, ["bash", "-c", here(local_service, end)], tmp_path))

    expected = json.loads(printed)
    assert list(expected) == list(answer)
    assert list(expected["metrics"]) == list(answer["metrics"])
    assert {name: value for name, value in expected.items() if name not in MEASURED} == {
        name: value for name, value in answer.items() if name not in MEASURED
    }
    assert ended == {"status": "success"}


def test_the_readmes_sdk_examples_are_whole_scripts_that_print_what_they_say(
    wheels_service: Live, tmp_path: Path
) -> None:
    """A line ends with what it prints, as a comment."""
    for example in fences(README, "python"):
        (tmp_path / "example.py").write_text(here(wheels_service, example))
        printed = run(wheels_service, [sys.executable, "-W", "error", "example.py"], tmp_path)
        comments = re.findall(r"^ *print\(.*\)  # (.*)$", example, re.MULTILINE)
        assert comments
        said = (
            "\n".join(comments).replace("0, 1, 2", "0\n1\n2").replace('"Hello from sandbox!"', "Hello from sandbox!\n")
        )
        assert said == printed.removesuffix("\n")


def test_the_readmes_command_line_prints_the_value(local_service: Live, tmp_path: Path) -> None:
    (example,) = (text for text in fences(README, "bash") if "orchestrator run" in text)
    assert run(local_service, ["bash", "-c", here(local_service, example)], tmp_path) == '{"greeting":"Hello, you"}\n'


async def test_the_readmes_mcp_configuration_leads_to_the_tools(local_service: Live) -> None:
    _, shown = fences(README, "json")
    (server,) = json.loads(here(local_service, shown))["mcpServers"].values()
    async with (
        httpx2.AsyncClient(headers=server["headers"], trust_env=False, timeout=60) as http,
        Client(streamable_http_client(server["url"], http_client=http)) as client,
    ):
        tools = {tool.name for tool in (await client.list_tools()).tools}
    documented = section(API, "## Model Context Protocol")
    assert {f"`{name}`" for name in tools} == set(first_cells(documented)[1:])


def test_the_readmes_snippets_are_those_that_its_tests_run_or_marked() -> None:
    """All Python, the two calls of curl, and the command line."""
    shell = [text for language, text in snippets(README) if language != "python"]
    assert all(text.startswith("curl") or "orchestrator run" in text for text in shell)
    assert fences(README, "python") == [text for language, text in snippets(README) if language == "python"]


@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path not in (ROOT / "README.md", CHINESE)], ids=lambda path: path.name
)
def test_the_snippets_of_the_documents_run(document: Path, wheels_service: Live, tmp_path: Path) -> None:
    """In their order, and each from where the one before it left off."""
    for language, text in snippets(document.read_text()):
        assert language in ("bash", "python")
        command = ["bash", "-e", "-c"] if language == "bash" else [sys.executable, "-W", "error", "-c"]
        run(wheels_service, [*command, here(wheels_service, text)], tmp_path)


def test_the_tour_answers_as_it_says(wheels_service: Live, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "getting-started.md").read_text()
    shell = [example for language, example in snippets(text) if language == "bash"]
    printed = [run(wheels_service, ["bash", "-e", "-c", here(wheels_service, example)], tmp_path) for example in shell]
    promised = re.findall(r'`("\w+":[^`]*)`', text)
    assert [promise for promise in promised if not any(promise in answer for answer in printed)] == []
    assert len(promised) == 3


def shape(text: str) -> list[Any]:
    """Return what a translation has in common with its original: levels of headings, blocks of code, rows of tables."""
    code = re.findall(r"^(?:<!-- not run[^\n]*-->\n)?```.*?^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)]
    links = sorted(re.sub(r"#.*", "", place) for place in re.findall(r"\]\(([^)]+)\)", prose) if "README" not in place)
    named = sorted(set(re.findall(r"`(SANDBOX_\w+|(?:GET|POST|PUT|PATCH|DELETE|WebSocket)?[ ,`A-Z]*/\S*)`", prose)))
    return [levels, [re.sub(r"<!-- not run.*-->", "<!-- not run -->", block) for block in code], links, named]


def test_the_chinese_readme_keeps_step() -> None:
    """Where it does not: translate what changed in README.md. The figures stand in that alone."""
    for ours, theirs in zip(shape(README), shape(CHINESE.read_text()), strict=True):
        assert ours == theirs


def test_the_readmes_five_settings_have_their_names_and_defaults() -> None:
    ours = {variable: default for variable, default, *_ in settings.describe()}
    rows = re.findall(r"^\| `(SANDBOX_\w+)` \|.*\| (\S+) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    assert {name: ours[name] for name, _ in rows} == dict(rows)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_examples_can_be_read_by_their_language(document: Path) -> None:
    text = document.read_text()
    for example in fences(text, "bash"):
        subprocess.run(["bash", "-n", "-c", example], check=True)
    for example in fences(text, "python"):
        ast.parse(example)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_that_are_named_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:`|^)make ((?:[a-z]+ ?)+)(?:`|$)", document.read_text(), re.MULTILINE)
    assert {word for words in named for word in words.split()} <= targets


def test_the_templates_that_are_shown_are_taken(tmp_path: Path) -> None:
    (shown,) = fences((ROOT / "docs" / "configuration.md").read_text(), "toml")
    (tmp_path / "templates.toml").write_text(shown)
    taken = settings.load({"SANDBOX_TEMPLATES_FILE": str(tmp_path / "templates.toml")}).read_templates()
    assert list(taken) == ["python", *re.findall(r"^\[(\w+)\]", shown, re.MULTILINE)]


def test_the_documented_keys_of_a_template_are_its_keys() -> None:
    text = section((ROOT / "docs" / "configuration.md").read_text(), "## Templates")
    assert [f"`{name}`" for name in settings.TemplateTable.__struct_fields__] == first_cells(text)[1:]


def test_the_documented_metrics_are_those_that_are_served(local_service: Live) -> None:
    served = re.findall(r"^# TYPE (sandbox_\w+) (\w+)$", local_service.client.get("/metrics").text, re.MULTILINE)
    documented = re.findall(
        r"^\| `(sandbox_\w+)` \| (\w+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE
    )
    after_an_error = {("sandbox_http_requests_error_total", "counter")}
    assert {row for row in served if not row[0].endswith("_created")} | after_an_error == set(documented)


def test_the_documented_routes_are_those_of_the_specification(local_service: Live) -> None:
    specification = local_service.client.get("/openapi.json").json()
    served = {(method.upper(), path) for path, methods in specification["paths"].items() for method in methods}
    assert served == set(re.findall(r"`(GET|HEAD|POST|PUT|PATCH|DELETE) (/[^`]*)`", API))


def test_the_documented_websockets_are_those_that_are_served() -> None:
    listed = subprocess.run([sys.executable, "-c", WEBSOCKETS], cwd=ROOT, check=True, capture_output=True, text=True)
    assert set(listed.stdout.split()) == set(re.findall(r"`WebSocket (/[^`]*)`", API))


@pytest.mark.parametrize(
    ("heading", "struct", "elsewhere"),
    [
        ("### Session request", models.SessionRequest, set()),
        ("### Session", models.Session, set()),
        ("### Execution request", models.OneShotRequest, {"template", "network"}),
        ("### Execution", models.Execution, set()),
    ],
)
def test_the_documented_fields_are_those_of_the_struct(
    heading: str, struct: type[msgspec.Struct], elsewhere: set[str]
) -> None:
    text = section(API, heading)
    cells = " ".join(first_cells(text)) or text.split("(the layers")[0]
    named = set(re.findall(r"`(\w+)`", cells)) - {"warm", "cold"}
    assert set(struct.__struct_fields__) - elsewhere == named


def test_every_problem_is_documented_with_its_status() -> None:
    def tree(kind: type[errors.SandboxError]) -> set[tuple[str, int]]:
        return {(kind.code, kind.status)}.union(*map(tree, kind.__subclasses__()))

    rows = re.findall(r"^\| `(\w+)` \| (\d+) \|", section(API, "## Problems"), re.MULTILINE)
    assert tree(errors.SandboxError) == {(code, int(status)) for code, status in rows}


def test_every_outcome_is_documented() -> None:
    assert [f"`{outcome}`" for outcome in models.OUTCOMES] == first_cells(section(API, "### Outcomes"))[1:]


def anchors(path: Path) -> set[str]:
    """Return the anchors that a document's headings get."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        place, _, anchor = link.partition("#")
        if place.startswith("https://"):
            continue
        target = document.parent / place if place else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_test_that_security_names_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    cases: list[dict[str, Any]] = json.loads((ROOT / "tests" / "attack" / "attacks.json").read_bytes())
    assert set(re.findall(r"`([a-z]+-\d\d)`", text)) <= {case["id"] for case in cases}
    named = re.findall(r"`(\w+/\w+\.py)::(\w+)`", text)
    assert len(named) > 20
    assert [
        f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / "tests" / file).read_text()
    ] == []


def test_every_threat_has_a_defence_and_a_test() -> None:
    rows = section((ROOT / "SECURITY.md").read_text(), "## Threats and defences").splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| ")]
    assert [row for row in cells[1:] if len(row) != 3 or not all(row) or "`" not in row[2]] == []
