"""The network: rows in, hidden states and logits out.

That of XLNet (two-stream attention, relative positions) with the parameter names of Hugging Face's
``XLNetLMHeadModel``. What differs is the interface: instead of a permutation mask over a whole sequence, a call
computes the *rows* it is asked for (see :mod:`asarm.orders`).

Everything that computes needs this module alone. :class:`asarm.model.AnySubsetLM` is the same network as a model of
Hugging Face's library, whose base class takes longer to import than a short text takes to fill.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import XLNetConfig

from .activations import activation_of
from .attention import RelativeAttention, product_dtype, relative_encoding
from .compiling import set_marks
from .config import require
from .dropout import dropout
from .errors import ConfigError
from .orders import may_attend
from .pretrained import Checkpointed
from .row_mask import RowMask

XLNET_MASK_ID = 6


class FeedForward(nn.Module):
    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.layer_1 = nn.Linear(config.d_model, config.d_inner)
        self.layer_2 = nn.Linear(config.d_inner, config.d_model)
        self.dropout = config.dropout
        self.activation = activation_of(config.ff_activation)

    def forward(self, x_BRE: torch.Tensor) -> torch.Tensor:
        inner_BRF = self._drop(self.activation(self.layer_1(x_BRE)))
        return self.layer_norm(x_BRE + self._drop(self.layer_2(inner_BRF)))

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.dropout, self.training)


class Layer(nn.Module):
    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.rel_attn = RelativeAttention(config)
        self.ff = FeedForward(config)

    def forward(
        self, x_BRE: torch.Tensor, n_content: int, first: int, encoding_PE: torch.Tensor, row_mask: RowMask
    ) -> torch.Tensor:
        return self.ff(self.rel_attn(x_BRE, n_content, first, encoding_PE, row_mask))


class Trunk(nn.Module):
    """Embeddings and layers (``transformer.*`` in the checkpoint)."""

    def __init__(self, config: XLNetConfig):
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.mask_emb = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.n_layer))
        self.clamp_len, self.dropout = config.clamp_len, config.dropout

    def encoding(self, length: int) -> torch.Tensor:
        """Of the relative positions of sequences of ``length``, [2N, E]."""
        weight = self.word_embedding.weight
        encoding_PE = relative_encoding(length, weight.shape[1], self.clamp_len, weight.device)
        return dropout(encoding_PE.to(weight.dtype), self.dropout, self.training)

    def relative_keys(self, length: int) -> torch.Tensor:
        """Each layer's relative-position keys for sequences of ``length``, [L, H, 2N, D]."""
        encoding_PE = self.encoding(length)
        return torch.stack([layer.rel_attn.relative_key(encoding_PE).transpose(0, 1) for layer in self.layer])


class Network(Checkpointed):
    """An any-subset network on the architecture of ``config``, an ``XLNetConfig`` with bidirectional attention; its
    optional ``mask_token_id`` (default 6, XLNet's) names the token that is never drawn. ``name_or_path`` and
    ``revision`` say where it was loaded from, if it was."""

    revision = "main"

    def __init__(self, config: XLNetConfig):
        require_architecture(config)
        super().__init__()
        self.config, self.name_or_path = config, config.name_or_path
        self.make_layers()
        if config.tie_word_embeddings:
            self.lm_loss.weight = self.transformer.word_embedding.weight

    def make_layers(self) -> None:
        self.recompute = False  # layers in the backward pass, instead of keeping their activations
        self.transformer = Trunk(self.config)
        self.lm_loss = nn.Linear(self.config.d_model, self.config.vocab_size)

    @property
    def layers(self) -> list[Layer]:
        """The transformer's layers, the first one first."""
        return list(self.transformer.layer)

    @property
    def mask_token_id(self) -> int:
        return getattr(self.config, "mask_token_id", XLNET_MASK_ID)

    def forward(
        self, ids_BN: torch.Tensor, position_BR: torch.Tensor, limit_BR: torch.Tensor, rank_BN: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [B, Q, E] of the query rows.

        The first N rows are content rows, one for each position in order, and carry ``ids_BN``; the remaining Q = R - N
        are query rows. Row r sits at ``position_BR`` and sees every token whose ``rank_BN`` is below its ``limit_BR``;
        one that sees nothing has zero attention output. (Decoding calls the network through :mod:`asarm.engine`.)
        """
        B, N = ids_BN.shape
        dtype = product_dtype(self.transformer.word_embedding.weight)
        row_mask = RowMask.of(may_attend(rank_BN, limit_BR), N - 1 - position_BR.clamp(max=N - 1), N, dtype)
        encoding_PE = self.transformer.encoding(N)
        query_BQE = self.transformer.mask_emb.expand(B, position_BR.shape[1] - N, -1)
        x_BRE = self._drop(torch.cat([self.transformer.word_embedding(ids_BN), query_BQE], dim=1))
        *layers, last = self.layers
        for layer in layers:
            x_BRE = self._run(layer, x_BRE, N, 0, encoding_PE, row_mask)
        # nothing reads the content rows' last hidden states
        x_BRE = self._run(last, x_BRE, N, N, encoding_PE, row_mask.after(N))
        return self._drop(x_BRE)

    def _run(self, layer: Layer, *arguments) -> torch.Tensor:
        if self.recompute and self.training:
            return checkpoint(layer, *arguments, use_reentrant=False)
        return layer(*arguments)

    def compile_layers(self) -> None:
        """Run the layers through :func:`torch.compile`."""
        set_marks()
        # PyTorch 2.11 writes this kind of reduction without brackets around a size that varies from batch to batch
        broken = "triton.mix_order_reduction"
        options = {broken: False} if broken in torch._inductor.list_options() else {}
        for layer in self.layers:
            layer.compile(options=options)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary projection, for the rows that need it: [..., E] -> [..., V]."""
        return self.lm_loss(hidden)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(x, self.config.dropout, self.training)


def require_architecture(config: XLNetConfig) -> None:
    """Raise :class:`~asarm.errors.ConfigError` for what no any-subset network can have."""
    if config.attn_type != "bi" or config.bi_data:
        raise ConfigError(
            f"an any-subset model needs attn_type 'bi' and bi_data false, got {config.attn_type!r} and {config.bi_data}"
        )
    for ok, field, rule in (
        (config.n_layer >= 1, "n_layer", "at least 1"),
        (config.d_model % 2 == 0, "d_model", "even"),
        (0 <= config.dropout < 1, "dropout", "in [0, 1)"),
    ):
        require(ok, field, getattr(config, field), rule)
