"""The memory estimate against what a process really takes."""

import subprocess
import sys

import pytest
from conftest import make_model

from asarm.memory import call_bytes, free_bytes

MEASURE = """
import sys, threading, time, psutil, torch
sys.path.insert(0, {tests!r})
from conftest import make_model, random_batch
from asarm.density import PROJECTION_ROWS, conditional_log_probs
from asarm.memory import call_bytes, training_bytes
from asarm.train.config import ObjectiveConfig
from asarm.train.objective import Batch, Objective
B, N, kind = {batch}, {length}, {kind!r}
model = make_model(vocab_size=8000, d_model=128, n_head=4, d_inner=512, n_layer=4, spread=0.02)
ids_BN, order = random_batch(8000, B, N)
order = type(order).from_visible(order.rank_BN < N // 20)
process, peak, done = psutil.Process(), 0, False
weights = sum(p.numel() for p in model.parameters()) * 4
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
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        loss = Objective(model.train(), ObjectiveConfig())(batch)
    loss.backward()
    estimate = training_bytes(model, B, N) - 3 * weights  # the weights are there already, the optimiser is not
done = True
thread.join()
print(estimate / (peak - start))
"""


@pytest.mark.parametrize(
    ("kind", "batch", "length"), [("density", 4, 512), ("density", 1, 1024), ("fp32", 2, 512), ("bf16", 4, 256)]
)
def test_the_estimate_is_of_the_right_size(kind, batch, length):
    script = MEASURE.format(tests=str(__file__).rpartition("/")[0], batch=batch, length=length, kind=kind)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 0.7 < float(done.stdout) < 3, "estimated over measured"


def test_the_estimate_grows_as_it_should():
    model = make_model(vocab_size=8000)
    one = call_bytes(model, 1, 256, 512, 0)
    assert call_bytes(model, 8, 256, 512, 0) < 8 * one
    assert call_bytes(model, 8, 256, 512, 10) == call_bytes(model, 8, 256, 512, 0), "attention takes more than that"
    projection = call_bytes(model, 8, 256, 512, 2000) - call_bytes(model, 8, 256, 512, 1000)
    assert projection == call_bytes(model, 1, 256, 512, 2000) - call_bytes(model, 1, 256, 512, 1000) > 0, "of the batch"
    assert free_bytes(model.device) > 2**20
