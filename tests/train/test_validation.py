"""Validation during training: what is measured on, which weights are kept as the best, which texts are kept."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import assert_same_tokenizer
from datasets import Dataset
from safetensors.torch import load_file
from training_runs import losses, small_run, stop_before
from transformers import AutoTokenizer

from asarm import AnySubsetLM, TextTokenizer
from asarm.data.sources import find_files, read_documents
from asarm.errors import ConfigError, DataFileError, OutputDirError
from asarm.loading import trained_length
from asarm.runlog import read_lines
from asarm.train import validation
from asarm.train.checkpoint import checkpoints, load_checkpoint
from asarm.train.config import TrainConfig, ValidationConfig
from asarm.train.head_config import TrainHeadConfig
from asarm.train.model import train
from asarm.train.validation import Validation, keep_if_best, prompt_text

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


def validated(text_file, out, **changes) -> TrainConfig:
    """A run that measures after every second step."""
    settings = {"rows": 3, "masked_fractions": [0.5, 0.9], "generations": 2, "every": 2} | changes.pop("validation", {})
    return small_run(text_file, out, steps=6, validation=ValidationConfig(file=str(text_file), **settings), **changes)


def with_nll(values: dict[int, float], monkeypatch) -> None:
    """Let the measured negative log-likelihoods be these, by the number of the measurement."""
    calls = []

    def at(model, rows, fraction, seed, batch_size):
        calls.append(fraction)
        return {"nll_per_token": values[(len(calls) - 1) // 2], "nll_per_token_se": 0.1}

    monkeypatch.setattr(validation, "likelihood_at", at)


def best_of(out: Path) -> tuple[int, float]:
    best = json.loads((out / "best" / "best.json").read_text())
    return best["step"], best["mean_nll"]


def test_the_best_weights_by_held_out_likelihood_are_kept(text_file, tmp_path, monkeypatch):
    with_nll({0: 5.0, 1: 3.0, 2: 4.0}, monkeypatch)
    out = tmp_path / "run"
    final = train(validated(text_file, out, checkpoint_every=2, keep_checkpoints=3))
    assert best_of(out) == (4, 3.0)
    second = load_checkpoint(checkpoints(out / "checkpoints")[1])
    best = AnySubsetLM.from_pretrained(out / "best")
    assert second["step"] == 4 and trained_length(best) == 16
    for name, parameter in best.state_dict().items():
        assert torch.equal(parameter, second["model"][f"model.{name}"]), name
    assert best.fingerprint() != AnySubsetLM.from_pretrained(final).fingerprint()
    assert_same_tokenizer(AutoTokenizer.from_pretrained(out / "best"), TextTokenizer.from_pretrained(out / "best"))
    measures = json.loads((out / "best" / "best.json").read_text())
    logged = read_lines(out / "validation.jsonl")
    assert [record["mean_nll"] for record in logged] == [5.0, 3.0, 4.0] and measures == logged[1]
    assert not list(out.glob(".*best")), "nothing half-written is left"


@pytest.mark.parametrize(("later", "kept"), [(3.5, (4, 3.0)), (2.5, (6, 2.5))])
def test_a_resumed_run_replaces_the_best_only_by_better_ones(text_file, tmp_path, monkeypatch, later, kept):
    with_nll({0: 5.0, 1: 3.0}, monkeypatch)
    run = validated(text_file, tmp_path / "run", checkpoint_every=4, resume="auto")
    stop_before(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert best_of(tmp_path / "run") == (4, 3.0)
    with_nll({0: later}, monkeypatch)
    train(run)
    assert best_of(tmp_path / "run") == kept


@pytest.mark.parametrize("stop_at", [3, 5])  # after one measurement, after two and a checkpoint
def test_resume_keeps_the_same_best_and_the_same_texts(text_file, tmp_path, monkeypatch, stop_at):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(validated(text_file, whole, checkpoint_every=4))
    run = validated(text_file, parts, checkpoint_every=4, resume="auto")
    stop_before(stop_at, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    train(run)
    assert losses(parts) == losses(whole)
    for name in ("validation.jsonl", "generations.jsonl", "best/best.json"):
        assert (parts / name).read_text() == (whole / name).read_text()
    first, second = (load_file(out / "best" / "model.safetensors") for out in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_that_begins_again_forgets_the_best_of_before(text_file, tmp_path, monkeypatch):
    with_nll({0: 1.0}, monkeypatch)
    run = validated(text_file, tmp_path / "run", checkpoint_every=100)
    stop_before(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert best_of(tmp_path / "run") == (2, 1.0) and not (tmp_path / "run" / "checkpoints").exists()
    with pytest.raises(OutputDirError, match="already holds a run"):
        train(run)
    with_nll({0: 4.0, 1: 3.0, 2: 5.0}, monkeypatch)
    train(replace(run, resume="auto"))
    assert best_of(tmp_path / "run") == (4, 3.0)


def test_the_best_folder_is_whole_or_as_it_was(tmp_path):
    def write(text):
        return lambda folder: (folder / "weights").write_text(text)

    def interrupted(folder):
        (folder / "weights").write_text("half")
        raise KeyboardInterrupt

    def no_room(folder):
        raise OSError(28, "No space left on device")

    best = tmp_path / "best"
    assert keep_if_best(best, 1, {"mean_nll": 2.0}, write("first"))
    with pytest.raises(OutputDirError, match=r"cannot write .*best: .*No space left.*go on with --resume auto"):
        keep_if_best(best, 2, {"mean_nll": 1.0}, no_room)
    with pytest.raises(KeyboardInterrupt):
        keep_if_best(best, 2, {"mean_nll": 1.0}, interrupted)
    assert (best / "weights").read_text() == "first" and best_of(tmp_path) == (1, 2.0)
    for not_better in (2.0, 3.0, float("nan"), float("inf")):
        assert not keep_if_best(best, 3, {"mean_nll": not_better}, write("worse"))
    assert not keep_if_best(best, 4, {"entropy": 1.0}, write("unmeasured"))
    assert keep_if_best(best, 5, {"mean_nll": 1.5}, write("better"))
    assert (best / "weights").read_text() == "better" and best_of(tmp_path) == (5, 1.5)


def test_generated_texts_are_kept_with_their_prompts(text_file, tmp_path):
    train(validated(text_file, tmp_path / "run", validation={"generation_masked_fraction": 0.5}))
    kept = read_lines(tmp_path / "run" / "generations.jsonl")
    assert [(r["step"], r["index"]) for r in kept] == [(2, 0), (2, 1), (4, 0), (4, 1), (6, 0), (6, 1)]
    assert [r["prompt"] for r in kept[:2]] * 3 == [r["prompt"] for r in kept], "the same masks every time"
    logged = read_lines(tmp_path / "run" / "validation.jsonl")
    for step, record in zip((2, 4, 6), logged, strict=True):
        for key in ("nfe_per_token", "entropy"):
            values = [r[key] for r in kept if r["step"] == step]
            assert record[key] == pytest.approx(sum(values) / 2)
    for record in kept:
        assert "<mask:" in record["prompt"] and "<mask" not in record["text"] and record["log_prob_per_token"] < 0


@pytest.mark.parametrize("name", ["tiny-english", "xlnet"])
def test_a_prompt_reads_as_the_text_with_gaps(name, data_dir):
    """And where a document ends there is a line break."""
    folder = data_dir / "tokenizers" / "xlnet-base-cased" if name == "xlnet" else name
    tokenizer = TextTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("The old dog ran to the park, and back.")
    visible = [i not in (2, 3, 6) for i in range(len(ids))]
    assert prompt_text(tokenizer, ids, visible) == "The old <mask:2> to the <mask:1>, and back."
    first, second = tokenizer.encode("The end."), tokenizer.encode("Once upon")
    joined = [*first, *tokenizer.document_end, *second]
    assert prompt_text(tokenizer, joined, [True] * len(joined)).split("\n") == ["The end.", "Once upon"]


@pytest.mark.slow
def test_texts_are_a_table_on_wandb(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(replace(validated(text_file, tmp_path / "run", validation={"every": 6}), wandb="asarm-test"))
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/table/generations_*.table.json")
    table = json.loads(file.read_text())
    kept = read_lines(tmp_path / "run" / "generations.jsonl")
    assert [{"step": 6} | dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == kept


def test_a_data_set_in_the_form_of_the_hubs_is_read(tmp_path):
    texts = [f"The dog number {i} ran home." for i in range(30)]
    Dataset.from_dict({"content": texts}).to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    tokenizer = TextTokenizer.from_pretrained("tiny-english")
    config = ValidationConfig(dataset=str(tmp_path), split="train", text_column="content", rows=4, generations=0)
    rows = Validation(config, tokenizer, 16).rows
    assert len(rows) == 4 and "The dog number 0 ran home." in tokenizer.decode(rows[0].tolist())
    with pytest.raises(DataFileError, match="no column 'text'"):
        Validation(replace(config, text_column="text"), tokenizer, 16)
    with pytest.raises(ConfigError, match="one of the two"):
        ValidationConfig(file="a.txt", dataset="wikitext")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_measures_on_text_that_it_does_not_train_on(path, data_dir, monkeypatch):
    monkeypatch.chdir(path.parents[2])
    recipe = yaml.safe_load(path.read_text())
    if "held_out" in recipe:
        held_out = find_files([recipe["held_out"]["file"]])
        assert "windows" in recipe and TrainHeadConfig.__dataclass_fields__.keys() >= recipe.keys()
    else:
        settings = ValidationConfig(**recipe["validation"])
        assert settings.given and set(recipe["validation"]) >= {"every"}
        held_out = find_files([settings.file]) if settings.file else []
        if settings.dataset in ("english-valid", "wikitext"):
            tokenizer = TextTokenizer.from_pretrained("tiny-english")
            assert len(Validation(settings, tokenizer, recipe["data"]["max_length"]).rows) == settings.rows
    trained_on = find_files(recipe["data"].get("files", []))
    assert not set(held_out) & set(trained_on)
    if trained_on and held_out:
        unseen, seen = ({d.text for f in files for d in read_documents(str(f))} for files in (held_out, trained_on))
        assert not unseen & seen
