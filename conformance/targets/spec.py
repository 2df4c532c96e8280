"""The specification as a target: the reference of every property, and what mutants are made from.

Layer cases run one part of `refpeft.part`; model and lifecycle cases run `refpeft.Model`. Nothing is computed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import refpeft
from refpeft import bottleneck, quantisation
from refpeft.adapter import Adapter
from refpeft.adapter import found as adapted
from refpeft.checkpoint import adapters as checkpoints
from refpeft.checkpoint.adapters import contents
from refpeft.checkpoint.families import describe
from refpeft.checkpoint.wrapper import PREFIX
from refpeft.conformance import chain
from refpeft.conformance.case import DTYPES, Case
from refpeft.conformance.targets.base import FEATURES, Arrays, Life
from refpeft.conformance.traits import known
from refpeft.inputs import shift_right
from refpeft.method import Phi
from refpeft.methods import METHODS, prefix_tuning
from refpeft.model import Model
from refpeft.ops import Array, cross_entropy
from refpeft.part import BASE, Part, make, stored

GREEK = {"bias": "β", "E": "Λ"}  # names in cases → names in the formulae
LATIN = {"β": "bias", "Λ": "E"}


class Spec:
    def info(self) -> Mapping[str, Any]:
        return {
            "name": "spec", "version": refpeft.__version__,
            "levels": ["layer", "model", "lifecycle", "story", "export"],
            "methods": known(), "dtypes": list(DTYPES), "features": list(FEATURES),
        }  # fmt: skip

    def run(self, case: Case) -> Arrays:
        if "refuse" in case.meta:
            self.made(case)
        if "steps" in case.meta:
            return self.session(case).run(case.meta["steps"])
        return self.layer(case) if case.level == "layer" else self.model(case)

    def close(self) -> None:
        pass

    def made(self, case: Case) -> None:
        """An adapter made from the case's config, with all that is checked then."""
        if case.level == "layer":
            METHODS[case.method].Config(**case.meta["config"])
        else:
            refpeft.init(case.method, case.meta["adapters"]["default"]["config"], model_of(case))

    def layer(self, case: Case) -> Arrays:
        return answers(Layer(case), case.meta["want"])

    def model(self, case: Case) -> Arrays:
        return answers(Whole(case), case.meta["want"])

    def session(self, case: Case) -> "Session":
        from refpeft.conformance.targets.spec_stories import Story

        return Story(case) if case.level == "story" else Session(case)


def answers(subject: Any, want: Sequence[str]) -> Arrays:
    """One method per thing that a case can want."""
    found: Arrays = {}
    for name in want:
        found |= getattr(subject, name)()
    return found


# ── one layer ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Layer:
    """y = wrap(part)(x), as a model of one layer called 'layer'."""

    def __init__(self, case: Case) -> None:
        meta, a = case.meta, case.arrays
        self.case, self.x, self.dy = case, a["x"], a.get("dy")
        self.method = METHODS[case.method]
        self.cfg = self.method.Config(**meta["config"], target_modules=["layer"]).at("layer")
        self.φ = {GREEK.get(n, n): a[n] for n in meta["params"]}
        self.part = part(meta["layer"]["kind"], a["W"], a.get("b"))

    def adapted(self, φ: Mapping[str, Array] | None = None) -> Part:
        values = self.φ if φ is None else φ
        return self.method.wrap(self.cfg, Phi(values, {n: (0, n) for n in values}), self.part)

    def output(self) -> Arrays:
        return {"y": self.adapted().run(self.x)[0]}

    def first_row(self) -> Arrays:
        return {"y_row": self.adapted().run(self.x[:1])[0]}

    def grads(self) -> Arrays:
        _, back = self.adapted().run(self.x)
        want = {(0, n) for n in self.φ}
        dx, grads = back(lambda: self.dy, want)
        found = {"d" + LATIN.get(n, n): grads[0, n]() for n in self.φ}
        return found if self.part.kind == "embedding" else {"dx": dx(), **found}

    def trained(self) -> Arrays:
        names = ["W", *(["b"] if self.part.b is not None else []), *(LATIN.get(n, n) for n in self.φ)]
        return {f"trained/{n}": np.array(n not in ("W", "b")) for n in names}

    def fresh(self) -> Arrays:
        """The base's own output, which is what a fresh adapter must give; and the shapes of its parameters."""
        shapes = {f"shape/{LATIN.get(n, n)}": np.array(v.shape) for n, v in self.φ.items()}
        return {"y_fresh": self.part.run(self.x)[0], **shapes}

    def changed(self) -> Arrays:
        """The output after new values were written into the parameters of an adapter that has already run."""
        new = {n: self.case.arrays["new/" + LATIN.get(n, n)] for n in self.φ}
        return {"y": self.adapted().run(self.x)[0], "y_changed": self.adapted(new).run(self.x)[0]}

    def merged(self) -> Arrays:
        kind = self.part.kind
        W, b, _ = self.method.merge(self.cfg, self.part.W, self.part.b, self.φ)
        found = {
            "W_merged": np.ascontiguousarray(stored(kind, W)),
            "y_merged": part(kind, stored(kind, W), b).run(self.x)[0],
        }
        return found if b is None else {**found, "b_merged": b}

    def nf4(self) -> Arrays:
        """What is stored of W in four bits, and W as it is read from there."""
        W = self.case.arrays["W"]
        codes, absmax = quantisation.nf4(W)
        return {"codes": codes, "absmax": absmax, "W_read": quantisation.read(codes, absmax, W)}

    def merged_nf4(self) -> Arrays:
        """What is stored of the merged weights, and the bias beside them."""
        W, b, _ = self.method.merge(self.cfg, self.part.W, self.part.b, self.φ)
        codes, absmax = quantisation.nf4(W)
        return {"codes": codes, "absmax": absmax, **({} if b is None else {"b_merged": b})}

    def unmerged(self) -> Arrays:
        a = self.case.arrays
        found = {"W_unmerged": a["W"], "y_unmerged": self.adapted().run(self.x)[0]}
        return {**found, "b_unmerged": a["b"]} if "b" in a else found

    def unloaded(self) -> Arrays:
        """What is merged, once more: this time with nothing left that knows of an adapter."""
        return {name.replace("_merged", "_unloaded"): a for name, a in self.merged().items()}

    def disabled(self) -> Arrays:
        return {"y_disabled": self.part.run(self.x)[0], "y_enabled": self.adapted().run(self.x)[0]}


def part(kind: str, W: Array, b: Array | None) -> Part:
    return make("layer", kind, stored(kind, W), b, (BASE, "W"), (BASE, "b"))


# ── a whole model ────────────────────────────────────────────────────────────────────────────────────────────────────


class Whole:
    """A model with the adapters that `active` names, in order."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.base = model_of(case)
        self.inputs = inputs_of(case)
        self.active = [adapter_of(case, name, self.base) for name in case.meta["active"]]
        if "rows" in case.arrays:
            self.active = refpeft.by_row(self.active, case.arrays["rows"])

    def logits(self) -> Arrays:
        return {"logits": self.real(self.base(self.case.arrays["ids"], self.active, **self.inputs)[0])}

    def real(self, out: Array) -> Array:
        """What is said at padded positions is nobody's business: zero."""
        return real(out, mask_of(self.case))

    def other_logits(self) -> Arrays:
        given = {**self.case.arrays, **other(self.case)}
        return {"other_logits": self.base(given["ids"], self.active, **inputs_of(self.case, given))[0]}

    def grads(self) -> Arrays:
        _, vjp = self.base(self.case.arrays["ids"], self.active, **self.inputs)
        names = self.case.meta["active"]
        return {
            f"grad/{n}/{k}": v
            for n, grads in zip(names, vjp(self.case.arrays["dout"]), strict=True)
            for k, v in grads.items()
        }

    def loss(self) -> Arrays:
        """Of a language model: each row predicts the next token, and the last row of a prompt the first. A decoder with
        an encoder predicts each label from those before, and the first from its start."""
        ids, labels = (self.case.arrays[name] for name in ("ids", "labels"))
        if self.base.config.encoder_decoder:
            return {"loss": cross_entropy(self.base(ids, self.active, **self.inputs, **self.shifted())[0], labels)[0]}
        y = self.base(ids, self.active)[0]
        front = np.full((len(labels), y.shape[1] - labels.shape[1]), -100)
        return {"loss": cross_entropy(y[:, :-1], np.concatenate([front, labels], axis=1)[:, 1:])[0]}

    def shifted(self) -> Arrays:
        """What the decoder reads to predict the labels."""
        c = self.base.config
        assert c.decoder_start_token_id is not None
        assert c.pad_token_id is not None
        return {"decoder_input_ids": shift_right(self.case.arrays["labels"], c.decoder_start_token_id, c.pad_token_id)}

    def dropped(self) -> Arrays:
        plain = [refpeft.drop_encoder(a) for a in self.active]
        return {"dropped": self.real(self.base(self.case.arrays["ids"], plain, **self.inputs)[0])}

    def pulled(self) -> Arrays:
        """Pᵀ g: the gradient of Σ ⟨θ′, g⟩ over the tensors of the merged model, each of them once."""
        g, seen, found = tensors(self.case, "g/"), set[str](), dict[str, Array]()
        for role, site in self.base.sites.items():
            part = self.base.part(role)
            dW = stored(part.kind, g[site.weight] * (site.weight not in seen))
            seen.add(site.weight)
            for adapter, φ in adapted(self.active[:1], part.path):
                _, _, vjp = METHODS[adapter.method].merge(adapter.at(part.path), part.W, part.b, φ.values)
                for name, d in vjp(partial(np.asarray, dW), partial(g.get, site.bias))[1].items():
                    key = f"pulled/{self.case.meta['active'][0]}/{φ.keys[name][1]}"
                    found[key] = found[key] + d() if key in found else d()
        return found

    def merged(self) -> Arrays:
        return {f"merged/{n}": v for n, v in refpeft.merge(self.base, self.active).params.items()}

    def merged_logits(self) -> Arrays:
        merged = refpeft.merge(self.base, self.active)
        return {"merged_logits": self.real(merged(self.case.arrays["ids"], **self.inputs)[0])}

    def decoded(self) -> Arrays:
        """The logits of one position after the other, from the keys and values of those before."""
        ids, written, out, cache = self.case.arrays["ids"], self.inputs.get("decoder_input_ids"), [], None
        for t in range((ids if written is None else written).shape[1]):
            one = slice(t, t + 1)
            given = (ids[:, one], {}) if written is None else (ids, {"decoder_input_ids": written[:, one]})
            y, cache = self.base.decode(given[0], cache, self.active, **given[1])
            out.append(y)
        return {"decoded": np.concatenate(out, axis=1)}

    def count(self) -> Arrays:
        return {"count": np.array(sum(v.size for a in self.active for v in a.params.values()))}


def inputs_of(case: Case, arrays: Mapping[str, Array] | None = None) -> Arrays:
    """What a model is given besides ids."""
    there = case.arrays if arrays is None else arrays
    return {n: there[n] for n in ("attention_mask", "token_type_ids", "decoder_input_ids") if n in there}


def mask_of(case: Case) -> Array | None:
    """Of the positions that the output has: those of a decoder are not what the mask of the encoder is about."""
    return None if "decoder_input_ids" in case.arrays else case.arrays.get("attention_mask")


def other(case: Case) -> Arrays:
    """The ids, or those of the decoder, whose last tokens are others."""
    return {n.removeprefix("other_"): a for n, a in case.arrays.items() if n.startswith("other_")}


def real(out: Array, mask: Array | None) -> Array:
    """What is said at padded positions is nobody's business: zero. A prompt before the tokens is not padding."""
    if mask is None or out.ndim < 3:
        return out
    prompt = np.ones((len(mask), out.shape[1] - mask.shape[1]), mask.dtype)
    return np.where(np.concatenate([prompt, mask], axis=1)[..., None] > 0, out, out.dtype.type(0))


def model_of(case: Case) -> Model:
    source = case.meta["model"]
    if source["model_type"] == chain.FAMILY:
        return chain.model(source, tensors(case, "model/"))
    fields, sites, _ = describe(source)
    return Model(fields, sites, tensors(case, "model/"), source)


def adapter_of(case: Case, name: str, model: Model) -> Adapter:
    """The adapter `name`, its tensors being the case's arrays '<name>/<tensor>'."""
    meta, values = case.meta["adapters"][name], tensors(case, name + "/")
    still = {n: values.pop(n) for n in meta.get("frozen", ())}
    return Adapter(meta["method"], METHODS[meta["method"]].Config(**meta["config"]), values, still)


def tensors(case: Case, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in case.arrays.items() if n.startswith(prefix)}


# ── a life: steps, and what the model says after each ────────────────────────────────────────────────────────────────


class Session(Life):
    """The invariant of all lifecycles: the model says what the specification says of the adapters active now."""

    def __init__(self, case: Case) -> None:
        self.case, self.base = case, model_of(case)
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.enabled = True
        self.merged: Model | None = None
        self.files: dict[str, Adapter] = {}

    def logits(self) -> Array:
        model, adapters = (self.merged, []) if self.merged else (self.base, self.now())
        return model(self.case.arrays["ids"], adapters, **inputs_of(self.case))[0]

    def now(self) -> list[Adapter]:
        return [self.adapters[name] for name in self.active] if self.enabled else []

    def add(self, adapter: str) -> None:
        self.adapters[adapter] = adapter_of(self.case, adapter, self.base)
        self.active = self.active or [adapter]

    def activate(self, adapters: Sequence[str]) -> None:
        self.active = list(adapters)

    def merge(self, safe: bool = False) -> None:
        """Merging what is merged already changes nothing."""
        self.merged = self.merged or refpeft.merge(self.base, self.now())

    def refused_merge(self, adapter: str) -> Arrays:
        """nan in the adapter: a merge with safe=True must be refused and change nothing. Then the nan is taken out."""
        return {"refused": np.array(True)}

    def unmerge(self) -> None:
        self.merged = None

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def weighted(self, adapter: str, of: Sequence[str], weights: Sequence[float], how: str) -> None:
        """ΔW = Σ wₖ ΔWₖ: adapters whose α is wₖ αₖ, side by side. `how` is the target's concern."""
        for name, w in zip(of, weights, strict=True):
            self.adapters[f"{adapter}.{name}"] = scaled(self.adapters[name], w)
        self.active = [f"{adapter}.{name}" for name in of]

    def delete(self, adapter: str) -> None:
        del self.adapters[adapter]
        self.active = [name for name in self.active if name != adapter] or list(self.adapters)[:1]

    def save(self, adapter: str) -> Arrays:
        self.files[adapter] = self.adapters[adapter]
        return {f"file/{name}": a for name, a in filed(self.files[adapter]).items()}

    def convert(self, adapter: str) -> None:
        """Saved as the plain adapter that it is, of twice the rank, A₀ and B₀ being part of A and B; and loaded."""
        a = self.adapters[adapter]
        params = checkpoints.plain_params(a)
        self.files[adapter] = a.replace(config=checkpoints.doubled(a.config), params=params, frozen={})
        self.load([adapter])

    def load(self, adapters: Sequence[str]) -> None:
        """A new base model, with these saved adapters; the first of them active."""
        self.adapters = {name: self.files[name] for name in adapters}
        self.active, self.merged, self.enabled = [adapters[0]], None, True

    def change(self, adapter: str) -> None:
        """New values written into the parameters of an adapter."""
        new = tensors(self.case, f"new-{adapter}/")
        self.adapters[adapter] = self.adapters[adapter].replace(params=new)


def filed(adapter: Adapter) -> Arrays:
    """What a file of it holds, by HF peft's names; where HF peft has no such adapter, its parameters by their own."""
    stacked = prefix_tuning.SHARED["encoder.P"] in adapter.params or prefix_tuning.SHARED["encoder.E"] in adapter.params
    unshifted = not getattr(adapter.config, "position_shift", True)
    if isinstance(adapter.config, bottleneck.Config) or unshifted or stacked:
        return dict(adapter.params)
    return {name.removeprefix(PREFIX): a for name, a in contents(adapter)[1].items()}


def scaled(adapter: Adapter, w: float) -> Adapter:
    cfg = adapter.config
    pattern = {path: w * α for path, α in cfg.alpha_pattern.items()}
    return adapter.replace(config=replace(cfg, lora_alpha=w * cfg.lora_alpha, alpha_pattern=pattern))
