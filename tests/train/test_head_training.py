"""Training a draft head: its windows, its loss, its runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, random_batch
from safetensors.torch import load_file
from test_draft_head import SHAPE, random_head
from training_runs import write_text

from asarm import AnySubsetLM, Law, Order, conditional_log_probs
from asarm.cli import main
from asarm.config import DataConfig
from asarm.draft_head import DraftHead
from asarm.errors import CheckpointMismatchError, ConfigError, DataFileError, MemoryBudgetError, ModelNotFoundError
from asarm.orders import Rows, content_limit
from asarm.pretrained import parameters_fingerprint
from asarm.train import draft_head as training
from asarm.train.checkpoint import checkpoints, load_checkpoint
from asarm.train.config import MaskingConfig, OptimizerConfig
from asarm.train.draft_head import divergences, head_losses, make_windows, train_draft_head, window_rows
from asarm.train.head_config import HeadConfig, HeldOutConfig, TrainHeadConfig, WindowConfig


@pytest.fixture(scope="module")
def trunk() -> AnySubsetLM:
    return make_model(vocab_size=30)


def windows_of(trunk, B=4, N=12, W=6, k=4) -> tuple:
    ids_BN, order = random_batch(30, B, N, seed=3)
    uniform_BW = torch.rand(B, W, generator=torch.Generator().manual_seed(4))
    return ids_BN, order, uniform_BW, window_rows(order, uniform_BW, k), k


def test_window_states_see_the_settled_tokens_and_teachers_all_that_precedes(trunk):
    ids_BN, order, uniform_BW, rows, k = windows_of(trunk)
    windows = make_windows(trunk, ids_BN, order, uniform_BW, k)
    exact_BN = conditional_log_probs(trunk, ids_BN, order)
    position_BQ = rows.position_BR.clamp(max=ids_BN.shape[1] - 1)
    teacher_BQV = windows.teacher_logits_XKV.double().log_softmax(-1).view(*position_BQ.shape, -1)
    teacher_BQ = teacher_BQV.gather(-1, ids_BN.gather(1, position_BQ)[..., None]).squeeze(-1)
    assert torch.allclose(teacher_BQ[rows.valid_BR], exact_BN.gather(1, position_BQ)[rows.valid_BR], atol=1e-5)

    base_BQV = windows.base_logits_XKV.view(*position_BQ.shape, -1)
    limit_BQ = rows.rank_BR - windows.missing_XK.view_as(rows.rank_BR)
    for q in rows.valid_BR.any(0).nonzero().flatten().tolist():
        hidden_BN = ids_BN.where(order.rank_BN < limit_BQ[:, q, None], (ids_BN + 1) % 30)
        one = Rows(*(x_BQ[:, q : q + 1] for x_BQ in vars(rows).values()))
        alone_B1E = trunk(
            hidden_BN,
            torch.cat([torch.arange(ids_BN.shape[1]).expand_as(ids_BN), one.position_BR], dim=1),
            torch.cat([content_limit(order, order.rank_BN), limit_BQ[:, q : q + 1]], dim=1),
            order.rank_BN,
        )
        used_B = rows.valid_BR[:, q]
        alone_BV = trunk.logits(alone_B1E)[:, 0]  # float32, around 6
        assert torch.allclose(alone_BV[used_B], base_BQV[used_B, q], atol=1e-4)


def test_windows_are_of_both_kinds_and_start_after_the_prompt(trunk):
    _, order, uniform_BW, rows, k = windows_of(trunk, W=40)
    first_BW = rows.rank_BR.view(*uniform_BW.shape, k)[..., 0]
    settled_BW = first_BW - torch.arange(40) % 2
    assert (settled_BW >= order.n_visible_B[:, None]).all() and (settled_BW < order.length_B[:, None]).all()
    assert all(len(settled.unique()) > 2 for settled in settled_BW)
    missing_BWK = (rows.rank_BR - rows.limit_BR).where(rows.valid_BR, -1).view(*uniform_BW.shape, k)
    assert set(missing_BWK[:, ::2].unique().tolist()) == {-1, 0, 1, 2, 3}
    assert set(missing_BWK[:, 1::2].unique().tolist()) == {-1, 1, 2, 3, 4}
    assert rows.rank_BR[rows.valid_BR].max() == 11


def test_divergences_are_those_of_the_law_that_is_sampled_from():
    teacher, draft = torch.randn(2, 50, 30).mul(2).unbind()
    kl, tv = divergences(teacher, draft, banned_id=6)
    law = Law(banned_ids=(6,))
    t, d = law.probs(teacher), law.probs(draft)
    assert torch.allclose(1 - tv.double(), torch.minimum(t, d).sum(-1), atol=1e-6)
    allowed = [i for i in range(30) if i != 6]
    assert torch.allclose(kl.double(), (t * (t / d).log())[:, allowed].sum(-1), atol=1e-5)


@pytest.fixture
def head_run(tmp_path) -> TrainHeadConfig:
    """A run on a small random trunk."""
    make_model(vocab_size=8192, mask_token_id=6, spread=0.3).save_pretrained(tmp_path / "trunk")
    return TrainHeadConfig(
        output_dir=str(tmp_path / "run"),
        model=str(tmp_path / "trunk"),
        tokenizer="tiny-english",
        head=HeadConfig(**SHAPE),
        data=DataConfig(files=[str(write_text(tmp_path / "text.jsonl"))], max_length=16),
        masking=MaskingConfig(0.5, 0.9, 0.5, 0.9, 0),
        windows=WindowConfig(k=3, per_row=4, kl_steps=20),
        optimizer=OptimizerConfig(
            lr=2e-2, steps=12, warmup_steps=2, rows_per_step=4, rows_per_pass=2, precision="fp32"
        ),
        held_out=HeldOutConfig(file=str(tmp_path / "text.jsonl"), rows=4, masked_fractions=[0.75], every=6),
        checkpoint_every=5,
        log_every=1,
    )


def records(config: TrainHeadConfig, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(config.output_dir) / name).read_text().splitlines()]


def test_training_raises_acceptance_and_the_head_loads(head_run):
    """On the embedded model; a random trunk has little that a drafted token could tell the next."""
    optimizer = replace(head_run.optimizer, lr=1e-2, steps=25, precision="auto")
    config = replace(head_run, model="tiny-english", head=HeadConfig(64, 2, 32), optimizer=optimizer)
    final = train_draft_head(config)
    held_out = records(config, "held_out.jsonl")
    assert [r["step"] for r in held_out] == [0, 6, 12, 18, 24, 25]
    first, last = held_out[0], held_out[-1]
    assert first["two_pass"][0] == last["two_pass"][0] == pytest.approx(1)  # nothing is missing there
    assert sum(last["two_pass"][1:]) > sum(first["two_pass"][1:]) + 0.1
    assert sum(last["one_pass"]) > sum(first["one_pass"]) + 0.3
    curve = records(config, "metrics.jsonl")
    assert curve[0]["loss"] == pytest.approx(curve[0]["kl"])
    assert curve[-1]["loss"] == pytest.approx(curve[-1]["total_variation"])
    head = DraftHead.from_pretrained(final, AnySubsetLM.from_pretrained("tiny-english"))
    assert head.correction.weight.abs().max() > 0


@pytest.mark.parametrize("stop_at", [2, 8])  # before the first checkpoint and after it
def test_resume_equals_an_uninterrupted_run_bit_for_bit(head_run, tmp_path, monkeypatch, stop_at):
    whole = train_draft_head(replace(head_run, output_dir=str(tmp_path / "whole")))
    original = training.make_batch

    def interrupted(rows_BN, indices, step, *arguments):
        if step == stop_at:
            raise KeyboardInterrupt
        return original(rows_BN, indices, step, *arguments)

    monkeypatch.setattr(training, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_draft_head(head_run)
    monkeypatch.setattr(training, "make_batch", original)
    parts = train_draft_head(replace(head_run, resume="auto"))
    first, second = (load_file(folder / "draft_head" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(first[key], second[key]) for key in first)
    for name in ("metrics.jsonl", "held_out.jsonl"):
        ours, theirs = (records(c, name) for c in (head_run, replace(head_run, output_dir=str(tmp_path / "whole"))))
        drop = {"tokens_per_second": 0, "memory_gib": 0, "seconds_left": 0}
        assert [r | drop for r in ours] == [r | drop for r in theirs], "steps that were run again are logged once"


def test_gradients_do_not_depend_on_how_the_batch_is_split(trunk, head_run):
    ids_BN, _, uniform_BW, _, _ = windows_of(trunk)
    order, head = Order.from_visible(torch.rand(ids_BN.shape) < 0.3), random_head(trunk)
    results = []
    for size in (1, len(ids_BN)):
        head.zero_grad()
        measured = dict.fromkeys(("loss", "kl", "total_variation"), 0.0)
        for first in range(0, len(ids_BN), size):
            part = slice(first, first + size)
            losses = head_losses(trunk, head, ids_BN[part], order.of(part), uniform_BW[part], 10, head_run.windows)
            losses["loss"].backward()
            measured = {key: value + losses[key].item() for key, value in measured.items()}
        results.append((measured, [p.grad.clone() for p in head.parameters()]))
    (one, one_grad), (all_, all_grad) = results
    assert one == pytest.approx(all_, rel=1e-5) and one["loss"] == pytest.approx(
        (one["kl"] + one["total_variation"]) / 2
    )
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one_grad, all_grad, strict=True))
    assert all(g.abs().max() > 0 for g in one_grad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: replace(c, data=replace(c.data, files=["nowhere.txt"])), DataFileError, "nowhere.txt"),
        (lambda c: replace(c, held_out=HeldOutConfig(file="nowhere.txt")), DataFileError, "nowhere.txt"),
        (lambda c: replace(c, data=replace(c.data, max_length=2000)), DataFileError, "less than one row"),
        (lambda c: replace(c, data=replace(c.data, max_length=100_000)), MemoryBudgetError, "100000 tokens"),
        (lambda c: replace(c, model="nowhere"), ModelNotFoundError, "nowhere"),
        (lambda c: replace(c, head=HeadConfig(rank=64)), ConfigError, "rank"),
        (lambda c: replace(c, head=HeadConfig(width=10)), ConfigError, "head.n_head"),
        (lambda c: replace(c, windows=WindowConfig(k=1)), ConfigError, "windows.k"),
        (lambda c: replace(c, windows=WindowConfig(per_row=1)), ConfigError, "windows.per_row"),
        (lambda c: replace(c, held_out=HeldOutConfig(masked_fractions=[0.0])), ConfigError, "masked_fractions"),
        (lambda c: replace(c, data=DataConfig()), ConfigError, "data.files"),
    ],
)
def test_errors_before_the_first_step(head_run, change, error, message):
    with pytest.raises(error, match=message):
        train_draft_head(change(head_run))


def test_a_head_may_start_as_that_of_another_trunk(head_run, tmp_path):
    """With a learning rate of next to nothing it ends as it began, made for the new trunk."""
    other = make_model(vocab_size=8192, mask_token_id=6, seed=5)
    start = random_head(other)
    start.save_pretrained(tmp_path / "other")
    slow = replace(head_run.optimizer, steps=1, lr=1e-12)
    final = train_draft_head(replace(head_run, start_from=str(tmp_path / "other"), optimizer=slow))
    trunk = AnySubsetLM.from_pretrained(head_run.model)
    assert trunk.fingerprint() != other.fingerprint()
    head = DraftHead.from_pretrained(final, trunk)
    for (name, expected), found in zip(start.state_dict().items(), head.state_dict().values(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6), name
    untrained, trained = records(head_run, "held_out.jsonl")
    assert untrained["step"] == 0 and untrained["one_pass"] != trained["one_pass"], (
        "what is measured first is the self draft"
    )


def test_any_checkpoint_of_a_run_is_a_draft_head(head_run, tmp_path):
    """The moving average where there is one; another head may start as it."""
    optimizer = replace(head_run.optimizer, ema_decay=0.8)
    train_draft_head(replace(head_run, optimizer=optimizer, keep_checkpoints=3))
    first, _, last = checkpoints(tmp_path / "run" / "checkpoints")
    trunk = AnySubsetLM.from_pretrained(head_run.model)
    average = load_checkpoint(first)["average"]
    head = DraftHead.from_pretrained(first, trunk)
    for name, parameter in head.state_dict().items():
        assert torch.equal(parameter, average[f"module.{name}"]), name
    final = DraftHead.from_pretrained(tmp_path / "run" / "final", trunk)
    assert parameters_fingerprint(DraftHead.from_pretrained(last, trunk)) == parameters_fingerprint(final)
    assert parameters_fingerprint(head) != parameters_fingerprint(final)
    assert (first / "draft_head" / "training_config.yaml").read_text() == (tmp_path / "run" / "config.yaml").read_text()
    slow = replace(head_run.optimizer, steps=1, lr=1e-12)
    again = replace(head_run, output_dir=str(tmp_path / "again"), start_from=str(first), optimizer=slow)
    begun = DraftHead.from_pretrained(train_draft_head(again), trunk).state_dict()
    assert all(torch.allclose(begun[name], value, atol=1e-6) for name, value in head.state_dict().items())
    with pytest.raises(CheckpointMismatchError, match="was trained for the model with fingerprint"):
        DraftHead.from_pretrained(first, make_model(vocab_size=8192, mask_token_id=6, seed=5))


@pytest.mark.parametrize(
    ("start_from", "error", "message"),
    [
        (
            "tiny-english",
            CheckpointMismatchError,
            "draft head of 'tiny-english': d_model 256, not 16, width 256, not 8",
        ),
        ("nowhere", ModelNotFoundError, "no draft head in 'nowhere'"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(head_run, start_from, error, message):
    with pytest.raises(error, match=message):
        train_draft_head(replace(head_run, start_from=start_from))


def test_the_command_trains_a_head_for_the_embedded_model(tmp_path, capsys):
    text = write_text(tmp_path / "text.jsonl")
    command = ["train-draft-head", "--output_dir", str(tmp_path / "run"), "--data.files", f"['{text}']"]
    command += ["--data.max_length", "16", "--optimizer.steps", "1", "--optimizer.rows_per_step", "1"]
    command += ["--optimizer.rows_per_pass", "1", "--windows.per_row", "2", "--head.width", "16", "--head.rank", "4"]
    assert main(command) == 0
    final = Path(capsys.readouterr().out.split(": ")[1].strip())
    trunk = AnySubsetLM.from_pretrained("tiny-english")
    assert final.name == "draft_head" and DraftHead.from_pretrained(final.parent, trunk).config.rank == 4
    assert main(command) == 2 and "--resume" in capsys.readouterr().err
