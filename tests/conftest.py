"""Small random models and the development data, where it is there."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

# read when the libraries are imported, here and in the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
os.environ["OMP_NUM_THREADS"] = "1"  # the models are tiny, and two processes share the machine in a parallel run

import pytest
import torch
from training_runs import write_text
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, XLNetConfig

from asarm import AnySubsetLM, TextTokenizer
from asarm.draft_head import DraftHead
from asarm.drafter import attach_draft_head
from asarm.embedded import ASSETS
from asarm.evals import speculative
from asarm.orders import Order

HEAD_SHAPE = {"width": 8, "n_head": 2, "rank": 6}  # of a small draft head
NUMERICAL = [Path(__file__).parent / name for name in ("law", "model")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="slow tests too, and statistical tests with all of their draws")
    parser.addoption("--numerical", action="store_true", help="of the quick suite only tests/law and tests/model")


def all_are_asked_for(config: pytest.Config) -> bool:
    return config.getoption("--all") and not config.getoption("--numerical")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is not asked for. Slow tests come first: in a parallel run, nobody then waits for one that
    started last."""

    def is_slow(item: pytest.Item) -> bool:
        return item.get_closest_marker("slow") is not None

    def is_asked_for(item: pytest.Item) -> bool:
        if config.getoption("--numerical") and not any(folder in item.path.parents for folder in NUMERICAL):
            return False
        return all_are_asked_for(config) or not is_slow(item)

    config.hook.pytest_deselected(items=[item for item in items if not is_asked_for(item)])
    items[:] = sorted(filter(is_asked_for, items), key=is_slow, reverse=True)


def mostly_slow(values: Iterable, quick: Sequence) -> list:
    """Parameters of a test of which the quick suite has only ``quick``."""

    def parameter(value):
        marks = () if value in quick else pytest.mark.slow
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)

    return [parameter(value) for value in values]


def make_model(vocab_size=6, seed=0, dtype=torch.float32, mask_token_id=0, spread=0.8, **config) -> AnySubsetLM:
    """A random model whose distributions are far from uniform (``spread`` is the weights' standard deviation)."""
    torch.manual_seed(seed)
    fields = {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "dropout": 0.0, "mem_len": None}
    config = XLNetConfig(
        vocab_size=vocab_size, initializer_range=spread, mask_token_id=mask_token_id, **(fields | config)
    )
    return AnySubsetLM(config).to(dtype).eval()


def with_random_head(model: AnySubsetLM, seed: int = 0) -> AnySubsetLM:
    """``model`` with an untrained draft head whose corrections are far from zero."""
    torch.manual_seed(seed)
    head = DraftHead.for_trunk(model, width=8, n_head=2, rank=4)
    with torch.no_grad():
        head.correction.weight.normal_(std=0.5)
        head.from_token.weight.normal_(std=0.5)
    attach_draft_head(model, head)
    return model


def random_head(trunk: AnySubsetLM, seed=0, **shape) -> DraftHead:
    """A head that says anything at all: every parameter drawn, the correction included."""
    torch.manual_seed(seed)
    head = DraftHead.for_trunk(trunk, **HEAD_SHAPE | shape).to(trunk.dtype).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.5)
    return head


def random_batch(vocab_size: int, B: int, N: int, seed: int = 0, lengths=None) -> tuple[torch.Tensor, Order]:
    """Random ids and a random any-subset order for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    ids_BN = torch.randint(0, vocab_size, (B, N), generator=generator)
    visible_BN = torch.rand(B, N, generator=generator) < torch.rand(B, 1, generator=generator)
    visible_BN[:, generator.initial_seed() % N] = False
    return ids_BN, Order.from_visible(visible_BN, None if lengths is None else torch.tensor(lengths))


@pytest.fixture(scope="session")
def everything(request) -> bool:
    """Whether statistical tests shall have all of their draws."""
    return all_are_asked_for(request.config)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """``ASARM_DATA_DIR``; tests that need it are skipped where it is not set."""
    path = os.environ.get("ASARM_DATA_DIR")
    if not path or not Path(path).is_dir():
        pytest.skip("ASARM_DATA_DIR is not set: the development data is not part of the repository")
    return Path(path)


@pytest.fixture
def text_file(tmp_path) -> Path:
    """Something to train on."""
    return write_text(tmp_path / "text.jsonl")


@pytest.fixture
def without_figures(monkeypatch) -> None:
    """The comparison of samplers draws none."""
    monkeypatch.setattr(speculative, "draw_plots", lambda *_: None)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a small random model in the vocabulary of tiny-english."""
    folder = tmp_path_factory.mktemp("small")
    make_model(vocab_size=8192, mask_token_id=6, spread=0.3).save_pretrained(folder)
    shutil.copy(ASSETS / "tiny-english" / "tokenizer.json", folder)
    return str(folder)


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory):
    """A folder with a small random GPT-2 in the same vocabulary, for texts of at most 64 tokens."""
    folder = tmp_path_factory.mktemp("small-gpt2")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}
    GPT2LMHeadModel(GPT2Config(vocab_size=8192, bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(folder)
    file = str(ASSETS / "tiny-english" / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


def valid_of(arguments) -> torch.Tensor:
    """``valid_BK`` among the arguments of an acceptance rule: the one mask."""
    return next(value for value in arguments if torch.is_tensor(value) and value.dtype == torch.bool)


TEXTS = [
    "Tom lost his hat.",
    " Two  spaces,\ta tab,\n\na newline, “quotes”, naïve 雪.",
    "def f(x):\n    return x\n",
    "",
]


def assert_same_tokenizer(theirs, ours: TextTokenizer) -> None:
    """``theirs`` is that of transformers."""
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ids == ours.encode(text)
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert (theirs.mask_token, theirs.mask_token_id) == ("<mask>", ours.mask_id)
    assert theirs.convert_tokens_to_ids(["<s>", "</s>"]) == [theirs.bos_token_id, theirs.eos_token_id] == [1, 2]
    others = (theirs.unk_token, theirs.sep_token, theirs.cls_token, theirs.pad_token)
    assert others == ("<unk>", "<sep>", "<cls>", "<pad>")
