"""DraftHead: a cheap sequential drafter on the trunk's hidden states.

The trunk's query states for the ranks ahead are conditioned on the settled tokens only, so the second drafted token
does not know the first. The head repairs that outside the trunk. For each drafted position in order it takes

- the trunk's query state,
- the token before it in the order: the one just drafted, or the last one settled,
- the clipped distance between the two positions,
- how many tokens the state is missing: rank - limit; 0 where it sees all that precede it,

mixes them to its own width, lets the round's rows attend causally to each other (one layer, EAGLE-fashion: Li et al.
2024, arXiv 2401.15077), and adds a low-rank correction to the trunk's own logits. Where nothing is missing the trunk's
logits are exact already and stay untouched. An untrained head corrects nothing: it is the self draft.

Whatever a head predicts, the samples are exact, because the draft's own probabilities enter the acceptance.
"""

from pathlib import Path

import torch
from huggingface_hub.dataclasses import strict
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .embedded import resolve_model
from .errors import CheckpointMismatchError, ConfigError, ModelNotFoundError, reason
from .network import Network
from .orders import Order
from .pretrained import WEIGHTS, Checkpointed, find_file, load_plain

FOLDER = "draft_head"  # beside the trunk's own files
EMBEDDING_STD = 0.02  # of random weights
SHAPE_FIELDS = ("d_model", "vocab_size", "width", "n_head", "rank", "max_missing", "max_distance")


@strict
class DraftHeadConfig(PreTrainedConfig):
    """Shape of a head, and the trunk that it was made for.

    Args:
        d_model: width of the trunk's states.
        vocab_size: of the trunk.
        width: of the head.
        n_head: attention heads; must divide width.
        rank: of the correction to the logits, and of the embedding of the token before.
        max_missing: missing tokens are told apart up to this number.
        max_distance: distances between positions are told apart up to this number, either way.
        trunk_fingerprint: ``fingerprint()`` of the trunk.
    """

    model_type = "asarm_draft_head"

    d_model: int = 768
    vocab_size: int = 32000
    width: int = 256
    n_head: int = 4
    rank: int = 128
    max_missing: int = 15
    max_distance: int = 8
    trunk_fingerprint: str = ""


class CausalLayer(nn.Module):
    """Pre-norm self-attention over the round's rows, each seeing the rows up to itself, and an MLP."""

    def __init__(self, config: DraftHeadConfig):
        super().__init__()
        M = config.width
        self.n_head = config.n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(M), nn.LayerNorm(M)
        self.qkv, self.out = nn.Linear(M, 3 * M), nn.Linear(M, M)
        self.mlp = nn.Sequential(nn.Linear(M, 4 * M), nn.GELU(), nn.Linear(4 * M, M))

    def query_key_value(self, x_BKM: torch.Tensor) -> torch.Tensor:
        """All three, [3, B, H, K, D]."""
        return self.qkv(self.norm_1(x_BKM)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)

    def rest(self, x_BKM: torch.Tensor, attended_BHKD: torch.Tensor) -> torch.Tensor:
        """What follows the attention."""
        x_BKM = x_BKM + self.out(attended_BHKD.transpose(1, 2).flatten(2))
        return x_BKM + self.mlp(self.norm_2(x_BKM))


class DraftHead(Checkpointed):
    """Logits of drafted tokens, each given the tokens drafted before it."""

    def __init__(self, config: DraftHeadConfig):
        if config.width % config.n_head or not config.rank <= config.d_model:
            raise ConfigError(
                f"a draft head needs a width ({config.width}) that n_head ({config.n_head}) divides, and a rank "
                f"({config.rank}) of at most the trunk's width ({config.d_model})"
            )
        super().__init__()
        self.config = config
        M = config.width
        self.token = nn.Embedding(config.vocab_size, config.rank)
        self.from_token = nn.Linear(config.rank, M, bias=False)
        self.from_state = nn.Linear(config.d_model, M)
        self.distance = nn.Embedding(2 * config.max_distance + 1, M)
        self.missing = nn.Embedding(config.max_missing + 1, M)
        self.layer = CausalLayer(config)
        self.norm = nn.LayerNorm(M)
        self.correction = nn.Linear(M, config.rank, bias=False)
        self.vocabulary = nn.Linear(config.rank, config.vocab_size, bias=False)
        self.apply(_set_random)

    @classmethod
    def for_trunk(cls, trunk: Network, width: int = 256, n_head: int = 4, rank: int = 128) -> "DraftHead":
        """An untrained head for ``trunk``, float32, on its device; its draft is the trunk's own.

        Both vocabulary matrices start as the principal directions of the trunk's, so that a correction means from the
        start what the trunk's states mean.
        """
        config = DraftHeadConfig(
            d_model=trunk.config.d_model,
            vocab_size=trunk.config.vocab_size,
            width=width,
            n_head=n_head,
            rank=rank,
            trunk_fingerprint=trunk.fingerprint(),
        )
        head = cls(config).to(trunk.device)
        weight_VE = trunk.lm_loss.weight.detach().float()
        direction_EE = torch.linalg.eigh(weight_VE.T @ weight_VE).eigenvectors.flip(1)
        weight_VX = weight_VE @ direction_EE[:, :rank]
        with torch.no_grad():
            head.correction.weight.zero_()
            head.vocabulary.weight.copy_(weight_VX)
            head.token.weight.copy_(weight_VX / weight_VX.square().mean().sqrt())
        return head

    def forward(
        self,
        states_BKE: torch.Tensor,
        base_logits_BKV: torch.Tensor,
        previous_ids_BK: torch.Tensor,
        distance_BK: torch.Tensor,
        missing_BK: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [B, K, V] of a round's rows with the token before each of them known (training, tests).

        Args:
            states_BKE: the trunk's query states at consecutive ranks.
            base_logits_BKV: the trunk's logits of these states.
            previous_ids_BK: the token one rank before each row.
            distance_BK: from that token's position to the row's (:func:`distance_to_previous`).
            missing_BK: rank - limit of each row.
        """
        x_BKM = self.mix(states_BKE, distance_BK, missing_BK) + self.from_token(self.token(previous_ids_BK))
        attended_BHKD = F.scaled_dot_product_attention(*self.layer.query_key_value(x_BKM), is_causal=True)
        return base_logits_BKV + self._correct(self.layer.rest(x_BKM, attended_BHKD), missing_BK)

    def mix(self, states_BKE: torch.Tensor, distance_BK: torch.Tensor, missing_BK: torch.Tensor) -> torch.Tensor:
        """What a row knows before the token that precedes it, [B, K, M]."""
        return self.from_state(states_BKE) + self.place(distance_BK, missing_BK)

    def place(self, distance_BK: torch.Tensor, missing_BK: torch.Tensor) -> torch.Tensor:
        """What distance and missing tokens add to a row's state, [B, K, M]."""
        most = self.config.max_distance
        distance_BKM = self.distance(distance_BK.clamp(-most, most) + most)
        return distance_BKM + self.missing(missing_BK.clamp(max=self.config.max_missing))

    def _correct(self, x_BKM: torch.Tensor, missing_BK: torch.Tensor) -> torch.Tensor:
        """The low-rank correction [B, K, V] to the trunk's logits, zero where the state misses nothing."""
        return self.vocabulary(self.correction(self.norm(x_BKM)) * (missing_BK > 0)[..., None])

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the folder ``draft_head`` inside ``save_directory``, which is the trunk's folder or any other."""
        folder = Path(save_directory) / FOLDER
        self.config.save_pretrained(folder)
        weights = {name: x.contiguous() for name, x in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, name_or_path, trunk: Network, revision: str = "main") -> "DraftHead":
        """Load the head in the folder ``draft_head`` of an embedded model, a local folder or a Hub id (or that is one
        itself), ready to draft for ``trunk``: in evaluation mode, with the trunk's type and device.

        Raises :class:`ModelNotFoundError` where there is none and :class:`CheckpointMismatchError` for one that was
        trained for another trunk.
        """
        head = cls._load(name_or_path, revision, trunk.dtype)
        require_trunk(head, trunk, str(name_or_path))
        return head.to(trunk.device).eval()

    @classmethod
    def _load(cls, name_or_path, revision: str, dtype: torch.dtype) -> "DraftHead":
        try:
            folder = "" if is_draft_head(name_or_path, revision) else FOLDER
            return load_plain(cls, DraftHeadConfig, name_or_path, revision, dtype, folder)
        except OSError as error:
            raise ModelNotFoundError(
                f"no draft head in {str(name_or_path)!r} at revision {revision!r}: make one with "
                f"python -m asarm train-draft-head ({reason(error)})"
            ) from error

    def start_from(self, name_or_path, revision: str = "main") -> None:
        """Take the weights of a head of this shape, whatever trunk it was trained for: of another trunk with the same
        tokenizer it is a better beginning than none.

        Raises :class:`ModelNotFoundError` where there is none and :class:`CheckpointMismatchError` for another shape.
        """
        start = self._load(name_or_path, revision, torch.float32)
        shapes = [(name, getattr(start.config, name), getattr(self.config, name)) for name in SHAPE_FIELDS]
        if wrong := [f"{name} {there}, not {here}" for name, there, here in shapes if there != here]:
            raise CheckpointMismatchError(
                f"cannot start from the draft head of {str(name_or_path)!r}: {', '.join(wrong)}"
            )
        self.load_state_dict(start.state_dict())


def _set_random(module: nn.Module) -> None:
    """Random weights to train from."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=EMBEDDING_STD)


def require_trunk(head: DraftHead, trunk: Network, name: str) -> None:
    """Raise :class:`CheckpointMismatchError` for a head that was made for another trunk."""
    if (expected := head.config.trunk_fingerprint) != (found := trunk.fingerprint()):
        raise CheckpointMismatchError(
            f"the draft head of {name!r} was trained for the model with fingerprint {expected}, this one has {found}; "
            "train one for it with python -m asarm train-draft-head"
        )


def is_draft_head(name_or_path, revision: str) -> bool:
    """Whether a name leads to the folder of a draft head itself, and not to one that holds such a folder."""
    try:
        settings, _ = DraftHeadConfig.get_config_dict(resolve_model(name_or_path, revision), revision=revision)
    except OSError:
        return False
    return settings.get("model_type") == DraftHeadConfig.model_type


def find_draft_head(name_or_path, trunk: Network, revision: str = "main") -> DraftHead | None:
    """The head that lies beside a model, or None where there is none; one for another trunk is refused."""
    found = find_file(name_or_path, "config.json", revision, FOLDER)
    return None if found is None else DraftHead.from_pretrained(name_or_path, trunk, revision)


def distance_to_previous(order: Order, rank_BK: torch.Tensor) -> torch.Tensor:
    """From the position one rank before to the position at each rank, [B, K]; 0 for rank 0, which has none before."""
    last = order.order_BN.shape[1] - 1
    here_BK = order.order_BN.gather(1, rank_BK.clamp(max=last))
    return here_BK - order.order_BN.gather(1, (rank_BK - 1).clamp(0, last)).where(rank_BK > 0, here_BK)


def previous_ids(ids_BN: torch.Tensor, order: Order, rank_BK: torch.Tensor, none_id: int) -> torch.Tensor:
    """The token one rank before each rank, [B, K]; ``none_id`` (the mask token) for rank 0."""
    position_BK = order.order_BN.gather(1, (rank_BK - 1).clamp(0, order.order_BN.shape[1] - 1))
    return ids_BN.gather(1, position_BK).where(rank_BK > 0, none_id)
