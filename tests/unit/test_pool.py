"""The pool: who waits is served in order, and no container is lost between those who give up."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import models
from orchestrator.container import Container
from orchestrator.engine import Spec
from orchestrator.errors import Unavailable
from orchestrator.models import Source
from orchestrator.pool import Pool
from orchestrator.recipes import Recipe

LONG_S = 60.0
Acquired = tuple[Container, Source]


def container(name: str) -> Container:
    """Return a container that nobody started: the pool only holds it."""
    spec = Spec(name=name, image="i", uid=1, cpus=1, memory_bytes=1, workspace_bytes=1, scratch_bytes=1, labels={})
    return Container(spec, "python", output_limit=1, on_lost=lambda _: None)


class Bench:
    """A pool of size 2, and how often it asked for containers."""

    def __init__(self) -> None:
        self.woken = 0
        template = models.Template(
            name="python",
            image="i",
            pool_size=2,
            cpu_quota=1,
            memory_kb=1,
            workspace_kb=1,
            network="none",
            languages=["python"],
        )
        self.pool = Pool(Recipe(template=template, preboot={"python": 1}, runtime=None), self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def acquire(self, timeout_s: float = LONG_S) -> asyncio.Task[Acquired]:
        return asyncio.create_task(self.pool.acquire(timeout_s))

    async def waiting(self, count: int) -> list[asyncio.Task[Acquired]]:
        """Return so many acquires that wait, in their order."""
        tasks = [self.acquire() for _ in range(count)]
        await settle()
        assert len(self.pool.waiting) == count
        return tasks


async def settle() -> None:
    """Let everything that is due happen."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_ready_container_is_taken_at_once_and_another_asked_for() -> None:
    bench = Bench()
    first, second = container("1"), container("2")
    bench.pool.supply(first)
    bench.pool.supply(second)
    assert await bench.pool.acquire(LONG_S) == (first, "warm")
    assert list(bench.pool.ready) == [second]
    assert bench.woken == 1
    assert bench.pool.deficit == 1


async def test_those_who_wait_are_served_in_their_order() -> None:
    bench = Bench()
    tasks = await bench.waiting(3)
    made = [container(str(number)) for number in range(3)]
    for one in made:
        bench.pool.supply(one)
    assert await asyncio.gather(*tasks) == [(one, "cold") for one in made]
    assert not bench.pool.ready


async def test_who_waits_counts_as_missing_until_served() -> None:
    bench = Bench()
    tasks = await bench.waiting(2)
    bench.pool.starting.add("c")
    assert bench.pool.deficit == 3
    bench.pool.supply(container("1"))
    assert bench.pool.deficit == 2
    for task in tasks:
        task.cancel()
    await settle()
    assert len(bench.pool.ready) == 1
    assert bench.pool.deficit == 0


async def test_a_wait_ends_at_its_timeout_and_leaves_nothing_behind() -> None:
    bench = Bench()
    with pytest.raises(Unavailable, match="in time") as caught:
        await bench.pool.acquire(0.01)
    assert caught.value.retry_after_s == 5
    assert not bench.pool.waiting


async def test_who_is_cancelled_while_waiting_leaves_the_queue() -> None:
    bench = Bench()
    first, second = await bench.waiting(2)
    first.cancel()
    await settle()
    one = container("1")
    bench.pool.supply(one)
    assert await second == (one, "cold")
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_who_is_cancelled_in_the_step_of_being_served_hands_on_to_the_next() -> None:
    bench = Bench()
    first, second = await bench.waiting(2)
    one = container("1")
    bench.pool.supply(one)
    first.cancel()  # before `first` could run on: it owns the container and will never say so
    assert await second == (one, "cold")
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_who_is_cancelled_in_the_step_of_being_served_puts_it_back_when_nobody_waits() -> None:
    bench = Bench()
    [task] = await bench.waiting(1)
    one = container("1")
    bench.pool.supply(one)
    task.cancel()
    await settle()
    assert list(bench.pool.ready) == [one]
    assert task.cancelled()


async def test_who_is_served_in_the_step_of_the_timeout_hands_back() -> None:
    bench = Bench()
    task = bench.acquire(timeout_s=0)
    await asyncio.sleep(0)  # it waits now, and its timeout is the next thing that happens
    one = container("1")
    bench.pool.supply(one)
    with pytest.raises(Unavailable):
        await task
    assert list(bench.pool.ready) == [one]


async def test_a_ready_container_that_was_lost_is_not_given_away_and_stays_for_the_reconciler() -> None:
    """Taken out here, nobody would hold it any more, and so nobody would remove it."""
    bench = Bench()
    gone, good = container("gone"), container("good")
    bench.pool.supply(gone)
    bench.pool.supply(good)
    gone.lose("killed")
    assert await bench.pool.acquire(LONG_S) == (good, "warm")
    assert list(bench.pool.ready) == [gone]


async def test_a_container_that_was_lost_is_not_handed_on() -> None:
    bench = Bench()
    first, second = await bench.waiting(2)
    gone = container("gone")
    bench.pool.supply(gone)
    gone.lose("killed")
    first.cancel()
    await settle()
    assert not second.done()
    assert list(bench.pool.ready) == [gone]
    second.cancel()
    await settle()


STEPS = st.lists(
    st.tuples(st.sampled_from(["acquire", "supply", "cancel", "lose", "run"]), st.integers(0, 5)), max_size=40
)


@given(steps=STEPS)
async def test_whatever_happens_every_container_is_in_one_place_and_nobody_waits_beside_a_good_one(
    steps: list[tuple[str, int]],
) -> None:
    bench = Bench()
    made: list[Container] = []
    tasks: list[asyncio.Task[Acquired]] = []
    for step, number in steps:
        if step == "acquire":
            tasks.append(bench.acquire())
        elif step == "supply":
            made.append(container(str(len(made))))
            bench.pool.supply(made[-1])
        elif step == "cancel" and tasks:
            tasks[number % len(tasks)].cancel()
        elif step == "lose" and bench.pool.ready:
            bench.pool.ready[number % len(bench.pool.ready)].lose("killed")
        elif step == "run":
            await asyncio.sleep(0)
    await settle()
    served = [task.result()[0] for task in tasks if task.done() and not task.cancelled()]
    good = [one for one in bench.pool.ready if one.lost_reason is None]
    assert sorted(one.name for one in (*served, *bench.pool.ready)) == sorted(one.name for one in made)
    assert not (good and bench.pool.waiting)
    assert len(bench.pool.waiting) == sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
