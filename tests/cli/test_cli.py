"""The command line as a user meets it: plain errors, fast help, and what a process prints is what was asked for."""

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout

import pytest
import yaml
from conftest import make_model
from tokenizers import Regex, normalizers

from asarm import Law, TextTokenizer
from asarm.cli import main
from asarm.config import DataConfig
from asarm.errors import ModelNotFoundError, TextError
from asarm.infilling import infill, score_text
from asarm.loading import load
from asarm.tokenizer import train_byte_level_bpe
from asarm.train.config import TrainConfig
from asarm.train.model import train


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "asarm", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def answer(*arguments):
    """What :func:`run` returns, from this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main([*arguments])
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def tiny():
    return load("tiny-english")


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["infill"],
        ["score"],
        ["train"],
        ["train-draft-head"],
        ["eval"],
        ["eval", "speculative"],
        ["eval", "nlp-infill"],
        ["eval", "code-infill"],
    ],
)
def test_help_does_not_import_torch(command):
    script = (
        "import sys; from asarm.cli import main\ntry: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


@pytest.mark.slow
def test_a_process_prints_what_the_command_answers():
    words = ("infill", "--text", "The cat <mask:3> the mat.", "--seed", "5")
    done, expected = run(*words), answer(*words)
    assert (done.returncode, done.stdout) == (expected.returncode, expected.stdout), done.stderr
    assert done.stdout.startswith("The cat")


def test_infill_json_and_plain():
    done = answer("infill", "--text", "The cat <mask:3> the mat.", "--num_samples", "2", "--seed", "5", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert len(result["infills"]) == 2 and len(set(result["infills"])) == 2
    assert all(t.startswith("The cat") and t.endswith(" the mat.") and "<" not in t for t in result["infills"])
    plain = answer("infill", "--text", "The cat <mask:3> the mat.", "--num_samples", "2", "--seed", "5")
    assert plain.stdout == "\n\n".join(result["infills"]) + "\n"


def test_infill_keeps_the_text_and_every_sampler_fills_it(tiny):
    text = "One day,  a girl\nnamed <mask:2> went to the <mask>. <mask:5>"
    for name in ("sequential", "assd", "assd-ngram", "parallel"):
        from asarm import SamplerConfig

        for filled in infill(*tiny, text, SamplerConfig(name), num_samples=3, seed=1):
            assert filled.startswith("One day,  a girl\nnamed") and " went to the" in filled and "<mask" not in filled


def test_score_of_fills_and_of_a_whole_text(tiny):
    model, tokenizer = tiny
    likely = score_text(model, tokenizer, "Once upon a <mask> there was a girl.", [" time,"])
    unlikely = score_text(model, tokenizer, "Once upon a <mask> there was a girl.", [" the of"])
    assert len(likely.tokens) == len(unlikely.tokens) == 2
    assert likely.log_prob > unlikely.log_prob + 3
    whole = score_text(model, tokenizer, "Once upon a time")
    assert "".join(whole.tokens) == "Once upon a time" and whole.log_prob < 0
    assert score_text(model, tokenizer, "Once upon a time", law=Law(temperature=2.0)).log_prob != whole.log_prob

    done = answer("score", "--text", "Once upon a <mask> there was a girl.", "--fills", " time,", "--json")
    assert json.loads(done.stdout)["log_prob"] == pytest.approx(likely.log_prob, abs=1e-4)


def test_a_text_or_fill_that_the_vocabulary_changes_is_not_scored():
    backend = train_byte_level_bpe(["the cat sat on the mat"], 300)
    backend.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    model, tokenizer = make_model(vocab_size=300, mask_token_id=6), TextTokenizer(backend)
    for text, fills in (("a\nb", None), ("a\nb <mask>", ["c"]), ("a <mask>", ["x\ny"]), ("a <mask>", ["x  y"])):
        with pytest.raises(TextError, match="does not keep the text"):
            score_text(model, tokenizer, text, fills)
    assert "".join(score_text(model, tokenizer, "a <mask>", [" x y"]).tokens) == " x y"


def test_held_out_likelihood_falls_with_more_context(tmp_path):
    (tmp_path / "t.txt").write_text(
        "One day a little girl went to the park. She saw a big dog. The dog was happy. " * 12
    )
    done = answer(
        "score",
        "--data_file",
        str(tmp_path / "t.txt"),
        "--max_length",
        "64",
        "--masked_fractions",
        "0.15",
        "0.95",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    light, heavy = json.loads(done.stdout)["likelihood"]
    assert light["nll_per_token"] < heavy["nll_per_token"] < 9.01  # log 8192
    assert light["nll_per_token_se"] > 0 and heavy["tokens"] > light["tokens"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infill", "--text", "nothing to fill"], "no <mask>"),
        (["infill", "--text", "a <mask>", "--model", "no/such-model"], "no model 'no/such-model'"),
        (
            ["infill", "--text", "a <mask>", "--model", "no/such-model", "--tokenizer", "tiny-english"],
            "no model 'no/such-model'",
        ),
        (["infill", "--text", "a <mask>", "--revision", "v9"], "no revision 'v9'"),
        (["infill", "--text", "a <mask>", "--model", "/etc"], "no model '/etc'"),
        (["infill", "--text", "a <mask>", "--k", "0"], "k must be at least 1, got 0"),
        (["infill", "--text", "a <mask>", "--temperature", "0"], "temperature must be above 0"),
        (["infill", "--text", "a <mask>", "--temperature", "-1"], "got -1.0"),
        (["score", "--text", "a <mask> b", "--fills", "x", "y"], "1 gap(s) and 2 fill(s)"),
        (["score"], "one of the two"),
        (["score", "--text", "a <mask> b"], "1 gap(s) and 0 fill(s)"),
        (["score", "--text", "a b", "--seed", "-1"], "seed must be 0 or more, got -1"),
        (["score", "--data_file", "/nowhere.txt"], "/nowhere.txt"),
        (["eval", "speculative", "--samplers", "assd", "magic"], "'magic'"),
        (["eval", "speculative", "--output_dir", "/proc/asarm"], "/proc/asarm"),
        (["eval", "speculative", "--visible_fraction", "1.5"], "got 1.5"),
        (["eval", "speculative", "--max_length", "3000000", "--num_sequences", "1"], "GiB"),
        (["eval", "speculative", "--num_sequences", "0"], "num_sequences must be at least 1, got 0"),
    ],
)
def test_a_mistake_is_one_plain_line_and_status_two(arguments, message, tmp_path, capsys):
    if arguments[0] == "eval" and "--output_dir" not in arguments:
        arguments = [*arguments, "--output_dir", str(tmp_path)]
    assert main(arguments) == 2
    stderr = capsys.readouterr().err.strip()
    assert message in stderr and stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "records.jsonl").exists()


def test_a_mistyped_model_is_answered_with_the_models_there_are(tmp_path):
    training = TrainConfig(model="nosuch", output_dir=str(tmp_path), data=DataConfig(files=["nowhere.txt"]))
    for use in (lambda: load("nosuch"), lambda: train(training)):
        with pytest.raises(ModelNotFoundError, match=r"no model 'nosuch' .* embedded name .*tiny-english"):
            use()


def test_a_model_without_a_tokenizer_is_told_how_to_name_one(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"has no tokenizer.json.* --tokenizer"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("speculative", ["--model", "/etc"]),
        ("speculative", ["--model", "tiny-code", "--samplers", "assd-head"]),
        ("speculative", ["--max_length", "3000000", "--num_sequences", "1"]),
        ("nlp-infill", ["--model", "/etc"]),
        ("nlp-infill", ["--causal_lm", "/etc"]),
    ],
)
def test_after_a_mistake_the_right_command_has_the_folder(command, mistake, tmp_path, without_figures):
    arguments = ["eval", command, "--output_dir", str(tmp_path), "--limit", "1"]
    assert main([*arguments, *mistake]) == 2
    assert not (tmp_path / "config.yaml").exists()
    small = ["--num_sequences", "1", "--max_length", "16"] * (command == "speculative")
    assert main([*arguments, *small, "--samplers", "parallel"]) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("visible_fractoin: 0.1\n", "'visible_fractoin'"),
        ("k: five\n", "Got value: five"),
        ("k: [\n", "while parsing"),
        ("- a\n- b\n", "- a"),
    ],
)
def test_a_malformed_config_is_named_before_anything_runs(text, message, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    start = time.monotonic()
    done = run("eval", "speculative", "--config", str(tmp_path / "c.yaml"), "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert message in done.stderr[done.stderr.index("error: ") :]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "words",
    [
        "--config A --k 7",
        "--k 7 --config A",
        "--k=7 --config=A",
        "--samplers assd sequential --config A --k 7 --config B",
        "--config B --k 7 --config=A --samplers assd sequential --visible_fraction 0.1",
    ],
)
def test_the_command_line_goes_over_the_file_in_any_order(words, tmp_path, capsys):
    """And of several files the last over those before."""
    files = {"A": "k: 3\nvisible_fraction: 1e-1\nsamplers: [assd]\n", "B": "visible_fraction: 0.2\nmargin: 0.3\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        words = words.replace(f"--config {name}", f"--config {tmp_path / name}")
        words = words.replace(f"--config={name}", f"--config={tmp_path / name}")
    with pytest.raises(SystemExit):
        main(["eval", "speculative", "--print_config", *words.split()])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["k"] == 7 and shown["samplers"] == ["assd"] + ["sequential"] * ("sequential" in words)
    assert shown["visible_fraction"] == (0.2 if words.rfind("B") > words.rfind("A") else 0.1)
    assert shown["margin"] == (0.3 if "B" in words else 0.1)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, data_dir):
    done = answer("infill", "--text", "a <mask>", "--tokenizer", str(data_dir / "tokenizers" / "xlnet-base-cased"))
    assert done.returncode == 2 and "32000 pieces" in done.stderr


def test_embedded_tokenizer_is_lossless_on_the_samples():
    from asarm.data.datasets import load_text

    tokenizer = TextTokenizer.from_pretrained("tiny-english")
    for document in load_text("samples")[1]:
        tokenizer.check_lossless(document.text)
