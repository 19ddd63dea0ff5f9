"""Write docs/openapi.json, the specification of the HTTP API, and docs/api-reference.md, the same for people."""

import json
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

from orchestrator.api.specification import document
from orchestrator.app import create_app
from orchestrator.settings import Settings

Json = dict[str, Any]
DOCS = Path(__file__).resolve().parents[1] / "docs"
USUAL = {status.description for status in HTTPStatus}
HEAD = """# API reference

Written by `scripts/reference.py` from the [OpenAPI document](openapi.json); [HTTP API](api.md) says what it all means. A name
with `?` may be left out. *Refused* lists the statuses of [problems](api.md#problems).
"""


def main() -> None:
    """Write both into the folder that is named, or the documents' own."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS
    specification = document(create_app(Settings(engine="local")))
    (folder / "openapi.json").write_text(json.dumps(specification, indent=1, ensure_ascii=False) + "\n")
    (folder / "api-reference.md").write_text("\n".join(page(specification)) + "\n")


def page(specification: Json) -> Iterator[str]:
    """Yield the lines of the page."""
    yield HEAD
    tag = None
    for path, methods in specification["paths"].items():
        for method, operation in methods.items():
            if operation["tags"][0] != tag:
                tag = operation["tags"][0]
                yield f"## {tag.capitalize()}\n"
            yield from section(f"{method.upper()} {path}", operation)
    yield "## Schemas\n"
    for name, schema in sorted(specification["components"]["schemas"].items()):
        yield from table(name, schema)


def section(title: str, operation: Json) -> Iterator[str]:
    """Yield an operation: what it does, takes, answers and refuses."""
    yield f"### {title}\n"
    yield f"{operation['description']}\n"
    for parameter in operation.get("parameters", ()):
        about = f": {parameter['description']}" if "description" in parameter else ""
        optional = "" if parameter["required"] else "?"
        yield f"- {parameter['in']} `{parameter['name']}{optional}` ({words(parameter['schema'])}){about}"
    if (body := operation.get("requestBody")) is not None:
        yield f"- body{'' if body['required'] else '?'}: {contents(body)}"
    refused = []
    for status, answer in operation["responses"].items():
        if "$ref" in answer:
            refused.append(status)
        else:
            about = "" if answer["description"] in USUAL else f": {answer['description']}"
            yield f"- **{status}** {contents(answer)}".rstrip() + about
    if refused:
        yield f"- *Refused*: {', '.join(refused)}"
    yield ""


def table(name: str, schema: Json) -> Iterator[str]:
    """Yield a schema: its fields."""
    yield f"### {name}\n"
    if "description" in schema:
        yield f"{schema['description']}\n"
    required = schema.get("required", ())
    rows = [(field if field in required else f"{field}?", facts) for field, facts in schema["properties"].items()]
    if rows:
        yield "| Field | Type | Default | About |\n|---|---|---|---|"
    for field, facts in rows:
        default = f"`{json.dumps(facts['default'])}`" if facts.get("default") is not None else ""
        yield f"| `{field}` | {words(facts)} | {default} | {facts.get('description', '')} |"
    yield ""


def contents(answer: Json) -> str:
    """Return media types and their schemas."""
    return ", ".join(
        f"`{kind}` {words(given.get('schema', {}))}".strip() for kind, given in answer.get("content", {}).items()
    )


def words(schema: Json) -> str:
    """Return a schema in a few words."""
    match schema:
        case {"$ref": str(place)}:
            name = place.rpartition("/")[2]
            return f"[{name}](#{name.lower()})"
        case {"anyOf": list(kinds)} | {"oneOf": list(kinds)}:
            return " or ".join(map(words, kinds))
        case {"enum": list(values)}:
            return " or ".join(f"`{json.dumps(value)}`" for value in values)
        case {"type": "array"}:
            return f"list of {words(schema.get('items', {}))}{bounds(schema)}"
        case {"type": "object", "additionalProperties": dict(kind)}:
            return f"object of {words(kind)}{bounds(schema)}"
        case {"type": str(kind)}:
            return f"{schema.get('format', kind)}{bounds(schema)}"
        case _:
            return "any"


def bounds(schema: Json) -> str:
    """Return what a schema allows of its type."""
    least = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}"}
    sizes = {"minLength": "at least {}", "maxLength": "at most {}", "minItems": "at least {}", "maxItems": "at most {}"}
    known = least | sizes | {"maxProperties": "at most {}"}
    found = [text.format(f"{schema[name]:g}") for name, text in known.items() if name in schema]
    return f" ({', '.join(found)})" if found else ""


if __name__ == "__main__":
    main()
