"""DyLoRA: LoRA that is trained for all ranks at once.      Valipour et al. 2022, arXiv 2210.07558, algorithm 1

    W′ = W + s B_↓b A_↓b,   s = α/b,   b′ = b      W [o, i], A [r, i], B [o, r];   A_↓b [b, i], B_↓b [o, b]: the first b
    y  = y₀ + s x A_↓bᵀ B_↓bᵀ

With G = ∂L/∂W′:   dA_↓b = s B_↓bᵀ G,   dB_↓b = s G A_↓bᵀ,   zero in the ranks from b on;   dW = G.      With `frozen`
only the last `block_size` c of these b ranks are trained: zero in the first b − c ranks too, which count as constants.

In each step of training b is drawn anew, from c, 2 c, …, r. What is drawn is no matter of the formula: here b is
`rank` in the config, `dataclasses.replace(config, rank=b)` from step to step. `rank=None` is b = r.

Claims:
    DY1  B = 0 at init, hence W′ = W exactly.
    DY2  wrap ≡ merge: both forms give the same outputs and gradients.
    DY3  It is the LoRA of rank b of the first rows of A and columns of B; with b = r that of all, with the same α.
    DY4  What lies from b on has no influence, and gradients of zero.
    DY5  `frozen` changes no output: gradients of the last c of b ranks are the same, all others are zero.
    DY6  Several adapters add up: W′ = W + Σ ΔWₖ, in any order.

Where implementations differ:
    * The paper has c = 1, and `frozen` as one of two ways to train. LyCORIS has blocks, of 4 if not said otherwise, and
      is always `frozen`.
    * LyCORIS has s = α/k for k = b/c blocks, which is α c/b. Its file says α, and is read as a LoRA's: α/r, where b = r
      was trained with α c/r.
    * LyCORIS draws b whenever ΔW is asked for: also when it evaluates, and when it merges. In bypass mode it has s = 1,
      and fails where b < r.
"""

from dataclasses import dataclass

import numpy as np

from refpeft import delta
from refpeft.method import Base, Merged, Phi, Values, branch
from refpeft.methods import lora
from refpeft.ops import Array
from refpeft.part import Back, Grads, Lazy, Once, Part, Run, Want

KEYS = {name: lora.KEYS[name] for name in ("A", "B")}
FROZEN = ()


@dataclass(frozen=True)
class Config(delta.Config):
    """r and α as in HF peft's configs; the rest is this specification's own."""

    rank: int | None = None
    block_size: int = 1
    frozen: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.block_size, int) and self.block_size > 0 and self.r % self.block_size == 0):
            raise ValueError(
                f"block_size must be a positive integer that divides r={self.r}, found {self.block_size!r}"
            )
        if not 0 < self.b <= self.r or self.b % self.block_size:
            raise ValueError(
                f"rank must be a multiple of block_size={self.block_size} from there to r={self.r}, found {self.rank!r}"
            )

    @property
    def b(self) -> int:
        """The ranks in play."""
        return self.r if self.rank is None else self.rank

    @property
    def scale(self) -> float:
        """s = α/b"""
        return self.alpha / self.b


def shapes(cfg: Config, part: Part) -> dict[str, tuple[int, ...]]:
    """A [r, i], B [o, r]."""
    (o, i), r = part.W.shape, cfg.r
    return {"A": (r, i), "B": (o, r)}


def init(cfg: Config, part: Part, rng: np.random.Generator) -> dict[str, Array]:
    """Such that W′ = W, by B = 0; only `init_weights=False` starts elsewhere."""
    φ = {name: lora.kaiming(rng, (n, m)) for name, (n, m) in shapes(cfg, part).items()}
    return delta.typed(φ if cfg.init_weights is False else {**φ, "B": 0 * φ["B"]}, part)


def nested(cfg: Config, φ: Values | Phi) -> dict[str, Array]:
    """A_↓b and B_↓b"""
    return {"A": φ["A"][: cfg.b], "B": φ["B"][:, : cfg.b]}


def whole(cfg: Config, φ: Values | Phi, name: str, d: Lazy) -> Lazy:
    """From the gradient of A_↓b or B_↓b to that of A or B."""
    first, axis = (cfg.b - cfg.block_size if cfg.frozen else 0), "AB".index(name)

    def wide() -> Array:
        a, own = np.swapaxes(0 * φ[name], 0, axis), np.swapaxes(d(), 0, axis)
        return np.swapaxes(np.concatenate([a[:first], own[first:], a[cfg.b :]]), 0, axis)

    return Once(wide)


def merge(cfg: Config, W: Array, b: Array | None, φ: Values, base: Base | None = None) -> Merged:
    """W′ = W + s B_↓b A_↓b,   b′ = b"""

    def ΔW(φ: Values | Phi) -> tuple[Array, delta.BackΔ]:
        few, as_lora = nested(cfg, φ), plain(cfg)

        def back(G: Lazy) -> dict[str, Lazy]:
            return {n: whole(cfg, φ, n, d) for n, d in lora.dΔW(as_lora, few, G).items()}

        return lora.ΔW(as_lora, few), back

    return delta.merged(W, b, φ, ΔW)


def plain(cfg: Config) -> lora.Config:
    """The LoRA that it is."""
    return lora.Config(r=cfg.b, lora_alpha=cfg.alpha)


def wrap(cfg: Config, φ: Phi, part: Part, mask: Array | None = None) -> Part:
    """y = y₀ + s x A_↓bᵀ B_↓bᵀ"""
    return branch(part, low_rank(cfg, φ, part))


def low_rank(cfg: Config, φ: Phi, part: Part) -> Run:
    """z = s x A_↓bᵀ B_↓bᵀ"""
    names = {key: name for name, key in φ.keys.items()}
    δ = lora.low_rank(plain(cfg), Phi(nested(cfg, φ), φ.keys), part)

    def run(x: Array) -> tuple[Array, Back]:
        z, back_z = δ(x)

        def back(dz: Lazy, want: Want) -> tuple[Lazy, Grads]:
            dx, grads = back_z(dz, want)
            return dx, {key: whole(cfg, φ, names[key], d) for key, d in grads.items()}

        return z, back

    return run
