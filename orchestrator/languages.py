"""What an image speaks, by its agent's word, and what a request asks of it."""

from collections.abc import Mapping

from orchestrator.errors import InvalidRequest
from orchestrator.frames import Support
from orchestrator.models import ExecutionRequest, Language

Languages = Mapping[Language, Support]


def check(request: ExecutionRequest, languages: Languages, *, template: str) -> None:
    """Refuse a request in a language that the template's image lacks, and a handler where it has none."""
    if isinstance(request.command, list):
        return
    language = request.language if request.command is None else "shell"
    support = languages.get(language)
    if support is None:
        has = ", ".join(languages) or "no language"
        raise InvalidRequest(f"The image of template {template} lacks {language}, it has {has}: use another template")
    if request.handler is not None and not support.handlers:
        raise InvalidRequest(f"`{language}` has no handlers: give `code` or `command` alone")
