"""asarm: any-subset autoregressive models, sampled in parallel without changing their distribution.

Reading order, each module importing only from those before it: errors, config, rng, embedded, allocation, runlog,
tokenizer, orders, dropout, sight, block_attention, attention, model, cache, engine, memory, law, density, draft_head,
drafter, sampling/ (accept, decoding, drafts, sequential, assd, parallel, replay, sample), infilling, loading, data/
(sources, datasets, packing, stream, rows), evals/ (config, code_config, shards, stats, metrics, records, tasks, decode,
run, judge, plots, likelihood, speculative, grid, nlp_tasks, guessers, causal, gaps, multiple_choice, nlp_infill,
jail.isolation, jail.wire, jail.candidate, jail.referee, jail.warden, sandbox, code_tasks, execution, code_infill),
train/ (config, head_config, schedule, objective, checkpoint, stopping, start, trainer, validation, loop, draft_head),
bench/ (config, clock, baselines, decode, draft, memory, run, train), cli.

Shape suffixes: B batch, N positions, S slots of the cache, T sequences or targets, R rows, C content rows, Q query
rows, K drafted tokens, H heads, D head dimension, E model width, F feed-forward width, P relative positions (2N), V
vocabulary, L layers, M draft-head width, W windows. A 1 is a dimension of size one, an X a flattened one.
"""

import importlib

_PUBLIC = {
    "AnySubsetLM": "model",
    "Completion": "sampling.decoding",
    "Law": "law",
    "Order": "orders",
    "SamplerConfig": "config",
    "TextTokenizer": "tokenizer",
    "UserError": "errors",
    "conditional_log_probs": "density",
    "infill": "infilling",
    "joint_log_prob": "density",
    "sample": "sampling.sample",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    """Import a public name when it is first used: ``python -m asarm --help`` must not wait for torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
