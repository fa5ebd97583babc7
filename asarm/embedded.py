"""The checkpoints that come with the package, by name."""

from pathlib import Path

from .errors import ModelNotFoundError

ASSETS = Path(__file__).parent / "assets"


def embedded_models() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def resolve_model(name_or_path: str | Path, revision: str = "main") -> str:
    """The folder of an embedded checkpoint or local path, or the Hub id as it was given.

    Only the Hub has revisions: another one than ``main`` of a folder raises :class:`ModelNotFoundError`.
    """
    name = str(name_or_path)
    path = str(ASSETS / name) if name in embedded_models() else name
    if revision != "main" and Path(path).is_dir():
        raise ModelNotFoundError(f"{name!r} is a folder on this machine and has no revision {revision!r}; leave it out")
    return path
