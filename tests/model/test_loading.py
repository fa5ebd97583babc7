"""The short way of loading a network against Hugging Face's, and where it leads over to that."""

import json

import pytest
import torch
from conftest import make_model

from asarm import AnySubsetLM
from asarm.errors import CheckpointMismatchError, ConfigError, ModelNotFoundError
from asarm.loading import load_network
from asarm.network import Network


def short_way(folder, dtype=torch.float32):
    network = load_network(str(folder), "main", dtype)
    assert type(network) is Network
    return network


def assert_same(ours: Network, theirs: AnySubsetLM) -> None:
    mine, his = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == his.keys()
    for name, parameter in mine.items():
        assert torch.equal(parameter, his[name]) and parameter.dtype == his[name].dtype
        assert parameter.requires_grad == his[name].requires_grad
    assert (ours.lm_loss.weight is ours.transformer.word_embedding.weight) == (
        theirs.lm_loss.weight is theirs.transformer.word_embedding.weight
    )
    assert ours.fingerprint() == theirs.fingerprint()
    assert (ours.training, ours.device, ours.dtype) == (theirs.training, theirs.device, theirs.dtype)
    assert (ours.name_or_path, ours.mask_token_id) == (theirs.name_or_path, theirs.mask_token_id)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_short_way_loads_what_the_long_one_does(tmp_path, dtype, stored, tied):
    make_model(tie_word_embeddings=tied, mask_token_id=3).to(stored).save_pretrained(tmp_path)
    assert_same(short_way(tmp_path, dtype), AnySubsetLM.from_pretrained(tmp_path, dtype=dtype))


def test_an_embedded_checkpoint():
    assert_same(short_way("tiny-english"), AnySubsetLM.from_pretrained("tiny-english"))


def test_other_forms_of_checkpoint_go_the_long_way(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    loaded = load_network(str(tmp_path / "parts"), "main", torch.float32)
    assert isinstance(loaded, AnySubsetLM)
    assert loaded.fingerprint() == model.fingerprint()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"n_layer": 3}, CheckpointMismatchError, "missing_keys"),
        ({"d_inner": 33}, CheckpointMismatchError, "layer_1"),
        ({"n_head": 3}, CheckpointMismatchError, "n_head"),
        ({"attn_type": "uni"}, ConfigError, "'uni'"),
        ({"ff_activation": "gelo"}, ConfigError, "gelo"),
        (None, ModelNotFoundError, "at revision 'main'"),
    ],
)
def test_what_is_wrong_is_said_as_the_long_way_says_it(tmp_path, settings, error, message):
    if settings is not None:
        make_model().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(error, match=message):
        load_network(str(tmp_path), "main", torch.float32)


def test_a_rare_activation_is_found_by_its_name():
    hidden = torch.linspace(-3, 3, 7)
    assert torch.equal(
        make_model(ff_activation="silu").transformer.layer[0].ff.activation(hidden), torch.nn.functional.silu(hidden)
    )
