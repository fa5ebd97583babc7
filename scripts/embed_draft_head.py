"""Put a trained draft head beside its embedded checkpoint: float16 weights, recipe and acceptance.

python scripts/embed_draft_head.py --run runs/tiny_english_head --name tiny-english
"""

import shutil
from pathlib import Path

from jsonargparse import CLI

from asarm import AnySubsetLM
from asarm.draft_head import FOLDER, DraftHead
from asarm.embedded import ASSETS


def main(run: str, name: str) -> None:
    """Write asarm/assets/NAME/draft_head.

    Args:
        run: output_dir of the training run.
        name: of the embedded checkpoint.
    """
    source, target = Path(run), ASSETS / name
    head = DraftHead.from_pretrained(source / "final", AnySubsetLM.from_pretrained(name))
    head.half().save_pretrained(target)
    folder = target / FOLDER
    shutil.copy(source / "config.yaml", folder / "training_config.yaml")
    shutil.copy(source / "metrics.jsonl", folder / "training_metrics.jsonl")
    shutil.copy(source / "held_out.jsonl", folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    CLI(main, as_positional=False)
