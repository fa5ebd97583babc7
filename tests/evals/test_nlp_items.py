"""What the natural-language evaluations read: rows that add up, each with its reason where it cannot be used."""

import gzip
import json

import pyarrow as pa
import pytest
from datasets import Dataset

from asarm.data.sources import read_documents
from asarm.errors import DataFileError
from asarm.evals.guessers import context_word, frequent_word, next_story, sentence_before
from asarm.evals.nlp_items import GapItem, read_items
from asarm.evals.nlp_tasks import NLP_TASKS

HEADER = (
    "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4,"
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding"
)
CLOZE = f'{HEADER}\nid-1,A one.,"B, two.",C three.,D four.,E wrong.,E right.,2\nid-2,F.,G.,H.,I.,J.,K.,1\n'


def file_of(folder, rows, name="data.jsonl"):
    path = folder / name
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("task", "first", "second"),
    [
        ("rocstories-1of5", ("A one. B, two.", " C three.", " D four. E right."), ("F. G.", " H.", " I. J.")),
        ("rocstories-3of5", ("A one.", " B, two. C three. D four.", " E right."), ("F.", " G. H. I.", " J.")),
    ],
)
def test_story_cloze_takes_the_right_ending_and_the_right_gap(tmp_path, task, first, second):
    _, items, skipped = read_items(NLP_TASKS[task], file_of(tmp_path, CLOZE, "cloze.csv"), None)
    assert [(i.pieces[0], i.references[0], i.pieces[1]) for i in items] == [first, second] and not skipped
    assert [item.name for item in items] == ["id-1", "id-2"]


def test_malformed_rows_are_counted_and_the_total_adds_up(tmp_path):
    bad = "id,A.,B.,,D.,E.,F.,1\nid,A.,B.,C.,D.,E.,F.,3\nid,A.,B.\nid,A.,B.,C.,D.,E.,F.,1,more\n"
    _, items, skipped = read_items(NLP_TASKS["rocstories-1of5"], file_of(tmp_path, CLOZE + bad, "cloze.csv"), None)
    assert len(items) + len(skipped) == 6 and [s.index for s in skipped] == [2, 3, 4, 5]
    for skip, reason in zip(skipped, ("InputSentence3", "'3'", "as many cells", "as many cells"), strict=True):
        assert reason in skip.reason
    _, items, skipped = read_items(NLP_TASKS["rocstories-1of5"], file_of(tmp_path, CLOZE + bad, "cloze.csv"), 4)
    assert (len(items), len(skipped)) == (2, 2)


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        (
            "lambada",
            {"context": "Tom saw a dog. He liked the", "continuation": "dog"},
            {
                '{"context": "a"': "not JSON",
                "[1]": "not a JSON object",
                '{"context": "a"}': "continuation",
                '{"context": "a", "continuation": " "}': "continuation",
            },
        ),
        (
            "hellaswag",
            {"ctx": "He", "endings": ["ran.", "sat."], "label": "1"},
            {
                '{"ctx": "a", "endings": ["b", "c"], "label": "2"}': "label",
                '{"ctx": "a", "endings": ["b", "c"]}': "label",
                '{"ctx": "a", "endings": ["b"], "label": 0}': "endings",
                '{"ctx": "a", "endings": ["b", ""], "label": 0}': "ending",
                '{"endings": ["b", "c"], "label": 0}': "ctx",
            },
        ),
        (
            "infill-file",
            {"text": "a <mask> c"},
            {
                '{"text": "no gap"}': "no <mask>",
                '{"text": "a <mask:0>"}': "<mask:0>",
                '{"text": "a <mask:99999999999>"}': "<mask:99999999999>",
                '{"text": "<mask> a <mask>", "reference": "b"}': "2 gap",
                '{"text": "a <mask>", "reference": ""}': "reference",
                '{"id": 3}': "text",
            },
        ),
    ],
)
def test_malformed_lines_are_counted_with_their_reasons(tmp_path, task, good, bad):
    lines = [json.dumps(good), *bad, json.dumps(good)]
    _, items, skipped = read_items(NLP_TASKS[task], file_of(tmp_path, "\n".join(lines)), None)
    assert [item.index for item in items] == [0, len(lines) - 1]
    assert [s.index for s in skipped] == list(range(1, len(lines) - 1))
    for skip, reason in zip(skipped, bad.values(), strict=True):
        assert reason in skip.reason


def test_records_are_read_from_every_form_of_file(tmp_path):
    """Compressed or not, or Parquet; a damaged file is named."""
    rows = [{"ctx": "He", "endings": ["ran.", "sat."], "label": str(n % 2)} for n in range(30)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = gzip.compress(lines, mtime=0)
    (tmp_path / "h.jsonl.gz").write_bytes(packed)
    (tmp_path / "h.jsonl.zst").write_bytes(pa.Codec("zstd").compress(lines, asbytes=True))
    Dataset.from_list(rows).to_parquet(str(tmp_path / "h.parquet"))
    _, plain, _ = read_items(NLP_TASKS["hellaswag"], file_of(tmp_path, rows), None)
    for name in ("h.jsonl.gz", "h.jsonl.zst", "h.parquet"):
        assert read_items(NLP_TASKS["hellaswag"], str(tmp_path / name), None)[1:] == (plain, [])
    for name, content in (("cut.jsonl.gz", packed[:-9]), ("bad.jsonl.gz", packed[:20] + b"xxxx" + packed[24:])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataFileError, match=f"cannot read data file .*{name}"):
            read_items(NLP_TASKS["hellaswag"], str(tmp_path / name), None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,b\n1,2\n", "lacks the columns"),
        ("b.csv", f"{HEADER}\n", "holds nothing"),
        ("c.csv", f"{HEADER}\nid,A.,B.,C.,D.,E.,F.,3\n", "holds nothing.*'3'"),
        ("d.jsonl", '{"text": "One. Two."}\n', "2 sentences instead of 5"),
    ],
)
def test_a_file_without_a_usable_row_is_an_error(tmp_path, name, text, message):
    with pytest.raises(DataFileError, match=message):
        read_items(NLP_TASKS["rocstories-1of5"], file_of(tmp_path, text, name), None)


def test_masks_and_references_of_a_file(tmp_path):
    rows = [
        {"text": "Tom <mask:2> his<mask>!", "references": ["lost all", "hat"]},
        {"text": "<mask> end", "reference": "The", "id": "x"},
        {"text": "a <mask>"},
    ]
    _, (two, start, bare), _ = read_items(NLP_TASKS["infill-file"], file_of(tmp_path, rows), None)
    assert two == GapItem(0, "0", ("Tom", " his", "!"), (" lost all", "hat"), (2, None))
    assert start == GapItem(1, "x", ("", " end"), ("The",), (None,))
    assert bare == GapItem(2, "2", ("a", ""), (), (1,))


def test_the_sample_stories_serve_without_the_data_folder(monkeypatch):
    monkeypatch.delenv("ASARM_DATA_DIR", raising=False)
    name, items, skipped = read_items(NLP_TASKS["rocstories-3of5"], None, None)
    assert name.endswith("stories.jsonl") and len(items) == 64 and not skipped
    stories = [document.text for document in read_documents(name)]
    assert [item.pieces[0] + item.references[0] + item.pieces[1] for item in items] == stories
    with pytest.raises(DataFileError, match="ASARM_DATA_DIR"):
        read_items(NLP_TASKS["lambada"], None, None)


@pytest.mark.parametrize(
    ("task", "count"), [("rocstories-1of5", 1871), ("rocstories-3of5", 1871), ("lambada", 5153), ("hellaswag", 10042)]
)
def test_the_real_files_are_read_whole(data_dir, task, count):
    _, items, skipped = read_items(NLP_TASKS[task], None, None)
    assert (len(items), skipped) == (count, [])


def test_guessers():
    items = [
        GapItem(0, "0", ("I ran. I sat.", " End."), (" One.",)),
        GapItem(1, "1", ("Hi there", ""), (" Two.",)),
        GapItem(2, "2", ("x", ""), (" Two.",)),
    ]
    assert sentence_before(items, 0) == ["I sat.", "Hi there", "x"]
    assert next_story(items, 0) == [" Two.", " Two.", " One."]
    assert frequent_word(items, 0) == [" Two."] * 3
    assert all(word in item.pieces[0].split() for word, item in zip(context_word(items, 5), items, strict=True))
