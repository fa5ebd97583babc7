"""Measures on held-out text while a model is trained: joint log-likelihood, and what ASSD makes of masked rows.

Masks and samples have a seed of their own, the same at every measurement.
"""

import math

import numpy as np
import torch

from ..config import SamplerConfig
from ..data.packing import pack_all
from ..data.sources import read_documents
from ..evals.decode import decode
from ..evals.judge import Judge
from ..evals.likelihood import likelihood_at
from ..evals.metrics import token_entropy
from ..evals.speculative import plain_text
from ..evals.stats import mean_and_se
from ..evals.tasks import mask_rows
from ..model import AnySubsetLM
from ..tokenizer import TextTokenizer
from .config import ValidationConfig


class Validation:
    """Held-out rows, tokenised once, and the judge; raises before training starts for what cannot be read."""

    def __init__(self, config: ValidationConfig, tokenizer: TextTokenizer, max_length: int):
        self.config, self.tokenizer = config, tokenizer
        documents = [] if config.file is None else read_documents(config.file)
        self.rows = pack_all(documents, tokenizer, max_length)[: config.rows] if documents else []
        self.judge = None if config.judge is None else Judge(config.judge)

    def due(self, done: int, last: bool) -> bool:
        """Whether to measure after ``done`` steps."""
        return bool(self.rows) and (last or done % self.config.every == 0)

    def measure(self, model: AnySubsetLM) -> dict[str, float]:
        """``nll_<masked fraction>`` in nats per masked token, and of the generations ``nfe_per_token`` and ``entropy``
        (bits); standard errors beside them as ``<key>_se``. With a judge, its perplexity of all generations together
        (``judge_ppl``)."""
        measured = {}
        for fraction in self.config.masked_fractions:
            found = likelihood_at(model, self.rows, fraction, self.config.seed, self.config.batch_size)
            measured[f"nll_{fraction:g}"] = found["nll_per_token"]
            measured[f"nll_{fraction:g}_se"] = found["nll_per_token_se"]
        return measured | self._generate(model, self.rows[: self.config.generations])

    def _generate(self, model: AnySubsetLM, rows: list[np.ndarray]) -> dict[str, float]:
        if not rows:
            return {}
        c = self.config
        tasks, sampler = mask_rows(rows, 1 - c.generation_masked_fraction, c.seed), SamplerConfig("assd", k=c.k)
        drawn = list(decode(model, tasks, sampler, c.seed, c.batch_size))
        measured = {}
        for key, values in (
            ("nfe_per_token", [measures["nfe"] / measures["masked"] for _, _, measures in drawn]),
            ("entropy", [token_entropy(ids) for _, ids, _ in drawn]),
        ):
            measured[key], measured[f"{key}_se"] = mean_and_se(values)
        if self.judge is not None:
            scores = self.judge.score([plain_text(self.tokenizer, ids) for _, ids, _ in drawn], c.batch_size)
            tokens, nll = map(sum, zip(*scores, strict=True))
            measured["judge_ppl"] = math.exp(nll / max(tokens, 1))
        return measured


def copy_with(model: AnySubsetLM, weights: dict[str, torch.Tensor], device: torch.device) -> AnySubsetLM:
    """A model of its own with these weights, ready to be measured: what is trained is not touched."""
    copy = AnySubsetLM(model.config)
    copy.load_state_dict(weights)
    return copy.to(device).eval()
