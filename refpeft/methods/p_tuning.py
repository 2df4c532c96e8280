"""P-tuning.      Liu et al. 2021, arXiv 2103.10385, §3

    P = MLP(LSTM(H))   or   MLP(H)                      H [n, d] → P [n, d]
    MLP(z) = W₂ relu(W₁ z + b₁) + b₂                    behind the LSTM:  2h → 2h → d
    MLP(z) = W₃ relu(W₂ relu(W₁ z + b₁) + b₂) + b₃      alone:  d → h → h → d

The LSTM reads H in both directions, h wide each, in `encoder_num_layers` layers (`refpeft.recurrent`). The rows of P
are the embeddings of virtual tokens that stand among the tokens of a template, such as (P₁, x, P₂, [MASK]) or
(P₁, x, P₂, [MASK], P₃): see `refpeft.templates`. With dP as in prompt tuning, the gradients of H, W and b follow by the
chain rule, through the LSTM from its last step to its first.

Claims:
    PU1  The encoder is needed in training only: with P in its place, outputs are the same, bit for bit (drop_encoder).
    PU2  With the prompt before the tokens (P₁, x), P-tuning is prompt tuning with this P.
    PU3  The order of virtual tokens in the template, not their number, decides where P goes: id v + k has row k.
    PU4  Both bias vectors of the LSTM have the same gradient.

Where implementations differ:
    * The paper's encoder is the LSTM with the MLP of two layers; HF peft's default is the MLP alone, of three, which is
      the default here. The paper's code gives both directions together the width of the model: encoder_hidden_size d/2.
    * HF peft knows one template, the prompt before the tokens, which is the default here; the paper's need `placement`
      'template' and ids made by `refpeft.templates`.
    * With encoder_dropout (between the layers of the LSTM) HF peft draws a mask for each row of the batch; here the
      batch shares one prompt, and one mask.
    * Checkpoints hold P, as HF peft's do: an encoder that was saved is gone, and training goes on from P itself.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from refpeft import prompts
from refpeft.hollow import hollow
from refpeft.hooks import Hooks
from refpeft.ops import Array, Vjp, linear, relu
from refpeft.part import Lazy, Once, link
from refpeft.prompts import Virtual, own_grads
from refpeft.recurrent import lstm

if TYPE_CHECKING:
    from refpeft.adapter import Adapter
    from refpeft.model import Model

KEYS = {"P": (prompts.P, None)}
SHARED = {"P": prompts.P, "H": "embedding.weight", "LSTM": "lstm_head.", "MLP": "mlp_head."}
FROZEN = ()
ENSEMBLES = True  # `prompts.ensemble` may put several into one adapter
H, LSTM, MLP = "embedding.weight", "lstm_head", "mlp_head"


@dataclass(frozen=True)
class Config(Virtual):
    """HF peft's PromptEncoderConfig."""

    encoder_reparameterization_type: str = "MLP"
    encoder_hidden_size: int | None = None  # the width of the model, if None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_reparameterization_type not in ("MLP", "LSTM"):
            found = self.encoder_reparameterization_type
            raise ValueError(f"encoder_reparameterization_type must be 'MLP' or 'LSTM', found {found!r}")
        if self.encoder_num_layers < 1 or (self.encoder_hidden_size is not None and self.encoder_hidden_size < 1):
            raise ValueError(
                "encoder_num_layers and encoder_hidden_size must be positive integers, "
                f"found {self.encoder_num_layers!r} and {self.encoder_hidden_size!r}"
            )
        if not 0 <= self.encoder_dropout < 1:
            raise ValueError(f"encoder_dropout must be in [0, 1), found {self.encoder_dropout!r}")


def complete(cfg: Config, model: "Model") -> Any:
    return prompts.complete(
        replace(cfg, encoder_hidden_size=cfg.encoder_hidden_size or model.config.hidden_size), model
    )


def shapes(cfg: Config) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """The encoder's parameters as torch names and orders them, with their shapes and the number n of U(−1/√n, 1/√n)."""
    d, h = cfg.token_dim or 0, cfg.encoder_hidden_size or 0
    widths = [d, h, h, d]
    if cfg.encoder_reparameterization_type == "LSTM":
        widths = [2 * h, 2 * h, d]
        for n in range(cfg.encoder_num_layers):
            for way in (f"l{n}", f"l{n}_reverse"):
                own = {"weight_ih": (4 * h, 2 * h if n else d), "weight_hh": (4 * h, h)}
                for name, shape in {**own, "bias_ih": (4 * h,), "bias_hh": (4 * h,)}.items():
                    yield f"{LSTM}.{name}_{way}", shape, h
    for n, (i, o) in enumerate(pairwise(widths)):
        yield f"{MLP}.{2 * n}.weight", (o, i), i
        yield f"{MLP}.{2 * n}.bias", (o,), i


def init_model(
    cfg: Config, model: "Model", chosen: Sequence[str], rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """H ~ N(0, 1), all else U(−1/√n, 1/√n): torch's own initialisation, which HF peft and the paper's code use."""
    assert cfg.token_dim is not None
    φ: dict[str, Array] = {H: rng.normal(size=(cfg.total, cfg.token_dim))}
    for name, shape, n in shapes(cfg):
        φ[name] = rng.uniform(-1, 1, shape) / math.sqrt(n)
    return {name: a.astype(prompts.dtype_of(model)) for name, a in φ.items()}, {}


def outline_model(cfg: Config, model: "Model", chosen: Sequence[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    """H [n S, d] and the encoder's."""
    return {H: prompts.outline(cfg, model)} | {n: hollow(s, prompts.dtype_of(model)) for n, s, _ in shapes(cfg)}, {}


def kept(adapter: "Adapter") -> "Adapter":
    """P [n S, d], which is of the shape and dtype of H."""
    if prompts.P in adapter.params:
        return adapter
    encoders = {H, *(name for name, *_ in shapes(adapter.config))}
    params = {name: a for name, a in adapter.params.items() if name not in encoders}
    return adapter.replace(params={prompts.P: adapter.params[H]} | params)


def encoder(
    cfg: Config, φ: Mapping[str, Array], masks: Array | None = None
) -> tuple[Array, Callable[[Lazy], dict[str, Lazy]]]:
    """P = MLP(LSTM(H)) or MLP(H), and pull: dP → the gradients by name, lazily."""
    names = [name for name, *_ in shapes(cfg)]
    x, steps = φ[H][None], list[tuple[Vjp, Sequence[str]]]()  # [1, n, d]: a batch of one
    recurrent = [name for name in names if name.startswith(LSTM)]
    if recurrent:
        x, vjp = lstm(x, *(φ[name] for name in recurrent), masks=() if masks is None else masks)
        steps.append((vjp, recurrent))
    mlp = names[len(recurrent) :]
    for k in range(0, len(mlp), 2):
        if k:
            x, vjp = relu(x)
            steps.append((vjp, ()))
        x, vjp = linear(x, *(φ[name] for name in mlp[k : k + 2]))
        steps.append((vjp, mlp[k : k + 2]))

    def pull(dP: Lazy) -> dict[str, Lazy]:
        d: Lazy = Once(lambda: dP()[None])
        grads: dict[str, Lazy] = {}
        for vjp, own in reversed(steps):
            d, *dφ = link(vjp, d, 1 + len(own))
            grads |= dict(zip(own, dφ, strict=True))
        return grads | {H: Once(lambda: d()[0])}

    return x[0], pull


def hooks(adapter: "Adapter", k: int, model: "Model") -> Hooks:
    """P, made by the encoder if it is still there, for the virtual tokens."""
    if prompts.P in adapter.params:
        P = adapter.params[prompts.P]
        pull: Callable[[Lazy], dict[str, Lazy]] = itself
    else:
        P, pull = encoder(adapter.config, adapter.params, adapter.masks.get(LSTM))
    return prompts.hooks(
        adapter.config, P, lambda dP, want: own_grads(k, adapter.params, want, pull(dP)), model, adapter.rows
    )


def itself(dP: Lazy) -> dict[str, Lazy]:
    return {prompts.P: dP}


def plain(cfg: Config, params: Mapping[str, Array]) -> dict[str, Array]:
    """P in place of the encoder that makes it."""
    encoders = [H, *(name for name, *_ in shapes(cfg))]
    kept = {name: a for name, a in params.items() if name not in encoders}
    return kept if prompts.P in params else {prompts.P: encoder(cfg, params)[0], **kept}


def masks(cfg: Config, model: "Model", rng: np.random.Generator, *shapes: object) -> dict[str, Array]:
    """Of the dropout between the layers of the LSTM: [layers − 1, 1, n, 2h]."""
    p, layers = cfg.encoder_dropout, cfg.encoder_num_layers - 1
    if not p or not layers or cfg.encoder_reparameterization_type == "MLP":
        return {}
    kept = rng.random((layers, 1, cfg.total, 2 * (cfg.encoder_hidden_size or 0))) >= p
    return {LSTM: (kept / (1 - p)).astype(prompts.dtype_of(model))}
