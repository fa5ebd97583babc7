"""The left-to-right baseline: any causal language model of Hugging Face's, given the text before the gap alone.

It is told as much about the gap's length as an any-subset model is: the reference's number of tokens, in its own
vocabulary. It draws with the same law settings and the same kind of keyed random numbers.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import TextError
from ..law import Law, draw
from ..loading import load_causal, this_device
from ..pretrained import parameters_fingerprint
from ..rng import rank_uniforms


@dataclass(frozen=True)
class CausalTask:
    """Ids of the left context and of what follows it; ``index`` keys the random numbers."""

    index: int
    context: list[int]
    continuation: list[int]

    @property
    def length(self) -> int:
        return len(self.context) + len(self.continuation)


@dataclass(frozen=True)
class CausalLM:
    """A causal language model and its tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def from_pretrained(cls, name: str, dtype: str = "float32") -> "CausalLM":
        """``name`` is a folder, or a Hub id, if need be as id@revision."""
        tokenizer = load_causal(AutoTokenizer, name)
        model = load_causal(AutoModelForCausalLM, name, dtype=getattr(torch, dtype))
        return cls(name, model.to(this_device()).eval(), tokenizer)

    @property
    def system(self) -> str:
        """The name of its results."""
        return f"causal {self.name}"

    @property
    def max_length(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    @property
    def fingerprint(self) -> str:
        return parameters_fingerprint(self.model)

    def task(self, index: int, context: str, continuation: str | int) -> CausalTask:
        """``continuation`` as a text, or only its number of tokens. An empty context is the start of a document.

        Raises :class:`TextError` for a continuation without a token in this vocabulary.
        """
        context_ids = self._encode(context)
        if not context_ids:
            if self.tokenizer.bos_token_id is None:
                raise TextError(f"nothing precedes the gap, and {self.name} has no token to begin a text with")
            context_ids = [self.tokenizer.bos_token_id]
        ids = self._encode(continuation) if isinstance(continuation, str) else [0] * continuation
        if not ids:
            raise TextError(f"{continuation!r} has no token in the vocabulary of {self.name}")
        return CausalTask(index, context_ids, ids)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def law(self, **settings) -> Law:
        """Its special tokens are never drawn: a gap is filled with text."""
        return Law(banned_ids=tuple(sorted(self.tokenizer.all_special_ids)), **settings)

    def generate(
        self, tasks: list[CausalTask], law: Law, seed: int, batch_size: int
    ) -> Iterator[tuple[CausalTask, list[int], float]]:
        """Each task with as many drawn ids as its continuation has, and its share of the seconds."""
        for start in range(0, len(tasks), batch_size):
            batch, began = tasks[start : start + batch_size], time.perf_counter()
            drawn_BN = self._generate(batch, law, seed).tolist()
            seconds = (time.perf_counter() - began) / len(batch)
            for task, ids in zip(batch, drawn_BN, strict=True):
                yield task, ids[: len(task.continuation)], seconds

    @torch.no_grad()
    def _generate(self, tasks: list[CausalTask], law: Law, seed: int) -> torch.Tensor:
        ids_BT, mask_BT = self._left_padded([task.context for task in tasks])
        n_new = max(len(task.continuation) for task in tasks)
        uniform_BN = rank_uniforms(seed, "sample", [task.index for task in tasks], n_new, 1)[0].to(ids_BT.device)
        cache, drawn = None, []
        for step in range(n_new):
            done = self._call(ids_BT, mask_BT, 1, past_key_values=cache, use_cache=True)
            ids_BT, cache = draw(law.probs(done.logits[:, -1]), uniform_BN[:, step])[:, None], done.past_key_values
            mask_BT = torch.cat([mask_BT, torch.ones_like(ids_BT)], dim=1)
            drawn.append(ids_BT)
        return torch.cat(drawn, dim=1)

    @torch.no_grad()
    def score(self, tasks: list[CausalTask], batch_size: int) -> Iterator[tuple[CausalTask, float, bool, float]]:
        """Each task with its continuation's log-probability (nats, joint), whether each of its tokens is the most
        likely one, and its share of the seconds."""
        law = Law()
        for start in range(0, len(tasks), batch_size):
            batch, began = tasks[start : start + batch_size], time.perf_counter()
            ids_BT, mask_BT = self._left_padded([task.context + task.continuation for task in batch])
            n_kept = max(len(task.continuation) for task in batch) + 1
            logits_BKV = self._call(ids_BT, mask_BT, n_kept).logits
            seconds = (time.perf_counter() - began) / len(batch)
            for task, logits_KV in zip(batch, logits_BKV, strict=True):
                target_T = torch.tensor(task.continuation, device=logits_KV.device)
                logp_TV = law.log_probs(logits_KV[-len(target_T) - 1 : -1])
                log_prob = logp_TV.gather(1, target_T[:, None]).sum().item()
                yield task, log_prob, torch.equal(logp_TV.argmax(1), target_T), seconds

    def _call(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, n_kept: int, **settings):
        position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :]
        return self.model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_BT, logits_to_keep=n_kept, **settings
        )

    def _left_padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids [B, T] and which of them are not padding (1) or are (0)."""
        T = max(map(len, rows))
        ids_BT = torch.tensor([[0] * (T - len(row)) + row for row in rows], device=self.model.device)
        pad_B1 = torch.tensor([[T - len(row)] for row in rows], device=self.model.device)
        return ids_BT, (torch.arange(T, device=self.model.device) >= pad_B1).long()
