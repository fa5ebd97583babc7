"""Checkpoints by name: which files a name stands for, loading all of their parameters or none, fingerprints.

A checkpoint of a training run (``runs/x/checkpoints/step-0000500``) holds the weights of its model or draft head in
``state.pt``, with what the run needs to go on, and is loaded from there like any other.
"""

import hashlib
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .embedded import embedded_models, resolve_model
from .errors import CheckpointMismatchError, ModelNotFoundError, reason

Model = TypeVar("Model", bound=nn.Module)
WEIGHTS = "model.safetensors"
STATE = "state.pt"  # of a training run's checkpoint


class Checkpointed(nn.Module):
    """What a checkpoint holds: a configuration, and parameters that are all of one type and on one device."""

    config: PreTrainedConfig

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def fingerprint(self) -> str:
        """See :func:`parameters_fingerprint`."""
        return parameters_fingerprint(self)


def parameters_fingerprint(module: nn.Module) -> str:
    """A short hash of all parameters in bfloat16: a checkpoint has one fingerprint in every type it is loaded in."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().bfloat16().cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def model_not_found(name_or_path, revision: str, why: str) -> ModelNotFoundError:
    """The error for a name that leads to no model."""
    return ModelNotFoundError(
        f"no model {str(name_or_path)!r} at revision {revision!r}: give an embedded name "
        f"({', '.join(embedded_models())}), a folder with config.json and model.safetensors, or a Hub id "
        f"and a revision that exist ({why})"
    )


def require_model(name_or_path, revision: str = "main") -> None:
    """Raise :class:`ModelNotFoundError` for a name that leads to no model; only its configuration is looked for."""
    try:
        found = cached_file(resolve_model(name_or_path, revision), "config.json", revision=revision)
    except OSError as error:
        raise model_not_found(name_or_path, revision, reason(error)) from error
    if found is None:
        raise model_not_found(name_or_path, revision, "config.json is missing there")


class NoValues(TorchFunctionMode):
    """PyTorch's modules that are made in here leave their parameters as they are. On the device ``meta`` there are no
    values to set, but setting them imports PyTorch's compiler: a second."""

    def __torch_function__(self, function, types, arguments=(), settings=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*arguments, **(settings or {}))


def load_plain(
    make: Callable[[PreTrainedConfig], Model],
    config_class: type[PreTrainedConfig],
    name_or_path,
    revision: str,
    dtype: torch.dtype,
    subfolder: str = "",
) -> Model:
    """What ``make`` makes of a configuration, with the weights that lie beside it in one file (``WEIGHTS``), or in the
    checkpoint of a training run; in evaluation mode.

    Hugging Face's loading, for these forms alone, without its import, which takes seconds. Raises :class:`OSError`
    where a file is missing and :class:`CheckpointMismatchError` for files that are broken or do not hold exactly the
    parameters that the configuration describes.
    """
    path, place = resolve_model(name_or_path, revision), {"revision": revision, "subfolder": subfolder}
    what = f"checkpoint {str(Path(name_or_path, subfolder))!r}"
    try:
        config = config_class.from_pretrained(path, **place)
        if only_in_state(path, subfolder):
            stored = trained_weights(Path(path) / STATE)
        else:
            commit = getattr(config, "_commit_hash", None)
            stored = load_file(cached_file(path, WEIGHTS, **place, _commit_hash=commit))
    except (SafetensorError, StrictDataclassError) as error:
        raise CheckpointMismatchError(f"{what} is broken: {reason(error)}") from error
    config.name_or_path = path
    with torch.device("meta"), NoValues():
        module = make(config)
    parameters = dict(module.named_parameters())  # one that has two names once
    found, wanted = ({name: list(x.shape) for name, x in tensors.items()} for tensors in (stored, parameters))
    if wrong := [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]:
        sizes = [f"{name} {found.get(name)} and not {wanted.get(name)}" for name in wrong]
        raise CheckpointMismatchError(f"{what} does not hold the parameters of its config.json: {', '.join(sizes)}")
    loaded = {p: nn.Parameter(stored[name].to(dtype), p.requires_grad) for name, p in parameters.items()}
    every_name = module.named_parameters(remove_duplicate=False)
    module.load_state_dict({name: loaded[p] for name, p in every_name}, assign=True)
    return module.eval()


def only_in_state(place: str, subfolder: str = "") -> bool:
    """Whether a place is a training run's checkpoint, whose weights lie in ``state.pt`` alone."""
    return (Path(place) / STATE).is_file() and not Path(place, subfolder, WEIGHTS).exists()


def find_file(name_or_path, file: str, revision: str = "main", folder: str = "") -> Path | None:
    """A file that a model may have, in a ``folder`` of its place or beside the weights; None where there is none."""
    found = cached_file(
        resolve_model(name_or_path, revision),
        file,
        subfolder=folder,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return None if found is None else Path(found)


def pretrained_loader(from_pretrained: Callable[..., Model], config_class: type, place: str, *args) -> Callable:
    """``from_pretrained`` (of ``PreTrainedModel``) with its place filled in: a folder or a Hub id, or a checkpoint of a
    training run, in which only the configuration is."""
    if only_in_state(place):
        return partial(_from_state, from_pretrained, config_class, place, *args)
    return partial(from_pretrained, place, *args)


def _from_state(
    from_pretrained: Callable[..., tuple[Model, dict]],
    config_class: type,
    folder: str,
    *args,
    **settings,
) -> tuple[Model, dict]:
    config = config_class.from_pretrained(folder)
    weights = trained_weights(Path(folder) / STATE)
    model, info = from_pretrained(None, *args, config=config, state_dict=weights, **settings)
    model.name_or_path = model.config.name_or_path = folder
    return model, info


def trained_weights(file: Path) -> dict[str, torch.Tensor]:
    """The weights that count in the state of a training run, the moving average where there is one, by the model's own
    names; they are read from the disk when they are looked at."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        weights = state["average"] or state["model"]
    except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise CheckpointMismatchError(f"{file} is no state of a training run, or damaged: {reason(error)}") from error
    weights = {name.removeprefix("module."): x for name, x in weights.items() if name != "n_averaged"}
    return {name.removeprefix("model."): x for name, x in weights.items()}  # beside the loss that is trained


def load_whole(
    load: Callable[..., tuple[Model, dict]], what: str, not_found: Callable[[str], ModelNotFoundError], **settings
) -> tuple[Model, dict]:
    """A model and its loading info from ``load``, of :func:`pretrained_loader`.

    Raises what ``not_found`` makes of the reason where there are no files, and :class:`CheckpointMismatchError` for
    files (``what`` names them) that are broken or do not hold exactly the parameters of their config.json.
    """
    try:
        # parameters of other sizes are reported below, with their names
        model, info = load(output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    except (SafetensorError, StrictDataclassError, json.JSONDecodeError) as error:
        raise CheckpointMismatchError(f"{what} is broken: {reason(error)}") from error
    except OSError as error:
        raise not_found(reason(error)) from error
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise CheckpointMismatchError(f"{what} does not hold the parameters of its config.json: {wrong}")
    return model, info
