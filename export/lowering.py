"""Fused nodes: the ops of the specification for which ONNX has one of its own.

A rule takes the arguments of an op of `refpeft.ops` and answers with nodes of the same meaning. The formula itself is
traced beside it; whatever a gradient uses of that stays in the graph, the rest is left out. An op without a rule is
exported as its formula, so a missing rule costs speed, never correctness. Softmax has none: a row of nothing but −∞
gives zeros in the specification and NaN in ONNX.

Every rule is compared with the formula on onnxruntime in tests/export/test_lowering.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from refpeft.export.signature import KNOWN
from refpeft.export.sizes import Shape
from refpeft.export.symbols import Branch, Symbol, where


def linear(x: Symbol, W: Symbol, b: Symbol | None = None, frozen: bool = False) -> Symbol:
    """x Wᵀ + b without flattening x. A Conv1D's W is the transpose of what is stored, and undone by W.T."""
    if x.ndim == 2 and b is not None:
        stored = W.source("Transpose")
        weight, flip = (W, 1) if stored is None else (stored, 0)
        return x.graph.emit("Gemm", (x, weight, b), x.dtype, (x.shape[0], W.shape[0]), transB=flip)
    y: Symbol = x @ W.T
    return y if b is None else y + b


def layer_norm(x: Symbol, g: Symbol, b: Symbol, eps: float = 1e-5) -> Symbol:
    return x.graph.emit("LayerNormalization", (x, g, b), x.dtype, x.shape, axis=-1, epsilon=eps)


def rms_norm(x: Symbol, g: Symbol, eps: float = 1e-6) -> Symbol:
    return x.graph.emit("RMSNormalization", (x, g), x.dtype, x.shape, axis=-1, epsilon=eps)


def gelu(x: Symbol) -> Symbol:
    return x.graph.emit("Gelu", (x,), x.dtype, x.shape, approximate="none")


def gelu_new(x: Symbol) -> Symbol:
    return x.graph.emit("Gelu", (x,), x.dtype, x.shape, approximate="tanh")


def silu(x: Symbol) -> Symbol:
    """Opset 23 has no Swish: x σ(x)."""
    y: Symbol = x * x.graph.emit("Sigmoid", (x,), x.dtype, x.shape)
    return y


def relu(x: Symbol) -> Symbol:
    return x.graph.emit("Relu", (x,), x.dtype, x.shape)


def pick(x: Symbol, index: Symbol) -> Symbol:
    return x.graph.emit("GatherND", (x, index[:, None]), x.dtype, (x.shape[0], x.shape[2]), batch_dims=1)


def attention(
    q: Symbol, k: Symbol, v: Symbol, mask: Symbol | None = None, bias: Symbol | None = None, scale: float | None = None
) -> Symbol:
    """Attention-23 on [b, s, h·e]; on [b, h, s, e] where keys are kept like that from one run to the next. onnxruntime
    does not broadcast its mask, which is therefore expanded, once for all layers. A bias takes the mask's place, −∞
    where that is false. Rows that may see nothing give zeros in both."""
    b, s, h, e = q.shape
    t, g = k.shape[1:3]
    more = {} if scale is None else {"scale": scale}
    masks = [] if mask is None else [mask.expand(b, 1, s, t)]
    if bias is not None:
        seen = bias if mask is None else where(q.graph, mask, bias, -math.inf)
        masks = [seen.astype(q.dtype).expand(b, h, s, t)]
    if k.swapaxes(1, 2).node.op == "Concat":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        shape = (b, h, s, v.shape[3])
        if one_or_other(k):
            return either(q, k, v, masks, shape, more).swapaxes(1, 2)
        return q.graph.emit("Attention", [q, k, v, *masks], q.dtype, shape, **more).swapaxes(1, 2)
    heads = {"q_num_heads": h, "kv_num_heads": g} | more
    args = [q.reshape(b, s, h * e), k.reshape(b, t, g * e), v.reshape(b, t, g * v.shape[3]), *masks]
    y = q.graph.emit("Attention", args, q.dtype, (b, s, h * v.shape[3]), **heads)
    return y.reshape(b, s, h, v.shape[3])


def one_or_other(k: Symbol) -> bool:
    """Is this [known; new], one of which has no places (`refpeft.export.seq2seq`)?"""
    known = k.node.args[0]
    return known is not None and not known.op and getattr(known.shape[2], "name", "") == KNOWN


def either(q: Symbol, k: Symbol, v: Symbol, masks: Sequence[Symbol], shape: Shape, attrs: Mapping[str, Any]) -> Symbol:
    """Attention to what is known, or to what is new where nothing is: neither is copied, as joining them would."""
    g = q.graph
    parts = [Symbol(g, a) for x in (k, v) for a in x.node.args if a is not None]
    none = g.ints(parts[0].shape[2:3]) == 0
    rest, more = range(6, 6 + len(masks)), tuple(attrs.items())
    of_new, of_known = (Branch("Attention", (1, 2 + n, 4 + n, *rest), more) for n in (1, 0))
    args = [none, q, *parts, *masks]
    return g.emit("If", args, q.dtype, shape, then_branch=of_new, else_branch=of_known)


def rope(x: Symbol, cos: Symbol, sin: Symbol) -> Symbol:
    """RotaryEmbedding-23 on [b, s, h·e] with the angles of each place, [b, s, e/2]."""
    b, s, h, e = x.shape
    half = cos.shape[3]
    angles = [c.reshape(c.shape[0], s, half).expand(b, s, half) for c in (cos, sin)]
    flat = x.reshape(b, s, h * e)
    return x.graph.emit("RotaryEmbedding", (flat, *angles), x.dtype, flat.shape, num_heads=h).reshape(b, s, h, e)


RULES: Mapping[str, Callable[..., Any]] = {
    rule.__name__: rule for rule in (linear, layer_norm, rms_norm, gelu, gelu_new, silu, relu, pick, attention, rope)
}
