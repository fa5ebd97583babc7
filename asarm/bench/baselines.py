"""What one would use instead: Hugging Face's XLNet without a cache, and GPT-2 small with its cache."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, XLNetConfig, XLNetLMHeadModel

from .clock import median_seconds

GPT2_TOKENS = 12  # that a timed run of GPT-2 draws


def xlnet_call_seconds(
    config: XLNetConfig, length: int, n_query: int, device: torch.device, dtype: torch.dtype
) -> float:
    """One call of ``XLNetLMHeadModel`` as the paper's code makes it: every position recomputed, ``n_query``
    predicted."""
    model = XLNetLMHeadModel(XLNetConfig(**config.to_dict())).to(device, dtype).eval()
    encode = model.transformer.relative_positional_encoding
    # Hugging Face computes the sinusoids in float32 whatever the weights are, and then fails to multiply them
    model.transformer.relative_positional_encoding = lambda *args, **kwargs: encode(*args, **kwargs).to(dtype)
    ids_1N = torch.randint(0, config.vocab_size, (1, length), device=device)
    perm_mask_1NN = torch.triu(torch.ones(1, length, length, device=device, dtype=dtype))
    target_mapping_1QN = torch.eye(length, device=device, dtype=dtype)[None, :n_query]

    @torch.no_grad()
    def call() -> None:
        model(ids_1N, perm_mask=perm_mask_1NN, target_mapping=target_mapping_1QN, use_mems=False)

    return median_seconds(call, device, repeats=2)


def gpt2(device: torch.device, dtype: torch.dtype) -> GPT2LMHeadModel:
    """GPT-2 small: 124 M, random weights."""
    return GPT2LMHeadModel(GPT2Config()).to(device, dtype).eval()


@torch.no_grad()
def gpt2_token_seconds(model: GPT2LMHeadModel, length: int, batch: int) -> float:
    """Seconds a step of ``generate`` with its cache, sampling, half-way through ``length`` positions."""
    prompt_1N = torch.randint(0, model.config.vocab_size, (1, length // 2), device=model.device)
    cache = model(prompt_1N[:, :-1], use_cache=True).past_key_values  # of one prompt, which all sequences share
    cache.batch_repeat_interleave(batch)
    prompt_BN = prompt_1N.expand(batch, -1)

    def seconds(n_new: int) -> float:
        settings = {"max_new_tokens": n_new, "min_new_tokens": n_new, "do_sample": True, "pad_token_id": 0}

        def generate() -> None:
            cache.crop(prompt_BN.shape[1] - 1 - cache.get_seq_length())  # so many fewer
            model.generate(prompt_BN, attention_mask=torch.ones_like(prompt_BN), past_key_values=cache, **settings)

        return median_seconds(generate, model.device, repeats=2)

    return (seconds(GPT2_TOKENS + 1) - seconds(1)) / GPT2_TOKENS
