"""asarm: any-subset autoregressive models, sampled in parallel without changing their distribution.

A module imports only from the modules before it in the tree of docs/modules.md, which says what each one is for.

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
