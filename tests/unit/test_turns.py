"""The turns of a session's executions: who runs, who waits, who gives up."""

import asyncio

import pytest

from orchestrator.turns import Turns


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_turns_are_given_in_the_order_of_those_who_wait() -> None:
    turns = Turns(1)
    assert await turns.wait("a")
    waiting = [asyncio.create_task(turns.wait(eid)) for eid in "bc"]
    await settle()
    turns.give_back()
    await settle()
    assert [task.done() for task in waiting] == [True, False]
    turns.give_back()
    assert await waiting[1]
    turns.give_back()
    assert turns.take()
    assert not turns.take()


async def test_who_was_called_off_is_told_and_takes_no_turn() -> None:
    turns = Turns(1)
    assert turns.take()
    waiting = asyncio.create_task(turns.wait("b"))
    await settle()
    turns.call_off("b")
    turns.call_off("b")
    turns.call_off("nobody")
    assert await waiting is False
    turns.give_back()
    assert turns.take()


@pytest.mark.parametrize("given", ["before", "in between", "never"])
async def test_who_gives_up_loses_no_turn(given: str) -> None:
    """The cancel races the turn: it is handed on, whichever came first."""
    turns = Turns(1)
    assert turns.take()
    waiting = asyncio.create_task(turns.wait("b"))
    await settle()
    if given == "before":
        turns.give_back()
    waiting.cancel()
    if given == "in between":
        turns.give_back()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    if given == "never":
        turns.give_back()
    assert turns.take()
    assert not turns.take()
