"""What a model is told of what a tool did: text, images, and facts for programs."""

import base64
from typing import Any

import msgspec
from mcp_types import CallToolResult, ContentBlock, ImageContent, TextContent

from orchestrator.models import Execution

EVENT_LIMIT = 1 << 20  # bytes of one event that clients take
MARGIN = 64 << 10  # of them for what is around the content
TEXT_LIMIT = 32 << 10  # characters of a stream that a model gets to read; six bytes of JSON may stand for one
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
TEXTS = ("text/markdown", "text/plain")
Image = tuple[str, str]  # MIME type, base64


def told(execution: Execution, *, also: list[str]) -> list[str]:
    """Return what became of an execution, in words for a model; `also` is what it showed as text."""
    lines = []
    if execution.outcome != "ok":
        code = "" if execution.exit_code is None else f", exit code {execution.exit_code}"
        lines.append(f"[outcome: {execution.outcome}{code}]")
    for name, text in (("stdout", execution.stdout), ("stderr", execution.stderr)):
        if text:
            cut = " (cut off)" if name in execution.truncated else ""
            lines.append(shown(text) if name == "stdout" and not cut else f"[{name}{cut}]\n{shown(text)}")
    lines += also
    if execution.value is not None and execution.context_id is None:
        lines.append(f"[value] {shown(bytes(execution.value).decode())}")
    if execution.error is not None and execution.error.message not in execution.stderr:
        lines.append(f"[error] {execution.error.type}: {shown(execution.error.message)}")
    if execution.artifacts:
        lines.append("[files] " + ", ".join(f"{file.path} ({file.size_bytes} bytes)" for file in execution.artifacts))
    return lines


def displayed(execution: Execution) -> tuple[list[str], list[Image]]:
    """Return what a cell showed: texts, and images. What is shown anew under an id stands in its first place."""
    last: dict[object, dict[str, Any]] = {}
    for display in plain(execution.displays):
        last[display.get("display_id") or object()] = display
    texts, images = [], []
    for display in last.values():
        image = next((kind for kind in IMAGES if is_image(display.get(kind))), None)
        if image is not None:
            images.append((image, display[image]))
            continue
        text = next((display[kind] for kind in TEXTS if isinstance(display.get(kind), str)), "")
        texts.append(shown(text))
    return texts, images


def is_image(data: object) -> bool:
    """Tell whether what came from the sandbox is base64, as an image has to be."""
    try:
        return isinstance(data, str) and bool(base64.b64decode(data, validate=True))
    except ValueError:
        return False


def shown(text: str) -> str:
    """Return as much of a text as a model should have to read: beginning and end."""
    text = text.removesuffix("\n")
    left_out = len(text) - TEXT_LIMIT
    if left_out <= 0:
        return text
    half = TEXT_LIMIT // 2
    return f"{text[:half]}\n[{left_out} characters are left out here: print less, or write to a file]\n{text[-half:]}"


def facts_of(execution: Execution) -> Any:
    """Return what programs want to know of an execution. What may be long is text only, shortened for the model."""
    return {
        "session_id": execution.session_id,
        "execution_id": execution.id,
        "outcome": execution.outcome,
        "exit_code": execution.exit_code,
        "error": None if execution.error is None else execution.error.type,
        "usage": plain(execution.usage),
    }


def result(
    lines: list[str], *, images: list[Image] | None = None, facts: Any = None, failed: bool = False
) -> CallToolResult:
    """Return a tool's result: text, and as many of the images as there is room for."""
    room = EVENT_LIMIT - MARGIN - len(msgspec.json.encode(lines))
    content: list[ContentBlock] = []
    for kind, data in images or []:
        if len(data) <= room:
            room -= len(data)
            content.append(ImageContent(type="image", data=data, mime_type=kind))
        else:
            lines = [*lines, f"[an image of {len(base64.b64decode(data))} bytes is left out: make it smaller]"]
    if text := "\n".join(line for line in lines if line):
        content.append(TextContent(type="text", text=text))
    return CallToolResult(content=content, structured_content=facts, is_error=failed)


def plain(value: Any) -> Any:
    """Return structs as what JSON has."""
    return msgspec.json.decode(msgspec.json.encode(value))
