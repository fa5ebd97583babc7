"""Turn the final checkpoint of a training run into an embedded one: float16 weights, tokenizer, recipe and loss curve.

python scripts/embed_checkpoint.py --run runs/tiny_english --name tiny-english
"""

import shutil
from pathlib import Path

from jsonargparse import CLI

from asarm import AnySubsetLM, TextTokenizer
from asarm.embedded import ASSETS
from asarm.export import write_model
from asarm.loading import RECIPE


def main(run: str, name: str) -> None:
    """Write asarm/assets/NAME.

    Args:
        run: output_dir of the training run.
        name: of the embedded checkpoint.
    """
    source, target = Path(run), ASSETS / name
    target.mkdir(parents=True, exist_ok=True)
    model, tokenizer = (kind.from_pretrained(source / "final") for kind in (AnySubsetLM, TextTokenizer))
    write_model(target, model.half(), tokenizer, (source / "final" / RECIPE).read_text(encoding="utf-8"))
    shutil.copy(source / "metrics.jsonl", target / "training_metrics.jsonl")
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    CLI(main, as_positional=False)
