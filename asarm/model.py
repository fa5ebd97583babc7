"""AnySubsetLM: the network as a model of Hugging Face's library, loaded, saved and initialised as those are.

Its parameters have the names of ``XLNetLMHeadModel``: any XLNet checkpoint loads here and any checkpoint of ours loads
there.
"""

from functools import partial
from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, XLNetConfig
from transformers import initialization as init

from .attention import RelativeAttention
from .embedded import resolve_model
from .network import Network, Trunk, require_architecture
from .pretrained import load_whole, model_not_found, pretrained_loader


class AnySubsetLM(Network, PreTrainedModel):
    """Any-subset autoregressive language model on the XLNet architecture (see :class:`~asarm.network.Network`)."""

    config_class = XLNetConfig
    base_model_prefix = "transformer"
    _tied_weights_keys: ClassVar = {"lm_loss.weight": "transformer.word_embedding.weight"}

    def __init__(self, config: XLNetConfig):
        require_architecture(config)
        PreTrainedModel.__init__(self, config)
        self.make_layers()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, RelativeAttention):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, Trunk):
            init.normal_(module.mask_emb, mean=0.0, std=std)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.word_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.word_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_loss

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_loss = value

    @classmethod
    def from_pretrained(cls, name_or_path, *args, revision: str = "main", dtype=torch.float32, **kwargs):
        """Load an embedded checkpoint (``tiny-english``), a local folder (a training run's checkpoint, too) or a Hub id
        at a ``revision``.

        Weights are float32 unless ``dtype`` says otherwise. Raises :class:`ModelNotFoundError` for a name that does
        not resolve and :class:`CheckpointMismatchError` where the weights are not exactly those that the
        configuration describes.
        """
        want_info = kwargs.pop("output_loading_info", False)
        model, info = load_whole(
            pretrained_loader(super().from_pretrained, XLNetConfig, resolve_model(name_or_path, revision), *args),
            f"checkpoint {str(name_or_path)!r}",
            partial(model_not_found, name_or_path, revision),
            revision=revision,
            dtype=dtype,
            **kwargs,
        )
        for layer in model.layers:
            layer.rel_attn.freeze_segment_terms()  # the library makes parameters anew when it loads them
        model.revision = revision
        return (model, info) if want_info else model
