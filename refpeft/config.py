"""What a transformer is, as data: what it computes, and where its layers find their parameters."""

from dataclasses import dataclass

from refpeft.ops import Array


@dataclass(frozen=True)
class Config:
    """What the transformer computes. Names as in HF's config.json where one exists."""

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str  # of `ops.activations`
    gated: bool  # mlp x = down(act(gate x) ⊙ up x), else down(act(up x))
    norm_first: bool
    norm_eps: float
    causal: bool
    head: tuple[str, ...]  # steps after the last layer: sites, activations, 'first' or 'last' (pick one position)
    inv_freq: Array | None = None  # rotary frequencies [e/2]
    positions: str = "index"  # learned positions: 'index' 0, 1, …; 'nonpad': pad_token_id + 1, … counting non-pad ids
    pad_token_id: int | None = None


@dataclass(frozen=True)
class Site:
    """A layer's place in the checkpoint: its module, its kind, and its tensors' names (tied layers share one)."""

    path: str
    kind: str  # 'linear', 'conv1d', 'embedding', 'layer_norm', 'rms_norm'
    weight: str
    bias: str  # a layer has no bias if the checkpoint has no tensor of this name
