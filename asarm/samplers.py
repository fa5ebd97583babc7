"""The samplers by name: one record each, which is all that the rest of the program knows of a sampler.

Imports nothing heavy: the command line checks names with it. A new sampler is a function that plays a round
(:mod:`asarm.sampling`) and a :func:`register` call.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from .errors import ConfigError

REFERENCE = "sequential"  # what the law and the speed of the others are compared with
ONE_PASS = "+one-pass"  # ends the name of the form that drafts in the pass that verifies


@dataclass(frozen=True)
class Sampler:
    """A sampler as everything but its own round sees it.

    Args:
        name: on the command line, in tables and in figures.
        round: the function that moves every sequence of a :class:`~asarm.sampling.decoding.Decoding` on by one round,
            or its place as ``module:function``, which is imported when the sampler is first used.
        query_rows: the most query rows that a network call has for a sequence, by k.
        colour: in figures; the built-in ones are Okabe and Ito's, told apart in every common colour blindness.
        marker: in figures (matplotlib's name).
        drafts: where drafts come from: ``model`` (its own marginals, from query rows that miss tokens), ``head`` (the
            model's draft head), ``context`` (the settled tokens, no network), or None where nothing is drafted.
        verifies: whether drafts are put to the test, so that the settings of verification apply.
        exact: whether what is drawn has the model's law.
        drafts_ahead: whether a round verifies the drafts of the round before and drafts for the next one.
        calls_per_round: network calls of a round.
        judges_blocks: whether a round's drafts are judged together unless a setting says otherwise.
        one_pass_on: kinds of device (``cuda``) where the one-pass form is played unless a setting says otherwise.
    """

    name: str
    round: str | Callable
    query_rows: Callable[[int], int]
    colour: str
    marker: str
    drafts: str | None = None
    verifies: bool = False
    exact: bool = True
    drafts_ahead: bool = False
    calls_per_round: int = 1
    judges_blocks: bool = False
    one_pass_on: tuple[str, ...] = ()

    @property
    def play_round(self) -> Callable:
        """The round's function."""
        return pkgutil.resolve_name(self.round) if isinstance(self.round, str) else self.round


SAMPLERS: dict[str, Sampler] = {}


def register(sampler: Sampler) -> None:
    """Make a sampler known by its name to :func:`asarm.sample`, the command line, the evaluations and the figures."""
    if sampler.name in SAMPLERS:
        raise ConfigError(f"there is a sampler {sampler.name!r} already; give the new one another name")
    SAMPLERS[sampler.name] = sampler


def find_sampler(name: str) -> Sampler:
    """The record of ``name``, which may have a k of its own (``assd:8``); raises :class:`ConfigError` for an unknown
    one."""
    form = form_of(name)
    if form not in SAMPLERS:
        raise ConfigError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}")
    return SAMPLERS[form]


def form_of(name: str) -> str:
    """A sampler's name without the k of its own: ``assd-head+one-pass`` of ``assd-head+one-pass:8``."""
    return name.partition(":")[0]


for _sampler in (
    Sampler(
        "sequential",
        round="asarm.sampling.sequential:sequential_round",
        query_rows=lambda k: 1,
        colour="#000000",
        marker="s",
    ),
    Sampler(
        "assd",
        round="asarm.sampling.assd:assd_round",
        query_rows=lambda k: k + 1,
        colour="#0072B2",
        marker="o",
        drafts="model",
        verifies=True,
        calls_per_round=2,
    ),
    Sampler(
        "assd+one-pass",
        round="asarm.sampling.assd:assd_one_pass_round",
        query_rows=lambda k: (k + 1) ** 2,
        colour="#56B4E9",
        marker="D",
        drafts="model",
        verifies=True,
        drafts_ahead=True,
    ),
    Sampler(
        "assd-head",
        round="asarm.sampling.assd:assd_round",
        query_rows=lambda k: k + 1,
        colour="#009E73",
        marker="^",
        drafts="head",
        verifies=True,
        calls_per_round=2,
        judges_blocks=True,
        one_pass_on=("cuda",),
    ),
    Sampler(
        "assd-head+one-pass",
        round="asarm.sampling.assd:assd_one_pass_round",
        query_rows=lambda k: 3 * k + 1,
        colour="#E69F00",
        marker="v",
        drafts="head",
        verifies=True,
        drafts_ahead=True,
        judges_blocks=True,
    ),
    Sampler(
        "assd-ngram",
        round="asarm.sampling.assd:assd_ngram_round",
        query_rows=lambda k: k + 1,
        colour="#CC79A7",
        marker="P",
        drafts="context",
        verifies=True,
    ),
    Sampler(
        "parallel",
        round="asarm.sampling.parallel:parallel_round",
        query_rows=lambda k: k,
        colour="#D55E00",
        marker="X",
        drafts="model",
        exact=False,
    ),
):
    register(_sampler)
