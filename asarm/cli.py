"""``python -m asarm``: infill, score, export, train, train-draft-head, the evaluations and the benchmarks.

Every command takes ``--config FILE.yaml`` with ``--key value`` over it, in any order; ``--print_config`` shows the
result. A mistake of the user's is one line on standard error and exit status 2; a training run that a signal stopped
exits with 75, which asks for the same command again.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import get_args, get_origin

import docstring_parser
from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser

from .bench.config import BenchDecodeConfig, BenchTrainConfig
from .command_config import ExportConfig, InfillConfig, ScoreConfig
from .errors import EXIT_STOPPED, ConfigError, StoppedError, UserError
from .evals.code_config import CodeInfillConfig
from .evals.config import DecodingConfig, NlpInfillConfig, SpeculativeConfig
from .malloc import keep_freed_memory
from .train.config import TrainConfig
from .train.head_config import TrainHeadConfig


def run_infill(config: InfillConfig) -> None:
    from .tokenizer import split_at_gaps

    text = _text(config.text)
    split_at_gaps(text)  # what is wrong with the text is said before anything is loaded, PyTorch included

    from .infilling import infill
    from .loading import load

    model, tokenizer = load(config.model, config.revision, **config.tokenizer_settings, draft_head=config.draft_head)
    texts = infill(model, tokenizer, text, config.sampler_config(config.sampler), config.num_samples, config.seed)
    if config.json:
        print(json.dumps(asdict(config) | {"text": text, "infills": texts}, ensure_ascii=False))
    else:
        print("\n\n".join(texts))


def run_score(config: ScoreConfig) -> None:
    if config.data_file is not None:
        from .data.packing import pack_all
        from .data.sources import read_documents
        from .evals.likelihood import held_out_likelihood
        from .loading import load

        documents = read_documents(config.data_file)
        model, tokenizer = load(config.model, config.revision, **config.tokenizer_settings)
        rows = pack_all(documents, tokenizer, config.max_length, config.num_sequences)
        table = held_out_likelihood(model, rows, config.masked_fractions, config.seed, config.batch_size)
        about = {key: getattr(config, key) for key in ("model", "data_file", "max_length")}
        result = about | {"rows": len(rows), "likelihood": table}
        lines = [
            f"{row['masked_fraction']:7.2f}  {row['nll_per_token']:.4f} +- {row['nll_per_token_se']:.4f} nats/token  "
            f"({row['tokens']} tokens)"
            for row in result["likelihood"]
        ]
        text = "\n".join([" masked  joint negative log-likelihood", *lines])
    else:
        from .tokenizer import require_fills

        given = _text(config.text)
        require_fills(given, config.fills)  # before anything is loaded, PyTorch included

        from .infilling import score_text
        from .loading import load

        model, tokenizer = load(config.model, config.revision, **config.tokenizer_settings)
        score = score_text(model, tokenizer, given, config.fills)
        result = asdict(score) | {"log_prob": score.log_prob}
        lines = [f"{logp:9.4f}  {token!r}" for token, logp in zip(score.tokens, score.log_probs, strict=True)]
        text = "\n".join([*lines, f"{score.log_prob:9.4f}  nats, {len(score.tokens)} tokens"])
    print(json.dumps(result, ensure_ascii=False) if config.json else text)


def run_export(config: ExportConfig) -> None:
    from .export import export

    print(f"model: {export(config)}")


def run_train(config: TrainConfig) -> None:
    from .train.model import train

    print(f"final checkpoint: {train(config)}")


def run_train_draft_head(config: TrainHeadConfig) -> None:
    from .train.draft_head import train_draft_head

    print(f"draft head: {train_draft_head(config)}/draft_head")


def run_eval_speculative(config: SpeculativeConfig) -> None:
    from .evals.grid import evaluate_grid, grid_report
    from .evals.speculative import evaluate, replot, report

    if config.replot is not None:
        print(*replot(Path(config.replot)), sep="\n")
    elif config.grid:
        _show(config, evaluate_grid(config), grid_report)
    else:
        _show(config, evaluate(config), report)


def run_eval_nlp_infill(config: NlpInfillConfig) -> None:
    from .evals.nlp_infill import evaluate, report

    _show(config, evaluate(config), report)


def run_eval_code_infill(config: CodeInfillConfig) -> None:
    from .evals.code_infill import evaluate, report

    _show(config, evaluate(config), report)


def run_bench_decode(config: BenchDecodeConfig) -> None:
    from .bench.run import bench, report

    result = bench(config)
    print(report(result))
    print(json.dumps(result, ensure_ascii=False))


def run_bench_train(config: BenchTrainConfig) -> None:
    from .bench.train import bench, report

    result = bench(config)
    print(report(result))
    print(json.dumps(result, ensure_ascii=False))


def _show(config: DecodingConfig, summary: dict, report: Callable[[dict], str]) -> None:
    if config.json:
        print(json.dumps(summary, ensure_ascii=False))
    elif summary["complete"]:
        print(report(summary))
        print(f"records and summary: {config.output_dir}")
    else:
        print(
            f"this share of the run is done; {summary['recorded']} of {summary['expected']} records are in "
            f"{config.output_dir}, and the process that adds the last one writes the summary"
        )


def _text(text: str) -> str:
    return sys.stdin.read().rstrip("\n") if text == "-" else text


COMMANDS = {
    "infill": (InfillConfig, run_infill),
    "score": (ScoreConfig, run_score),
    "export": (ExportConfig, run_export),
    "train": (TrainConfig, run_train),
    "train-draft-head": (TrainHeadConfig, run_train_draft_head),
}
DESCRIPTION = (
    "Any-subset autoregressive models. Evaluations: python -m asarm eval --help. "
    "Benchmarks: python -m asarm bench --help."
)
EVALS = {
    "speculative": (SpeculativeConfig, run_eval_speculative),
    "nlp-infill": (NlpInfillConfig, run_eval_nlp_infill),
    "code-infill": (CodeInfillConfig, run_eval_code_infill),
}


BENCHES = {"decode": (BenchDecodeConfig, run_bench_decode), "train": (BenchTrainConfig, run_bench_train)}


def build_parser(prog: str, description: str, commands: dict) -> ArgumentParser:
    parser = ArgumentParser(prog=prog, description=description)
    subcommands = parser.add_subcommands(dest="command")
    for name, (config_class, _) in commands.items():
        subcommands.add_subcommand(name, _command_parser(config_class), help=_first_line(config_class))
    return parser


def _command_parser(config_class: type) -> ArgumentParser:
    """``--key value`` for every field. Switches need no value (nor do fields that name one for the bare option), and
    lists take words: ``--samplers assd sequential`` or ``assd,sequential``."""
    parser = ArgumentParser(description=_first_line(config_class))
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the settings below.")
    documented = [p for cls in config_class.__mro__[:-1] for p in docstring_parser.parse(cls.__doc__).params]
    help_texts = {p.arg_name: p.description for p in documented}
    special = [f for f in fields(config_class) if f.type is bool or get_origin(f.type) is list or "bare" in f.metadata]
    parser.add_class_arguments(config_class, skip={f.name for f in special})
    for f in special:
        text = help_texts[f.name]
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action=ActionYesNo, nargs="?", default=f.default, help=text)
        elif bare := f.metadata.get("bare"):
            parser.add_argument(f"--{f.name}", nargs="?", const=bare, type=f.type, default=f.default, help=text)
        else:
            item = get_args(f.type)[0] | str
            parser.add_argument(f"--{f.name}", nargs="+", type=item, default=f.default_factory(), help=text)
    return parser


def _make_config(config_class: type, settings: dict):
    """The configuration of one command from its parsed settings."""
    values = {key: value for key, value in settings.items() if key != "config"}
    for f in fields(config_class):
        if separator := f.metadata.get("separator"):
            item = get_args(f.type)[0]
            words = [word for value in values[f.name] for word in str(value).strip("[]").split(separator)]
            try:
                values[f.name] = [item(word.strip()) for word in words if word.strip()]
            except ValueError as error:
                raise ConfigError(f"{f.name}: {error}") from error
    return config_class(**values)


def _files_first(words: list[str]) -> list[str]:
    """A command's words with each ``--config FILE`` before all others: what is parsed later goes over what came before,
    and the command line goes over the file wherever that is named."""
    files, others, rest = [], [], iter(words)
    for word in rest:
        if word == "--config":
            files += [word, *islice(rest, 1)]
        else:
            (files if word.startswith("--config=") else others).append(word)
    return files + others


def _first_line(config_class: type) -> str:
    return config_class.__doc__.strip().splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    keep_freed_memory()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["eval"]:  # a parser of its own: jsonargparse loses the message of an error two subcommands down
        commands, argv = EVALS, argv[1:]
        parser = build_parser("python -m asarm eval", "Evaluations.", EVALS)
    elif argv[:1] == ["bench"]:
        commands, argv = BENCHES, argv[1:]
        parser = build_parser("python -m asarm bench", "Benchmarks.", BENCHES)
    else:
        commands = COMMANDS
        parser = build_parser("python -m asarm", DESCRIPTION, COMMANDS)
    parsed = parser.parse_args([*argv[:1], *_files_first(argv[1:])])
    try:
        settings = parser.instantiate(parsed)
        config_class, run = commands[settings.command]
        run(_make_config(config_class, vars(settings[settings.command])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StoppedError as error:
        print(error, file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def entry_point() -> None:
    """The ``asarm`` console script."""
    sys.exit(main())
