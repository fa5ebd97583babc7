"""The draft head: steps against the teacher-forced form, what it may depend on, its file, and its training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model, random_batch
from safetensors.torch import load_file
from test_train import write_text

from asarm import AnySubsetLM, Law, Order, conditional_log_probs
from asarm.cli import main
from asarm.config import DataConfig
from asarm.draft_head import DraftHead, distance_to_previous, find_draft_head, previous_ids
from asarm.drafter import Drafter
from asarm.errors import CheckpointMismatchError, ConfigError, DataFileError, MemoryBudgetError, ModelNotFoundError
from asarm.orders import Rows, content_limit
from asarm.train import draft_head as training
from asarm.train.config import MaskingConfig, OptimizerConfig
from asarm.train.draft_head import divergences, head_losses, make_windows, train_draft_head, window_rows
from asarm.train.head_config import HeadConfig, HeldOutConfig, TrainHeadConfig, WindowConfig

SHAPE = {"width": 8, "n_head": 2, "rank": 6}


def random_head(trunk: AnySubsetLM, seed=0, **shape) -> DraftHead:
    """A head that says anything at all: every parameter drawn, the correction included."""
    torch.manual_seed(seed)
    head = DraftHead.for_trunk(trunk, **SHAPE | shape).to(trunk.dtype).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.5)
    return head


def random_round(trunk: AnySubsetLM, B=3, K=5, first_missing=0, seed=1) -> tuple:
    """The arguments of ``DraftHead.forward`` for a random round."""
    generator = torch.Generator().manual_seed(seed)
    states_BKE = torch.randn(B, K, trunk.config.d_model, generator=generator)
    ids_BK = torch.randint(trunk.config.vocab_size, (B, K), generator=generator)
    distance_BK = torch.randint(-20, 20, (B, K), generator=generator)
    missing_BK = (first_missing + torch.arange(K)).expand(B, K)
    return states_BKE, trunk.logits(states_BKE).detach(), ids_BK, distance_BK, missing_BK


@pytest.fixture(scope="module")
def trunk() -> AnySubsetLM:
    return make_model(vocab_size=30)


@pytest.mark.parametrize("K", [1, 5, 20])  # 20: more missing tokens than the head tells apart
@pytest.mark.parametrize("first_missing", [0, 1])
@torch.no_grad()
def test_steps_equal_the_teacher_forced_form(trunk, K, first_missing):
    head = random_head(trunk)
    states_BKE, base_BKV, ids_BK, distance_BK, missing_BK = random_round(trunk, K=K, first_missing=first_missing)
    whole_BKV = head(states_BKE, base_BKV, ids_BK, distance_BK, missing_BK)
    steps = Drafter(head).begin(states_BKE, base_BKV, distance_BK, first_missing)
    one_by_one_BKV = torch.stack([steps.step(j, ids_BK[:, j]) for j in range(K)], dim=1)
    assert torch.allclose(one_by_one_BKV, whole_BKV, atol=1e-5)
    assert (first_missing == 0 and K == 1) or (whole_BKV - base_BKV).abs().max() > 0.5, "the head did speak"


@torch.no_grad()
def test_an_untrained_head_is_the_self_draft_and_any_head_leaves_exact_logits_alone(trunk):
    arguments = random_round(trunk)
    assert torch.equal(DraftHead.for_trunk(trunk, **SHAPE)(*arguments), arguments[1])
    assert torch.equal(random_head(trunk)(*arguments)[:, 0], arguments[1][:, 0])  # nothing is missing in row 0


@pytest.mark.parametrize("which", [0, 2, 3])  # states, tokens, distances
@torch.no_grad()
def test_a_row_depends_on_what_is_drafted_up_to_it_and_on_nothing_later(trunk, which):
    head, arguments = random_head(trunk), list(random_round(trunk, first_missing=1))
    before = head(*arguments)
    for j in range(5):
        changed = [x.clone() for x in arguments]
        changed[which][:, j] = (changed[which][:, j] + 1) % 7
        after = head(*changed)
        assert torch.equal(after[:, :j], before[:, :j])
        differs_BK = (after - before).abs().amax(-1) > 1e-6
        assert differs_BK[:, j:].all(), "and every row from there on does depend on it"


@torch.no_grad()
def test_distances_and_missing_tokens_are_clipped(trunk):
    head, (states, base, ids, distance, missing) = random_head(trunk), random_round(trunk, first_missing=1)
    far, farther = torch.full_like(distance, 8), torch.full_like(distance, 100)
    assert torch.equal(head(states, base, ids, far, missing), head(states, base, ids, farther, missing))
    assert torch.equal(head(states, base, ids, -far, missing), head(states, base, ids, -farther, missing))
    assert not torch.equal(head(states, base, ids, far, missing), head(states, base, ids, -far, missing))
    most = torch.full_like(missing, 15)
    assert torch.equal(head(states, base, ids, far, most), head(states, base, ids, far, most + 5))


def test_what_precedes_a_rank():
    ids_BN, order = random_batch(30, B=4, N=7, lengths=[7, 7, 5, 6])
    rank_BK = torch.tensor([[0, 1, 2, 6], [3, 4, 5, 6], [1, 2, 3, 4], [0, 5, 6, 7]])
    distance_BK = distance_to_previous(order, rank_BK)
    previous_BK = previous_ids(ids_BN, order, rank_BK, none_id=29)
    for b in range(4):
        for k in range(4):
            rank = int(rank_BK[b, k])
            if rank == 0:
                assert (distance_BK[b, k], previous_BK[b, k]) == (0, 29)
            elif rank < 7:  # a rank past the end is never used
                before, here = order.order_BN[b, rank - 1], order.order_BN[b, rank]
                assert (distance_BK[b, k], previous_BK[b, k]) == (here - before, ids_BN[b, before])


@pytest.mark.parametrize("half", [False, True])
def test_saved_and_loaded(trunk, tmp_path, half):
    head, arguments = random_head(trunk), random_round(trunk)
    trunk.save_pretrained(tmp_path)
    (head.half() if half else head).save_pretrained(tmp_path)
    assert sorted(p.name for p in (tmp_path / "draft_head").iterdir()) == ["config.json", "model.safetensors"]
    again = AnySubsetLM.from_pretrained(tmp_path)  # the head's folder does not disturb the trunk's
    loaded = find_draft_head(tmp_path, again)
    assert loaded.dtype == torch.float32 and not loaded.training
    assert torch.equal(loaded(*arguments), head.float()(*arguments))
    loaded.save_pretrained(tmp_path / "copy")
    assert torch.equal(DraftHead.from_pretrained(tmp_path / "copy", again)(*arguments), loaded(*arguments))


def test_a_head_for_another_trunk_is_refused_and_none_is_no_error(trunk, tmp_path):
    assert find_draft_head(tmp_path, trunk) is None
    with pytest.raises(ModelNotFoundError, match="train-draft-head"):
        DraftHead.from_pretrained(tmp_path, trunk)
    random_head(trunk).save_pretrained(tmp_path)
    other = make_model(vocab_size=30, seed=1)
    for load in (find_draft_head, DraftHead.from_pretrained):
        with pytest.raises(CheckpointMismatchError, match=f"{trunk.fingerprint()}.*{other.fingerprint()}"):
            load(tmp_path, other)
    weights = tmp_path / "draft_head" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointMismatchError, match="broken"):
        find_draft_head(tmp_path, trunk)


def test_parameters_that_the_config_does_not_describe_are_named(trunk, tmp_path):
    random_head(trunk).save_pretrained(tmp_path)
    file = tmp_path / "draft_head" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank": 5}))
    with pytest.raises(CheckpointMismatchError, match=r"vocabulary\.weight"):
        find_draft_head(tmp_path, trunk)


@pytest.mark.parametrize("shape", [{"n_head": 3}, {"rank": 17}])
def test_impossible_shapes(trunk, shape):
    with pytest.raises(ConfigError, match="draft head needs"):
        DraftHead.for_trunk(trunk, **SHAPE | shape)


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
        assert torch.allclose(trunk.logits(alone_B1E)[used_B, 0], base_BQV[used_B, q], atol=1e-5)


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
