"""Any checkpoint of a run is a model: by its folder's name, wherever a model is named."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import assert_same_tokenizer
from training_runs import small_run
from transformers import AutoTokenizer

from asarm import AnySubsetLM, TextTokenizer
from asarm.cli import main
from asarm.config import DataConfig
from asarm.errors import CheckpointMismatchError, ModelNotFoundError
from asarm.loading import load, trained_length
from asarm.runlog import restore_folder, whole_folder
from asarm.train.checkpoint import checkpoints, load_checkpoint
from asarm.train.config import MaskingConfig, OptimizerConfig
from asarm.train.draft_head import train_draft_head
from asarm.train.head_config import HeadConfig, TrainHeadConfig, WindowConfig
from asarm.train.model import train


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of 12 steps with checkpoints after 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("finished")
    text = folder / "text.txt"
    text.write_text("The cat sat on the mat. A dog ran to the park. The sun was warm. She gave him a red apple. " * 20)
    train(small_run(text, folder / "run", keep_checkpoints=3, optimizer={"ema_decay": 0.8}))
    return folder / "run"


@pytest.fixture
def copied(run, tmp_path) -> Path:
    """A checkpoint to be changed."""
    return Path(shutil.copytree(checkpoints(run / "checkpoints")[0], tmp_path / "step-0000005"))


def test_a_checkpoint_is_the_model_of_its_step(run):
    """The moving average, which final/ holds too; nothing of it is stored twice."""
    first, _, last = checkpoints(run / "checkpoints")
    files = ["config.json", "state.pt", "tokenizer.json", "tokenizer_config.json", "training_config.yaml"]
    assert sorted(p.name for p in first.iterdir()) == files
    model, final = AnySubsetLM.from_pretrained(first), AnySubsetLM.from_pretrained(run / "final")
    average = load_checkpoint(first)["average"]
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, average[f"module.model.{name}"]), name
    assert model.fingerprint() != final.fingerprint() == AnySubsetLM.from_pretrained(last).fingerprint()
    assert model.name_or_path == str(first) and trained_length(model) == 16
    assert AnySubsetLM.from_pretrained(first, dtype=torch.bfloat16).fingerprint() == model.fingerprint()


def test_without_an_average_the_weights_themselves_are_read(text_file, tmp_path):
    train(small_run(text_file, tmp_path / "run", steps=2))
    (saved,) = checkpoints(tmp_path / "run" / "checkpoints")
    weights = load_checkpoint(saved)["model"]
    for name, parameter in AnySubsetLM.from_pretrained(saved).state_dict().items():
        assert torch.equal(parameter, weights[f"model.{name}"]), name


def test_infill_score_and_evaluations_take_a_checkpoint(run, text_file, tmp_path, capsys):
    name = str(checkpoints(run / "checkpoints")[0])
    assert main(["infill", "--model", name, "--text", "The cat <mask:2> the mat."]) == 0
    text = capsys.readouterr().out
    assert text.startswith("The cat") and text.rstrip().endswith("the mat.")
    scored = {}
    for model in (name, str(run / "final")):
        assert main(["score", "--model", model, "--text", "The cat sat.", "--json"]) == 0
        scored[model] = json.loads(capsys.readouterr().out)["log_prob"]
    assert len(set(scored.values())) == 2
    evaluation = ["eval", "speculative", "--model", name, "--data_file", str(text_file), "--num_sequences", "2"]
    evaluation += ["--max_length", "16", "--samplers", "sequential", "--output_dir", str(tmp_path / "eval"), "--json"]
    assert main(evaluation) == 0
    assert json.loads(capsys.readouterr().out)["config"]["model"] == name


def test_training_begins_at_a_checkpoint_and_so_does_that_of_a_draft_head(run, text_file, tmp_path):
    name = str(checkpoints(run / "checkpoints")[0])
    tuned = small_run(text_file, tmp_path / "tuned", steps=1, model=name, architecture={}, optimizer={"lr": 1e-12})
    after = AnySubsetLM.from_pretrained(train(replace(tuned, tokenizer=None))).state_dict()
    before = AnySubsetLM.from_pretrained(name).state_dict()
    assert all(torch.allclose(after[key], before[key], atol=1e-6) for key in before)
    head = TrainHeadConfig(
        output_dir=str(tmp_path / "head"),
        model=name,
        head=HeadConfig(width=8, n_head=2, rank=4),
        data=DataConfig(files=[str(text_file)], max_length=16),
        masking=MaskingConfig(0.5, 0.9, 0.5, 0.9, 0),
        windows=WindowConfig(k=3, per_row=2),
        optimizer=OptimizerConfig(steps=1, rows_per_step=1, rows_per_pass=1, precision="fp32"),
    )
    made = json.loads((train_draft_head(head) / "draft_head" / "config.json").read_text())
    assert made["trunk_fingerprint"] == AnySubsetLM.from_pretrained(name).fingerprint()


def test_auto_tokenizer_loads_every_folder_of_a_run(run):
    for folder in (*checkpoints(run / "checkpoints"), run / "final"):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert_same_tokenizer(theirs, TextTokenizer.from_pretrained(folder))
        assert theirs.model_max_length == 16


def change(state: Path, how) -> None:
    saved = torch.load(state, weights_only=True)
    how(saved)
    torch.save(saved, state)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda state: state["average"].pop("module.model.lm_loss.bias"), r"missing_keys.*lm_loss.bias"),
        (lambda state: state["average"].update({"module.model.other": torch.ones(2)}), r"unexpected_keys.*other"),
        (
            lambda state: state["average"].update({"module.model.lm_loss.bias": torch.ones(2)}),
            r"mismatched_keys.*lm_loss.bias",
        ),
        (lambda state: [state.pop(key) for key in ("average", "model")], "no state of a training run"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_refused(copied, how, message):
    change(copied / "state.pt", how)
    with pytest.raises(CheckpointMismatchError, match=message):
        AnySubsetLM.from_pretrained(copied)


def test_a_damaged_or_incomplete_checkpoint_is_named(copied):
    whole = (copied / "state.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive"):
        (copied / "state.pt").write_bytes(damaged)
        with pytest.raises(CheckpointMismatchError, match=r"step-0000005/state.pt is no state of a training run"):
            AnySubsetLM.from_pretrained(copied)
    (copied / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="step-0000005"):
        load(str(copied))


def test_the_recipe_lies_beside_the_weights(run):
    settings = (run / "config.yaml").read_text()
    for folder in (*checkpoints(run / "checkpoints"), run / "final"):
        assert (folder / "training_config.yaml").read_text() == settings


def test_replacing_a_folder_leaves_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    """Killed at any of the two renamings: after ``restore_folder`` one of the two is there, whole."""
    final, replace_ = tmp_path / "best", os.replace
    with whole_folder(final) as folder:
        (folder / "a").write_text("old")
    for survives in (0, 1):
        calls = []

        def killed(source, target, survives=survives, calls=calls):
            if len(calls) == survives:
                raise KeyboardInterrupt
            calls.append(target)
            replace_(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt), whole_folder(final) as folder:
            (folder / "a").write_text("new")
        monkeypatch.setattr(os, "replace", replace_)
        assert final.exists() == (survives == 0)
        restore_folder(final)
        assert (final / "a").read_text() == "old"
    with whole_folder(final) as folder:
        (folder / "a").write_text("new")
    restore_folder(final)
    assert (final / "a").read_text() == "new" and sorted(p.name for p in tmp_path.iterdir()) == ["best"]
