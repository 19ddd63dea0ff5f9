"""The pool of one template: containers that are ready, and those who wait for one."""

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from orchestrator.container import Container
from orchestrator.errors import Unavailable
from orchestrator.languages import Languages
from orchestrator.models import Source, Template
from orchestrator.recipes import Recipe


class Pool:
    """Membership is state: a container is in `ready` until the step that gives it away.

    `starting` holds the names of containers that the reconciler starts. Only the reconciler starts:
    who finds nothing ready waits, in order.
    """

    def __init__(self, recipe: Recipe, wake: Callable[[], None]) -> None:
        self.recipe = recipe
        self.languages: Languages | None = None  # not known until a container has told
        self.ready: deque[Container] = deque()
        self.starting: set[str] = set()
        self.waiting: deque[asyncio.Future[Container]] = deque()
        self._wake = wake

    @property
    def workspace_bytes(self) -> int:
        """How much the workspace of each container holds."""
        return self.recipe.template.workspace_kb << 10

    @property
    def deficit(self) -> int:
        """How many containers are missing; negative when there are too many."""
        return self.recipe.template.pool_size + len(self.waiting) - len(self.ready) - len(self.starting)

    @property
    def template(self) -> Template:
        """The template, with the languages that its image has."""
        languages = None if self.languages is None else list(self.languages)
        return msgspec.structs.replace(self.recipe.template, languages=languages)

    @property
    def is_short(self) -> bool:
        """Whether containers are missing, those that start not counted."""
        return sum(container.is_usable for container in self.ready) < self.recipe.template.pool_size + len(self.waiting)

    async def acquire(self, timeout_s: float) -> tuple[Container, Source]:
        """Take a container for good: the one that is ready longest, or the next that starts.

        Unavailable when none came in time. Who gives up hands back what arrived meanwhile.
        """
        self._wake()
        for container in self.ready:
            if container.is_usable:  # another stays: the reconciler removes it, or attaches to it again
                self.ready.remove(container)
                return container, "warm"
        future: asyncio.Future[Container] = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        try:
            async with asyncio.timeout(timeout_s):
                return await future, "cold"
        except BaseException as error:
            if future.done() and not future.cancelled():
                self.supply(future.result())
            elif future in self.waiting:
                self.waiting.remove(future)
            if isinstance(error, TimeoutError):
                raise Unavailable("No container became ready in time: try again later", retry_after_s=5) from None
            raise

    def offer(self, container: Container) -> None:
        """Give one that was kept ready, and is usable again, to the first who waits."""
        if container in self.ready:
            self.ready.remove(container)
            self.supply(container)

    def supply(self, container: Container) -> None:
        """Give a started container to the first who waits, or keep it ready."""
        while self.waiting and container.is_usable:
            future = self.waiting.popleft()
            if not future.done():
                future.set_result(container)
                return
        self.ready.append(container)
