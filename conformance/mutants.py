"""Mutants: the specification with one deliberate mistake each, named after the kind of real bug that it imitates.

They test the suite: `mutants()` must find every one of them wrong, on every seed. A mutant is a change to the `Spec`
target (what its layers, models or sessions answer) or to a function of the specification, which is replaced only while
the mutant runs; the reference is the specification as it is. The mistakes themselves are in `mistakes` and its
neighbours.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import refpeft.tune
from refpeft import combine, delta, hooks, inputs, layers, recurrent, selection
from refpeft.conformance import mistakes as m
from refpeft.conformance import mistakes_intrinsic as mi
from refpeft.conformance import mistakes_products as mo
from refpeft.conformance import mistakes_prompts as mp
from refpeft.conformance import mistakes_refusals as mr
from refpeft.conformance import mistakes_selection as ms
from refpeft.conformance import mistakes_stacks as mt
from refpeft.conformance import mistakes_stories as mh
from refpeft.conformance import mistakes_vectors as mv
from refpeft.conformance import mistakes_whole as mw
from refpeft.conformance.case import Case
from refpeft.conformance.mistakes_bottleneck import BOTTLENECK
from refpeft.conformance.targets.base import Arrays
from refpeft.conformance.targets.spec import Layer, Session, Spec, Whole, answers
from refpeft.conformance.targets.spec_stories import Story
from refpeft.methods import (
    adalora,
    boft,
    did,
    dora,
    dylora,
    glora,
    ia3,
    loha,
    lokr,
    lora,
    oft,
    p_tuning_v2,
    prefix_tuning,
    rslora,
    said,
    trainable_tokens,
    vera,
)
from refpeft.ops import relu


@dataclass(frozen=True)
class Mutant(Spec):
    """Replacements of functions of the specification, or other classes for what it answers."""

    first: tuple[str, str]  # the level and property expected to find it first; the others follow if it does not
    patches: Callable[[], Sequence[m.Patch]] = lambda: ()
    of_layer: Callable[[Case], Any] = Layer
    of_model: Callable[[Case], Any] = Whole
    of_session: Callable[[Case], Session] = Session
    of_story: Callable[[Case], Session] = Story
    methods: Sequence[str] = ("lora", "rslora", "dora")
    forgets: Sequence[str] = ()  # fields of configs that it does not look at
    lacks: Sequence[str] = ()  # features

    def info(self) -> Mapping[str, Any]:
        told = super().info()
        return {**told, "features": [f for f in told["features"] if f not in self.lacks]}

    def made(self, case: Case) -> None:
        if case.meta["refuse"] not in self.forgets:
            super().made(case)

    def run(self, case: Case) -> Arrays:
        if case.meta.get("refuse") in self.forgets:
            case = mr.without(case)
        with ExitStack() as stack:
            for change in self.patches():
                stack.enter_context(change)
            return super().run(case)

    def layer(self, case: Case) -> Arrays:
        return answers(self.of_layer(case), case.meta["want"])

    def model(self, case: Case) -> Arrays:
        return answers(self.of_model(case), case.meta["want"])

    def session(self, case: Case) -> Session:
        return self.of_story(case) if case.level == "story" else self.of_session(case)


# ── all of them ──────────────────────────────────────────────────────────────────────────────────────────────────────

LORA = (lora, rslora)
FORWARD, GRADS, MERGE = ("layer", "forward"), ("layer", "param-grads"), ("layer", "merge")
WEIGHTED, SUMS, ONE = ("lifecycle", "weighted"), ("lora", "rslora"), ("lora",)
MATRIX: Mapping[str, Mutant] = {  # of LoRA and its kin
    "transposed-merge-on-square": Mutant(MERGE, m.merges(m.transposed_merge)),
    "scale-forgotten-in-merge": Mutant(MERGE, m.merges(lambda f, cfg, W, b, φ: f(m.unscaled(cfg), W, b, φ))),
    "scale-forgotten-in-forward": Mutant(FORWARD, m.wraps(lambda f, cfg, φ, part: f(m.unscaled(cfg), φ, part))),
    "alpha-over-sqrt-r-for-lora": Mutant(FORWARD, m.scale(lambda c: c.lora_alpha / c.r**0.5), methods=("lora",)),
    "alpha-over-r-for-rslora": Mutant(FORWARD, m.scale(lambda c: c.lora_alpha / c.r), methods=("rslora",)),
    "alpha-ignored": Mutant(FORWARD, m.scale(lambda c: 1.0)),
    "dora-norm-wrong-axis": Mutant(FORWARD, lambda: [patch.object(dora, "norm", m.wrong_axis)], methods=("dora",)),
    "dora-norm-not-detached": Mutant(
        GRADS, m.wraps(lambda f, cfg, φ, part: f(replace(cfg, detach_norm=False), φ, part), [dora]), methods=("dora",)
    ),
    "dora-rescales-bias": Mutant(MERGE, m.merges(m.bias_rescaled, [dora]), methods=("dora",)),
    "dora-unscaled-norm": Mutant(FORWARD, m.wraps(m.unscaled_norm, [dora]), methods=("dora",)),
    "conv1d-not-transposed": Mutant(MERGE, of_layer=m.TransposedConv1D),
    "second-adapter-takes-first-scale": Mutant(("model", "order"), of_model=m.FirstScale),
    "last-rank-row-lost": Mutant(FORWARD, m.wraps(m.row_lost)),
    "bias-merged-without-scale": Mutant(MERGE, m.merges(m.bias_unscaled, LORA), methods=SUMS),
    "low-precision-delta": Mutant(MERGE, m.merges(m.rounded_delta)),
    "input-grad-misses-branch": Mutant(("layer", "input-grad"), m.wraps(m.without_branch)),
    "gradient-of-B-unscaled": Mutant(GRADS, m.wraps(m.b_unscaled)),
    "embedding-scale-lost": Mutant(
        FORWARD, m.wraps(lambda f, cfg, φ, part: f(m.unscaled(cfg) if part.kind == "embedding" else cfg, φ, part))
    ),
    "batch-rows-mix": Mutant(FORWARD, m.wraps(m.rows_mixed)),
    "unmerge-wrong-axis": Mutant(("layer", "unmerge"), of_layer=m.UnmergesAlongTheOtherAxis),
    "stale-cache-after-param-change": Mutant(("layer", "sensitive"), of_layer=m.Stale),
    "not-zero-at-init": Mutant(("layer", "init"), of_layer=m.NotZeroAtInit),
    "unloads-a-linear-layer": Mutant(("layer", "unload"), of_layer=m.UnloadsLinear),
    "unloads-what-is-not-merged": Mutant(("layer", "unload"), of_layer=m.UnloadsUnmerged),
    "base-trained-too": Mutant(("layer", "frozen"), of_layer=m.BaseTrained),
    "stays-disabled": Mutant(("layer", "disable"), of_layer=m.StaysDisabled),
    "output-promoted-to-float32": Mutant(("layer", "dtype"), of_layer=m.Promotes),
    "empty-batch-refused": Mutant(("layer", "batch"), of_layer=m.RefusesEmpty),
    "rank-pattern-as-one-list": Mutant(
        ("model", "patterns"), lambda: [patch.object(lora.Config, "at", m.patterns_as_one)]
    ),
    "padding-leaks": Mutant(("model", "padding"), of_model=m.SeesPadding),
    "decoding-counts-from-zero": Mutant(("model", "incremental"), of_model=m.DecodesAtZero),
    "count-includes-frozen": Mutant(("model", "count"), of_model=m.CountsFrozen),
    "merged-keeps-adapter-tensors": Mutant(("model", "merge"), of_model=m.KeepsAdapterTensors),
    "only-first-merged": Mutant(("model", "two-merged"), of_model=m.MergesFirstOnly),
    "original-of-a-head-trained": Mutant(("model", "modules-to-save"), of_model=mw.TrainsTheOriginalToo),
    "rank-trained-in-other-dtypes": Mutant(("model", "trained"), of_model=mw.TrainsItsRank),
    "tied-weights-merged-both": Mutant(
        ("model", "tied"), lambda: [patch.object(refpeft.tune, "untied", lambda sites, params, role: sites)]
    ),
    "merge-twice-adds-twice": Mutant(("lifecycle", "merge-twice"), of_session=m.MergesTwice),
    "safe-merge-merges-nothing": Mutant(("lifecycle", "safe-merge"), of_session=m.SafeMergeSkips),
    "safe-merge-leaves-nan": Mutant(("lifecycle", "refused-merge"), of_session=m.LeavesNan),
    "unmerge-takes-out-one-of-two": Mutant(("lifecycle", "two-merged"), of_session=m.UnmergesOne),
    "disable-keeps-head": Mutant(("lifecycle", "modules-to-save"), of_session=m.KeepsHead),
    "switch-keeps-old-scale": Mutant(("lifecycle", "switch"), of_session=m.SwitchKeepsScale),
    "delete-changes-the-others": Mutant(("lifecycle", "delete"), of_session=m.DeleteActivatesAll),
    "weight-zero-still-adds": Mutant(WEIGHTED, of_session=m.ZeroAdds, methods=SUMS),
    "negative-weight-sign-lost": Mutant(WEIGHTED, of_session=m.SignLost, methods=SUMS),
    "weighted-scaled-twice": Mutant(WEIGHTED, of_session=m.KeepsAlpha, methods=SUMS),
    "weighted-keeps-patterns": Mutant(
        ("lifecycle", "weighted-patterns"), of_session=m.PatternsTwice, methods=("lora",)
    ),
    "save-foo-writes-foobar": Mutant(("lifecycle", "saved-keys"), of_session=m.SavesNeighbour),
    "prefix-names-lose-tensors": Mutant(("lifecycle", "saved-modules"), of_session=m.LosesByName),
    "names-in-paths-lose-tensors": Mutant(("lifecycle", "saved-names"), of_session=mw.LosesNamesInPaths),
    "saved-patterns-sorted": Mutant(("lifecycle", "saved-patterns"), of_session=m.SortsPatterns),
    "converted-patterns-not-doubled": Mutant(("lifecycle", "converted"), of_session=m.PatternsNotDoubled),
    "converted-with-its-start": Mutant(("lifecycle", "converted"), of_session=m.StartForgotten),
    "converted-without-magnitudes": Mutant(("lifecycle", "converted"), of_session=m.MagnitudesLost, methods=("dora",)),
    "changed-parameters-unseen": Mutant(("lifecycle", "change"), of_session=m.StaleSession),
    **{name: Mutant(("model", prop), patches, methods=which) for name, (prop, patches, which) in BOTTLENECK.items()},
}


# ── soft prompts, prefixes ───────────────────────────────────────────────────────────────────────────────────────────

LOGITS, PARAMS = ("model", "logits"), ("model", "param-grads")
DROPPED, RECURRENT, LAYERS = ("model", "dropped"), ("model", "recurrent"), ("model", "layers")
SOFT, PREFIX, INTRINSIC = ("prompt_tuning", "p_tuning"), ("prefix_tuning", "p_tuning_v2"), ("did", "said")
SELECTION = ("full", "partial", "bitfit", "ln_tuning", "trainable_tokens")


def each(methods: Sequence[str], name: str, first: tuple[str, str], **wrong: Any) -> dict[str, Mutant]:
    """The same mistake in several methods, each of which must be found out."""
    return {f"{method.replace('_', '-')}-{name}": Mutant(first, **wrong, methods=(method,)) for method in methods}


PROMPTS: Mapping[str, Mutant] = {
    **each(SOFT, "after-the-tokens", LOGITS, patches=mp.instead(inputs, prefixed=mp.after_the_tokens)),
    **each(SOFT, "positions-from-zero-again", LOGITS,
           patches=mp.instead(inputs, prefixed=mp.from_zero_again)),
    **each(SOFT, "masked-with-padding", ("model", "padding"),
           patches=mp.instead(inputs, extended=mp.hidden)),
    **each(SOFT, "gradient-averaged", PARAMS, of_model=mp.AveragesOverTheBatch),
    **each(SOFT, "inserted-at-every-step", ("model", "incremental"), of_model=mp.InsertsAtEveryStep),
    **each(SOFT, "first-token-not-predicted", ("model", "loss"), of_model=mp.PredictsFromTheTokensOnly),
    **each(("p_tuning",), "dropped-before-the-encoder", DROPPED, of_model=mp.DropsTooMuch),
    **each(("p_tuning",), "saves-its-encoder", ("lifecycle", "saved-keys"), of_session=mp.SavesTheEncoder),
    **each(("p_tuning",), "reads-forwards-only", RECURRENT,
           patches=mp.instead(recurrent, direction=mp.forwards_only)),
    **each(("p_tuning",), "gates-in-another-order", RECURRENT,
           patches=mp.instead(recurrent, step=mp.gates_in_another_order)),
    **each(("p_tuning",), "one-bias-frozen", RECURRENT, of_model=mp.frozen("bias_hh")),
    **each(PREFIX, "keys-and-values-swapped", LOGITS, patches=mp.instead(prefix_tuning, memory=mp.values_for_keys)),
    **each(PREFIX, "first-layer-for-all", LAYERS, patches=mp.instead(prefix_tuning, memory=mp.first_for_all)),
    **each(PREFIX, "keys-of-all-layers-first", LAYERS,
           patches=mp.instead(prefix_tuning, memory=mp.keys_of_all_layers_first)),
    **each(("prefix_tuning",), "tokens-not-shifted", LOGITS, patches=mp.instead(prefix_tuning, hooks=mp.unshifted)),
    **each(("p_tuning_v2",), "tokens-not-shifted", LOGITS, patches=mp.instead(p_tuning_v2, hooks=mp.unshifted)),
    **each(("prefix_tuning",), "behind-the-causal-mask", LOGITS,
           patches=mp.instead(hooks, columns=mp.behind_the_causal_mask)),
    **each(PREFIX, "masked-with-padding", ("model", "padding"),
           patches=mp.instead(hooks, columns=mp.behind_the_causal_mask)),
    **each(PREFIX, "gradient-averaged", PARAMS, of_model=mp.AveragesOverTheBatch),
    **each(("prefix_tuning",), "relu-for-tanh", DROPPED, patches=mp.instead(prefix_tuning, tanh=relu)),
    **each(PREFIX, "first-task-for-all", ("model", "rows"), of_model=mp.FirstTaskForAll),
    **each(("p_tuning_v2",), "head-frozen", PARAMS, of_model=mp.frozen("score", "classifier")),
    **each(("p_tuning_v2",), "head-not-counted", ("model", "count"), of_model=mp.ForgetsTheHead),
    **each((*SOFT, "prefix_tuning"), "disabled-keeps-head", ("lifecycle", "language-head"),
           of_session=mw.DisabledKeepsHead),
    **each((*SOFT, *PREFIX), "stays-enabled", ("lifecycle", "disable"), of_session=ms.StaysEnabled),
}  # fmt: skip

# ── tensors of the model's own, and intrinsic dimension ──────────────────────────────────────────────────────────────

OWN: Mapping[str, Mutant] = {
    **each(SELECTION, "added-to-the-base", LOGITS, of_model=ms.AddsToTheBase),
    **each(SELECTION, "one-forgotten-in-merge", ("model", "merge"), of_model=ms.ForgetsOneInMerging),
    **each((*SELECTION, *INTRINSIC), "stays-enabled", ("lifecycle", "disable"), of_session=ms.StaysEnabled),
    **each((*SELECTION, *INTRINSIC), "unmerge-loses-the-adapter", ("lifecycle", "unmerge"),
           of_session=ms.LosesTheAdapter),
    **each(("full",), "gradient-of-one-use-only", PARAMS, patches=mp.instead(selection, replaced=ms.one_use_only)),
    **each(("partial",), "leaves-out-the-mlp", LOGITS, of_model=ms.leaves_out(ms.in_mlp)),
    **each(("bitfit",), "leaves-out-norms", LOGITS, of_model=ms.leaves_out(ms.norm)),
    **each(("ln_tuning",), "leaves-out-shifts", LOGITS, of_model=ms.leaves_out(ms.bias)),
    **each(("trainable_tokens",), "tied-head-keeps-old-rows", LOGITS,
           patches=mp.instead(trainable_tokens, hooks=ms.embedding_only)),
    **each(("trainable_tokens",), "tied-head-loses-its-bias", LOGITS,
           patches=mp.instead(trainable_tokens, multiplied=ms.without_bias)),
    **each(("trainable_tokens",), "next-tokens-too", LOGITS,
           patches=mp.instead(trainable_tokens, looked_up=ms.next_tokens_too)),
    **each(INTRINSIC, "permutation-inverted", LOGITS, patches=mp.instead(did, fastfood=mi.permutation_inverted)),
    **each(INTRINSIC, "signs-forgotten", LOGITS, patches=mp.instead(did, fastfood=mi.signs_forgotten)),
    **each(INTRINSIC, "not-transposed", ("model", "transpose"), patches=mp.instead(did, fastfood=mi.not_transposed)),
    **each(INTRINSIC, "never-turned", LOGITS, patches=mp.instead(did, project=mi.never_turned)),
    **each(("did",), "biases-forgotten", LOGITS, patches=mp.instead(did, merge=mi.biases_forgotten(did))),
    **each(("said",), "biases-forgotten", LOGITS, patches=mp.instead(said, merge=mi.biases_forgotten(said))),
    **each(("said",), "one-lambda-for-all", LOGITS, patches=mp.instead(said, merge=mi.one_lambda)),
    **each(("said",), "lambda-forgotten-in-gradient", ("model", "transpose"),
           patches=mp.instead(said, merge=mi.lambda_forgotten_in_gradient)),
    **each(("said",), "lambda-not-trained", PARAMS, of_model=mi.TrainsNoLambda),
    **each(INTRINSIC, "projection-counted", ("model", "count"), of_model=mi.CountsTheProjection),
    **each(INTRINSIC, "tied-tensors-moved-twice", ("model", "merge"), of_model=mi.MovesTiedTensorsTwice),
    **each(INTRINSIC, "projection-drawn-again", ("lifecycle", "save-load"), of_session=mi.DrawsAgain),
}  # fmt: skip

# ── an encoder and a decoder ─────────────────────────────────────────────────────────────────────────────────────────

LOSS, LABELLED = ("model", "loss"), (*SOFT, "prefix_tuning")
STACKS: Mapping[str, Mutant] = {  # which no other model reveals
    "cross-attends-to-the-decoder": Mutant(LOGITS, mp.instead(layers, attend_across=mt.of_the_decoder), methods=ONE),
    "cross-sees-padding": Mutant(("model", "padding"), mp.instead(layers, attend_across=mt.sees_padding), methods=ONE),
    "cross-not-adapted": Mutant(LOGITS, of_model=mt.LeavesOutCross, methods=ONE),
    "encoder-detached": Mutant(PARAMS, mp.instead(layers, encoded_pair=mt.detached), methods=ONE),
    "decoder-bias-in-both-directions": Mutant(
        ("model", "causal"), mp.instead(layers, buckets=mt.both_ways), methods=ONE
    ),
    **each(LABELLED, "labels-shifted-twice", LOSS, of_model=mt.ShiftsTwice),
    **each(LABELLED, "padding-counts", LOSS, of_model=mt.PaddingCounts),
    **each(LABELLED, "decoder-starts-with-padding", LOSS, of_model=mt.StartsWithPadding),
}

# ── vectors ──────────────────────────────────────────────────────────────────────────────────────────────────────────

VECTORS: Mapping[str, Mutant] = {
    **each(("ia3",), "bias-left-in-merge", MERGE, patches=m.merges(mv.bias_left, [ia3])),
    **each(("ia3",), "bias-not-scaled", FORWARD, patches=m.wraps(mv.bias_unscaled, [ia3])),
    **each(("ia3",), "merged-along-the-other-axis", MERGE, patches=m.merges(mv.other_axis, [ia3])),
    **each(("ia3",), "counted-from-one", FORWARD, patches=m.wraps(mv.from_one, [ia3])),
    **each(("ia3",), "input-gradient-unscaled", ("layer", "input-grad"),
           patches=m.wraps(mv.input_gradient_unscaled, [ia3])),
    **each(("ia3",), "batch-rows-mix", FORWARD, patches=m.wraps(m.rows_mixed, [ia3])),
    **each(("ia3",), "stale-cache-after-param-change", ("layer", "sensitive"), of_layer=m.Stale),
    **each(("ia3",), "unloads-a-linear-layer", ("layer", "unload"), of_layer=m.UnloadsLinear),
    **each(("ia3",), "base-trained-too", ("layer", "frozen"), of_layer=m.BaseTrained),
    **each(("ia3",), "stays-disabled", ("layer", "disable"), of_layer=m.StaysDisabled),
    **each(("adalora",), "not-zero-at-init", ("layer", "init"), of_layer=m.NotZeroAtInit),
    **each(("adalora",), "scale-not-divided", LOGITS,
           patches=lambda: [patch.object(adalora.Config, "scale", property(lambda c: c.lora_alpha))]),
    **each(("adalora",), "singular-values-forgotten-in-merge", ("model", "merge"),
           patches=m.merges(mv.merged_without_values, [adalora])),
    **each(("adalora",), "last-triplet-lost", LOGITS, patches=m.wraps(mv.last_triplet_lost, [adalora])),
    **each(("adalora",), "gradient-of-singular-values-unscaled", PARAMS,
           patches=m.wraps(mv.values_unscaled, [adalora])),
    **each(("adalora",), "singular-values-frozen", PARAMS, of_model=mp.frozen("lora_E")),
    **each(("adalora", "vera"), "unmerge-loses-the-adapter", ("lifecycle", "unmerge"), of_session=ms.LosesTheAdapter),
    **each(("adalora", "ia3", "vera"), "only-first-merged", ("model", "two-merged"), of_model=m.MergesFirstOnly),
    **each(("vera",), "other-corners", LOGITS, patches=mp.instead(vera, corners=mv.other_corners)),
    **each(("vera",), "lambda-forgotten-in-merge", ("model", "merge"), patches=m.merges(mv.merged_without_d, [vera])),
    **each(("vera",), "averaged-over-the-rank", LOGITS, patches=m.wraps(mv.averaged_over_the_rank, [vera])),
    **each(("vera",), "gradient-misses-the-other-vector", PARAMS, of_model=mv.DForgetsB),
    **each(("vera",), "projection-counted", ("model", "count"), of_model=mi.CountsTheProjection),
    **each(("vera",), "projection-drawn-again", ("lifecycle", "save-load"), of_session=mi.DrawsAgain),
    **each(("adalora", "vera"), "stays-enabled", ("lifecycle", "disable"), of_session=ms.StaysEnabled),
}  # fmt: skip

# ── products and rotations ───────────────────────────────────────────────────────────────────────────────────────────

PRODUCTS: Mapping[str, Mutant] = {
    **each(("loha",), "scaled-twice", FORWARD, patches=mp.instead(loha, ΔW=mo.scaled_twice(loha.ΔW))),
    **each(("loha",), "alpha-ignored", FORWARD, patches=mp.instead(loha, ΔW=mo.unscaled(loha.ΔW))),
    **each(("loha",), "summed", FORWARD, patches=mp.instead(loha, ΔW=mo.summed)),
    **each(("loha",), "gradient-of-a-sum", GRADS, patches=mp.instead(loha, ΔW=mo.one_sided)),
    **each(("loha",), "first-core-for-both", ("layer", "cores"), patches=mp.instead(loha, ΔW=mo.first_core_for_both)),
    **each(("loha",), "taps-before-channels", ("layer", "cores"), patches=mp.instead(loha, ΔW=mo.taps_first)),
    **each(("loha",), "gradient-by-the-other-chain", ("layer", "cores-grads"),
           patches=mp.instead(loha, ΔW=mo.other_chain)),
    **each(("lokr",), "scaled-twice", FORWARD, patches=mp.instead(lokr, ΔW=mo.lokr_scaled_twice)),
    **each(("lokr",), "factors-commuted", FORWARD, patches=mp.instead(lokr, ΔW=mo.commuted)),
    **each(("lokr",), "unscaled-where-full", FORWARD, patches=mp.instead(lokr, ΔW=mo.one_where_full)),
    **each(("dylora",), "alpha-over-r", FORWARD,
           patches=mp.instead(dylora, plain=lambda c: lora.Config(r=c.r, lora_alpha=c.alpha))),
    **each(("dylora",), "all-ranks-in-play", FORWARD,
           patches=mp.instead(dylora, nested=lambda c, φ: {"A": φ["A"], "B": φ["B"]}, whole=lambda c, φ, n, d: d)),
    **each(("dylora",), "last-ranks", FORWARD, patches=mp.instead(dylora, nested=mo.last_ranks)),
    **each(("dylora",), "never-frozen", GRADS, patches=mp.instead(dylora, whole=mo.never_frozen)),
    **each(("dylora",), "first-block-trained", GRADS, patches=mp.instead(dylora, whole=mo.first_block_trained)),
    **each(("glora",), "alpha-ignored", FORWARD,
           patches=lambda: [patch.object(glora.Config, "scale", property(lambda c: 1.0))]),
    **each(("glora",), "A-on-the-other-side", FORWARD, patches=mp.instead(glora, through=mo.through_the_other)),
    **each(("glora",), "gradient-of-A-halved", GRADS, patches=mp.instead(glora, through=mo.halved_for_A)),
    **each(("glora",), "A-of-what-is-merged", ("model", "two-merged"),
           patches=m.merges(mo.of_what_is_there, [glora])),
    **each(("glora",), "transposed-merge-on-square", MERGE, patches=m.merges(m.transposed_merge, [glora])),
    **each(("oft",), "turned-back", FORWARD, patches=mp.instead(oft, rotation=mo.turned_back)),
    **each(("oft",), "turned-back-if-exact", ("model", "exact-cayley"),
           patches=mp.instead(oft, rotation=mo.turned_back_if_exact)),
    **each(("oft",), "term-lost", FORWARD, patches=mp.instead(oft, rotation=mo.term_lost)),
    **each(("oft",), "first-block-for-all", FORWARD, patches=mp.instead(oft, rotate=mo.first_block_for_all)),
    **each(("oft",), "bias-turned", FORWARD, patches=m.wraps(mo.bias_turned, [oft])),
    **each(("loha", "lokr", "oft"), "transposed-merge-on-square", MERGE,
           patches=m.merges(m.transposed_merge, [loha, lokr, oft])),
    **each(("loha", "lokr", "oft"), "only-first-merged", ("model", "two-merged"), of_model=m.MergesFirstOnly),
    **each(("loha", "lokr"), "safe-merge-leaves-nan", ("lifecycle", "refused-merge"), of_session=m.LeavesNan),
    **each(("loha", "lokr"), "rank-pattern-as-one-list", ("model", "patterns"),
           patches=lambda: [patch.object(delta.Config, "at", mo.patterns_as_one)]),
    **each(("boft",), "half-forgotten", FORWARD, patches=mp.instead(boft, rotation=mo.half_turned)),
    **each(("boft",), "bias-scaled", FORWARD, patches=m.wraps(mo.scale_of_bias, [boft])),
    **each(("boft",), "bias-turned", FORWARD, patches=m.wraps(mo.bias_turned_by_butterflies, [boft])),
    **each(("boft",), "same-blocks-mixed", ("model", "butterfly"),
           patches=mp.instead(boft, gathered=mo.never_gathered, scattered=mo.never_gathered)),
    **each(("boft",), "transposed-merge-on-square", MERGE, patches=m.merges(m.transposed_merge, [boft])),
    **each(("oft", "boft"), "in-the-other-order", ("model", "order"), of_model=mo.OtherOrder),
}  # fmt: skip

# ── stories ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ANY, FILES, SWAP, COMBINED = (("story", name) for name in ("any-order", "files", "hot-swap", "combined"))
AVERAGED, HALVES = ("story", "averaged"), ("story", "sixteen-bits")
STORIES: Mapping[str, Mutant] = {  # which only show after something else was done
    "merges-again": Mutant(ANY, of_story=mh.MergesAgain),
    "delete-leaves-merged-weights": Mutant(ANY, of_story=mh.DeleteLeavesMerged),
    "delete-activates-none": Mutant(ANY, of_story=mh.DeleteActivatesNone),
    "delete-forgets-head-of-heir": Mutant(ANY, of_story=mh.HeirWithoutHead),
    "delete-by-prefix": Mutant(ANY, of_story=mh.DeletesByPrefix),
    "switch-on-top-of-merged": Mutant(ANY, of_story=mh.SwitchKeepsMerged),
    "unmerge-restores-other-dtype": Mutant(ANY, of_story=mh.RestoresOtherDtype),
    "disabled-stays-merged": Mutant(ANY, of_story=mh.DisableForgetsMerged),
    "disabled-keeps-saved-modules": Mutant(ANY, of_story=mh.DisableKeepsHead),
    "training-moves-inactive-adapters": Mutant(ANY, of_story=mh.TrainsAll),
    "training-leaves-saved-modules": Mutant(ANY, of_story=mh.TrainsHeadNot),
    "load-under-another-name-keeps-the-old": Mutant(FILES, of_story=mh.LoadKeepsOld),
    "saved-as-it-was-added": Mutant(FILES, of_story=mh.SaveSavesActive),
    "hot-swap-keeps-scale": Mutant(SWAP, of_story=mh.SwapKeepsScale),
    "hot-swap-clears-neighbours": Mutant(SWAP, of_story=mh.SwapClearsNeighbours),
    "replaced-keeps-config": Mutant(("story", "replaced"), of_story=mh.ReplacedKeepsConfig),
    "combined-as-they-were-added": Mutant(COMBINED, of_story=mh.CombinedSeesLater, methods=SUMS),
    "pruned-the-largest": Mutant(COMBINED, mp.instead(combine, top=mh.smallest), methods=SUMS),
    "pruned-by-rows": Mutant(COMBINED, mp.instead(combine, top=mh.by_rows), methods=SUMS),
    "dare-not-rescaled": Mutant(("story", "dare"), mp.instead(combine, summing=mh.not_rescaled), methods=SUMS),
    "ties-against-the-majority": Mutant(COMBINED, mp.instead(combine, elected=mh.against), methods=SUMS),
    "ties-elects-by-the-other-count": Mutant(COMBINED, mp.instead(combine, elected=mh.by_frequency), methods=SUMS),
    "ties-mean-of-all": Mutant(COMBINED, mp.instead(combine, summing=mh.mean_of_all), methods=SUMS),
    **each(("ia3", "lokr", "boft"), "merges-again", ANY, of_story=mh.MergesAgain),
    **each(("adalora", "vera", "oft"), "switch-on-top-of-merged", ANY, of_story=mh.SwitchKeepsMerged),
    **each(("ia3", "loha", "houlsby", "p_tuning"), "training-moves-inactive-adapters", ANY, of_story=mh.TrainsAll),
    **each(("vera", "lokr", "prefix_tuning"), "loads-the-first-file-for-all", FILES, of_story=mh.LoadsTheFirstFile),
    **each(("ia3", "oft"), "taken-out-by-division", ANY, of_story=mh.TakenOutByDivision),
    **each(("loha", "adalora", "oft"), "second-takes-first-config", ANY, of_story=mh.SecondTakesFirstConfig),
    **each(("prompt_tuning", "parallel"), "stays-enabled-in-stories", ANY, of_story=mh.StaysInFront),
    **each(("lora", "ia3"), "half-stays-merged", HALVES, of_story=mh.LeavesHalf),
    **each(("dora", "vera"), "merged-stays-wide", HALVES, of_story=mh.MergedStaysWide),
    **each(("lora", "lokr", "prefix_tuning"), "loads-in-the-models-dtype", HALVES, of_story=mh.LoadsInModelsDtype),
    **each(("ia3", "pfeiffer"), "average-normalised", AVERAGED, of_story=mh.AverageIsNormalised),
    **each(("lora", "parallel"), "averaged-as-they-were-added", AVERAGED, of_story=mh.AverageSeesLater),
}
REJECTS: Mapping[str, Mutant] = {
    "unknown-field-ignored": Mutant(("layer", "rejects"), forgets=["lora_alfa"]),
    "patterns-ignored-where-not-supported": Mutant(("layer", "rejects"), forgets=["alpha_pattern"], lacks=["patterns"]),
    "bias-of-B-ignored-where-not-supported": Mutant(
        ("layer", "rejects"), forgets=["lora_bias"], lacks=["bias"], methods=SUMS
    ),
    "targets-that-match-nothing-accepted": Mutant(("model", "rejects"), forgets=["target_modules"]),
    "modules-to-save-that-match-nothing-accepted": Mutant(("model", "rejects"), forgets=["modules_to_save"]),
    "fails-without-a-reason": Mutant(("model", "rejects"), mr.speechless),
}
MUTANTS: Mapping[str, Mutant] = {
    **MATRIX, **PROMPTS, **OWN, **STACKS, **VECTORS, **PRODUCTS, **STORIES, **REJECTS,
}  # fmt: skip


def target(name: str) -> Mutant:
    if name not in MUTANTS:
        raise ValueError(f"unknown mutant {name!r}: there are {', '.join(MUTANTS)}")
    return MUTANTS[name]


# ── hunting them ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Kill:
    """One mutant under one seed: the property that found it wrong, or None if it survived all of them."""

    mutant: str
    seed: int
    by: str | None
    kind: str | None = None
    detail: str = ""


def mutants(seeds: int = 20, names: Sequence[str] | None = None, executor: Executor | None = None) -> Iterator[Kill]:
    """Every mutant on every seed, until the first property that fails."""
    hunts = [(name, seed) for name in names or MUTANTS for seed in range(seeds)]
    if executor is None:
        yield from (hunt(*h) for h in hunts)
    else:
        yield from executor.map(hunt, *zip(*hunts, strict=True), chunksize=4)


def hunt(name: str, seed: int) -> Kill:
    from refpeft.conformance.engine import Options, chosen, run_unit

    mutant = target(name)
    options = Options(seed, folder=None, shrink=False)
    units = chosen(mutant.info(), mutant.methods, None, None)
    for unit in sorted(units, key=lambda u: (u.level, u.property) != mutant.first):
        row = run_unit(f"mutant:{name}", unit, options)
        if row["status"] in ("fail", "error"):
            return Kill(name, seed, f"{unit.method}/{unit.level}/{unit.property}", row["kind"], row["detail"])
    return Kill(name, seed, None)
