"""Functions on the disk: whatever is cut off or changed there, what is read back is whole, or left out."""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from orchestrator.errors import CodeStorageFull, FunctionChanging, FunctionNotFound, InvalidCode, Unavailable
from orchestrator.functions import Function, Functions, hash_of

CODE = b"PK code"


def function(name: str = "f", *, code: bytes = CODE, revision: str = "1") -> Function:
    return Function(
        name=name,
        runtime="python3.11",
        language="python",
        template="python",
        handler="app.handler",
        role="arn:aws:iam::000000000000:role/any",
        description="",
        timeout_s=3,
        memory_mb=128,
        env={"COLOUR": "red"},
        tags={},
        code_sha256=hash_of(code),
        code_bytes=len(code),
        revision=revision,
        modified_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def loaded(root: Path, *, storage_bytes: int = 1000) -> Functions:
    held = Functions(root, storage_bytes=storage_bytes)
    held.load()
    return held


async def test_what_was_put_is_read_back(tmp_path: Path) -> None:
    held = loaded(tmp_path / "functions")
    await held.put(function(), CODE)
    await held.put(function("g", code=b"PK other"), b"PK other")
    await held.put(function(revision="2"))
    await held.put(function("g", code=b"PK new"), b"PK new")
    again = loaded(tmp_path / "functions")
    assert again.held == {"f": function(revision="2"), "g": function("g", code=b"PK new")} == held.held
    assert (await again.code(again.get("f")), await again.code(again.get("g"))) == (CODE, b"PK new")
    assert len(list((tmp_path / "functions" / "g").iterdir())) == 2


async def test_what_was_removed_is_gone(tmp_path: Path) -> None:
    held = loaded(tmp_path)
    await held.put(function(), CODE)
    await held.remove("f")
    with pytest.raises(FunctionNotFound):
        held.get("f")
    assert not (tmp_path / "f").exists()
    assert loaded(tmp_path).held == {}


async def test_only_the_service_may_read_it(tmp_path: Path) -> None:
    held = loaded(tmp_path / "functions")
    await held.put(function(), CODE)
    folders = [tmp_path / "functions", tmp_path / "functions" / "f"]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in folders[1].iterdir()} == {0o600}


@pytest.mark.parametrize("calls", range(6))
async def test_a_change_that_is_cut_off_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The disk fails at its n-th fsync, and nothing afterwards is done: as in a crash."""
    held = loaded(tmp_path)
    await held.put(function(), CODE)
    left = iter(range(calls))

    def fsync(_fd: int) -> None:
        if next(left, None) is None:
            raise OSError(5, "Input/output error")

    new = function(code=b"PK new", revision="2")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        try:
            await held.put(new, b"PK new")
            failed = False
        except Unavailable:
            failed = True
    assert failed == (calls < 5)
    again = loaded(tmp_path)
    found = again.get("f")
    assert found in (function(), new)
    assert await again.code(found) == (CODE if found == function() else b"PK new")
    assert await held.code(held.get("f")) in (CODE, b"PK new")


def spoil_json(folder: Path) -> None:
    (folder / "function.json").write_bytes(b'{"name"')


def spoil_name(folder: Path) -> None:
    (folder / "function.json").write_bytes(msgspec.json.encode(function("g")))


def add_field(folder: Path) -> None:
    (folder / "function.json").write_bytes(b'{"x": 1,' + (folder / "function.json").read_bytes()[1:])


def lose_code(folder: Path) -> None:
    next(folder.glob("*.zip")).unlink()


def cut_code(folder: Path) -> None:
    next(folder.glob("*.zip")).write_bytes(CODE[:-1])


@pytest.mark.parametrize("spoil", [spoil_json, spoil_name, add_field, lose_code, cut_code])
async def test_what_cannot_be_read_is_left_out_and_left_there(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    held = loaded(tmp_path)
    await held.put(function(), CODE)
    await held.put(function("other"), CODE)
    spoil(tmp_path / "f")
    names = sorted(path.name for path in (tmp_path / "f").iterdir())
    assert set(loaded(tmp_path).held) == {"other"}
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == names


def test_half_of_a_function_is_removed(tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "code.zip").write_bytes(CODE)
    assert loaded(tmp_path).held == {}
    assert not (tmp_path / "half").exists()


async def test_code_that_was_changed_on_the_disk_is_not_run(tmp_path: Path) -> None:
    held = loaded(tmp_path)
    await held.put(function(), CODE)
    next((tmp_path / "f").glob("*.zip")).write_bytes(b"PK evil")
    with pytest.raises(InvalidCode):
        await held.code(held.get("f"))


async def test_a_link_in_the_place_of_the_new_file_is_not_followed(tmp_path: Path) -> None:
    held = loaded(tmp_path / "functions")
    (tmp_path / "functions" / "f").mkdir()
    (tmp_path / "functions" / "f" / ".function.json.new").symlink_to(tmp_path / "victim")
    with pytest.raises(Unavailable):
        await held.put(function(), CODE)
    assert not (tmp_path / "victim").exists()


async def test_one_change_at_a_time(tmp_path: Path) -> None:
    held = loaded(tmp_path)
    with held.change("f"):
        with pytest.raises(FunctionChanging), held.change("f"):
            pass
        with held.change("g"):
            pass
    with held.change("f"):
        pass


async def test_all_code_together_has_a_limit(tmp_path: Path) -> None:
    held = loaded(tmp_path, storage_bytes=20)
    with held.change("f", code_bytes=7):
        await held.put(function(), CODE)
    with held.change("f", code_bytes=20):  # its own code is replaced
        pass
    with held.change("g", code_bytes=10):
        with pytest.raises(CodeStorageFull), held.change("h", code_bytes=4):
            pass
        with held.change("h", code_bytes=3):
            pass
