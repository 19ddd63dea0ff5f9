"""Where the agent and the seccomp profile lie: in the wheel, or in the repository."""

from pathlib import Path


def images_dir() -> Path:
    """Return the directory of the agent, the Dockerfiles and the profiles."""
    package = Path(__file__).resolve().parents[1]
    packed = package / "_images"
    return packed if packed.exists() else package.parent / "images"
