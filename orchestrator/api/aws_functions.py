"""AWS Lambda's own wire: functions are created, read, changed and deleted."""

from bisect import bisect_right
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import uuid4

from litestar import Response, delete, get, post, put
from litestar.params import Parameter
from msgspec.structs import replace

from orchestrator import errors
from orchestrator.api import aws_words as words
from orchestrator.api.aws_answers import JSON, Asked, Name, Qualifier, answer, nothing, read
from orchestrator.api.guard import TAKES
from orchestrator.functions import Function, hash_of
from orchestrator.models import Language
from orchestrator.service import Orchestrator

UPLOAD_LIMIT = 4 * words.ZIP_LIMIT // 3 + (64 << 10)  # bytes of a body with a zip in base64
LANGUAGES: dict[str, Language] = {"python3.": "python", "nodejs": "javascript"}  # by how the runtime's name begins


@post(
    "/2015-03-31/functions",
    request_max_body_size=UPLOAD_LIMIT,
    opt={TAKES: (words.CreateFunction, JSON)},
    summary="Create a function",
)
async def create_function(service: Orchestrator, request: Asked) -> Response[Any]:
    """Unpack the code in a container, then keep the function."""
    asked = await read(request, words.CreateFunction)
    name = words.name_of(asked.function_name)
    words.check_architectures(asked.architectures)
    function = shaped(
        service,
        Function(
            name=name,
            runtime=asked.runtime,
            language="python",
            template="",
            handler=asked.handler,
            role=asked.role,
            description=asked.description,
            timeout_s=asked.timeout,
            memory_mb=asked.memory_size,
            env=asked.environment.variables,
            tags=asked.tags,
            **code_facts(asked.code.zip_file),
            **stamp(),
        ),
    )
    with service.functions.change(name, code_bytes=function.code_bytes):
        if name in service.functions.held:
            raise errors.FunctionExists(f"Function already exist: {name}")
        await service.invocations.deploy(function, asked.code.zip_file)
    return answer(request, words.configuration(function, request.state.region), 201)


@get("/2015-03-31/functions", summary="List functions")
async def list_functions(
    service: Orchestrator,
    request: Asked,
    marker: Annotated[str, Parameter(query="Marker", max_length=64)] = "",
    max_items: Annotated[int, Parameter(query="MaxItems", ge=1, le=10000)] = words.PAGE,
) -> Response[Any]:
    """List functions in the order of their names, at most 50 at once."""
    names = sorted(service.functions.held)
    start = bisect_right(names, marker)
    page = names[start : start + min(max_items, words.PAGE)]
    shown = [words.configuration(service.functions.held[name], request.state.region) for name in page]
    more = {"NextMarker": page[-1]} if start + len(page) < len(names) else {}
    return answer(request, {"Functions": shown} | more)


@get("/2015-03-31/functions/{name:str}", summary="Read a function")
async def get_function(service: Orchestrator, request: Asked, name: Name, qualifier: Qualifier = None) -> Response[Any]:
    """Return its configuration, tags and reserved concurrency; the code itself is not given out."""
    function = service.functions.get(words.name_of(name, qualifier=qualifier))
    reserved = {} if function.reserved is None else {"Concurrency": {"ReservedConcurrentExecutions": function.reserved}}
    shown = {"Configuration": words.configuration(function, request.state.region), "Tags": function.tags}
    return answer(request, shown | reserved | {"Code": {"RepositoryType": "Sandbox"}})


@get("/2015-03-31/functions/{name:str}/configuration", summary="Read a function's configuration")
async def get_configuration(
    service: Orchestrator, request: Asked, name: Name, qualifier: Qualifier = None
) -> Response[Any]:
    """Return its configuration."""
    function = service.functions.get(words.name_of(name, qualifier=qualifier))
    return answer(request, words.configuration(function, request.state.region))


@put(
    "/2015-03-31/functions/{name:str}/code",
    request_max_body_size=UPLOAD_LIMIT,
    opt={TAKES: (words.UpdateCode, JSON)},
    summary="Update a function's code",
)
async def update_code(service: Orchestrator, request: Asked, name: Name) -> Response[Any]:
    """Replace the code. With `DryRun` it is only unpacked."""
    asked = await read(request, words.UpdateCode)
    words.check_architectures(asked.architectures)
    facts = code_facts(asked.zip_file)
    with service.functions.change(name := words.name_of(name), code_bytes=facts["code_bytes"]):
        function = replace(current(service, name, asked.revision_id), **facts, **stamp())
        await service.invocations.deploy(function, asked.zip_file, keep=not asked.dry_run)
    return answer(request, words.configuration(function, request.state.region))


@put(
    "/2015-03-31/functions/{name:str}/configuration",
    opt={TAKES: (words.UpdateConfiguration, JSON)},
    summary="Update a function's configuration",
)
async def update_configuration(service: Orchestrator, request: Asked, name: Name) -> Response[Any]:
    """Replace what is given."""
    asked = await read(request, words.UpdateConfiguration)
    given = {
        "runtime": asked.runtime,
        "role": asked.role,
        "handler": asked.handler,
        "description": asked.description,
        "timeout_s": asked.timeout,
        "memory_mb": asked.memory_size,
        "env": None if asked.environment is None else asked.environment.variables,
    }
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    with service.functions.change(name := words.name_of(name)):
        function = shaped(service, replace(current(service, name, asked.revision_id), **changes, **stamp()))
        await service.functions.put(function)
    service.invocations.refresh(name)
    return answer(request, words.configuration(function, request.state.region))


@delete("/2015-03-31/functions/{name:str}", status_code=204, summary="Delete a function")
async def delete_function(
    service: Orchestrator, request: Asked, name: Name, qualifier: Qualifier = None
) -> Response[None]:
    """Forget the function and its code; what runs goes on to its end."""
    with service.functions.change(name := words.name_of(name, qualifier=qualifier)):
        service.functions.get(name)
        await service.functions.remove(name)
    service.invocations.refresh(name)
    return nothing(request)


def current(service: Orchestrator, name: str, revision: str | None) -> Function:
    """Return the function, if it is at the revision that the client thinks of."""
    function = service.functions.get(name)
    if revision not in (None, function.revision):
        raise errors.FunctionChanged(
            "The Revision Id provided does not match the latest Revision Id. Call the GetFunction API to retrieve it"
        )
    return function


def shaped(service: Orchestrator, function: Function) -> Function:
    """Return the function with the language of its runtime and the least template that it fits into."""
    words.check_environment(function.env)
    if "." not in function.handler.strip("."):
        raise errors.InvalidRequest("`Handler` has the form module.function")
    if function.timeout_s > service.settings.max_timeout_seconds:
        raise errors.TimeoutAboveCap(f"`Timeout` is at most {service.settings.max_timeout_seconds:g} here")
    language = next((language for start, language in LANGUAGES.items() if function.runtime.startswith(start)), None)
    templates = [pool.template for pool in service.pools.values()]
    # Of a template that no container was started of, it turns out when the code is unpacked.
    speaking = [template for template in templates if template.languages is None or language in template.languages]
    if language is None or not speaking:
        raise errors.InvalidRequest(
            f"There is no `Runtime` {function.runtime!r} here: see the languages of /v1/templates"
        )
    fitting = [template for template in speaking if template.memory_kb >= function.memory_mb << 10]
    if not fitting:
        most = max(template.memory_kb for template in speaking) >> 10
        raise errors.InvalidRequest(f"`MemorySize` is at most {most} here, as no template has more memory")
    template = min(fitting, key=lambda template: (template.languages is None, template.memory_kb))
    return replace(function, language=language, template=template.name)


def code_facts(code: bytes) -> dict[str, Any]:
    """Return what is kept of a zip beside it. BodyTooLarge or InvalidCode for what cannot be one."""
    if len(code) > words.ZIP_LIMIT:
        raise errors.BodyTooLarge(f"A zip file is at most {words.ZIP_LIMIT} bytes")
    if not code.startswith(b"PK"):
        raise errors.InvalidCode("Could not unzip uploaded file: it is no zip file")
    return {"code_sha256": hash_of(code), "code_bytes": len(code)}


def stamp() -> dict[str, Any]:
    """Return what every change gives a function."""
    return {"revision": str(uuid4()), "modified_at": datetime.now(UTC)}


handlers = [
    create_function,
    list_functions,
    get_function,
    get_configuration,
    update_code,
    update_configuration,
    delete_function,
]
