"""The checkpoints that come with the package, by name."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def embedded_models() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob("*/config.json"))


def resolve_model(name_or_path: str | Path) -> str:
    """The folder of an embedded checkpoint or local path, or the Hub id as it was given."""
    name = str(name_or_path)
    if name in embedded_models():
        return str(ASSETS / name)
    return name
