"""The model against Hugging Face's XLNet, and every way of loading it."""

import json

import pytest
import torch
from conftest import make_model, mostly_slow, random_batch
from transformers import XLNetConfig, XLNetLMHeadModel

from asarm import AnySubsetLM, TextTokenizer, conditional_log_probs, joint_log_prob
from asarm.density import target_states
from asarm.errors import CheckpointMismatchError, ConfigError, ModelNotFoundError

SMALL = {"vocab_size": 40, "d_model": 24, "n_layer": 3, "n_head": 4, "d_inner": 48, "initializer_range": 0.3}
CONFIGS = {
    "small": SMALL | {"ff_activation": "relu"},
    "clamped": SMALL | {"n_layer": 2, "clamp_len": 3, "layer_norm_eps": 1e-6},
    "xlnet-base": {"vocab_size": 32000, "d_model": 768, "n_layer": 12, "n_head": 12, "d_inner": 3072},
}


def hugging_face_logits(hf: XLNetLMHeadModel, ids_BN, order):
    """Logits [B, N, V] of HF's query stream, from the permutation mask that the order means (1 = may not attend)."""
    B, N = ids_BN.shape
    given_BN = order.rank_BN < order.n_visible_B[:, None]
    sees_below_BN = torch.where(given_BN, order.n_visible_B[:, None], order.rank_BN)
    perm_mask = ~(order.rank_BN[:, None, :] < sees_below_BN[:, :, None])
    if hf.dtype == torch.float64:  # HF makes its sinusoids in float32 and cannot mix the two
        encode = hf.transformer.relative_positional_encoding
        hf.transformer.relative_positional_encoding = lambda *a, **k: encode(*a, **k).double()
    with torch.no_grad():
        return hf(
            ids_BN, perm_mask=perm_mask.to(hf.dtype), target_mapping=torch.eye(N, dtype=hf.dtype).expand(B, N, N)
        ).logits


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, quick=["small", "clamped"]))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
def test_logits_and_joint_log_prob_equal_hugging_face(name, dtype, tolerance, direction, tmp_path):
    torch.manual_seed(1)
    config = XLNetConfig(**CONFIGS[name], dropout=0.0, mem_len=None)
    first, second = (
        (AnySubsetLM, XLNetLMHeadModel) if direction == "ours to theirs" else (XLNetLMHeadModel, AnySubsetLM)
    )
    first(config).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    ours = AnySubsetLM.from_pretrained(tmp_path, dtype=dtype).eval()
    theirs = XLNetLMHeadModel.from_pretrained(tmp_path).to(dtype).eval()
    assert isinstance(ours if second is AnySubsetLM else theirs, second)

    ids_BN, order = random_batch(config.vocab_size, 3, 12, seed=3)
    order = type(order).from_visible(
        ~order.target_BN | (torch.arange(12) == 5)
    )  # HF cannot express a row that sees nothing
    logits_BNV = hugging_face_logits(theirs, ids_BN, order)
    with torch.no_grad():
        hidden_TE, flat_T = target_states(ours, ids_BN, order)
        assert (ours.logits(hidden_TE) - logits_BNV.flatten(0, 1)[flat_T]).abs().max() < tolerance
    logp_BN = logits_BNV.double().log_softmax(-1).gather(2, ids_BN[..., None]).squeeze(2)
    assert (joint_log_prob(ours, ids_BN, order) - logp_BN.where(order.target_BN, 0).sum(1)).abs().max() < tolerance


def test_save_and_load_keep_every_bit_the_segment_terms_included(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    again = AnySubsetLM.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert again.mask_token_id == model.mask_token_id == 0
    assert again.lm_loss.weight is again.transformer.word_embedding.weight


def test_float16_checkpoint_loads_as_float32_by_default(tmp_path):
    make_model().half().save_pretrained(tmp_path)
    assert AnySubsetLM.from_pretrained(tmp_path).dtype == torch.float32


def test_embedded_checkpoint_by_name():
    model, tokenizer = AnySubsetLM.from_pretrained("tiny-english"), TextTokenizer.from_pretrained("tiny-english")
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.mask_id == model.mask_token_id == 6
    assert tokenizer.special_ids == tuple(range(9))


def test_unknown_name_and_unsuitable_architecture(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"no-such-model.*tiny-english"):
        AnySubsetLM.from_pretrained(tmp_path / "no-such-model")
    with pytest.raises(ConfigError, match="'uni'"):
        AnySubsetLM(XLNetConfig(**SMALL, attn_type="uni"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("d_inner", 33, "layer_1"),
        ("n_layer", 3, "missing_keys"),
        ("n_layer", 1, "unexpected_keys"),
        ("vocab_size", 7, "word_embedding"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(field, value, message, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(CheckpointMismatchError, match=message):
        AnySubsetLM.from_pretrained(tmp_path)


def test_a_broken_checkpoint_is_told_from_a_missing_one(tmp_path):
    make_model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(CheckpointMismatchError, match="broken"):
        AnySubsetLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_head": 3}))
    with pytest.raises(CheckpointMismatchError, match="n_head"):
        AnySubsetLM.from_pretrained(tmp_path)


def test_fingerprint_tells_weights_apart(tmp_path):
    make_model().save_pretrained(tmp_path)
    assert AnySubsetLM.from_pretrained(tmp_path).fingerprint() == make_model().fingerprint()
    assert make_model(seed=1).fingerprint() != make_model().fingerprint()


def test_bfloat16_scores_close_to_float32():
    model = make_model(vocab_size=50, spread=0.2, d_model=32)
    ids_BN, order = random_batch(50, 4, 10, seed=2)
    exact_BN = conditional_log_probs(model, ids_BN, order)
    rough_BN = conditional_log_probs(model.bfloat16(), ids_BN, order)
    assert (exact_BN - rough_BN).abs().max() < 0.15
    assert not torch.equal(exact_BN, rough_BN)


def test_what_is_trained_does_not_depend_on_where_the_weights_come_from(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    loaded = AnySubsetLM.from_pretrained(tmp_path)
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    assert not any("r_s_bias" in name or "seg_embed" in name for name in trained)
