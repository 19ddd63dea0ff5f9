"""What comes with a request and goes with its answer: files for an execution, and the content of what it made."""

from collections.abc import AsyncIterator, Mapping

import msgspec

from orchestrator.errors import FileConflict, FileNotFound
from orchestrator.files import Workspace
from orchestrator.models import Artifact, Encoded

ANSWER_BYTES = 8 << 20  # of all artifacts' content in one answer


async def bring(workspace: Workspace, files: Mapping[str, str | Encoded], *, limit: int) -> None:
    """Write files before an execution begins. The errors of Workspace.write."""
    for path, content in files.items():
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content.base64
        await workspace.write(path, _once(data), limit=limit)


async def take(workspace: Workspace, artifacts: list[Artifact]) -> list[Artifact]:
    """Return the artifacts with their content, as far as it fits one answer: the others keep `base64` null."""
    taken, left = [], ANSWER_BYTES
    for artifact in artifacts:
        content = None
        if artifact.size_bytes <= left:
            try:
                download = await workspace.read(artifact.path, length=artifact.size_bytes)
                content = b"".join([chunk async for chunk in download.chunks()])
                left -= len(content)
            except (FileConflict, FileNotFound):  # it has another name as well, or one that is no text
                content = None
        taken.append(msgspec.structs.replace(artifact, base64=content))
    return taken


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
