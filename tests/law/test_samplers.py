"""A sampler is one record: a toy one, registered from outside, works wherever a built-in one does."""

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import make_model, random_batch

from asarm import SamplerConfig, joint_log_prob, sample
from asarm.cli import main
from asarm.errors import ConfigError
from asarm.law import draw
from asarm.samplers import SAMPLERS, Sampler, find_sampler, register
from asarm.sampling.decoding import Decoding, chosen


def one_by_one(state: Decoding) -> None:
    """The next rank, from its conditional."""
    row = state.rows(state.settled_B, state.settled_B + 1, 1)
    probs_B1V = state.law.probs(state.call(row))
    ids_B1 = draw(probs_B1V, state.uniforms(state.target_uniform_1BN, row.rank_BR))
    state.put(row, ids_B1)
    state.logp_B += chosen(probs_B1V, ids_B1).log().where(row.valid_BR, 0).sum(1)
    state.settle(state.settled_B + 1, state.settled_B, backlog=1)


@pytest.fixture
def toy() -> Iterator[Sampler]:
    sampler = Sampler("toy", round=one_by_one, query_rows=lambda k: 1, colour="#F0E442", marker="*")
    register(sampler)
    yield sampler
    del SAMPLERS["toy"]


def test_a_registered_sampler_samples(toy):
    model = make_model(dtype=torch.float64)
    ids_BN, order = random_batch(6, 4, 7)
    done = sample(model, ids_BN, order, SamplerConfig("toy"), seed=3)
    law = sample(model, ids_BN, order, SamplerConfig("sequential"), seed=3)
    assert torch.equal(done.ids_BN, law.ids_BN) and torch.equal(done.nfe_B, order.n_masked_B)
    assert SamplerConfig("toy").lossless
    assert joint_log_prob(model, done.ids_BN, order).isfinite().all()


def test_a_registered_sampler_is_evaluated_and_drawn(toy, small, tmp_path, capsys):
    words = ["--model", small, "--dataset", "samples", "--num_sequences", "3", "--max_length", "16", "--json"]
    words += ["--samplers", "sequential,toy", "--output_dir", str(tmp_path)]
    assert main(["eval", "speculative", *words]) == 0
    rows = json.loads(capsys.readouterr().out)["samplers"]
    assert list(rows) == ["sequential", "toy"] and rows["toy"]["nfe_per_token"] == 1
    assert rows["toy"]["log_prob_per_token"] == rows["sequential"]["log_prob_per_token"]
    assert (tmp_path / "calls_by_k.png").stat().st_size > 1000


def test_what_does_not_apply_to_a_sampler_is_refused(toy):
    for settings in ({"verification": "block"}, {"accept_slack": 0.1}, {"one_pass": True}):
        with pytest.raises(ConfigError, match="used with"):
            SamplerConfig("toy", **settings)
    with pytest.raises(ConfigError, match="a sampler 'toy' already"):
        register(replace(toy, marker="o"))
    with pytest.raises(ConfigError, match=r"sampler must be one of sequential, .*, toy, got 'best:3'"):
        find_sampler("best:3")


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_record_names_a_round(name):
    assert callable(SAMPLERS[name].play_round) and SAMPLERS[name].query_rows(5) >= 1
