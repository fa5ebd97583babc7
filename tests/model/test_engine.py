"""The engine against the network it stands for, and sequences that share it."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model, mostly_slow, random_batch, with_random_head

from asarm import Order, SamplerConfig, sample
from asarm.density import target_states
from asarm.engine import Engine, can_pack, engine_of
from asarm.orders import content_limit, rows_at_ranks
from asarm.sampling.sample import sample_each

V = 12


@torch.no_grad()
def states_through_the_cache(engine, ids_BN, order, width):
    """Hidden states of all masked ranks, ``width`` at a time, after a prefill of the prompts: [B, Q, E]."""
    B, N = ids_BN.shape
    cache, order_BN = engine.new_cache(B, N), order.order_BN
    padded_BS = torch.cat([ids_BN, ids_BN[:, :1]], dim=1)
    n_B, every_B = order.n_visible_B, torch.arange(B)
    prompt = rows_at_ranks(order, torch.zeros_like(n_B), n_B, int(n_B.max()))
    prompt = replace(prompt, limit_BR=torch.where(prompt.valid_BR, n_B[:, None], 0))
    engine.prefill(padded_BS.gather(1, prompt.position_BR), prompt, order_BN, cache, every_B)
    parts = []
    for start in range(0, int(order.n_masked_B.max()), width):
        query = rows_at_ranks(order, n_B + start, order.length_B, width)
        content = replace(query, limit_BR=torch.where(query.valid_BR, content_limit(order, query.rank_BR), 0))
        ids_BC = padded_BS.gather(1, content.position_BR)
        parts.append(engine(ids_BC, content.followed_by(query), order_BN, cache, N))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("width", [1, 3, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cached_rows_equal_one_full_pass(dtype, width):
    """Prompts longer than the attention takes at a time, ragged lengths, one to many rows a call."""
    model = make_model(vocab_size=V, dtype=dtype, spread=0.3)
    ids_BN, order = random_batch(V, 4, 300, seed=3, lengths=[300, 290, 1, 170])
    engine = Engine(model)
    assert can_pack(torch.device("cpu"), dtype) == (dtype == torch.float32)
    hidden_BQE = states_through_the_cache(engine, ids_BN, order, width)
    with torch.no_grad():
        expected_TE, _ = target_states(model, ids_BN, order)
    valid_BQ = torch.arange(hidden_BQE.shape[1]) < order.n_masked_B[:, None]
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert (hidden_BQE[valid_BQ] - expected_TE).abs().max() < tolerance
    assert (engine.logits(expected_TE) - model.logits(expected_TE)).abs().max() < 10 * tolerance


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
def test_every_activation_is_the_models(activation):
    model = make_model(vocab_size=V, ff_activation=activation, spread=0.3)
    ids_BN, order = random_batch(V, 2, 12)
    hidden_BQE = states_through_the_cache(Engine(model), ids_BN, order, 4)
    valid_BQ = torch.arange(hidden_BQE.shape[1]) < order.n_masked_B[:, None]
    with torch.no_grad():
        assert torch.allclose(hidden_BQE[valid_BQ], target_states(model, ids_BN, order)[0], atol=2e-5)


def test_bfloat16_is_near_float32():
    model = make_model(vocab_size=V, spread=0.2)
    ids_BN, order = random_batch(V, 3, 20)
    exact = states_through_the_cache(Engine(model), ids_BN, order, 4)
    rough = states_through_the_cache(Engine(model.bfloat16()), ids_BN, order, 4)
    valid_BQ = torch.arange(exact.shape[1]) < order.n_masked_B[:, None]
    error = (rough.float() - exact)[valid_BQ].abs()
    assert 0 < error.mean() < 0.03


def test_an_engine_is_kept_until_the_weights_change():
    model = make_model(vocab_size=V)
    first = engine_of(model)
    assert engine_of(model) is first
    with torch.no_grad():
        model.lm_loss.bias.add_(1)
    second = engine_of(model)
    assert second is not first
    assert engine_of(model.double()).dtype == torch.float64
    model.float().load_state_dict(model.state_dict())
    assert engine_of(model) is not second


NAMES = ["sequential", "assd", "assd+one-pass", "assd-head", "assd-head+one-pass", "assd-ngram", "parallel"]


@pytest.mark.parametrize("name", mostly_slow(NAMES, quick=["assd", "assd-head+one-pass", "assd-ngram"]))
def test_sequences_that_make_room_for_others_get_the_same_tokens(name):
    model = with_random_head(make_model(vocab_size=V, seed=5, spread=0.5))
    lengths = [20 - (t * 7) % 17 for t in range(23)]
    ids_TN, order = random_batch(V, 23, 20, seed=8, lengths=lengths)
    config = SamplerConfig.named(name, k=3)
    together = sample(model, ids_TN, order, config, seed=4)
    for batch_size in (1, 2, 5):
        queued = sample(model, ids_TN, order, config, seed=4, batch_size=batch_size)
        for key, value in vars(together).items():
            if key == "logp_B":
                assert torch.allclose(value, queued.logp_B, atol=1e-4)
            elif key != "seconds_B":
                assert torch.equal(value, getattr(queued, key)), (key, batch_size)
    assert together.seconds_B.gt(0).all()


def test_short_sequences_do_not_wait_for_long_ones():
    model = make_model(vocab_size=V)
    visible_TN = torch.arange(30) >= torch.tensor([30, 2, 2, 2, 2])[:, None]
    order = Order.from_visible(visible_TN)
    ids_TN = torch.ones(5, 30, dtype=torch.long)
    rounds = sample_each(model, ids_TN, order, SamplerConfig("sequential"), 0, list(range(5)), batch_size=2)
    assert [numbers for numbers, _ in rounds] == [[1], [2], [3], [4], [0]]


def test_one_pass_is_the_default_where_it_was_measured_to_pay():
    """With a draft head on a GPU."""
    assert SamplerConfig("assd-head").on("cuda").full_name == "assd-head+one-pass"
    assert SamplerConfig("assd-head").on("cpu").full_name == "assd-head"
    assert SamplerConfig("assd-head", one_pass=False).on("cuda").full_name == "assd-head"
    assert SamplerConfig("assd-head", bonus_token=False).on("cuda").full_name == "assd-head"
    assert SamplerConfig("assd").on("cuda").full_name == "assd"
    assert SamplerConfig("assd", one_pass=True).on("cuda").full_name == "assd+one-pass"
