"""Acceptance of a draft head by draft index, from the held_out.jsonl of its training run.

python scripts/plot_acceptance.py --run asarm/assets/tiny-english/draft_head --output acceptance.png
"""

from pathlib import Path

import matplotlib
from jsonargparse import CLI

from asarm.runlog import read_lines


def main(run: str, output: str) -> None:
    """Plot the last measurement (solid) beside the untrained head's, which is the self draft (dashed).

    Args:
        run: folder with held_out.jsonl.
        output: image file to write.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_lines(Path(run) / "held_out.jsonl")
    last = max(record["step"] for record in records)
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, kind, title in zip(panels, ("two_pass", "one_pass"), ("two passes a round", "one pass"), strict=True):
        for record in records:
            if record["step"] not in (0, last):
                continue
            trained, masked = record["step"] == last, record["masked_fraction"]
            panel.plot(
                record[kind],
                marker="o",
                linestyle="-" if trained else "--",
                color="tab:blue" if masked > 0.9 else "tab:orange",
                label=f"{'draft head' if trained else 'self draft'}, {masked:.0%} masked",
            )
        panel.set(title=title, xlabel="draft index", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("probability of acceptance")
    panels[0].legend(fontsize=7, loc="lower right", ncol=2)
    figure.tight_layout()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    CLI(main, as_positional=False)
