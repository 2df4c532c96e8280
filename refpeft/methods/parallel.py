"""Parallel adapters: a bottleneck beside a sublayer.      He et al. 2021, arXiv 2110.04366, §3.3, table 1, and §4.5

    y = N(h + F(x) + x)                                     h = mlp(x), N the norm after the residual
    pre-norm    y = x + h + F(x)                            h = mlp(N x)
    F(x) = s φ(x Dᵀ + b_D) Uᵀ + s b_U                       φ = ReLU, s = 4, D [m, d], U [d, m]

With it and a prefix of 30 keys and values in every attention, an adapter list is the paper's MAM adapter. All options,
with the backward pass, are in `refpeft.bottleneck`.

Claims:
    PA1  At init U = 0, hence the model is unchanged, to the bit.
    PA2  s F with s a number is F with s U and s b_U: the scale is a choice of learning rate and of how U starts.
    PA3  `scaling` 'learned' starts at 1 and has the one gradient Σ dy · F/s; 'channel' has d of them.
    PA4  A parallel adapter adds to its sublayer: several of them add up, in any order.
    PA5  AdapterDrop: what an adapter has for a layer in `leave_out` waits, with gradient 0.

Where implementations differ:
    * The paper's bottlenecks are 512 (or 1024, or 30) wide, not a share of d; AdapterHub's default is d/2.
    * In pre-norm models F reads x as it is, as AdapterHub has it; the paper's code for mBART has that, and F(N x) as an
      option, here `normed_input`.
    * AdapterHub 1.3.0 ignores `stochastic_depth` here; in other adapters it is of F in whole rows of the batch.
    * In AdapterHub's `Stack` a parallel adapter forgets the adapters before it; here it adds to them (PA4).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from refpeft import bottleneck
from refpeft.bottleneck import FROZEN, KEYS, complete, hooks, init_model, masks, outline_model, reads_all

__all__ = ["FROZEN", "KEYS", "Config", "complete", "hooks", "init_model", "masks", "outline_model", "reads_all"]


@dataclass(frozen=True)
class Config(bottleneck.Config):
    mh_adapter: bool = False
    reduction_factor: float | Mapping[str, float] = 2
    non_linearity: str = "relu"
    init_weights: str = "mam_adapter"
    is_parallel: bool = True
    scaling: float | str = 4.0
