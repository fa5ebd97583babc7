"""Story infilling: tasks read to the byte, scores against hand-worked cases, real files where they are."""

import pytest

from asarm.data.sources import read_documents
from asarm.errors import DataFileError
from asarm.evals.config import NlpInfillConfig
from asarm.evals.infill_eval import evaluate, report
from asarm.evals.metrics import code_similarity, rouge
from asarm.evals.tasks import read_nlp_gaps
from asarm.runlog import read_lines

HEADER = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding"
)


@pytest.fixture
def cloze(tmp_path):
    path = tmp_path / "cloze.csv"
    path.write_text(f'{HEADER}\nid-1,A one.,"B, two.",C three.,D four.,E wrong.,E right.,2\nid-2,F.,G.,H.,I.,J.,K.,1\n')
    return path


def test_story_cloze_takes_the_right_ending_and_the_right_gap(cloze):
    _, gaps = read_nlp_gaps(NlpInfillConfig(data_file=str(cloze), task="rocstories-1of5"))
    assert (gaps[0].prefix, gaps[0].reference, gaps[0].suffix) == ("A one. B, two.", " C three.", " D four. E right.")
    assert gaps[1].name == "id-2" and gaps[1].suffix == " I. J."
    _, gaps = read_nlp_gaps(NlpInfillConfig(data_file=str(cloze), task="rocstories-3of5"))
    assert (gaps[0].prefix, gaps[0].reference, gaps[0].suffix) == ("A one.", " B, two. C three. D four.", " E right.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "lacks the columns"),
        (f"{HEADER}\nid,A.,B.,,D.,E.,F.,1\n", "line 2: an empty sentence"),
        (f"{HEADER}\nid,A.,B.,C.,D.,E.,F.,3\n", "line 2: .* AnswerRightEnding"),
        (f"{HEADER}\n", "holds no story"),
    ],
)
def test_a_malformed_cloze_file_is_named(tmp_path, text, message):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(DataFileError, match=message):
        read_nlp_gaps(NlpInfillConfig(data_file=str(tmp_path / "bad.csv")))


def test_the_sample_stories_serve_without_the_data_folder(monkeypatch):
    monkeypatch.delenv("ASARM_DATA_DIR", raising=False)
    name, gaps = read_nlp_gaps(NlpInfillConfig(task="rocstories-3of5"))
    assert name.endswith("stories.jsonl") and len(gaps) == 64
    stories = [document.text for document in read_documents(name)]
    assert [gap.prefix + gap.reference + gap.suffix for gap in gaps] == stories


def test_scores_against_hand_worked_cases():
    # "the cat sat" against "the cat ran off": 2 of 3 and 2 of 4 unigrams, 1 of 2 and 1 of 3 bigrams, subsequence of 2
    scores = rouge("The cat ran off.", "the cat sat")
    assert scores["rouge1"] == pytest.approx(100 * 2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4))
    assert scores["rouge2"] == pytest.approx(100 * 2 * (1 / 2 * 1 / 3) / (1 / 2 + 1 / 3))
    assert scores["rougeL"] == pytest.approx(scores["rouge1"])
    assert scores["rouge_mean"] == pytest.approx((2 * scores["rouge1"] + scores["rouge2"]) / 3)
    assert code_similarity("return x\n", "return x\n") == {"exact_match": 100.0, "edit_similarity": 100.0}
    assert code_similarity("abcd", "abxd") == {"exact_match": 0.0, "edit_similarity": 75.0}


def test_stories_are_infilled_scored_and_resumed(tmp_path):
    config = NlpInfillConfig(output_dir=str(tmp_path), limit=5, samplers=["sequential", "assd"], batch_size=2)
    summary = evaluate(config)
    records = read_lines(tmp_path / "records.jsonl")
    assert len(records) == 10 and summary["num_texts"] == 5
    for r in records:
        assert r["completion"] and "<" not in r["completion"]
        assert r["nfe"] <= r["masked"]
        expected = rouge(r["reference"], r["completion"])
        assert all(r[key] == value for key, value in expected.items())
    mine = [r["rouge1"] for r in records if r["sampler"] == "assd"]
    assert summary["samplers"]["assd"]["rouge1"] == pytest.approx(sum(mine) / 5)
    assert len(report(summary).splitlines()) == 4
    again = evaluate(config)
    assert again["samplers"] == summary["samplers"]
    assert read_lines(tmp_path / "records.jsonl") == records


@pytest.mark.parametrize("task", ["rocstories-1of5", "rocstories-3of5"])
def test_the_real_stories_are_read_whole(data_dir, task):
    name, gaps = read_nlp_gaps(NlpInfillConfig(task=task))
    assert name.startswith(str(data_dir)) and len(gaps) == 1871
    assert all(gap.prefix and gap.reference.strip() and gap.suffix for gap in gaps)
