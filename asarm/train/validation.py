"""Measures on held-out text while a model is trained: joint log-likelihood, and what ASSD makes of masked rows.

Masks and samples have a seed of their own, the same at every measurement. The best weights so far are kept.
"""

import json
import math
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from ..config import SamplerConfig
from ..data.datasets import load_text
from ..data.packing import pack_all
from ..evals.decode import decode
from ..evals.judge import Judge
from ..evals.likelihood import likelihood_at
from ..evals.metrics import token_entropy
from ..evals.speculative import plain_text
from ..evals.stats import mean_and_se
from ..evals.tasks import mask_rows
from ..model import AnySubsetLM
from ..runlog import whole_folder, write_json
from ..tokenizer import TextTokenizer
from .config import ValidationConfig
from .logs import finite

BEST_MEASURES = "best.json"
MEAN_NLL = "mean_nll"  # the measure by which the best weights are chosen


class Validation:
    """Held-out rows, tokenised once, and the judge; raises before training starts for what cannot be read."""

    def __init__(self, config: ValidationConfig, tokenizer: TextTokenizer, max_length: int):
        self.config, self.tokenizer = config, tokenizer
        self.rows = []
        if config.given:
            _, documents = load_text(
                config.dataset or "auto", config.file, config.dataset_config, config.split, config.text_column
            )
            self.rows = pack_all(documents, tokenizer, max_length, config.rows)
        self.judge = None if config.judge is None else Judge(config.judge)

    def due(self, done: int, last: bool) -> bool:
        """Whether to measure after ``done`` steps."""
        return bool(self.rows) and (last or done % self.config.every == 0)

    def measure(self, model: AnySubsetLM) -> tuple[dict[str, float], list[dict]]:
        """The measures, and the generated texts with theirs.

        ``nll_<masked fraction>`` in nats per masked token, their mean ``mean_nll``, and of the generations
        ``nfe_per_token`` and ``entropy`` (bits); standard errors beside them as ``<key>_se``. With a judge, its
        perplexity of all generations together (``judge_ppl``).
        """
        c = self.config
        measured = {}
        for fraction in c.masked_fractions:
            found = likelihood_at(model, self.rows, fraction, c.seed, c.batch_size)
            measured[f"nll_{fraction:g}"] = found["nll_per_token"]
            measured[f"nll_{fraction:g}_se"] = found["nll_per_token_se"]
        if c.masked_fractions:
            measured[MEAN_NLL] = fmean(measured[f"nll_{fraction:g}"] for fraction in c.masked_fractions)
        texts = self._generate(model, self.rows[: c.generations])
        for key in ("nfe_per_token", "entropy") if texts else ():
            measured[key], measured[f"{key}_se"] = mean_and_se([text[key] for text in texts])
        return measured | self._judge(texts), texts

    def _judge(self, texts: list[dict]) -> dict[str, float]:
        """The judge's perplexity of all texts together, that of each beside it; without what it has read nothing of."""
        if not texts or self.judge is None:
            return {}
        scores = self.judge.score([text["text"] for text in texts], self.config.batch_size)
        for text, (tokens, nll) in zip(texts, scores, strict=True):
            text["judge_ppl"] = math.exp(nll / tokens) if tokens else None
        tokens, nll = map(sum, zip(*scores, strict=True))
        return {"judge_ppl": math.exp(nll / tokens)} if tokens else {}

    def _generate(self, model: AnySubsetLM, rows: list[np.ndarray]) -> list[dict]:
        """The rows with most of their tokens drawn anew, in order."""
        if not rows:
            return []
        c = self.config
        tasks, sampler = mask_rows(rows, 1 - c.generation_masked_fraction, c.seed), SamplerConfig("assd", k=c.k)
        drawn = sorted(decode(model, tasks, sampler, c.seed, c.batch_size), key=lambda done: done[0].index)
        return [
            {
                "index": task.index,
                "prompt": prompt_text(self.tokenizer, task.ids, task.visible),
                "text": plain_text(self.tokenizer, ids),
                "nfe_per_token": measures["nfe"] / measures["masked"],
                "log_prob_per_token": measures["log_prob"] / measures["masked"],
                "entropy": token_entropy(ids),
            }
            for task, ids, measures in drawn
        ]


def prompt_text(tokenizer: TextTokenizer, ids: list[int], visible: list[bool]) -> str:
    """A masked row as a reader gets it: gaps as ``<mask:n>``, special tokens that are given as line breaks."""

    def kind(position: int) -> str:
        if not visible[position]:
            return "gap"
        return "special" if ids[position] in tokenizer.special_ids else "text"

    parts, before = [], "special"
    for what, positions in groupby(range(len(ids)), key=kind):
        run = list(positions)
        if what == "text":  # after a gap with the space that it begins with
            decoded = tokenizer.decode_gap(ids, range(run[0], run[-1] + 1))
            parts.append(decoded if before == "gap" else tokenizer.decode([ids[i] for i in run]))
        else:
            parts.append(f" <mask:{len(run)}>" if what == "gap" else "\n")
        before = what
    return "".join(parts)


def keep_if_best(best: Path, done: int, measured: dict[str, float], write: Callable[[Path], None]) -> bool:
    """Let ``write`` fill the folder ``best``, whole or not at all, if these measures have a lower ``mean_nll`` than
    those in its ``best.json``; whether it did."""
    if MEAN_NLL not in measured or not measured[MEAN_NLL] < best_so_far(best):
        return False
    with whole_folder(best) as folder:
        write(folder)
        write_json(folder / BEST_MEASURES, {"step": done} | finite(measured))
    return True


def best_so_far(best: Path) -> float:
    """The ``mean_nll`` of the weights in a folder ``best``; infinite where there is none."""
    file = best / BEST_MEASURES
    return json.loads(file.read_text(encoding="utf-8"))[MEAN_NLL] if file.is_file() else math.inf


def copy_with(model: AnySubsetLM, weights: dict[str, torch.Tensor], device: torch.device) -> AnySubsetLM:
    """A model of its own with these weights, ready to be measured: what is trained is not touched."""
    copy = AnySubsetLM(model.config)
    copy.load_state_dict(weights)
    return copy.to(device).eval()
