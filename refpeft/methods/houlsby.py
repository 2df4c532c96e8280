"""Houlsby's adapters: a bottleneck after both sublayers of each layer.      Houlsby et al. 2019, arXiv 1902.00751, §2.1

    post-norm   y = N(h + F(h) + x)                         h = attention(x) or mlp(x), N the norm after the residual
    pre-norm    y = x + h + F(h)                            h = attention(N x) or mlp(N x)
    F(h) = φ(h Dᵀ + b_D) Uᵀ + b_U                           D [m, d], U [d, m]

and the model's own norms are trained with the adapters (`train_norms`), and the head (`modules_to_save`). All options
of F and of its place, with the backward pass, are in `refpeft.bottleneck`.

Claims:
    H1  With U = 0 and b_U = 0 the model is unchanged, to the bit: the adapter begins near the identity, not at it.
    H2  An adapter has 2 m d + d + m parameters, the norms 2 d each (§2.1): with GPT-3's d = 12,288 and 96 layers, 7.1 M
        at m = 1 and 40.1 M at m = 8 without norms (Hu et al. 2021, arXiv 2106.09685, table 4, Adapter^H).
    H3  AdapterDrop (Rücklé et al. 2020, arXiv 2010.11918): below the first adapter nothing is computed that differs
        from the base, and what an adapter has for a layer in `leave_out` waits, with gradient 0.
    H4  Two adapters at one place: the second takes the sublayer with the first for its own.
    H5  A gate is one number per sequence; with w = 0 it is the scale σ(c).
    H6  There is no merge: φ stands between D and U.

Where implementations differ:
    * φ is any nonlinearity in the paper, the tanh form of GELU in its code (google-research/adapter-bert), the default
      here; AdapterHub (double_seq_bn) has SiLU.
    * D and U start from N(0, 10⁻⁴) within two standard deviations in the paper, the default here; its code has
      N(0, 10⁻⁶), AdapterHub N(0, 4 · 10⁻⁴) without bounds ('bert').
    * Norms are trained in the paper, and not in AdapterHub.
    * The mean of the gate runs over all positions, padding and later tokens included, as in AdapterHub: with it a
      causal model is no longer causal, and cannot decode step by step.
    * AdapterHub 1.3.0 at 'post_add' needs a norm after the residual, and fails in GPT-2 and LLaMA with an
      UnboundLocalError; here r = h + x there too. Its `scaling` must be a float: 2 is refused, 2.0 is not.
"""

from dataclasses import dataclass

from refpeft import bottleneck
from refpeft.bottleneck import FROZEN, KEYS, complete, hooks, init_model, masks, outline_model, reads_all

__all__ = ["FROZEN", "KEYS", "Config", "complete", "hooks", "init_model", "masks", "outline_model", "reads_all"]


@dataclass(frozen=True)
class Config(bottleneck.Config):
    train_norms: bool = True
