"""Plot the loss curve of a training run.

python scripts/plot_loss.py --metrics runs/tiny_english/metrics.jsonl --output loss.png
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from jsonargparse import CLI


def main(metrics: str, output: str, window: int = 20) -> None:
    """Joint negative log-likelihood per target against the step, raw and averaged.

    Args:
        metrics: metrics.jsonl of a run.
        output: PNG to write.
        window: logged points in the moving average.
    """
    by_step = {r["step"]: r["loss"] for r in map(json.loads, Path(metrics).read_text().splitlines())}
    step, loss = np.array(sorted(by_step.items())).T
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(step, loss, alpha=0.3, linewidth=0.8, label="one step in ten (its own masking rates)")
    if len(loss) >= window:
        mean = np.convolve(loss, np.ones(window) / window, mode="valid")
        axes.plot(step[window - 1 :], mean, linewidth=1.8, label=f"mean of {window}")
    axes.set(xlabel="optimiser step", ylabel="nats per masked token", title="Joint training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    CLI(main, as_positional=False)
