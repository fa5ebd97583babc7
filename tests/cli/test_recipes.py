"""Every recipe in configs/ runs, at toy size, with the command that its head names: a new recipe is covered.

Models, data sets and files that a recipe names are local stand-ins: small folders under the same names in the folder
that the command runs in, where a name that is a folder is read from it.
"""

import csv
import gzip
import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from asarm.cli import main
from asarm.errors import SandboxError
from asarm.evals import speculative
from asarm.evals.sandbox import Sandbox

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("configs/**/*.yaml"))
COMMANDS = {
    "_run_training.sh": ["train"],
    "_run_speculative_decoding.sh": ["eval", "speculative"],
    "_run_nlp_infill_eval.sh": ["eval", "nlp-infill"],
    "_run_code_infill_eval.sh": ["eval", "code-infill"],
}
LINES = [" = A cat = \n", " \n", " The cat sat on the mat . It was warm . \n", " A dog ran to the park . \n"]
STORY = ["Tom had a dog.", "The dog ran away.", "Tom looked for it.", "He found it at home.", "He was glad."]
SOURCES = ["TinyStories", "FairytaleQA", "pratham-1", "african-1"]  # that recipes give weights to
PROGRAM = {
    "prompt": "def f(x):\n    y = x\n",
    "canonical_solution": "    y = 2 * x\n",
    "suffix": "    return y\n",
    "test": "def check(f):\n    assert f(2) == 4\n",
    "entry_point": "f",
}


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_data(folder: Path) -> None:
    """An ASARM_DATA_DIR with a little of everything."""
    for split in ("valid", "test"):
        file = folder / "eval" / "wikitext-2-raw" / f"wiki.{split}.raw"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(LINES * 8))
    stories = [{"text": " ".join(STORY), "source": source} for source in SOURCES * 4]
    for name in ("english-simple", "english-valid"):
        write_lines(folder / "train" / f"{name}.jsonl.gz", stories)
    write_lines(folder / "train" / "python-stdlib.jsonl.gz", [{"text": PROGRAM["prompt"] * 9}] * 4)
    write_lines(
        folder / "eval" / "lambada" / "lambada_openai.jsonl", [{"text": "Tom lost his dog. He saw the dog"}] * 3
    )
    choice = {"ctx": "Tom ran", "endings": ["home.", "away.", "up.", "down."], "label": 1}
    write_lines(folder / "eval" / "hellaswag" / "hellaswag_val.jsonl", [choice] * 3)
    problems = [{"task_id": f"T/{number}", **PROGRAM} for number in range(3)]
    write_lines(folder / "eval" / "humaneval_infill" / "HumanEval-SingleLineInfilling.jsonl.gz", problems)
    file = folder / "eval" / "rocstories" / "cloze_test_val__spring2016.csv"
    file.parent.mkdir(parents=True)
    with open(file, "w", newline="") as out:
        header = ["InputStoryid", *(f"InputSentence{i}" for i in range(1, 5))]
        header += ["RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2", "AnswerRightEnding"]
        csv.writer(out).writerows([header, *([number, *STORY, "He slept.", 1] for number in "abc")])


def stand_in(recipe: dict, any_subset: str, causal: str) -> None:
    """Make a folder here of every model and data set that the recipe would fetch."""
    models = dict.fromkeys([recipe.get("model"), recipe.get("tokenizer"), *recipe.get("baselines", [])], any_subset)
    models[recipe.get("judge")] = models[recipe.get("validation", {}).get("judge")] = causal
    for name, target in models.items():
        if name and "/" in name:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).symlink_to(target)
    for section in (recipe, recipe.get("data", {}), recipe.get("validation", {})):
        if "/" in section.get("dataset", ""):
            folder = Path(section["dataset"], section.get("data_dir", ""))
            folder.mkdir(parents=True)
            rows = Dataset.from_dict({section.get("text_column", "text"): [" ".join(STORY) * 3] * 30})
            rows.to_parquet(str(folder / f"{section.get('split', 'train')}-00000-of-00001.parquet"))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to run in, with data."""
    for name in ("configs", "eval_datasets"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_data(tmp_path / "data")
    monkeypatch.setenv("ASARM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_of(path: Path) -> list[str]:
    """The command in a recipe's head, as words for the command line."""
    reads = f"--config {path.relative_to(ROOT)}"
    line = next(line for line in path.read_text().splitlines() if reads in line)
    words = line.split("#", 2)[1].split("  (")[0].split()
    for number, word in enumerate(words):
        if word in COMMANDS:
            return [*COMMANDS[word], *words[number + 1 :]]
    return words[words.index("asarm") + 1 :]


def draws_figures(path: Path) -> bool:
    """What takes most of a toy run's time."""
    return command_of(path)[:2] == ["eval", "speculative"]


def toy(command: list[str], recipe: dict) -> dict:
    """Settings that make a run of the recipe a matter of seconds."""
    settings = {"revision": "main"} if "revision" in recipe else {}
    if command[:2] == ["eval", "speculative"]:
        varied = recipe.get("grid", {})
        grid = {key: values[: 2 if number == 0 else 1] for number, (key, values) in enumerate(varied.items())}
        if "max_length" in grid:
            grid["max_length"] = [24, 16][: len(grid["max_length"])]
        settings |= {"num_sequences": 2, "max_length": 24, "batch_size": 2}
        return settings | ({"grid": json.dumps(grid)} if grid else {})
    if command[0] == "eval":
        return settings | {"limit": 2}
    settings |= {"data.max_length": 24, "data.num_workers": 0, "checkpoint_every": 1, "num_threads": 1}
    steps = {"steps": 2, "warmup_steps": 1, "rows_per_step": 2, "rows_per_pass": 1}
    settings |= {f"optimizer.{key}": value for key, value in steps.items()}
    if "architecture" in recipe:
        settings["architecture"] = json.dumps({"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "dropout": 0.0})
    if "validation" in recipe:
        settings |= {"validation.rows": 2, "validation.generations": 1, "validation.batch_size": 2}
    if command[0] == "train-draft-head":
        settings |= {"windows.k": 3, "windows.per_row": 2, "held_out.rows": 2}
    return settings


def promised(command: list[str], recipe: dict, out: Path) -> None:
    """Assert that the run has left what such a recipe is there for."""
    if command[0] == "train":
        assert (out / "final" / "model.safetensors").is_file() and (out / "metrics.jsonl").read_text().count("\n")
        held_out = recipe.get("validation", {}).keys() & {"file", "dataset"}
        assert (out / "validation.jsonl").is_file() == bool(held_out)
    elif command[0] == "train-draft-head":
        assert (out / "final" / "draft_head" / "model.safetensors").is_file() and (out / "held_out.jsonl").is_file()
    else:
        file = out / ("grid.json" if "grid" in recipe else "summary.json")
        result = json.loads(file.read_text())
        assert result["complete"]
        for rows in [cell["samplers"] for cell in result["cells"]] if "grid" in recipe else [result["samplers"]]:
            expected = [] if recipe.get("task") == "hellaswag" else recipe.get("samplers", [])
            expected = [
                prefix + name for prefix in ("", *(f"{b} " for b in recipe.get("baselines", []))) for name in expected
            ]
            assert set(expected) <= set(rows) and all(row["sequences"] for row in rows.values())
            assert all(("judge" not in recipe) or row["judge_ppl"] > 1 for row in rows.values())
        if command[1] == "speculative":
            assert list(out.rglob("*.png"))
        if "--allow_code_execution" in command:
            assert result["execution"]["controls"]["control: solution"]["pass_rate"] == 1


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * draws_figures(path)) for path in RECIPES],
)
def test_a_recipe_runs(path, place, small, small_gpt2, capsys, monkeypatch):
    command, recipe = command_of(path), yaml.safe_load(path.read_text())
    if "grid" in recipe:  # its own figure is drawn; those of every cell take ten times as long
        monkeypatch.setattr(speculative, "draw_plots", lambda *_: None)
    if "--allow_code_execution" in command:
        try:
            Sandbox()
        except SandboxError as error:
            pytest.skip(str(error))
    stand_in(recipe, small, small_gpt2)
    words = [f"--{key}={value}" for key, value in toy(command, recipe).items()]
    assert main([*command, *words]) == 0, capsys.readouterr().err
    promised(command, recipe, place / recipe["output_dir"])
