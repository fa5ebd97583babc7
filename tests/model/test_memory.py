"""The memory estimate against what a process really takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model
from transformers import XLNetConfig

from asarm import AnySubsetLM
from asarm.density import ROW_MULTIPLE
from asarm.memory import STATE_BYTES, call_bytes, free_bytes, training_bytes
from asarm.train.config import MaskingConfig

TRAIN = """
import sys, psutil, torch
from transformers import XLNetConfig
from asarm import density
from asarm.engine import multiplies_bfloat16
from asarm.malloc import keep_freed_memory
from asarm.model import AnySubsetLM
from asarm.train import objective
from asarm.train.config import MaskingConfig, ObjectiveConfig
keep_freed_memory()
density.ROW_MULTIPLE = objective.ROW_MULTIPLE = int(sys.argv[1])
torch.manual_seed(0)
model = AnySubsetLM(XLNetConfig(vocab_size=2000, d_model=64, n_layer=2, n_head=2, d_inner=256)).train()
loss, masking = objective.Objective(model, ObjectiveConfig()), MaskingConfig(0.1, 0.99, 0.1, 0.99, 0)
for step in range(40):
    ids, indices = torch.randint(9, 2000, (8, 256)).numpy(), list(range(8 * step, 8 * step + 8))
    batch = objective.make_batch(ids, indices, step, 8, masking, ObjectiveConfig(), 0)
    with torch.autocast('cpu', torch.bfloat16, enabled=multiplies_bfloat16(model.device)): loss(batch).backward()
    model.zero_grad()
    if step in (9, 39): print(psutil.Process().memory_info().rss)
"""
MEASURE = """
import sys, threading, time, psutil, torch
sys.path.insert(0, {tests!r})
from conftest import make_model, random_batch
from asarm.density import PROJECTION_ROWS, conditional_log_probs
from asarm.memory import call_bytes, training_bytes
from asarm.train.config import ObjectiveConfig
from asarm.train.objective import Batch, Objective
B, N, kind = {batch}, {length}, {kind!r}
sizes = dict(d_model=128, n_head=4, d_inner=512, n_layer=4, dropout=0.1)
model = make_model(vocab_size=8000, spread=0.02, **sizes)
ids_BN, order = random_batch(8000, B, N)
order = type(order).from_visible(order.rank_BN < N // 20)
process, peak, done = psutil.Process(), 0, False
moments_and_copy = model.num_parameters() * 12  # none are made here
start = process.memory_info().rss

def watch():
    global peak
    while not done:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
if kind == "density":
    conditional_log_probs(model, ids_BN, order)
    estimate = call_bytes(model, B, N, 2 * N, min(PROJECTION_ROWS, B * N))
else:
    ones_B = torch.ones(B)
    batch = Batch(ones_B, ids_BN, order, order.n_visible_B, ones_B)
    model.recompute = kind == "recompute"
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        loss = Objective(model.train(), ObjectiveConfig())(batch)
    loss.backward()
    estimate = training_bytes(model, B, N) - moments_and_copy
done = True
thread.join()
print(estimate / (peak - start))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "batch", "length"),
    [("density", 4, 512), ("density", 1, 1024), ("fp32", 2, 512), ("bf16", 4, 256), ("recompute", 4, 512)],
)
def test_the_estimate_is_of_the_right_size(kind, batch, length):
    """Every array has pages of its own, so that what malloc keeps for later is not counted."""
    script = MEASURE.format(tests=str(Path(__file__).parents[1]), batch=batch, length=length, kind=kind)
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert 0.9 < float(done.stdout) < 2.5, "estimated over measured"


def test_what_training_needs_depends_on_its_settings():
    model = make_model(vocab_size=800, n_layer=12)
    whole = training_bytes(model, 8, 512)
    assert training_bytes(model, 8, 512, masked=0.25) == pytest.approx(whole * 1.25 / 2, rel=0.05)
    state = whole - training_bytes(model, 8, 512, n_shards=4)
    assert state == pytest.approx(model.num_parameters() * STATE_BYTES * 3 / 4)
    model.recompute = True
    assert training_bytes(model, 8, 512) < whole / 4


@pytest.mark.parametrize(
    ("recipe", "gib"), [("nlp_paper", 16), ("code_paper", 16), ("stories_60_75", 40), ("code_single_line", 40)]
)
def test_the_papers_recipes_fit_the_gpus_that_they_name(recipe, gib):
    """XLNet-base, with a tenth of the memory left for the driver and the allocator."""
    file = Path(__file__).parents[2] / "configs" / "train" / f"{recipe}.yaml"
    settings = yaml.safe_load(file.read_text())
    masking, rows = MaskingConfig(**settings["masking"]), settings["optimizer"]["rows_per_pass"]
    with torch.device("meta"):
        model = AnySubsetLM(XLNetConfig(d_model=768, n_layer=12, n_head=12, d_inner=3072))
    masked = max(masking.start_high, masking.final_high)
    need = training_bytes(model, rows, settings["data"]["max_length"], masked) + model.num_parameters() * 4
    assert need < 0.9 * gib * 1e9


def test_the_estimate_grows_as_it_should():
    model = make_model(vocab_size=8000)
    one = call_bytes(model, 1, 256, 512, 0)
    assert call_bytes(model, 8, 256, 512, 0) < 8 * one
    assert call_bytes(model, 8, 256, 512, 10) == call_bytes(model, 8, 256, 512, 0), "attention takes more than that"
    projection = call_bytes(model, 8, 256, 512, 2000) - call_bytes(model, 8, 256, 512, 1000)
    assert projection == call_bytes(model, 1, 256, 512, 2000) - call_bytes(model, 1, 256, 512, 1000) > 0, "of the batch"
    assert free_bytes(model.device) > 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults with Linux's getrusage")
def test_freed_memory_is_kept_until_it_is_released():
    script = (
        "import resource, sys, torch; from asarm.malloc import keep_freed_memory, release_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    torch.zeros(2**24).add_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "def fewest(): return min(faults() for _ in range(8))\n"
        "default = fewest(); keep_freed_memory(); kept = fewest(); release_freed_memory()\n"
        "print(default, kept, faults())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    default, kept, released = map(int, done.stdout.split())
    assert default > 10_000 > 100 > kept, "of 16,384 pages of 4 KiB"
    assert released > 10_000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_training_on_ever_new_numbers_of_targets_keeps_its_size():
    """What is held after 40 steps, by what was held after 10 (measured: 1.03; without padding 1.64 with bfloat16
    products, 1.09 on processors that have none)."""

    def growth(multiple: int) -> float:
        command = [sys.executable, "-c", TRAIN, str(multiple)]
        early, late = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        return late / early

    assert growth(ROW_MULTIPLE) < 1.15
    if (unpadded := growth(1)) < 1.3:
        pytest.skip(f"it keeps its size, but without padding this processor lets it grow by {unpadded:.2f} only")
