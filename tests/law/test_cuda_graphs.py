"""Rounds as recorded graphs and as compiled ones, on a CPU: a tape stands for the GPU's recorder."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import make_model, mostly_slow, random_batch, with_random_head
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from asarm import SamplerConfig, sample
from asarm.errors import ConfigError
from asarm.samplers import SAMPLERS
from asarm.sampling import cuda_graphs
from asarm.sampling.cuda_graphs import Replay, compiled
from asarm.sampling.decoding import Decoding

V = 12
aten = torch.ops.aten
# a GPU's recorder refuses what reads from the device, or copies from the processor's memory
REFUSED = {aten._local_scalar_dense.default, aten.nonzero.default, aten.lift_fresh.default, aten.equal.default}


class Tape(TorchDispatchMode):
    """Notes operations and does them again on the tensors that they had, as a CUDA graph does: whatever Python decided
    in between stays decided, and a tensor that was made anew is no longer what the tape knows."""

    def __init__(self):
        super().__init__()
        self.done, self.played = [], -1  # the operations are done once when they are noted

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation not in REFUSED, operation
        out = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        self.played += 1
        if self.played == 0:
            return
        for operation, args, kwargs, out in self.done:
            for old, new in zip(tree_leaves(out), tree_leaves(operation(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # views are where they were
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """Every tape that was recorded."""
    made = []

    def tape():
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", tape)
    monkeypatch.setattr(cuda_graphs, "recording", lambda tape, device: tape)
    return made


def replayed(name, **settings):
    """Sequences of several lengths, more of them than are decoded together: as they are sampled, and as they are with
    rounds that are recorded, each a list of what becomes of a sequence."""
    model = with_random_head(make_model(vocab_size=V, seed=5, spread=0.5))
    ids_BN, order = random_batch(V, 7, 14, seed=1, lengths=[14, 9, 14, 5, 12, 14, 1])
    config = SamplerConfig.named(name, **({"k": 3} | settings))
    plain = sample(model, ids_BN, order, config, seed=2)
    with torch.no_grad():  # compile: with shapes that do not change
        state = Decoding(model, ids_BN, order, replace(config, compile=True), 2, list(range(7)), batch_size=3)
        parts = list(state.run(Replay(SAMPLERS[name].play_round)))
    found = {n: (part.ids_BN[i], part.nfe_B[i], part.rounds_B[i]) for ns, part in parts for i, n in enumerate(ns)}
    return zip(plain.ids_BN, plain.nfe_B, plain.rounds_B, strict=True), [found[number] for number in range(7)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_replayed_rounds_draw_the_same_tokens(name, tapes):
    for plain, found in zip(*replayed(name), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert len(tapes) == 1 and tapes[0].played > 3


OTHERS = pytest.mark.parametrize(
    "settings",
    [
        {"greedy": True},
        {"temperature": 0.7, "draft_only_temperature": True},
        {"top_k": 4, "top_p": 0.8},
        {"bonus_token": False},
        {"k": 1},
        {"verification": "block"},
        {"banned_ids": (3, 5)},
    ],
    ids=lambda settings: next(iter(settings)),
)


@OTHERS
def test_replayed_rounds_with_other_settings(settings, tapes):
    for plain, found in zip(*replayed("assd", **settings), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def test_a_draft_that_does_not_lie_where_the_last_one_lay_is_noticed(tapes, monkeypatch):
    """The negative control."""
    monkeypatch.setattr(Replay, "_play", lambda self, state: self.play_round(state))
    assert any(not torch.equal(plain[0], found[0]) for plain, found in zip(*replayed("assd+one-pass"), strict=True))


@pytest.fixture
def graphs(monkeypatch):
    """What torch.compile is given to compile from now on; it runs as it is."""
    found = []

    def keep(graph, inputs):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=keep))
    yield found
    compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", mostly_slow(SAMPLERS, quick=["assd", "assd-head+one-pass", "parallel"]))
def test_a_round_is_one_graph_that_draws_the_same_tokens(name, graphs):
    compare(name)
    assert len(graphs) == (2 if name == "parallel" else 1), "parallel's first round has fewer content rows"


@pytest.mark.slow
def test_compiled_rounds_of_other_laws_do_not_take_the_first_ones_graph(graphs):
    for settings in (
        {"banned_ids": (3, 5)},
        {"banned_ids": (4, 5)},
        {"greedy": True},
        {"temperature": 0.7},
        {"top_k": 4},
    ):
        compare("assd", **settings)
    assert len(graphs) == 5


@pytest.mark.slow
def test_compiled_rounds_draw_the_same_tokens():
    compiled.cache_clear()
    compare("assd-head+one-pass")


def compare(name, **settings):
    model = with_random_head(make_model(vocab_size=V, seed=5, spread=0.5))
    ids_BN, order = random_batch(V, 5, 14, seed=1)
    config = SamplerConfig.named(name, k=2, **settings)
    plain = sample(model, ids_BN, order, config, seed=2)
    through_compile = sample(model, ids_BN, order, replace(config, compile=True), seed=2, batch_size=3)
    assert torch.equal(plain.ids_BN, through_compile.ids_BN)
    assert torch.equal(plain.nfe_B, through_compile.nfe_B)


def test_nothing_need_be_banned():
    """The mask token may lie outside the vocabulary."""
    model = make_model(vocab_size=V, mask_token_id=V)
    done = sample(model, *random_batch(V, 3, 8), SamplerConfig("assd-ngram", k=2))
    assert done.nfe_B.gt(0).all()


def decode_in_batches(model, sizes):
    for B in sizes:
        sample(model, *random_batch(V, B, 4), SamplerConfig("sequential", compile=True))


@pytest.mark.slow
def test_every_shape_is_compiled(graphs):
    """torch.compile's own limit is eight; what comes after that would run uncompiled."""
    decode_in_batches(make_model(vocab_size=V, n_layer=1), range(1, 11))
    assert len(graphs) == 10


def test_shapes_beyond_what_a_process_may_compile_are_refused(graphs):
    model = make_model(vocab_size=V, n_layer=1)
    with torch._dynamo.config.patch(accumulated_recompile_limit=2), pytest.raises(ConfigError, match="at most 2"):
        decode_in_batches(model, [1, 2, 1, 3])
    assert len(graphs) == 2
