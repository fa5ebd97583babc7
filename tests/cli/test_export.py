"""export: any model that loads, as a folder that asarm and transformers load."""

import json

import pytest
import torch
from conftest import TEXTS, assert_same_tokenizer
from training_runs import small_run
from transformers import AutoTokenizer, XLNetLMHeadModel

from asarm import AnySubsetLM, TextTokenizer
from asarm.cli import main
from asarm.draft_head import find_draft_head
from asarm.embedded import ASSETS
from asarm.export import write_model
from asarm.loading import load, trained_length
from asarm.train.checkpoint import checkpoints
from asarm.train.model import train

MODEL = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training_config.yaml"]


def export(model, folder, *words) -> list[str]:
    """The command; the names of what it wrote."""
    assert main(["export", "--model", str(model), "--output_dir", str(folder), *words]) == 0
    return sorted(path.name for path in folder.iterdir())


def assert_transformers_loads(folder, model: AnySubsetLM, tokenizer: TextTokenizer) -> None:
    """With these weights in the type that they are stored in, all of them and no others, and these ids."""
    theirs, info = XLNetLMHeadModel.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert theirs.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in theirs.state_dict().items())
    assert_same_tokenizer(AutoTokenizer.from_pretrained(folder), tokenizer)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_embedded_model_with_its_draft_head(dtype, tmp_path):
    assert export("tiny-english", tmp_path / "out", "--dtype", dtype) == sorted([*MODEL, "draft_head"])
    model = AnySubsetLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, dtype))
    embedded = AnySubsetLM.from_pretrained("tiny-english", dtype=getattr(torch, dtype))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), embedded.parameters(), strict=True))
    assert model.fingerprint() == AnySubsetLM.from_pretrained("tiny-english").fingerprint()
    head, before = (find_draft_head(name, model) for name in (tmp_path / "out", "tiny-english"))
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), before.parameters(), strict=True))
    assert_transformers_loads(tmp_path / "out", model, TextTokenizer.from_pretrained("tiny-english"))
    assert trained_length(model) == 256
    n_bytes = sum(p.numel() for p in model.parameters()) * (4 if dtype == "float32" else 2)
    assert n_bytes < (tmp_path / "out" / "model.safetensors").stat().st_size < n_bytes + 2**16


def test_every_folder_of_a_run_is_exported(text_file, tmp_path, capsys):
    """A checkpoint, which outlives the run's own that way, and final/; with the run's document end."""
    run = tmp_path / "run"
    train(small_run(text_file, run, steps=6, document_end="<sep><cls></s>"))
    first, last = checkpoints(run / "checkpoints")
    for source in (first, last, run / "final"):
        out = tmp_path / f"{source.name}-copy"
        assert export(source, out) == MODEL
        model, tokenizer = load(str(out))
        assert model.fingerprint() == AnySubsetLM.from_pretrained(source).fingerprint()
        assert tokenizer.document_end == (4, 3, 2) and trained_length(model) == 16
        assert (out / "training_config.yaml").read_text() == (run / "config.yaml").read_text()
        assert_transformers_loads(out, model, tokenizer)
        assert capsys.readouterr().out.strip() == f"model: {out}"


def test_settings_of_the_tokenizer_are_stored(tmp_path, small):
    assert export(small, tmp_path / "out", "--whitespace_map", "code", "--document_end", "</s>") == MODEL[:-1]
    tokenizer = TextTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.whitespace_map, tokenizer.document_end) == ("code", (2,))
    other = tmp_path / "other"
    export(tmp_path / "out", other, "--tokenizer", "tiny-english")
    assert TextTokenizer.from_pretrained(other).whitespace_map is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere"], "no model 'nowhere'"),
        (["--model", "tiny-english", "--tokenizer", "nowhere"], "nowhere"),
        (["--model", "tiny-code", "--tokenizer", "tiny-english"], "8192 pieces"),
        (["--model", "tiny-english", "--dtype", "float16"], "dtype must be float32 or bfloat16, got 'float16'"),
        (["--model", "tiny-english", "--document_end", "end"], "document_end must be special tokens"),
    ],
)
def test_what_cannot_be_exported_is_named_and_leaves_nothing(words, message, tmp_path, capsys):
    assert main(["export", "--output_dir", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for there in (tmp_path, tmp_path / "file"):
        assert main(["export", "--model", "tiny-english", "--output_dir", str(there)]) == 2
        assert f"{str(there)!r} is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert "model.safetensors" in export("tiny-english", tmp_path / "empty")


def test_the_embedded_checkpoints_are_what_is_written(tmp_path):
    """The script that embeds a run's model writes the tokenizer's files as they are in the tree."""
    for name in ("tiny-english", "tiny-code"):
        model, tokenizer = AnySubsetLM.from_pretrained(name), TextTokenizer.from_pretrained(name)
        recipe = (ASSETS / name / "training_config.yaml").read_text()
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, model.half(), tokenizer, recipe)
        for file in ("tokenizer.json", "tokenizer_config.json", "training_config.yaml", "model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (ASSETS / name / file).read_bytes(), file
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert settings["document_end"] == "<eod>" and "whitespace_map" not in settings
        assert tokenizer.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
