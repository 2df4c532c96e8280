"""Pfeiffer's adapters: one bottleneck a layer.      Pfeiffer et al. 2020, arXiv 2005.00052, §4.1; 2005.00247, §3

    z = N(h + x),   y = N(h + F(z) + x)                     h = mlp(x), N the norm after the residual
    pre-norm    y = x + h + F(h + x)                        h = mlp(N x)
    F(z) = φ(z Dᵀ + b_D) Uᵀ + b_U                           φ = ReLU, D [m, d], U [d, m]

The residual r = h of the adapter is the sublayer's output from before the norm, so that F = 0 leaves the model as it
was. N is the same norm twice. All options, with the backward pass, are in `refpeft.bottleneck`.

Claims:
    PF1  With U = 0 and b_U = 0 the model is unchanged, to the bit.
    PF2  There are L adapters of 2 m d + d + m parameters: 0.9 M for BERT base at m = 48 (arXiv 2106.09685, table 2).
    PF3  The adapters of Lin et al. 2020 (arXiv 2004.03829; Adapter^L in arXiv 2106.09685), y = t + F(LN₁ t) with
         t = x + h after the sublayer, are original_ln_before=True, original_ln_after=False, residual_before_ln=False
         and ln_before=True in pre-norm models: 0.37 M for GPT-2 medium at m = 6, 11.09 M at m = 224, and for GPT-2
         large 0.88 M at m = 8, 23.00 M at m = 248 (table 3).
    PF4  AdapterDrop: what an adapter has for a layer in `leave_out` waits, with gradient 0, and its removal, or that of
         the layer from `leave_out`, is all there is to it (Adapter^D in arXiv 2106.09685).

Where implementations differ:
    * AdapterHub starts D and U from N(0, 4 · 10⁻⁴) ('bert'), the default here too, since the paper says nothing.
    * arXiv 2005.00247 §3 found this place by a search over all of AdapterHub's options; what they mean is in
      `refpeft.bottleneck`.
    * In pre-norm models, with residual_before_ln=False and original_ln_after, x is added twice, as in AdapterHub: in
      r = h + x and behind the adapter. AdapterHub refuses original_ln_after=False in models that it only hooks (Qwen2).
"""

from dataclasses import dataclass

from refpeft import bottleneck
from refpeft.bottleneck import FROZEN, KEYS, complete, hooks, init_model, masks, outline_model, reads_all

__all__ = ["FROZEN", "KEYS", "Config", "complete", "hooks", "init_model", "masks", "outline_model", "reads_all"]


@dataclass(frozen=True)
class Config(bottleneck.Config):
    mh_adapter: bool = False
    original_ln_before: bool = True
    non_linearity: str = "relu"
    init_weights: str = "bert"
