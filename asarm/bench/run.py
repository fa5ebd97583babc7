"""``python -m asarm bench decode``: side by side in one run, as tables and as one line of JSON."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from tqdm import tqdm

from ..engine import engine_of
from ..loading import this_device
from ..runlog import provenance
from ..samplers import find_sampler
from .baselines import gpt2, gpt2_token_seconds, xlnet_call_seconds
from .config import POINTS, BenchDecodeConfig
from .decode import ACCEPTANCE_LENGTH, acceptance_of, cost, model_of, require_draft_heads, streaming_seconds
from .draft import draft_step_seconds, ways_to_draft
from .dtypes import timed_dtypes
from .memory import memory_of

FEW_ROWS = 16  # a call with fewer takes about as long


class Cell(NamedTuple):
    """A part of the benchmark: what it is, how much work it is (very roughly, in rows through the network, for the time
    that is left), and what does it."""

    label: str
    work: int
    run: Callable[..., None]
    arguments: tuple = ()


class Bench:
    """The benchmark's cells, and what those that have run have found."""

    def __init__(self, config: BenchDecodeConfig, device: torch.device):
        self.config, self.device = config, device
        self.acceptance: dict[str, dict] = {}
        self.rows: list[dict] = []
        self.draft_steps: list[dict] = []
        self.memory: list[dict] = []

    def cells(self) -> Iterator[Cell]:
        """In the order in which they are to run."""
        config = self.config
        yield Cell("acceptance", 400 * len(config.samplers), self._accept)
        for dtype in config.dtypes:
            yield Cell(f"{dtype}, models", 4000 + 8 * config.length * config.baseline, self._begin, (dtype,))
            for batch_size in config.batch_sizes:
                for name in config.samplers:
                    work = self._work_of_a_round(name, batch_size) * len(POINTS) * 6
                    yield Cell(f"{dtype}, batch {batch_size}, {name}", work, self._time_sampler, (batch_size, name))
                if config.baseline:
                    work = config.length + 50 * max(FEW_ROWS, batch_size)
                    yield Cell(f"{dtype}, batch {batch_size}, GPT-2", work, self._time_gpt2, (batch_size,))
        for dtype in config.dtypes:
            for length in config.memory_lengths:
                yield Cell(f"{dtype}, memory at {length}", 4000 + 4 * length, self._measure_memory, (dtype, length))

    def _work_of_a_round(self, name: str, batch_size: int) -> int:
        sampler, k = find_sampler(name), self.config.k
        rows = k * sampler.verifies + sampler.query_rows(k)
        return sampler.calls_per_round * max(FEW_ROWS, batch_size * rows)

    def _accept(self) -> None:
        self.acceptance = acceptance_of(self.config)

    def _begin(self, dtype: str) -> None:
        """Make the models of a type, and time what their rows are compared with."""
        config = self.config
        self.model = model_of(config, self.device, dtype)
        self.dtype, self.ways = dtype, None
        self.compared = streaming_seconds(self.model, engine_of(self.model, config.compile))
        if config.baseline:
            call = xlnet_call_seconds(self.model.config, config.length, config.k, self.device, self.model.dtype)
            self.compared |= {"uncached_call_seconds": call}
            self.gpt2 = gpt2(self.device, self.model.dtype)

    def _time_sampler(self, batch_size: int, name: str) -> None:
        at = {"dtype": self.dtype, "batch_size": batch_size}
        row = cost(self.config, self.model, name, batch_size, self.acceptance[name])
        self.rows.append(at | {"sampler": name} | self.compared | row)
        sampler = find_sampler(name)
        if sampler.drafts == "head" and not sampler.drafts_ahead:
            self.ways = self.ways or ways_to_draft(self.model)
            steps = draft_step_seconds(self.model, self.ways, self.config.k, batch_size)
            self.draft_steps.append(at | {"call_seconds": row["call_seconds"]} | steps)

    def _time_gpt2(self, batch_size: int) -> None:
        step = gpt2_token_seconds(self.gpt2, self.config.length, batch_size)
        self.rows.append(
            {"dtype": self.dtype, "batch_size": batch_size, "sampler": "gpt2-small, cached", "call_seconds": step}
            | {"seconds_per_token": step / batch_size, "tokens_per_second": batch_size / step}
        )

    def _measure_memory(self, dtype: str, length: int) -> None:
        found = memory_of(self.config, self.device, dtype, length)
        self.memory.append({"dtype": dtype, "length": length} | found)


def bench(config: BenchDecodeConfig) -> dict:
    """Everything, in one run, with a bar on standard error; returns what the last line of the output holds."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = this_device()
    config = replace(config, dtypes=timed_dtypes(config.dtypes, device))
    require_draft_heads(config)
    run = Bench(config, device)
    bar_format = "{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
    with tqdm(total=sum(cell.work for cell in run.cells()), bar_format=bar_format) as bar:
        for cell in run.cells():
            bar.set_description(cell.label)
            cell.run(*cell.arguments)
            bar.update(cell.work)
    return {
        "config": asdict(config),
        "acceptance": run.acceptance,
        "rows": run.rows,
        "draft_steps": run.draft_steps,
        "memory": run.memory,
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
