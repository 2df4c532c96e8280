"""What a transformer is, as data: what it computes, and where its layers find their parameters."""

from dataclasses import dataclass

from refpeft.ops import Array

POOLS = ("first", "last", "eos")  # the position that a classifier reads: the last but padding, the last end of text


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
    head: tuple[str, ...]  # steps after the last layer: sites, activations, 'scale', or one of POOLS
    inv_freq: Array | None = None  # rotary frequencies [e/2]
    positions: str = "index"  # learned positions: 'index' 0, 1, …; 'nonpad': pad_token_id + 1, … counting non-pad ids
    position_offset: int = 0  # rows of the table of positions before that of place 0
    pad_token_id: int | None = None
    num_decoder_layers: int | None = None  # of an encoder-decoder, whose encoder has num_layers; None: one stack
    eos_token_id: int | None = None
    decoder_start_token_id: int | None = None
    shifts_input: bool = False  # without decoder_input_ids, the decoder gets the ids of the encoder, shifted
    embed_scale: float = 1.0  # what token embeddings are multiplied by
    attention_scale: float | None = None  # α of `ops.attention`; None: 1/√e
    relative: tuple[int, int] | None = None  # relative positions: how many buckets, and the distance of the last one
    buffers: tuple[str, ...] = ()  # tensors that are no parameters: no method trains them

    @property
    def encoder_decoder(self) -> bool:
        return self.num_decoder_layers is not None

    def causal_at(self, stack: str) -> bool:
        """May the positions of this stack see those before them only? Those of an encoder see all."""
        return self.causal and stack != "encoder."


@dataclass(frozen=True)
class Site:
    """A layer's place in the checkpoint: its module, its kind, and its tensors' names (tied layers share one)."""

    path: str
    kind: str  # 'linear', 'conv1d', 'embedding', 'layer_norm', 'rms_norm'
    weight: str
    bias: str  # a layer has no bias if the checkpoint has no tensor of this name
