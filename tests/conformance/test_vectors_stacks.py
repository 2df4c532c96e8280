"""Golden vectors of encoder-decoders: each finds the kind of bug that it says it hunts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refpeft import bottleneck, prompts
from refpeft.conformance import golden, tiny
from refpeft.conformance import mistakes_bottleneck as mb
from refpeft.conformance import mistakes_prompts as mp
from refpeft.conformance import mistakes_selection as ms
from refpeft.conformance.case import Case
from refpeft.conformance.mutants import MUTANTS, STACKS, Mutant
from refpeft.conformance.targets.spec import Whole
from refpeft.conformance.traits import known
from refpeft.methods import prefix_tuning, trainable_tokens

STORED = Path(__file__).parents[2] / "conformance" / "vectors"
FOUND = {e["id"]: e["file"] for e in golden.read_index(STORED)}
LOGITS = ("model", "logits")


def stored(id: str) -> Case:
    return Case.read(STORED / FOUND[id])


def family(id: str) -> str:
    return str(stored(id).meta.get("model", {}).get("model_type"))


BOTH = [id for id in FOUND if id.split("/")[1] == "model" and family(id) in tiny.ENCODER_DECODERS]


def finds(id: str, mutant: Mutant) -> bool:
    case = stored(id)
    return golden.judge(case, mutant.run(case.question)).kind == "value"


def test_every_method_that_has_them_is_asked_of_a_model_with_two_stacks() -> None:
    """A classifier of two stacks there is none; rsLoRA differs from LoRA in a number."""
    assert {id.split("/")[0] for id in BOTH} == set(known()) - {"p_tuning_v2", "rslora"}


# What no model of one stack reveals. BART has no relative positions.
ACROSS = {
    "cross-attends-to-the-decoder": [id for id in BOTH if id.endswith(("/t5", "/bart"))],
    "cross-sees-padding": [id for id in BOTH if id.endswith("-padding")],
    "encoder-detached": [id for id in BOTH if id.endswith(("/t5", "/bart"))],
    "decoder-bias-in-both-directions": [id for id in BOTH if id.endswith("/t5-decoding")],
}


@pytest.mark.parametrize("name", ACROSS)
def test_mistakes_between_two_stacks_are_found_whatever_the_method(name: str) -> None:
    assert [id for id in ACROSS[name] if not finds(id, STACKS[name])] == []
    assert len(ACROSS[name]) >= 4


# ── and what it says of its own ──────────────────────────────────────────────────────────────────────────────────────


def params(change: Callable[[str], str]) -> Callable[[Case], Whole]:
    """Every parameter of the adapter has the value of another one."""

    class Other(Whole):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.active = [a.replace(params={n: a.params[change(n)] for n in a.params}) for a in self.active]

    return Other


def one_for_all(name: str) -> str:
    return name.removeprefix("encoder.").removeprefix("cross.")


def exchanged(name: str) -> str:
    stack, dot, rest = name.partition(".")
    return {"encoder": "cross", "cross": "encoder"}.get(stack, stack) + dot + rest


def config(**fields: Any) -> Callable[[Case], Whole]:
    """The adapter runs as if its config had these fields."""

    class Otherwise(Whole):
        def __init__(self, case: Case) -> None:
            super().__init__(case)
            self.active = [a.replace(config=replace(a.config, **fields)) for a in self.active]

    return Otherwise


def placed(*arguments: Any) -> Any:
    m = mp.memory(*arguments)
    return replace(m, placed=not m.placed)


def decoder_moved(*arguments: Any) -> Any:
    """The places of a decoder, and of tokens behind a prompt, count the prompt."""
    return replace(prompts_hooks(*arguments), shift=1)


prompts_hooks = prompts.hooks


def from_zero() -> Sequence[Any]:
    """Layers of a decoder are counted from 0 again; what is missing there then is another layer's."""

    def sublayers(f: Any, model: Any) -> Any:
        found = f(model)
        first = sum(p.at.startswith("encoder.") and p.kind == "mlp" for p in found)
        return [replace(p, layer=p.layer - first * p.at.startswith("decoder.")) for p in found]

    def parameters(f: Any, adapter: Any, k: int, place: Any, model: Any) -> Any:
        same = [p for p in bottleneck.sublayers(model) if p.kind == place.kind]
        there = [p for p in same if bottleneck.name(p, "D") in adapter.params]
        return f(adapter, k, place if place in there else there[0], model)

    return [*mb.instead("sublayers", sublayers)(), *mb.instead("parameters", parameters)()]


def encoder_only(adapter: Any, k: int, model: Any) -> Any:
    """New rows are looked up by the first of the stacks."""
    found, done = ms.hooks(adapter, k, model), []

    def part(p: Any) -> Any:
        first = p.kind == "embedding" and not done
        done.append(p)
        return found.part(p) if first else p

    return replace(found, part=part)


def behind_ignored(case: Case) -> Whole:
    """Labels get ignored places at their front, as many as the prompt has, before they are shifted."""
    labels = case.arrays["labels"]
    n = case.meta["adapters"]["default"]["config"]["num_virtual_tokens"]
    front = np.full((len(labels), n), -100)
    return Whole(Case(case.meta, {**case.arrays, "labels": np.concatenate([front, labels], axis=1)}))


def usual_start(case: Case) -> Whole:
    """The config's own start token is not read."""
    return Whole(Case({**case.meta, "model": {**case.meta["model"], "decoder_start_token_id": 2}}, case.arrays))


def mutant(of_model: Any = Whole, patches: Any = lambda: ()) -> Mutant:
    return Mutant(LOGITS, patches, of_model=of_model)


def of_self_attention(name: str) -> str:
    return name.replace("1.EncDecAttention", "0.SelfAttention").replace("encoder_attn", "self_attn")


PREFIX, NECKS, SOFT = "prefix_tuning/model/", ("houlsby", "pfeiffer", "parallel"), ("prompt_tuning", "p_tuning")
LABELLED = (*SOFT, "prefix_tuning")
HUNTED: dict[str, tuple[Sequence[str], Mutant]] = {
    "one prefix for all": ([PREFIX + n for n in ("t5", "bart", "bart-projected")], mutant(params(one_for_all))),
    "prefixes exchanged": ([PREFIX + n for n in ("t5", "bart")], mutant(params(exchanged))),
    "a prefix with a place": (
        [PREFIX + n for n in ("t5", "t5-unshifted")], mutant(patches=mp.instead(prefix_tuning, memory=placed))
    ),
    "the first layer's prefix": ([PREFIX + "t5-layers"], MUTANTS["prefix-tuning-first-layer-for-all"]),
    "the MLP's activation": ([PREFIX + "bart-projected"], MUTANTS["prefix-tuning-relu-for-tanh"]),
    "a prefix that is masked": ([PREFIX + "bart-padding"], MUTANTS["prefix-tuning-masked-with-padding"]),
    "a decoder moved by a prompt": (
        [f"{m}/model/bart" for m in SOFT], mutant(patches=mp.instead(prompts, hooks=decoder_moved))
    ),
    "a prompt with the places of tokens": (
        [f"{m}/model/bart" for m in SOFT], MUTANTS["prompt-tuning-positions-from-zero-again"]
    ),
    "a prompt masked as padding": (
        [f"{m}/model/bart-padding" for m in SOFT], MUTANTS["prompt-tuning-masked-with-padding"]
    ),
    "a prompt behind the embeddings or before": (
        ["prompt_tuning/model/bart-behind"], mutant(config(placement="before"))
    ),
    "no adapter at the attention to the encoder": (
        [f"{m}/model/t5-cross" for m in NECKS], mutant(config(cross_adapter=False))
    ),
    "a decoder counted from 0": ([f"{m}/model/t5-left-out" for m in NECKS], mutant(patches=from_zero)),
    "a tensor of three uses": (["full/model/t5"], MUTANTS["full-gradient-of-one-use-only"]),
    "biases of the attention to the encoder": (
        ["bitfit/model/bart"], mutant(ms.leaves_out(lambda n: "encoder_attn" in n))
    ),
    "queries of the attention to the encoder": (
        ["bitfit/model/bart-some"], mutant(ms.leaves_out(lambda n: "encoder_attn.q_proj" in n))
    ),
    "the last norms of stacks": (
        ["ln_tuning/model/t5"], mutant(ms.leaves_out(lambda n: n.endswith("coder.final_layer_norm.weight")))
    ),
    "norms of the embeddings": (
        ["ln_tuning/model/bart"], mutant(ms.leaves_out(lambda n: "encoder.layernorm_embedding" in n))
    ),
    "the last layer of one stack": (
        ["partial/model/t5-layer-of-two"], mutant(ms.leaves_out(lambda n: n.startswith("encoder.")))
    ),
    "the head's bias": (["partial/model/bart-without-head"], MUTANTS["partial-added-to-the-base"]),
    "rows of the encoder alone": (
        [f"trainable_tokens/model/{n}" for n in ("t5", "t5-untied", "bart")],
        mutant(patches=mp.instead(trainable_tokens, hooks=encoder_only)),
    ),
    "labels shifted twice": ([f"{m}/model/t5-loss" for m in LABELLED], MUTANTS["prefix-tuning-labels-shifted-twice"]),
    "padding that counts": ([f"{m}/model/t5-loss" for m in LABELLED], MUTANTS["prefix-tuning-padding-counts"]),
    "places of labels for a prompt": ([f"{m}/model/bart-loss" for m in LABELLED], mutant(behind_ignored)),
    "the usual start": ([f"{m}/model/bart-loss" for m in LABELLED], mutant(usual_start)),
    "magnitudes of another attention": (
        ["dora/model/t5", "dora/model/bart"],
        mutant(params(of_self_attention)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", HUNTED)
def test_what_a_vector_says_it_hunts_is_found(mistake: str) -> None:
    ids, wrong = HUNTED[mistake]
    assert [id for id in ids if not finds(id, wrong)] == []


def test_what_is_hunted_is_not_found_where_nothing_is_wrong() -> None:
    assert [id for id in BOTH if finds(id, mutant())] == []
