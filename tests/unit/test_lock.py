"""Who holds an instance: one on this machine's files, and one on the engine, whoever was first."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from orchestrator import lock as module
from orchestrator.engine import Receiver, Seen, Wire
from orchestrator.errors import EngineAway, ImageMissing, InstanceHeld, NameTaken, SettingsError
from orchestrator.lock import HOLDER_LABEL, EngineLock, engine_lock, file_lock
from orchestrator.settings import Settings
from tests.fake_engine import Stage
from tests.unit.test_reconciler import settle, until

NAME = "sandbox-lock-one"


class Held:
    """The wire of a lock's container."""

    def __init__(self, receiver: Receiver, engine: "Engine") -> None:
        self.receiver = receiver
        self.heard = 0
        self._engine = engine

    def write(self, data: bytes) -> None:
        self.heard += len(data)

    async def drain(self) -> None:
        pass

    def close(self) -> None:
        self._engine.end(self)


class Engine(Stage):
    """A stage with names; `error` is what it answers instead."""

    reattaches = True

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, Seen] = {}
        self.wires: list[Held] = []
        self.error: Exception | None = None

    async def find(self, name: str) -> Seen | None:
        return self.names.get(name)

    async def hold(self, name: str, image: str, command: list[str], labels: dict[str, str], receiver: Receiver) -> Wire:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if name in self.names:
            raise NameTaken("in use")
        self.names[name] = Seen(name=name, running=True, labels=labels)
        self.wires.append(Held(receiver, self))
        return self.wires[-1]

    async def remove(self, name: str) -> None:
        self.names.pop(name, None)

    def end(self, wire: Held) -> None:
        """End the container whose wire this is: the newest has the name."""
        if wire is self.wires[-1]:
            self.names.pop(NAME, None)
        wire.receiver.lost("closed")


def engine_lock_of(engine: Engine, taken: list[InstanceHeld] | None = None) -> EngineLock:
    return EngineLock(engine, "one", "image", on_taken=([] if taken is None else taken).append)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TAKEN_S", 0.1), ("LOOK_S", 0.01), ("AGAIN_S", 0.01), ("BEAT_S", 0.02)):
        monkeypatch.setattr(module, name, value)


async def test_the_second_is_refused_and_told_who_is_the_first() -> None:
    engine = Engine()
    await engine_lock_of(engine).acquire()
    (first,) = engine.names.values()
    with pytest.raises(InstanceHeld, match="SANDBOX_INSTANCE=one") as refusal:
        await engine_lock_of(engine).acquire()
    assert first.labels[HOLDER_LABEL] in refusal.value.detail
    assert list(engine.names.values()) == [first]


async def test_of_two_that_start_at_once_one_is_refused() -> None:
    engine = Engine()
    results = await asyncio.gather(*(engine_lock_of(engine).acquire() for _ in range(2)), return_exceptions=True)
    assert sorted(type(result).__name__ for result in results) == ["InstanceHeld", "NoneType"]


async def test_who_lets_go_in_time_is_waited_for() -> None:
    engine = Engine()
    first = engine_lock_of(engine)
    await first.acquire()
    second = asyncio.create_task(engine_lock_of(engine).acquire())
    await settle()
    first.release()
    await second
    assert len(engine.wires) == 2


async def test_what_a_dead_one_left_half_started_is_removed() -> None:
    engine = Engine()
    engine.names[NAME] = Seen(name=NAME, running=False, labels={HOLDER_LABEL: "dead"})
    await engine_lock_of(engine).acquire()
    assert engine.names[NAME].running


async def test_a_lock_that_was_lost_is_taken_again_and_beats_all_the_time() -> None:
    engine = Engine()
    lock = engine_lock_of(engine)
    await lock.acquire()
    keeping = asyncio.create_task(lock.keep())
    await until(lambda: engine.wires[0].heard > 2)
    engine.error = EngineAway("connection refused")
    engine.end(engine.wires[0])
    await until(lambda: not engine.names)
    engine.error = None
    await until(lambda: len(engine.wires) == 2 and engine.wires[1].heard > 2)
    keeping.cancel()


async def test_its_own_container_that_outlived_its_wire_is_no_other_holder() -> None:
    engine = Engine()
    taken: list[InstanceHeld] = []
    lock = engine_lock_of(engine, taken)
    await lock.acquire()
    keeping = asyncio.create_task(lock.keep())
    engine.wires[0].receiver.lost("the engine was restarted")  # with live-restore the container is still there
    await until(lambda: len(engine.wires) == 2)
    assert taken == []
    keeping.cancel()


async def test_who_lost_the_lock_to_another_is_told() -> None:
    engine = Engine()
    taken: list[InstanceHeld] = []
    lock = engine_lock_of(engine, taken)
    await lock.acquire()
    engine.end(engine.wires[0])
    await engine_lock_of(engine).acquire()
    keeping = asyncio.create_task(lock.keep())
    await until(lambda: taken)
    keeping.cancel()


async def test_without_the_image_nobody_is_refused_and_the_lock_is_taken_when_it_is_there() -> None:
    engine = Engine()
    engine.error = ImageMissing("no such image")
    async with engine_lock(engine, Settings(instance="one"), alone=False):
        assert engine.names == {}
        engine.error = None
        await until(lambda: engine.names)
    assert engine.names == {}, "the end lets go"


@pytest.mark.parametrize("case", ["alone", "local"])
async def test_where_nobody_else_can_be_nothing_is_held(case: str) -> None:
    engine: Any = Engine() if case == "alone" else Stage()
    async with engine_lock(engine, Settings(instance="one"), alone=case == "alone"):
        assert getattr(engine, "names", {}) == {}


def test_the_lock_on_files_is_had_once(tmp_path: Path) -> None:
    settings = Settings(instance="one", state_dir=str(tmp_path))
    with file_lock(settings), pytest.raises(InstanceHeld, match="SANDBOX_INSTANCE=one"), file_lock(settings):
        pass
    with file_lock(settings):
        pass


def test_a_directory_that_cannot_be_used_is_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="SANDBOX_STATE_DIR"), file_lock(Settings(state_dir=str(tmp_path / "file"))):
        pass
