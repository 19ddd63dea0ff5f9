"""What a new orchestrator takes over from an earlier one: containers with a session. What else is left is removed."""

import asyncio

import msgspec
import structlog

from orchestrator.engine import Engine, Seen
from orchestrator.errors import EngineError, SandboxError
from orchestrator.recipes import TEMPLATE_LABEL, UID_LABEL, Recipe, spec_of
from orchestrator.reconciler import Reconciler
from orchestrator.sessions import Sessions
from orchestrator.settings import Settings

log = structlog.get_logger()


async def adopt(
    settings: Settings, engine: Engine, recipes: dict[str, Recipe], reconciler: Reconciler, sessions: Sessions
) -> None:
    """Take over the sessions of an earlier orchestrator. Before the reconciler runs; EngineError without an engine."""

    async def one(seen: Seen) -> None:
        reason = await _adopt(seen)
        if reason is not None:
            log.info("container_not_adopted", container=seen.name, reason=reason)
            try:
                await engine.remove(seen.name)
            except EngineError as error:  # the reconciler finds it again, as an orphan
                log.warning("container_left", container=seen.name, error=error.detail)

    async def _adopt(seen: Seen) -> str | None:
        """Adopt a container, or return why not."""
        template, uid = seen.labels.get(TEMPLATE_LABEL, ""), seen.labels.get(UID_LABEL, "")
        if not (seen.running and template in recipes and uid.isdigit()):
            return "it does not run"
        spec = msgspec.structs.replace(spec_of(settings, recipes[template], uid=int(uid)), name=seen.name)
        container = reconciler.enlist(spec, template)
        reason = "it has no session"
        try:
            async with asyncio.timeout(settings.engine_timeout_seconds):
                hello = await container.adopt(engine)
            if sessions.adopt(container, hello):
                reconciler.note_ready(container)
                return None
        except TimeoutError:
            reason = "its agent did not answer"
        except SandboxError as error:
            reason = error.detail
        container.close(reason)
        del reconciler.known[seen.name]
        return reason

    await asyncio.gather(*map(one, await engine.list()))
