"""The network as decoding calls it: a few rows of each sequence against a cache, at the speed of the memory.

A call with few rows is bound by reading the weights once. Hence, on a CPU, the weights are kept in oneDNN's blocked
layout (a product of up to six rows then takes about as long as reading the matrix), keys and values are projected
together, biases, activation and residual are part of the products, and attention is one fused kernel that reads only
the slots that a limit reaches. On a GPU the same steps run on the plain weights, with shapes that do not change from
round to round, so that rounds can be recorded (:mod:`asarm.sampling.cuda_graphs`); with ``compile`` on a CPU as well.

The results are those of :meth:`asarm.network.Network.forward` up to rounding; a test holds the two together.
"""

import warnings
import weakref

import torch
from torch.nn import functional as F

from .activations import activation_of
from .cache import SlotCache
from .network import Layer, Network
from .orders import Rows

ROWS_AT_A_TIME = 128  # rows of a prefill whose scores exist at the same time
# with AVX-512 but without AMX, a product of fewer rows takes oneDNN longer than one of this many
AVX512_ALONE = "AVX512" in torch.backends.cpu.get_cpu_capability() and not torch.cpu._is_amx_tile_supported()
FEW_ROWS = 4 if AVX512_ALONE else 1
FUSED_ACTIVATIONS = {"gelu": "none", "relu": ""}  # by name, with oneDNN's name of the algorithm


class Projection:
    """``x @ weight.T + bias``, then an activation or plus a residual; no gradient."""

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, activation: str | None, packed: bool):
        self.packed, self.bias_O = packed, bias_O
        self.fused = packed and activation in FUSED_ACTIVATIONS
        self.activation = None if activation is None or self.fused else activation_of(activation)
        self.post_op: tuple[str, list, str] = ("none", [], "")
        if activation is not None and self.fused:
            self.post_op = (activation, [], FUSED_ACTIVATIONS[activation])
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous()) if packed else weight_OI

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not self.packed:
            out = F.linear(x, self.weight, self.bias_O)
            out = out if residual is None else residual + out
        elif residual is None:
            out = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias_O, *self.post_op)
        else:
            out = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias_O, "add")
        return out if self.activation is None else self.activation(out)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 products of its own; emulated, a product takes up to sixty times as long as
    in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has_onednn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def warn_if_emulated(device: torch.device, dtype: torch.dtype, remedy: str) -> None:
    """Warn of bfloat16 on a device without bfloat16 products."""
    if dtype == torch.bfloat16 and not multiplies_bfloat16(device):
        warnings.warn(f"this {device.type} emulates bfloat16, far slower than float32; use {remedy}", stacklevel=2)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this type natively on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bfloat16(device))


class EngineLayer:
    """One layer's weights as the engine wants them."""

    def __init__(self, layer: Layer, activation: str, packed: bool):
        attention, ff = layer.rel_attn, layer.ff
        q_XE, k_XE, v_XE = (w.detach().flatten(1).T for w in (attention.q, attention.k, attention.v))
        # a query row's content score has the bias r_w_bias; its relative score has r_r_bias instead
        self.query = Projection(q_XE, attention.r_w_bias.detach().flatten(), None, packed)
        self.to_relative_H1D = (attention.r_r_bias - attention.r_w_bias).detach()[:, None]
        self.key_value = Projection(torch.cat([k_XE, v_XE]), None, None, packed)
        self.out = Projection(attention.o.detach().flatten(1), None, None, packed)
        self.inner = Projection(ff.layer_1.weight.detach(), ff.layer_1.bias.detach(), activation, packed)
        self.outer = Projection(ff.layer_2.weight.detach(), ff.layer_2.bias.detach(), None, packed)
        self.attention_norm, self.ff_norm = attention.layer_norm, ff.layer_norm


class Engine:
    """``model`` prepared for decoding; :func:`engine_of` makes it once and keeps it until the weights change."""

    def __init__(self, model: Network, compile: bool = False):
        self.config, self.trunk = model.config, model.transformer
        self.dtype, self.device = model.dtype, model.device
        packed = not compile and can_pack(self.device, self.dtype)
        self.layers = [EngineLayer(layer, model.config.ff_activation, packed) for layer in model.layers]
        self.vocabulary = Projection(model.lm_loss.weight.detach(), model.lm_loss.bias.detach(), None, packed)
        self.static = compile or self.device.type == "cuda"  # shapes that do not change from round to round
        self.few_rows = FEW_ROWS if packed else 1
        self.made_from: list = []
        self._sources = [p.detach() for p in model.parameters()]  # alive, so that their addresses tell them apart
        self._relative_keys = (0, torch.empty(0))

    def new_cache(self, batch: int, length: int) -> SlotCache:
        return SlotCache(self.config, batch, length, self.relative_keys(length))

    def relative_keys(self, length: int) -> torch.Tensor:
        """Relative-position keys for ``length``, scaled by D^-0.5: [L, H, 2N, D]. Projected once per length."""
        if self._relative_keys[0] != length:
            self._relative_keys = (length, self.trunk.relative_keys(length) * self.config.d_head**-0.5)
        return self._relative_keys[1]

    def prefill(
        self, ids_BC: torch.Tensor, rows: Rows, order_BN: torch.Tensor, cache: SlotCache, sequence_B: torch.Tensor
    ) -> None:
        """Write the content rows of some of the cache's sequences; they see each other within their limits."""
        self._rows(ids_BC, rows, order_BN, cache, sequence_B, rows.rank_BR.shape[1])

    def __call__(
        self, ids_BC: torch.Tensor, rows: Rows, order_BN: torch.Tensor, cache: SlotCache, n_slots: int
    ) -> torch.Tensor:
        """Hidden states [B, Q, E] of the query rows.

        The first C of ``rows`` are content rows and carry ``ids_BC``; they are written to the cache. No limit may be
        above ``n_slots``.
        """
        return self._rows(ids_BC, rows, order_BN, cache, cache.every_B, n_slots)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Vocabulary projection: [..., E] -> [..., V]."""
        return self.vocabulary(hidden)

    def _rows(
        self,
        ids_BC: torch.Tensor,
        rows: Rows,
        order_BN: torch.Tensor,
        cache: SlotCache,
        sequence_B: torch.Tensor,
        n_slots: int,
    ) -> torch.Tensor:
        (B, C), N = ids_BC.shape, cache.length
        H, D, n_query = self.config.n_head, self.config.d_head, rows.position_BR.shape[1] - C
        few = -(-self.few_rows // B)  # rows that see nothing are added up to here
        padding = (0, max(0, few - C - n_query))
        position_BR, limit_BR = F.pad(rows.position_BR, padding, value=N), F.pad(rows.limit_BR, padding)
        R = position_BR.shape[1]
        blind_BRS = torch.arange(n_slots, device=self.device) >= limit_BR[:, :, None]
        bias_BRS = torch.zeros(blind_BRS.shape, dtype=self.dtype, device=self.device)
        bias_B1RS = bias_BRS.masked_fill_(blind_BRS, torch.finfo(self.dtype).min)[:, None]
        first, last = self._positions(position_BR, N)
        relative_LHPD = cache.relative_LHPD[:, :, N - 1 - last : 2 * N - 1 - first]  # the distances that occur
        relative_BRS = last - position_BR.clamp(first, last)[:, :, None] + order_BN[:, None, :n_slots]
        relative_BHRS = relative_BRS[:, None].expand(B, H, R, n_slots)
        sees_BR1 = (limit_BR > 0).to(self.dtype)[:, :, None]  # a row that sees nothing has zero attention output
        rank_BC = rows.rank_BR[:, :C]

        content_BCE = F.embedding(ids_BC, self.trunk.word_embedding.weight)
        x_BRE = torch.cat([content_BCE, self.trunk.mask_emb.expand(B, R - C, -1)], dim=1)
        for index, layer in enumerate(self.layers):
            key_value_BC2HD = layer.key_value(x_BRE[:, : max(C, few)])[:, :C].view(B, C, 2, H, D)
            cache.write(index, sequence_B, rank_BC, key_value_BC2HD)
            if index == len(self.layers) - 1 and max(2, few) <= R - C:  # nothing reads the content rows' last states
                by_row = (x_BRE, sees_BR1, bias_B1RS, relative_BHRS)
                x_BRE, sees_BR1, bias_B1RS, relative_BHRS = (t[..., C:, :] for t in by_row)
            key_BHSD, value_BHSD = cache.read(index, sequence_B, n_slots)
            attended_BRX = self._attend(
                layer, key_BHSD, value_BHSD, relative_LHPD[index], x_BRE, bias_B1RS, relative_BHRS
            )
            x_BRE = layer.attention_norm(layer.out(attended_BRX * sees_BR1, x_BRE))
            x_BRE = layer.ff_norm(layer.outer(layer.inner(x_BRE), x_BRE))
        first = C - (R - x_BRE.shape[1])
        return x_BRE[:, first : first + n_query]

    def _positions(self, position_BR: torch.Tensor, length: int) -> tuple[int, int]:
        """The first and the last position that has a row; of the sequence, where shapes do not change."""
        if self.static:
            return 0, length - 1
        position = position_BR[position_BR < length]
        if not len(position):
            return 0, 0
        first, last = position.aminmax()
        return int(first), int(last)

    def _attend(
        self,
        layer: EngineLayer,
        key_BHSD: torch.Tensor,
        value_BHSD: torch.Tensor,
        relative_HPD: torch.Tensor,
        x_BRE: torch.Tensor,
        bias_B1RS: torch.Tensor,
        relative_BHRS: torch.Tensor,
    ) -> torch.Tensor:
        if x_BRE.shape[1] > ROWS_AT_A_TIME:
            by_row = (t.split(ROWS_AT_A_TIME, dim=-2) for t in (x_BRE, bias_B1RS, relative_BHRS))
            parts = [
                self._attend(layer, key_BHSD, value_BHSD, relative_HPD, *part) for part in zip(*by_row, strict=True)
            ]
            return torch.cat(parts, dim=1)
        (B, R, _), (H, D) = x_BRE.shape, (self.config.n_head, self.config.d_head)
        q_BHRD = layer.query(x_BRE).view(B, R, H, D).transpose(1, 2)
        q_HXD = (q_BHRD + layer.to_relative_H1D).transpose(0, 1).reshape(H, B * R, D)
        # few rows against many keys: this way round a product takes the least time
        score_HPX = torch.bmm(relative_HPD, q_HXD.transpose(1, 2))
        score_BHRP = score_HPX.view(H, -1, B, R).permute(2, 0, 3, 1)
        score_BHRS = score_BHRP.gather(3, relative_BHRS).add_(bias_B1RS)
        out_BHRD = F.scaled_dot_product_attention(q_BHRD, key_BHSD, value_BHSD, attn_mask=score_BHRS)
        return out_BHRD.transpose(1, 2).flatten(2)


_ENGINES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def engine_of(model: Network, compile: bool = False) -> Engine:
    """The engine of ``model``; made again where its weights were changed, moved or converted since."""
    kept = _ENGINES.setdefault(model, {})
    state = [(p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in model.parameters()]
    if compile not in kept or kept[compile].made_from != state:
        kept[compile] = Engine(model, compile)
        kept[compile].made_from = state
    return kept[compile]
