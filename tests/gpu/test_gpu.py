"""What differs on a CUDA device; skipped without one."""

from dataclasses import replace

import pytest
import torch
from conftest import make_model, random_batch, with_random_head
from safetensors.torch import load_file
from training_runs import small_run, stop_before, write_text

from asarm import SamplerConfig, joint_log_prob, sample
from asarm.evals.config import SpeculativeConfig
from asarm.evals.speculative import evaluate
from asarm.samplers import SAMPLERS
from asarm.train.config import ObjectiveConfig
from asarm.train.model import train
from asarm.train.objective import Batch, Objective

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_tokens_as_on_the_cpu_in_float32(name, compile):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = with_random_head(make_model(vocab_size=12, spread=0.5))
    ids_BN, order = random_batch(12, 6, 14, seed=1, lengths=[14, 9, 14, 5, 12, 1])
    config = SamplerConfig.named(name, k=3, compile=compile)
    on_cpu = sample(model, ids_BN, order, replace(config, compile=False), seed=4)
    on_gpu = sample(model.cuda(), ids_BN, order, config, seed=4, batch_size=4)
    assert torch.equal(on_cpu.ids_BN, on_gpu.ids_BN.cpu())
    scores = joint_log_prob(model, on_gpu.ids_BN, order).cpu()
    assert torch.allclose(scores, joint_log_prob(model.cpu(), on_cpu.ids_BN, order), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_main_job_runs(dtype, tmp_path):
    config = SpeculativeConfig(dataset="samples", num_sequences=4, max_length=48, dtype=dtype, output_dir=str(tmp_path))
    rows = evaluate(config)["samplers"]
    assert all(row["nfe_per_token"] <= 1 for row in rows.values())


def test_loss_and_gradient_are_those_of_the_cpu():
    """Of rows whose length is no multiple of anything, one of them without a given token."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(vocab_size=30).train()
    ids_BN, order = random_batch(30, 4, 13, seed=1)
    batch = Batch(torch.arange(4), ids_BN, order, order.n_visible_B, torch.ones(4))
    found = {}
    for device in ("cpu", "cuda"):
        objective = Objective(model.to(device), ObjectiveConfig())
        loss = objective(batch.to(device))
        loss.backward()
        found[device] = [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
        model.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found.values(), strict=True))


def test_a_resumed_training_run_draws_the_same_dropout(tmp_path, monkeypatch):
    text = write_text(tmp_path / "text.jsonl")
    whole = train(small_run(text, tmp_path / "whole"))
    stop_before(8, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(small_run(text, tmp_path / "parts"))
    parts = train(small_run(text, tmp_path / "parts", resume="must"))
    first, second = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)
