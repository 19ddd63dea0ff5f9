"""The OpenAPI document: what Litestar knows of the routes, with the words exactly as they are read and written, and every
refusal.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import msgspec
from litestar import Litestar, Response
from litestar.handlers import HTTPRouteHandler
from litestar.params import BodyKwarg
from litestar.response import Stream
from litestar.routes import HTTPRoute
from litestar.typing import FieldDefinition

from orchestrator.api.aws_words import AwsProblem
from orchestrator.api.guard import OPEN, SIGNED, TAKES
from orchestrator.api.problems import PROBLEM_JSON
from orchestrator.api.seed_problems import SeedProblem
from orchestrator.errors import Problem, by_code

Json = dict[str, Any]
JSON = "application/json"
METHODS = ("get", "head", "post", "put", "patch", "delete")
REF = "#/components/schemas/{name}"
SECURITY: Json = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "one of SANDBOX_API_KEYS"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "one of SANDBOX_API_KEYS"},
    "signature": {
        "type": "apiKey",
        "in": "header",
        "name": "Authorization",
        "description": "AWS Signature Version 4: the access key id is the name of an API key, the secret its key",
    },
}
FILES = (403, 409, 502)
# What a handler of the native door refuses, beside what follows from its parameters and its body.
REFUSALS: dict[str, tuple[int, ...]] = {
    "create_session": (404, 409, 410, 422, 429, 502, 503),
    "execute": (403, 409, 413, 422, 429, 502, 503),
    "read_events": (429,),
    "send_stdin": (409, 413, 429, 502),
    "execute_once": (403, 409, 413, 429, 502, 503),
    "list_files": FILES,
    "read_file": (*FILES, 416),
    "read_facts": FILES,
    "write_file": (*FILES, 413),
    "make_directory": (*FILES, 413),
    "rename_file": FILES,
    "delete_file": FILES,
    "read_archive": FILES,
    "write_archive": (*FILES, 413, 422),
    "create_context": (409, 429, 502, 503),
    "restart_context": (409, 502, 503),
    "install_packages": (409, 413, 422, 429, 502, 503),
}


def document(app: Litestar) -> Json:
    """Return the document, as JSON knows it."""
    found: Json = msgspec.to_builtins(app.openapi_schema.to_schema())
    bodies = {key: takes for key, handler in operations(app) if (takes := body_of(handler)) is not None}
    answers = {key: answer for key, handler in operations(app) if (answer := answer_of(handler)) is not None}
    kinds = [*bodies.values(), *answers.values(), Problem, SeedProblem, AwsProblem]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF)
    exact = dict(
        zip([*(("body", *key) for key in bodies), *(("answer", *key) for key in answers)], schemas, strict=False)
    )
    forms = {"Upload": found["components"]["schemas"]["Upload"]}
    found["components"]["schemas"] = dict(sorted((forms | components).items()))
    found["components"] |= {"securitySchemes": SECURITY, "responses": dict(problems())}
    found["security"] = [{"bearer": []}, {"key": []}]
    for (path, method), handler in operations(app):
        operation = found["paths"][path][method]
        describe_parameters(operation)
        if (schema := exact.get(("body", path, method))) is not None:
            describe_body(operation, handler, schema)
        describe_answers(operation, handler, exact.get(("answer", path, method)))
        operation["responses"] |= refusals(operation, path, handler)
        if handler.opt.get(OPEN):
            operation["security"] = []
        elif handler.opt.get(SIGNED):
            operation["security"] = [{"signature": []}]
    found["paths"] = ordered(found["paths"])
    document: Json = without_python(found)
    return document


def operations(app: Litestar) -> Iterator[tuple[tuple[str, str], HTTPRouteHandler]]:
    """Yield every operation of the document: path and method, and its handler."""
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            for handler in route.route_handlers:
                if handler.resolve_include_in_schema():
                    yield from (((route.path_format, str(method).lower()), handler) for method in handler.http_methods)


def body_of(handler: HTTPRouteHandler) -> Any:
    """Return the type of the body that a handler takes, None for none."""
    field = handler.parsed_data_field
    if field is None or is_form(field):
        return handler.opt.get(TAKES, (None,))[0]
    return field.annotation


def is_form(field: FieldDefinition) -> bool:
    return isinstance(field.kwarg_definition, BodyKwarg) and field.kwarg_definition.media_type != JSON


def answer_of(handler: HTTPRouteHandler) -> Any:
    """Return the type of a handler's JSON, None where it sends none."""
    field = handler.parsed_return_field
    if field.is_subclass_of(Stream):
        return None
    if field.is_subclass_of(Response):
        field = field.inner_types[0]
    is_json = handler.media_type in (None, "", JSON) and field.annotation not in (None, type(None))
    return field.annotation if is_json else None


def describe_parameters(operation: Json) -> None:
    """Take back what a parameter cannot be: null, and a path that is a URI."""
    for parameter in operation.get("parameters", ()):
        schema = parameter["schema"]
        if "oneOf" in schema:
            (kind,) = [kind for kind in schema.pop("oneOf") if kind != {"type": "null"}]
            parameter["schema"] = schema | kind
        if schema.get("format") == "uri":
            parameter["schema"] = {"type": "string", "minLength": 1}
            parameter["description"] = "path in the workspace, percent-encoded"


def describe_body(operation: Json, handler: HTTPRouteHandler, schema: Json) -> None:
    """Say what the body is. One that may be null may be left out as well, and so may bytes: none are the empty file."""
    media_type = handler.opt.get(TAKES, (None, JSON))[1]
    is_optional = media_type != JSON or {"type": "null"} in schema.get("anyOf", ())
    content = {"schema": schema} if media_type == JSON else {}
    operation["requestBody"] = {"content": {media_type: content}, "required": not is_optional}


def describe_answers(operation: Json, handler: HTTPRouteHandler, schema: Json | None) -> None:
    """Say what the answers are that Litestar knows."""
    operation["responses"].pop("400", None)  # Litestar's own, which is not ours
    for status, answer in operation["responses"].items():
        if handler.http_methods == {"HEAD"} or status == "204":
            answer.pop("content", None)
        elif schema is not None and status == str(handler.status_code):
            answer["content"][JSON] = {"schema": schema}
        elif handler.parsed_return_field.is_subclass_of(Stream):
            answer["content"] = {str(handler.media_type): {}}


def refusals(operation: Json, path: str, handler: HTTPRouteHandler) -> Json:
    """Return the answers of an operation that are errors, in the words of its door."""
    if path.startswith("/workspace/se/"):
        return {"default": {"description": "An error", "content": content_of("SeedProblem", JSON)}}
    if handler.opt.get(SIGNED):
        return {"default": {"description": "An error", "content": content_of("AwsProblem", JSON)}}
    if handler.opt.get(OPEN):
        return {}
    refused = {401, *REFUSALS.get(handler.handler_name, ())}
    if operation.get("parameters") or "requestBody" in operation:
        refused.add(400)
    if "requestBody" in operation:
        refused |= {413, 415}
    if "{sid}" in path:
        refused |= {404, 410}
    return {str(status): {"$ref": f"#/components/responses/Problem{status}"} for status in sorted(refused)}


def problems() -> Iterator[tuple[str, Json]]:
    """Yield an answer for every status of the tree of errors, with the codes that it may have."""
    codes: dict[int, list[str]] = {}
    for code, kind in by_code().items():
        codes.setdefault(kind.status, []).append(f"`{code}`")
    for status, known in sorted(codes.items()):
        described = {"description": ", ".join(known), "content": content_of("Problem", PROBLEM_JSON)}
        yield f"Problem{status}", described


def content_of(name: str, media_type: str) -> Json:
    return {media_type: {"schema": {"$ref": REF.format(name=name)}}}


def ordered(paths: Json) -> Json:
    """Return the paths of each door together, in an order that is always the same."""
    tags = [tag_of(methods) for methods in paths.values()]
    return {
        path: {method: paths[path][method] for method in METHODS if method in paths[path]}
        for path in sorted(paths, key=lambda path: (tags.index(tag_of(paths[path])), path))
    }


def tag_of(methods: Json) -> str:
    """Return the door of a path."""
    tag: str = next(iter(methods.values()))["tags"][0]
    return tag


def without_python(found: Any) -> Any:
    """Return the document with patterns that others than Python can read, and with texts that are not indented."""
    match found:
        case dict():
            kept = {name: without_python(value) for name, value in found.items()}
            if isinstance(pattern := kept.get("pattern"), str):
                kept["pattern"] = pattern.replace(r"\Z", "$")
            if isinstance(text := kept.get("description"), str):
                kept["description"] = inspect.cleandoc(text)
            return kept
        case list():
            return [without_python(item) for item in found]
        case _:
            return found
