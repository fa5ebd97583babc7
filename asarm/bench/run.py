"""``python -m asarm bench decode``: side by side in one run, as tables and as one line of JSON."""

from dataclasses import asdict

import torch

from ..engine import engine_of, warn_if_emulated
from ..loading import this_device
from ..runlog import provenance
from ..samplers import find_sampler
from .baselines import gpt2_token_seconds, xlnet_call_seconds
from .config import BenchDecodeConfig
from .decode import ACCEPTANCE_LENGTH, acceptance_of, cost, model_of, require_draft_heads, streaming_seconds
from .draft import draft_step_seconds
from .memory import memory_of


def bench(config: BenchDecodeConfig) -> dict:
    """Everything, in one run; returns what the last line of the output holds."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = this_device()
    for dtype in config.dtypes:
        warn_if_emulated(device, getattr(torch, dtype), "--dtypes float32")
    require_draft_heads(config)
    acceptance = acceptance_of(config)
    rows, draft_steps = [], []
    for dtype in config.dtypes:
        model = model_of(config, device, dtype)
        limits = streaming_seconds(model, engine_of(model, config.compile))
        baselines = {}
        if config.baseline:
            call = xlnet_call_seconds(model.config, config.length, config.k, device, model.dtype)
            baselines = {"uncached_call_seconds": call}
        for batch_size in config.batch_sizes:
            for name in config.samplers:
                row = {"dtype": dtype, "batch_size": batch_size, "sampler": name} | limits
                rows.append(row | cost(config, model, name, batch_size, acceptance[name]) | baselines)
                if find_sampler(name).drafts == "head" and not find_sampler(name).drafts_ahead:
                    steps = draft_step_seconds(model, config.k, batch_size)
                    call = {"call_seconds": rows[-1]["call_seconds"]}
                    draft_steps.append({"dtype": dtype, "batch_size": batch_size} | call | steps)
            if config.baseline:
                step = gpt2_token_seconds(config.length, batch_size, device, model.dtype)
                rows.append(
                    {"dtype": dtype, "batch_size": batch_size, "sampler": "gpt2-small, cached", "call_seconds": step}
                    | {"seconds_per_token": step / batch_size, "tokens_per_second": batch_size / step}
                )
        del model
    memory = [
        {"dtype": dtype, "length": length} | memory_of(config, device, dtype, length)
        for dtype in config.dtypes
        for length in config.memory_lengths
    ]
    return {
        "config": asdict(config),
        "acceptance": acceptance,
        "rows": rows,
        "draft_steps": draft_steps,
        "memory": memory,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }


def report(result: dict) -> str:
    """The tables, as Markdown."""
    config = result["config"]
    lines = [
        f"{config['size']}, {config['length']} positions, {config['masked_fraction']:.0%} masked, k = {config['k']}, "
        f"{result['threads']} CPU threads, {result['provenance']['device']}; calls per token from "
        f"{config['acceptance_model']} ({config['acceptance_sequences']} x {ACCEPTANCE_LENGTH} tokens)",
        "",
        "| dtype | batch | sampler | ms/call | call / streaming | uncached / call | NFE/token | ms/token | tokens/s "
        "| uncached / token |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        ours = "round_seconds" in row
        uncached = row.get("uncached_call_seconds")
        cells = [
            row["dtype"],
            row["batch_size"],
            row["sampler"],
            f"{1e3 * row['call_seconds']:.1f}",
            f"{row['call_seconds'] / row['streaming_seconds']:.2f}" if ours else "",
            f"{uncached / row['call_seconds']:.1f}" if uncached else "",
            f"{row['nfe_per_token']:.3f}" if ours else "1.000",
            f"{1e3 * row['seconds_per_token']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{uncached * row['nfe_per_token'] / row['seconds_per_token']:.1f}" if uncached else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for dtype in config["dtypes"]:
        of_dtype = [row for row in result["rows"] if row["dtype"] == dtype and "streaming_seconds" in row]
        text = f"\n{dtype}: streaming the weights {1e3 * of_dtype[0]['streaming_seconds']:.1f} ms"
        text += f" (as the model stores them {1e3 * of_dtype[0]['stored_streaming_seconds']:.1f} ms)"
        if config["baseline"]:
            text += f", uncached Hugging Face call {1e3 * of_dtype[0]['uncached_call_seconds']:.0f} ms"
        lines.append(text)
    if result["draft_steps"]:
        lines += [
            "",
            f"A round's {config['k']} draft steps in ms (not compiled), by the rank of the head's correction:",
            "",
        ]
        lines += [
            "| dtype | batch | rank 128 | full | full, 8,192 tokens | rank 128 / call |",
            "|---|---|---|---|---|---|",
        ]
    for row in result["draft_steps"]:
        times = [f"{1e3 * row[key]:.1f}" for key in ("low_rank", "full", "frequent")]
        cells = [row["dtype"], row["batch_size"], *times, f"{row['low_rank'] / row['call_seconds']:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| dtype | positions | weights (MiB) | one sequence, peak (MiB) |", "|---|---|---|---|"]
    for row in result["memory"]:
        lines.append(f"| {row['dtype']} | {row['length']} | {row['weights'] / 2**20:.0f} | {row['peak'] / 2**20:.0f} |")
    return "\n".join(lines)
