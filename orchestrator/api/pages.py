"""The pages for people: the console, and the API to browse. They are served whole by us, and hold no secret: no key is
needed to see them, but for all that they ask for.
"""

from importlib.resources import files
from typing import Annotated, Any

import msgspec
from litestar import Request, Response, get
from litestar.params import Parameter

from orchestrator.api import specification
from orchestrator.api.guard import OPEN
from orchestrator.errors import NotFound

TYPES = {"pages.css": "text/css", "console.js": "text/javascript", "docs.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@get("/", opt={OPEN: True}, include_in_schema=False)
async def page() -> Response[bytes]:
    """Send the page."""
    return sent("index.html", "text/html")


@get("/pages/{name:str}", opt={OPEN: True}, include_in_schema=False)
async def part(name: Annotated[str, Parameter(max_length=32)]) -> Response[bytes]:
    """Send what belongs to the page."""
    if name not in TYPES:
        raise NotFound("There is nothing at this path: the console is at /")
    return sent(name, TYPES[name])


@get("/docs", opt={OPEN: True}, include_in_schema=False)
async def documentation() -> Response[bytes]:
    """Send the page that shows the specification; it needs a key for that."""
    return sent("docs.html", "text/html")


@get("/openapi.json", include_in_schema=False)
async def openapi(request: Request[Any, Any, Any]) -> Response[bytes]:
    """Send the OpenAPI document, which is made when the first one asks for it."""
    state = request.app.state
    if "document" not in state:
        state.document = msgspec.json.encode(specification.document(request.app))
    return Response(state.document, media_type="application/json")


def sent(name: str, media_type: str) -> Response[bytes]:
    """Return the answer that sends one of the pages' files."""
    headers = {"Content-Security-Policy": POLICY}
    content = (files("orchestrator") / "pages" / name).read_bytes()
    return Response(content, media_type=media_type, headers=headers)


handlers = [page, part, documentation, openapi]
