"""Checkpoints by name: which files a name stands for, loading all of their parameters or none, fingerprints."""

import hashlib
import json
from collections.abc import Callable
from typing import TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers.utils import cached_file

from .embedded import embedded_models, resolve_model
from .errors import CheckpointMismatchError, ModelNotFoundError, reason

Model = TypeVar("Model", bound=nn.Module)


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


def load_whole(
    load: Callable[..., tuple[Model, dict]], what: str, not_found: Callable[[str], ModelNotFoundError], **settings
) -> tuple[Model, dict]:
    """A model and its loading info from ``load``, a ``PreTrainedModel.from_pretrained`` with its place filled in.

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
