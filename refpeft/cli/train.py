"""`refpeft train`: a model, a method and a file of lines become an adapter."""

import hashlib
import json
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refpeft.cli import stop

if TYPE_CHECKING:
    from refpeft.adapter import Adapter
    from refpeft.cli.data import Encode, Reading
    from refpeft.model import Model
    from refpeft.objectives import Setting
    from refpeft.train import Plan, State

HOW = "How to train"
WHAT = "What to train on"
KEEP = "Stopping and going on"


def option(name: str, about: str, panel: str = HOW, meta: str | None = None) -> Any:
    return typer.Option(name, help=about, rich_help_panel=panel, metavar=meta)


def train(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The base model: an HF folder, with tokenizer.json.")],
    data: Annotated[Path, typer.Option("--data", "-d", metavar="FILE", help="The training data, .jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="The folder to make. It must not exist.")],
    method: Annotated[str, typer.Option("--method", "-m", help="See [b]refpeft methods[/].")] = "lora",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="FIELD=VALUE", help="A field of the method's config (repeatable)."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="causal, masked, seq2seq, span-corruption, span-corruption-sentinel, lm-adaptation or classification.",
            show_default="the one of the model's head", rich_help_panel=WHAT,
        ),
    ] = None,
    objective_set: Annotated[
        list[str] | None,
        option("--objective-set", "A number of the objective: noise_density=0.15 (repeatable).", WHAT, "NAME=VALUE"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=1, help="Cut rows to this many tokens.", show_default="the model's", rich_help_panel=WHAT),
    ] = None,
    steps: Annotated[int, option("--steps", "Steps of the optimiser.")] = 100,
    batch: Annotated[int, option("--batch", "Rows in a batch.")] = 8,
    accumulate: Annotated[int, option("--accumulate", "Batches in a step.")] = 1,
    lr: Annotated[float, option("--lr", "The learning rate.")] = 1e-3,
    schedule: Annotated[str, option("--schedule", "constant, linear or cosine.")] = "linear",
    warmup: Annotated[int, option("--warmup", "Steps in which the learning rate grows from 0.")] = 0,
    optimizer: Annotated[str, option("--optimizer", "sgd, adam, adamw or adafactor.")] = "adamw",
    weight_decay: Annotated[float, option("--weight-decay", "Weight decay.")] = 0.0,
    momentum: Annotated[float, option("--momentum", "Of sgd.")] = 0.0,
    nesterov: Annotated[bool, option("--nesterov", "Of sgd: look ahead.")] = False,
    clip: Annotated[float, option("--clip", "Clip gradients to this global norm; 0 does not.")] = 0.0,
    loraplus_ratio: Annotated[
        float | None, typer.Option(help="LoRA+: how much faster B learns than A.", rich_help_panel=HOW)
    ] = None,
    dtype: Annotated[str, option("--dtype", "Of weights and arithmetic: float32 or float64.")] = "float32",
    seed: Annotated[int, option("--seed", "What the fresh adapter, order, masks and dropout are drawn from.")] = 0,
    save_every: Annotated[
        int, typer.Option(min=0, help="Keep a state in DIR.training every N steps; 0 does not.", rich_help_panel=KEEP)
    ] = 100,
    resume: Annotated[bool, option("--resume", "Go on from the state in DIR.training, to the bit.", KEEP)] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:  # fmt: skip
    """Train an adapter in NumPy, and save it as HF peft does.

    A line of the data is one of
    [dim]{"text": "…"}   {"input": "…", "target": "…"}   {"text": "…", "label": "good"}[/dim]
    or, already as ids,
    [dim]{"input_ids": [3, 1, 4]}   with "labels": [1, 5] or "label": 0[/dim]

    A language model, on text:
    [cyan]refpeft train gpt2 --data poems.jsonl --out my-lora --set r=16 --lr 2e-4[/cyan]

    Other modules, another method, LoRA+:
    [cyan]refpeft train llama -m dora --set target_modules=q_proj,k_proj,v_proj --loraplus-ratio 16 -d chat.jsonl -o my-dora[/cyan]

    A classifier (its head is trained whole, unless modules_to_save says otherwise):
    [cyan]refpeft train bert-classifier --data reviews.jsonl --out my-lora --steps 500 --schedule cosine --warmup 50[/cyan]

    It was stopped? The same line again, and
    [cyan]--resume[/cyan]

    Exit code 0: trained and saved. 1: the loss is no longer a number, so
    nothing is saved. 2: could not run.
    """  # noqa: E501
    import refpeft
    from refpeft import objectives
    from refpeft import train as engine
    from refpeft.checkpoint import folder, training
    from refpeft.cli.data import read_rows

    began = time.monotonic()
    home = out.parent / f"{out.name}.training"
    folder.check_free(out.absolute())
    if json_file and not json_file.parent.is_dir():
        raise ValueError(f"{json_file}: there is no folder {json_file.parent}")
    if training.steps(home) and not resume:
        raise ValueError(f"{home}: a run was stopped here; go on with --resume, or remove the folder")
    plan = engine.Plan(
        steps, batch, lr, schedule, warmup, optimizer, weight_decay, momentum, nesterov, accumulate, clip,
        loraplus_ratio, seed=seed,
    )  # fmt: skip
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, found {dtype!r}")
    base = refpeft.load(model, dtype=dtype)
    chosen = suitable(objective, base)
    encode, setting = vocabulary(model, base)
    setting = replace(setting, **numbers(objective_set or ()))
    goal = objectives.make(chosen, setting)
    reading = to_read(chosen, base, setting, max_length, encode)
    rows, cut = read_rows(data, reading)
    config = method_fields(method, set_ or (), chosen, base, steps)
    adapter = refpeft.init(method, config, base, seed=seed)
    savable(adapter)
    conditions = {
        "spec": refpeft.SPEC_VERSION, "method": method, "config": asdict(adapter.config), "objective": chosen,
        "setting": asdict(setting), "max_length": reading.longest, "dtype": dtype, "plan": asdict(plan),
        "data": hashlib.sha256(data.read_bytes()).hexdigest(), "model": fingerprint(model),
    }  # fmt: skip
    conditions = json.loads(json.dumps(conditions, default=list))
    state = engine.start(plan, adapter)
    if resume:
        state = training.load_state(home, state, conditions)
    began_at = state.step

    def keep(state: "State") -> None:
        training.save_state(home, state, conditions)

    def one(state: "State") -> "State":
        return engine.step(plan, base, adapter, goal, rows, state)

    state = run(plan, state, one, keep, save_every, home)
    refpeft.save_adapter(engine.trained(adapter, state), out)
    shutil.rmtree(home, ignore_errors=True)
    result = {
        "adapter": str(out), "method": method, "objective": chosen, "steps": state.step, "resumed_at": began_at,
        "rows": len(rows), "cut": cut, "loss_first": float(state.losses[0]), "loss_last": float(state.losses[-1]),
        "losses": state.losses.tolist(), "trained": sum(a.size for a in state.params.values()),
        "model_parameters": sum(a.size for a in base.params.values()),
        "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")), "seconds": time.monotonic() - began,
    }  # fmt: skip
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result)


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def run(
    plan: "Plan",
    state: "State",
    one: "Callable[[State], State]",
    keep: "Callable[[State], None]",
    every: int,
    home: Path,
) -> "State":
    """All steps that are left. A signal to stop is obeyed between two steps, with the state kept."""
    with signals() as pressed, progress(plan, state) as tell:
        while state.step < plan.steps:
            state = one(state)
            if not math.isfinite(state.losses[-1]):
                stop(
                    f"step {state.step}: the loss is {state.losses[-1]}; a smaller --lr, --clip or --warmup may help", 1
                )
            tell(state)
            if pressed and state.step < plan.steps:
                keep(state)
                stop(f"stopped after step {state.step} of {plan.steps}; --resume goes on from {home}", 128 + pressed[0])
            if every and state.step % every == 0 and state.step < plan.steps:
                keep(state)
    return state


@contextmanager
def signals() -> Iterator[list[int]]:
    """The signals to stop that have come. The second Ctrl-C stops at once."""
    pressed: list[int] = []

    def handle(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield pressed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(plan: "Plan", state: "State") -> "Iterator[Callable[[State], None]]":
    """Steps and loss, on stderr, if someone is looking."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("loss {task.fields[loss]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=plan.steps, completed=state.step, loss="…")
        yield lambda state: bar.update(task, completed=state.step, loss=f"{state.losses[-1]:.4f}")


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def suitable(objective: str | None, model: "Model") -> str:
    """The objective, which must fit what the model's head says; without one, the head's own."""
    from refpeft import objectives
    from refpeft.train import fitting

    kind = (model.source.get("architectures") or [model.config.family])[0]
    if "head.out" not in model.sites:
        raise ValueError(f"{kind} has no head to train with: expected a language model or a classifier")
    fit = fitting(model)
    if objective is not None and objective not in fit:
        if objective not in objectives.NAMES:
            raise ValueError(f"unknown objective {objective!r}: there are {', '.join(objectives.NAMES)}")
        raise ValueError(f"objective {objective!r} does not fit {kind}: expected {' or '.join(fit)}")
    return objective or fit[0]


def vocabulary(folder: Path, model: "Model") -> "tuple[Encode | None, Setting]":
    """The tokenizer of the model's folder, if there is one, and what it and config.json say of special tokens."""
    from refpeft.objectives import Setting

    c, ends = model.config, model.source.get("eos_token_id")
    known: dict[str, Any] = {
        "pad_id": c.pad_token_id if c.encoder_decoder else model.source.get("pad_token_id"),
        "eos_id": c.eos_token_id if c.encoder_decoder else ends[0] if isinstance(ends, list) and ends else ends,
        "start_id": c.decoder_start_token_id, "vocab": model.sizes()[0], "encoder_decoder": c.encoder_decoder,
    }  # fmt: skip
    encode = None
    if (folder / "tokenizer.json").is_file():
        from refpeft.checkpoint.prompts import tokenizer

        t = tokenizer(folder)
        special = sorted(n for n, token in t.get_added_tokens_decoder().items() if token.special)
        known |= {"special_ids": special, "vocab": min(t.get_vocab_size(), known["vocab"] or t.get_vocab_size())}
        known["mask_id"] = next((n for n in map(t.token_to_id, ("[MASK]", "<mask>")) if n is not None), None)
        known["sentinel_id"] = t.token_to_id("<extra_id_0>")

        def encode(text: str, special: bool) -> list[int]:
            return list(t.encode(text, add_special_tokens=special).ids)

    valid = {n: v for n, v in known.items() if v is not None and (n != "pad_id" or v >= 0)}
    return encode, Setting(**valid)


def numbers(words: Sequence[str]) -> dict[str, Any]:
    """--objective-set NAME=VALUE …"""
    from refpeft import tune
    from refpeft.objectives import Setting

    hints = {f.name: f.type for f in fields(Setting) if f.name != "encoder_decoder"}
    found: dict[str, Any] = {}
    for word in words:
        name, value = assigned("--objective-set", word)
        if name not in hints:
            raise ValueError(f"--objective-set: there is no {name!r}, but {', '.join(hints)}")
        if not tune.fits(value, hints[name]):
            raise ValueError(f"--objective-set {name}: expected {tune.readable(hints[name])}, found {value!r}")
        found[name] = value
    return found


def assigned(flag: str, word: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value as JSON where it is JSON (in Python's spelling too), else as it stands."""
    name, equals, text = word.partition("=")
    if not equals or not name:
        raise ValueError(f"{flag}: expected FIELD=VALUE, found {word!r}")
    constants = {"True": True, "False": False, "None": None}
    try:
        return name, constants[text] if text in constants else json.loads(text)
    except ValueError:
        return name, text


def method_fields(
    method: str, words: Sequence[str], objective: str, model: "Model", steps: int = 1
) -> dict[str, Any]:  # fmt: skip
    """--set FIELD=VALUE …: 'q,v' is a list where the field takes one, and so is a single plain name."""
    import typing

    from refpeft import tune
    from refpeft.methods import METHODS

    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: there are {', '.join(METHODS)}")
    hints = typing.get_type_hints(METHODS[method].Config)
    found: dict[str, Any] = {}
    for word in words:
        name, value = assigned("--set", word)
        names = value.split(",") if isinstance(value, str) else []
        plain = value != "all-linear" and all(n.replace(".", "_").isidentifier() for n in names)
        if names and plain and name in hints and tune.fits(names, hints[name]):
            value = names
        found[name] = value
    heads = [
        n
        for n in ("classifier", "score", "classification_head")
        if any(n in s.path.split(".") for s in model.sites.values())
    ]
    if objective == "classification" and "modules_to_save" in hints:  # the head is fresh as a rule
        found = {"modules_to_save": heads} | found
    if "total_step" in hints:
        found = {"total_step": steps} | found
    return found


def to_read(
    objective: str, model: "Model", setting: "Setting", longest: int | None, encode: "Encode | None"
) -> "Reading":  # fmt: skip
    from refpeft.cli.data import Reading

    c = model.config
    vocab, positions, _ = model.sizes("encoder." if c.encoder_decoder else "")
    if positions is not None:
        positions -= c.position_offset if c.positions == "index" else (c.pad_token_id or 0) + 1
        if longest is not None and longest > positions:
            raise ValueError(f"--max-length must be at most {positions}, the model's positions, found {longest}")
        longest = longest or positions
    classes = classes_of(model) if objective == "classification" else None
    return Reading(objective, vocab or 0, classes, setting.eos_id, longest, setting.encoder_decoder, encode)


def classes_of(model: "Model") -> Mapping[str, int] | int | None:
    """The classes by name, or how many there are; None where one number is predicted."""
    site = model.sites["head.out"]
    count = model.params[site.weight].shape[0]
    names = model.source.get("label2id")
    whole = isinstance(names, dict) and sorted(map(str, names.values())) == sorted(map(str, range(count)))
    return None if count == 1 else {n: int(v) for n, v in names.items()} if whole and names else count


def savable(adapter: "Adapter") -> None:
    """Better to hear it before the work than after."""
    import refpeft

    with tempfile.TemporaryDirectory() as folder:
        refpeft.save_adapter(adapter, Path(folder) / "adapter")


def fingerprint(folder: Path) -> str:
    """Of a model's folder: its config.json, and the names and sizes of its weights."""
    parts = [(folder / "config.json").read_bytes()]
    parts += [f"{f.name} {f.stat().st_size}".encode() for f in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['adapter']}: {result['method']}, {result['objective']}", title_justify="left")
    table.show_header = False
    at = result["resumed_at"]
    table.add_row("steps", f"{result['steps']:,}" + (f" (resumed after {at:,})" if at else ""))
    cut = result["cut"]
    table.add_row("rows", f"{result['rows']:,}" + (f", {cut:,} of them cut to the length of the model" if cut else ""))
    table.add_row("loss", f"{result['loss_first']:.4f} at first, {result['loss_last']:.4f} at last")
    share = result["trained"] / result["model_parameters"]
    table.add_row("trained parameters", f"{result['trained']:,} ({share:.3%} of the model's)")
    table.add_row("adapter", f"{result['bytes']:,} bytes")
    table.add_row("time", f"{result['seconds']:.1f} s")
    Console(highlight=False).print(table)
