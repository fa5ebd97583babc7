"""Left-to-right models as baselines: against slow loops, and what they cannot be asked."""

import pytest
import torch
from test_nlp_infill import file_of, without_seconds
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from asarm.cli import main
from asarm.evals.causal import CausalLM
from asarm.evals.config import NlpInfillConfig
from asarm.evals.nlp_infill import evaluate
from asarm.law import Law, draw
from asarm.rng import rank_uniforms


@pytest.fixture(params=["tiny", "gpt2"])
def causal(request, small_gpt2, tmp_path):
    """A small random model with the embedded vocabulary, and one with GPT-2's own."""
    if request.param == "gpt2":
        files = request.getfixturevalue("data_dir") / "tokenizers" / "gpt2"
        GPT2Tokenizer(str(files / "vocab.json"), str(files / "merges.txt")).save_pretrained(tmp_path)
        torch.manual_seed(0)
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    return CausalLM.from_pretrained(str(tmp_path) if request.param == "gpt2" else small_gpt2)


def test_a_left_to_right_model_draws_as_a_slow_loop_does(causal):
    """Batched with a cache and padding, against one text at a time recomputed from its beginning."""
    texts = [(7, "Once upon a time there was", " a small dog."), (8, "Tom", " ran"), (30, "", " The end of it")]
    tasks = [causal.task(*text) for text in texts]
    law, seed = causal.law(temperature=0.9), 3
    drawn = {task.index: ids for task, ids, _ in causal.generate(tasks, law, seed, batch_size=2)}
    for task in tasks:
        ids, uniform_N = list(task.context), rank_uniforms(seed, "sample", [task.index], 16, 1)[0, 0]
        for step in range(len(task.continuation)):
            logits_V = causal.model(torch.tensor([ids])).logits[0, -1]
            ids.append(int(draw(law.probs(logits_V), uniform_N[step])))
        assert drawn[task.index] == ids[len(task.context) :]
        assert not set(drawn[task.index]) & set(causal.tokenizer.all_special_ids)


def test_a_left_to_right_models_score_is_that_of_separate_calls(causal):
    tasks = [causal.task(0, "Once upon a time", " there was a dog"), causal.task(1, "Tom", " ran")]
    for task, log_prob, right, _ in causal.score(tasks, batch_size=2):
        ids_1N = torch.tensor([task.context + task.continuation])
        logp_NV = Law().log_probs(causal.model(ids_1N).logits[0, len(task.context) - 1 : -1])
        assert log_prob == pytest.approx(sum(logp_NV[i, t].item() for i, t in enumerate(task.continuation)), abs=1e-4)
        assert right == (logp_NV.argmax(1).tolist() == task.continuation)


def test_a_left_to_right_model_sees_only_what_precedes_the_gap(tmp_path, small, small_gpt2):
    story = "Tom had a dog. It ran away. {} He looked for it. {}"
    texts = [story.format("Tom was sad.", "He found it."), story.format("Tom was sad.", "It never came back again.")]
    found = {}
    for name, text in zip("ab", texts, strict=True):
        settings = {"model": small, "causal_lm": [small_gpt2], "output_dir": str(tmp_path / name)}
        summary = evaluate(NlpInfillConfig(data_file=file_of(tmp_path, [{"text": text}]), **settings))
        found[name] = without_seconds(tmp_path / name)
    system = f"causal {small_gpt2}"
    assert found["a"][system, 0] == found["b"][system, 0]
    assert found["a"]["assd", 0]["completion"] != found["b"]["assd", 0]["completion"]
    assert summary["samplers"][system]["nfe_per_token"] == 1.0


def test_texts_that_a_left_to_right_model_cannot_be_asked_are_counted(tmp_path, small, small_gpt2):
    rows = [{"text": "a <mask> b"}, {"text": "<mask> b <mask>"}, {"text": "Tom ran. " * 40 + "<mask>"}]
    config = NlpInfillConfig(
        task="infill-file",
        model=small,
        causal_lm=[small_gpt2],
        data_file=file_of(tmp_path, rows),
        output_dir=str(tmp_path / "out"),
    )
    summary = evaluate(config)
    system = f"causal {small_gpt2}"
    assert [s["index"] for s in summary["models"][system]["skipped"]] == [1, 2]
    assert summary["samplers"][system]["sequences"] == 1 and summary["samplers"]["assd"]["sequences"] == 3


def test_a_left_to_right_model_that_is_not_there_is_named(tmp_path, capsys):
    arguments = ["--causal_lm", str(tmp_path / "none"), "--limit", "1", "--output_dir", str(tmp_path / "out")]
    assert main(["eval", "nlp-infill", *arguments]) == 2
    assert f"no causal language model '{tmp_path / 'none'}'" in capsys.readouterr().err
