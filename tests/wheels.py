"""Wheels made here, so that tests need no index: a package that prints, one that needs it, and one that is broken."""

import zipfile
from pathlib import Path


def make_wheels(folder: Path) -> None:
    """Fill the folder, readable by everybody: hello-wheel 1.0 and 2.1, and needy, which needs hello-wheel below 2."""
    folder.mkdir(parents=True, exist_ok=True)
    for version in ("1.0", "2.1"):
        code = f"def greet(): return 'hello {version}'\ndef main(): print(greet())\n"
        scripts = "[console_scripts]\nhello-wheel = hello_wheel:main\n"
        write_wheel(folder, "hello_wheel", version, code, more={"entry_points.txt": scripts})
    write_wheel(folder, "needy", "1.0", "from hello_wheel import greet\n", needs="hello-wheel<2")
    (folder / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    for path in folder.iterdir():
        path.chmod(0o644)
    folder.chmod(0o755)


def write_wheel(
    folder: Path, name: str, version: str, code: str, *, needs: str | None = None, more: dict[str, str] | None = None
) -> None:
    """Write one wheel with one module."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": metadata + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    } | {f"{info}/{file}": text for file, text in (more or {}).items()}
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            wheel.writestr(path, text)
