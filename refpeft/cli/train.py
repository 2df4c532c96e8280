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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refpeft.cli import stop

if TYPE_CHECKING:
    from refpeft.adapter import Adapter
    from refpeft.model import Model
    from refpeft.objectives import Objective, Row
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
            help="causal, masked, seq2seq, span-corruption, span-corruption-sentinel, lm-adaptation, classification "
            "or template.",
            show_default="the one of the model's head", rich_help_panel=WHAT,
        ),
    ] = None,
    objective_set: Annotated[
        list[str] | None,
        option("--objective-set", "A number of the objective: noise_density=0.15 (repeatable).", WHAT, "NAME=VALUE"),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Of objective template: text, {fields}, special tokens like \\[MASK], virtual \\[P] or \\[P*3].",
            show_default=False, rich_help_panel=WHAT,
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        option("--words", "Of objective template: a label and the words that say it (one for each label).", WHAT,
               "LABEL=WORD,WORD"),
    ] = None,
    eval_data: Annotated[
        Path | None,
        option("--eval", "Lines that are not trained on: their loss, and accuracy, before and after.", WHAT, "FILE"),
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
    optimizer_set: Annotated[
        list[str] | None,
        option("--optimizer-set", "An option of the optimizer: betas=[0.9,0.95], eps, dampening; of adafactor "
               "relative_step=true, scale_parameter, warmup_init, beta1 … (repeatable).", HOW, "NAME=VALUE"),
    ] = None,
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

    A question with a gap, as in P-tuning; its virtual tokens are learned, and words stand for labels:
    [cyan]refpeft train bert -m p_tuning -d reviews.jsonl -o my-prompt --objective template
      --template "\\[CLS]\\[P*3] {text} \\[P*2] \\[MASK] . \\[SEP]" --words good=great,fine --words bad=poor[/cyan]

    It was stopped? The same line again, and
    [cyan]--resume[/cyan]

    Exit code 0: trained and saved. 1: the loss is no longer a number, so
    nothing is saved. 2: could not run.
    """  # noqa: E501
    import refpeft
    from refpeft import objectives
    from refpeft import train as engine
    from refpeft.cli import asked
    from refpeft.cli.asked import assigned
    from refpeft.cli.data import read_rows

    began = time.monotonic()
    free(out, json_file, resume)
    plan = engine.Plan(
        steps, batch, lr, schedule, warmup, optimizer, weight_decay, momentum, nesterov, accumulate, clip,
        loraplus_ratio, seed=seed, options=dict(assigned("--optimizer-set", word) for word in optimizer_set or ()),
    )  # fmt: skip
    if dtype not in ("float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, found {dtype!r}")
    base = refpeft.load(model, dtype=dtype)
    task = asked.task(
        model, base, objective, objective_set or (), template, words or (), max_length, (method, set_ or ()), steps
    )
    rows, cut = read_rows(data, task.reading)
    held, _ = read_rows(eval_data, task.reading) if eval_data else ([], 0)
    adapter = refpeft.init(method, task.config, base, seed=seed)
    savable(adapter)
    conditions = {
        "spec": refpeft.SPEC_VERSION, "method": method, "config": asdict(adapter.config), "objective": task.objective,
        "setting": asdict(task.setting), "max_length": task.reading.longest, "dtype": dtype, "plan": asdict(plan),
        "data": hashlib.sha256(data.read_bytes()).hexdigest(), "model": fingerprint(model),
    }  # fmt: skip
    goal = objectives.make(task.objective, task.setting)
    first = engine.evaluate(plan, base, adapter, goal, held) if held else None
    state, began_at = carried_out(plan, base, adapter, goal, rows, out, conditions, save_every, resume)
    tuned = engine.trained(adapter, state)
    refpeft.save_adapter(tuned, out)
    shutil.rmtree(beside(out), ignore_errors=True)
    last = engine.evaluate(plan, base, tuned, goal, held) if held else None
    result = {
        "adapter": str(out), "method": method, "objective": task.objective, "steps": state.step,
        "resumed_at": began_at, "rows": len(rows), "cut": cut, "loss_first": float(state.losses[0]),
        "loss_last": float(state.losses[-1]), "losses": state.losses.tolist(),
        "trained": sum(a.size for a in state.params.values()),
        "model_parameters": sum(a.size for a in base.params.values()),
        "bytes": sum(f.stat().st_size for f in out.glob("*.safetensors")), "seconds": time.monotonic() - began,
    }  # fmt: skip
    if first and last:
        result["eval"] = {"rows": len(held), "loss": [first[0], last[0]], "accuracy": [first[1], last[1]]}
    if json_file:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result)


# ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def carried_out(
    plan: "Plan",
    base: "Model",
    adapter: "Adapter",
    goal: "Objective",
    rows: "Sequence[Row]",
    out: Path,
    conditions: Mapping[str, Any],
    save_every: int,
    resume: bool,
) -> "tuple[State, int]":
    """The state after the last step, and the step at which this run began."""
    from refpeft import train as engine
    from refpeft.checkpoint import training

    conditions = json.loads(json.dumps(conditions, default=list))
    home, state = beside(out), engine.start(plan, adapter)
    if resume:
        state = training.load_state(home, state, conditions)

    def keep(state: "State") -> None:
        training.save_state(home, state, conditions)

    def one(state: "State") -> "State":
        return engine.step(plan, base, adapter, goal, rows, state)

    return run(plan, state, one, keep, save_every, home), state.step


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


# ── before the work ─────────────────────────────────────────────────────────────────────────────────────────────────


def beside(out: Path) -> Path:
    """Where states are kept."""
    return out.parent / f"{out.name}.training"


def free(out: Path, json_file: Path | None, resume: bool) -> None:
    from refpeft.checkpoint import folder, training

    folder.check_free(out.absolute())
    if json_file and not json_file.parent.is_dir():
        raise ValueError(f"{json_file}: there is no folder {json_file.parent}")
    if training.steps(beside(out)) and not resume:
        raise ValueError(f"{beside(out)}: a run was stopped here; go on with --resume, or remove the folder")


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
    if held := result.get("eval"):
        table.add_row("held out", f"loss {held['loss'][0]:.4f} before, {held['loss'][1]:.4f} after")
        if held["accuracy"][0] is not None:
            table.add_row("", f"accuracy {held['accuracy'][0]:.1%} before, {held['accuracy'][1]:.1%} after")
    share = result["trained"] / result["model_parameters"]
    table.add_row("trained parameters", f"{result['trained']:,} ({share:.3%} of the model's)")
    table.add_row("adapter", f"{result['bytes']:,} bytes")
    table.add_row("time", f"{result['seconds']:.1f} s")
    Console(highlight=False).print(table)
