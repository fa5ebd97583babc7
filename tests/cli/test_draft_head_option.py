"""``--draft_head``: the head of another place, and a head on a revision of the Hub."""

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from http.server import ThreadingHTTPServer

import pytest
from conftest import make_model
from test_hub import COMMITS, Endpoint

from asarm.bench import decode as bench_decode
from asarm.bench.config import BenchDecodeConfig
from asarm.cli import BENCHES, COMMANDS, EVALS, main
from asarm.command_config import InfillConfig, SamplingConfig
from asarm.draft_head import DraftHead
from asarm.drafter import drafter_of
from asarm.embedded import ASSETS
from asarm.errors import CheckpointMismatchError, ConfigError, ModelNotFoundError, OutputDirError
from asarm.evals import run as evals_run
from asarm.evals.config import SpeculativeConfig
from asarm.evals.run import EvalRun
from asarm.evals.speculative import evaluate
from asarm.infilling import InfillTask
from asarm.loading import load

SHAPE = {"width": 8, "n_head": 2, "rank": 4}
SMALL_RUN = {"dataset": "samples", "num_sequences": 2, "max_length": 16, "batch_size": 2, "k": 2}


def write_head(trunk, folder, seed: int) -> str:
    """An untrained head of ``trunk``, told apart by a number; returns its fingerprint."""
    head = DraftHead.for_trunk(trunk, **SHAPE)
    head.correction.weight.data.fill_(seed / 100)
    head.save_pretrained(folder)
    return head.fingerprint()


@pytest.fixture(scope="module")
def trunk(small):
    return load(small)[0]


@pytest.fixture
def head(trunk, tmp_path) -> tuple[str, str]:
    """A folder that holds ``draft_head``, and the head's fingerprint."""
    return str(tmp_path / "head"), write_head(trunk, tmp_path / "head", 1)


def test_the_head_of_a_folder_that_holds_one_or_is_one(small, head):
    folder, fingerprint = head
    assert drafter_of(load(small)[0]) is None
    for place in (folder, f"{folder}/draft_head"):
        assert drafter_of(load(small, draft_head=place)[0]).head.fingerprint() == fingerprint


def test_a_name_instead_of_a_folder_and_instead_of_the_models_own_head(tmp_path):
    own, _ = load("tiny-english")
    fingerprint = write_head(own, tmp_path, 1)
    by_name = drafter_of(load(str(ASSETS / "tiny-english"), draft_head="tiny-english")[0]).head
    assert by_name.fingerprint() == drafter_of(own).head.fingerprint() != fingerprint
    assert drafter_of(load("tiny-english", draft_head=str(tmp_path))[0]).head.fingerprint() == fingerprint


def test_a_head_of_another_trunk_or_of_no_place_is_refused_by_name(small, trunk, tmp_path):
    other = make_model(vocab_size=8192, mask_token_id=6, seed=5)
    write_head(other, tmp_path, 1)
    with pytest.raises(CheckpointMismatchError, match=f"{tmp_path}.*{other.fingerprint()}.*{trunk.fingerprint()}"):
        load(small, draft_head=str(tmp_path))
    for nowhere in (str(tmp_path / "nowhere"), small, "tiny-code"):  # two models without a head
        with pytest.raises(ModelNotFoundError, match=f"no draft head in '{nowhere}'"):
            load(small, draft_head=nowhere)
    with pytest.raises(ModelNotFoundError, match="has no revision 'v2'"):
        load(small, draft_head=f"{tmp_path}@v2")


def test_every_command_that_samples_has_it_and_refuses_it_where_nothing_would_read_it():
    sampling = [c for c, _ in (COMMANDS | EVALS).values() if issubclass(c, SamplingConfig)]
    assert len(sampling) == 4
    for config_class in (*sampling, BENCHES["decode"][0]):
        assert "draft_head" in {f.name for f in fields(config_class)}
    for make in (
        lambda **settings: InfillConfig(text="a <mask>", sampler="assd", **settings),
        lambda **settings: SpeculativeConfig(samplers=["assd", "sequential"], **settings),
        lambda **settings: BenchDecodeConfig(samplers=["sequential"], **settings),
    ):
        make()
        with pytest.raises(ConfigError, match=r"draft_head must be used with a sampler of assd-head, .*, got 'x'"):
            make(draft_head="x")
    InfillConfig(text="a <mask>", sampler="assd-head+one-pass", draft_head="x")
    SpeculativeConfig(draft_head="x")  # all samplers that the model has


def test_infill_drafts_with_it(small, head, capsys):
    words = ["infill", "--model", small, "--text", "a <mask:9> b", "--sampler", "assd-head"]
    assert main(words) == 2
    assert "has no draft head" in capsys.readouterr().err
    assert main([*words, "--draft_head", head[0]]) == 0
    assert capsys.readouterr().out.startswith("a")
    assert main([*words, "--draft_head", "tiny-english"]) == 2
    assert "draft head of 'tiny-english' was trained for the model" in capsys.readouterr().err


def test_an_evaluation_refuses_a_wrong_head_before_it_decodes(small, monkeypatch, tmp_path):
    monkeypatch.setattr(evals_run, "decode", lambda *_: pytest.fail("decoded first"))
    config = SpeculativeConfig(output_dir=str(tmp_path), model=small, draft_head="tiny-english", **SMALL_RUN)
    with pytest.raises(CheckpointMismatchError, match="'tiny-english'"):
        evaluate(config)


def decode_all(config: SpeculativeConfig) -> EvalRun:
    """What an evaluation does up to its records, with two sequences."""
    run = EvalRun(config)
    for evaluated in run.models():
        tasks = [InfillTask([20, 21, 22, 23], [True, False, True, False], index) for index in range(2)]
        run.decode(evaluated, tasks, lambda task, ids: {})
    return run


def test_a_run_goes_on_with_the_head_it_began_with(small, trunk, head, tmp_path):
    folder, fingerprint = head
    settings = {"model": small, "samplers": ["assd-head", "sequential"], "draft_head": folder}
    config = SpeculativeConfig(output_dir=str(tmp_path / "out"), **SMALL_RUN | settings)
    decode_all(config)
    notes = [json.loads(path.read_text()) for path in (tmp_path / "out" / "identity").iterdir()]
    assert {"draft head": {"weights": fingerprint}} in notes
    assert len(decode_all(config).log.records) == 4
    another = write_head(trunk, folder, 2)
    with pytest.raises(OutputDirError, match=f"weights: '{fingerprint}' there, '{another}' now"):
        decode_all(config)


def test_the_head_beside_the_model_is_part_of_a_run_too_where_a_sampler_uses_it(small, trunk, tmp_path):
    shutil.copytree(small, tmp_path / "model")
    write_head(trunk, tmp_path / "model", 1)
    without, with_head = (
        SpeculativeConfig(output_dir=str(tmp_path / name), model=str(tmp_path / "model"), samplers=[name], **SMALL_RUN)
        for name in ("assd", "assd-head")
    )
    decode_all(without)
    decode_all(with_head)
    write_head(trunk, tmp_path / "model", 2)
    decode_all(without)
    with pytest.raises(OutputDirError, match="weights"):
        decode_all(with_head)


def test_the_benchmark_measures_acceptance_with_it(monkeypatch):
    loaded = []

    def noted(name, **settings):
        loaded.append((name, settings["draft_head"]))
        raise InterruptedError

    monkeypatch.setattr(bench_decode, "load", noted)
    config = BenchDecodeConfig(size="tiny-code", draft_head="x")
    for use in (bench_decode.acceptance_of, lambda config: bench_decode.model_of(config, None, "float32")):
        with pytest.raises(InterruptedError):
            use(config)
    assert loaded == [("tiny-english", "x"), ("tiny-code", None)]


class HeadsEndpoint(Endpoint):
    """A repository with a model at each of two revisions, of which ``nlp`` alone has a head."""


RUN = """
import json, sys
from asarm.cli import main
for words in json.loads(sys.argv[1]):
    print(main(["infill", "--text", "a <mask:2>", "--sampler", "assd-head", *words]), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_head_on_a_revision_of_the_hub(tmp_path):
    for seed, revision in enumerate(COMMITS):
        model = make_model(vocab_size=8192, mask_token_id=6, seed=seed)
        model.save_pretrained(tmp_path / revision)
        shutil.copy(ASSETS / "tiny-english" / "tokenizer.json", tmp_path / revision)
    write_head(model, tmp_path / "nlp", 1)
    shutil.copytree(tmp_path / "nlp", tmp_path / "alone", ignore=lambda *_: {"draft_head"})
    HeadsEndpoint.root, HeadsEndpoint.served = tmp_path, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), HeadsEndpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "cache")}
    hub_id, alone = ["--model", "someone/asarm-test"], ["--model", str(tmp_path / "alone")]
    commands = {
        (*hub_id, "--revision", "nlp"): "0",
        (*hub_id, "--revision", COMMITS["nlp"]): "0",
        (*hub_id, "--revision", "main"): "has no draft head",
        (*alone, "--draft_head", "someone/asarm-test@nlp"): "0",
        (*alone, "--draft_head", "someone/asarm-test"): "no draft head in 'someone/asarm-test' at revision 'main'",
        (*hub_id, "--draft_head", "someone/asarm-test@nlp"): "'someone/asarm-test' was trained for the model",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(list(commands))],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"HF_HUB_DISABLE_XET": "1"},
        timeout=120,
    )
    server.shutdown()
    lines = [line for line in done.stderr.splitlines() if line != "2"]
    for line, (words, answer) in zip(lines, commands.items(), strict=True):
        assert answer in line, words
    assert "nlp/draft_head/model.safetensors" in HeadsEndpoint.served
