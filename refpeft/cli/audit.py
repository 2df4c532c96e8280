"""`refpeft audit`: does a merged checkpoint hold what base and adapters say?"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refpeft.cli.output import writable

if TYPE_CHECKING:
    from refpeft.conformance.audit import Finding, Found

Findings = Sequence["Finding"]


def audit(
    merged: Annotated[
        Path,
        typer.Argument(metavar="MERGED", help="What to audit: an HF folder, a .safetensors or an .onnx file."),
    ],
    base: Annotated[Path, typer.Option("--base", "-b", metavar="DIR", help="The base model: an HF folder.")],
    adapter: Annotated[
        list[Path],
        typer.Option(
            "--adapter", "-a", metavar="DIR", help="A PEFT adapter folder. Several, in order, are all merged."
        ),
    ],
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the findings as JSON.")
    ] = None,
) -> None:
    """Does a merged checkpoint hold what base and adapters say? Whoever made it, tensor by tensor.

    A tensor is [b]equal[/] if its numbers are the correctly rounded ones, and [b]equal
    to rounding[/] if they are as near as rounding in its dtype explains.
    Of one that is not, it says what it is instead: the base's, ΔW scaled by a
    constant (and which mistake with s = α/r makes that constant), transposed,
    only one of several adapters, not the base's, missing, extra. Nothing is
    run, and nothing but safetensors and ONNX is read.

    In an ONNX graph, tensors that the exporter renamed or transposed are found
    by their numbers.

    [cyan]refpeft audit merged --base llama --adapter my-lora[/cyan]
    [cyan]refpeft audit model.onnx --base gpt2 --adapter one --adapter two[/cyan]

    Exit code 0: it does. 1: it does not. 2: could not run.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    import refpeft
    from refpeft.conformance.audit import audit as run

    writable(json_file)
    model = refpeft.load(base)
    adapters = [refpeft.load_adapter(folder, model) for folder in adapter]
    found = opened(merged)
    console, findings = Console(highlight=False, soft_wrap=True), []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    errors = Console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("auditing", total=sum(a.size for a in model.params.values()))
        for finding in run(model, adapters, labels(adapter), found):
            findings.append(finding)
            size = model.params[finding.name].size if finding.name in model.params else 0
            bar.update(task, advance=size, description=finding.name)
    show(findings, console)
    sentences = verdict(findings, labels(adapter))
    console.print(*sentences, sep="\n", markup=False)
    if json_file:
        said = as_json(findings, sentences, merged=str(merged), base=str(base), adapters=[str(a) for a in adapter])
        json_file.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    raise typer.Exit(0 if all(f.right for f in findings) else 1)


def opened(merged: Path) -> "Found":
    """The tensors of a folder or file, mapped, and the config.json beside them."""
    from refpeft.checkpoint import folder, safetensors
    from refpeft.conformance.audit import Found

    if merged.is_dir():
        graphs = sorted(merged.glob("*.onnx"))
        exported = (merged / "refpeft.json").is_file()  # by us: a checkpoint in it is what the graph is linked with
        if not graphs or (any(merged.glob("model*.safetensors*")) and not exported):
            return Found(folder.tensors(merged, "model"), config_beside(merged))
        if len(graphs) > 1:
            found = ", ".join(g.name for g in graphs)
            raise safetensors.Malformed(f"{merged}: there are several ONNX files, name one of them: {found}")
        merged = graphs[0]
    if not merged.is_file():
        raise safetensors.Malformed(f"{merged}: no such file or folder")
    if merged.suffix == ".onnx":
        from refpeft.export import initialisers

        tensors = initialisers.read(merged)
        if low := next((name for name in tensors if name.endswith(".q4")), None):
            raise safetensors.Malformed(
                f"{merged}: {low.removesuffix('.q4')} has 4 bits, and of such weights none is what the adapters say"
            )
        return Found(tensors, config_beside(merged.parent), graph=True)
    if merged.suffix == ".safetensors":
        return Found(safetensors.read(merged), config_beside(merged.parent))
    raise safetensors.Malformed(f"{merged}: expected a folder, a .safetensors or an .onnx file")


def config_beside(folder: Path) -> Mapping[str, Any] | None:
    from refpeft.checkpoint import safetensors

    return safetensors.read_json(folder / "config.json") if (folder / "config.json").is_file() else None


def labels(folders: Sequence[Path]) -> list[str]:
    """Short names for the adapters: their folders', numbered where they are the same."""
    bare = [folder.resolve().name for folder in folders]
    return [name if bare.count(name) == 1 else f"{name} ({n})" for n, name in enumerate(bare, 1)]


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def show(findings: Findings, console: Any) -> None:
    """A line per tensor that is not equal; those that rounding explains are counted only."""
    from rich.text import Text

    wrong = [f for f in findings if not f.right]
    width = max((len(f.name) for f in wrong), default=0)
    for f in wrong:
        line = Text("✗ ", style="red")
        line.append(f.name.ljust(width + 2), style="bold")
        line.append(f"{f.verdict}: ", style="red").append(f.detail, style="default")
        if f.stored_as:
            line.append(f" [{f.stored_as}]", style="dim")
        console.print(line)
    if wrong:
        console.print()


def verdict(findings: Findings, adapters: Sequence[str]) -> list[str]:
    """In words: first what it comes to, then how many tensors are what."""
    said = [whole(findings, adapters)]
    counts = Counter(f.verdict for f in findings)
    worst = max((f for f in findings if f.verdict == "rounding"), key=lambda f: f.worst or 0, default=None)
    parts = [f"{counts['equal']} equal"] if counts["equal"] else []
    if worst:
        parts.append(f"{counts['rounding']} equal to rounding ({worst.worst:.2g} units of {worst.dtype} at most)")
    names = {"base": "not applied", "foreign": "not the base's"}
    parts += [f"{n} {names.get(name, name)}" for name, n in counts.items() if name not in ("equal", "rounding")]
    said.append(f"{len(findings)} tensors: {', '.join(parts)}.")
    renamed = [f for f in findings if f.stored_as]
    if renamed:
        said.append(f"{len(renamed)} were found under another name, as {renamed[0].name} in {renamed[0].stored_as}.")
    return said


def whole(findings: Findings, adapters: Sequence[str]) -> str:
    """The sentence that matters."""
    them = "the adapter" if len(adapters) == 1 else "the adapters"
    wrong = [f for f in findings if not f.right]
    if not wrong:
        return f"It holds what the base and {them} say."
    adapted = sum(bool(f.adapters) for f in findings)
    reasons = [
        reason(kind, [f for f in wrong if f.verdict == kind], n, adapted, them)
        for kind, n in Counter(f.verdict for f in wrong).most_common()
    ]
    return f"It does not hold what the base and {them} say: {'; '.join(reasons)}."


def reason(kind: str, of: Findings, n: int, adapted: int, them: str) -> str:
    """One kind of difference, in words."""
    where = f"all {n} adapted tensors" if n == adapted > 1 and all(f.adapters for f in of) else tensors(of)
    if kind == "base":
        return f"{them} {'was' if them == 'the adapter' else 'were'} not applied to {where}"
    if kind == "scaled":
        return scaling(of, adapted, them)
    if kind == "mistaken":
        return f"{where}: {'; '.join(dict.fromkeys(f.detail for f in of))}"
    if kind == "foreign":
        return f"{where}, which no adapter changes, {'is' if n == 1 else 'are'} not the base's"
    return {
        "coarse": f"{where} {'is' if n == 1 else 'are'} right but for more rounding than one merge needs",
        "transposed": f"{where} {'is' if n == 1 else 'are'} transposed",
        "differs": f"{where} differ{'s' if n == 1 else ''} from it in a way that no known mistake explains",
        "not finite": f"{where} {'has' if n == 1 else 'have'} elements that are no numbers",
        "shape": f"{where} {'has' if n == 1 else 'have'} another shape",
        "dtype": f"{where} {'is' if n == 1 else 'are'} not stored as floats",
        "tied": f"{where} {'is' if n == 1 else 'are'} stored apart though config.json ties them",
        "missing": f"{where} {'is' if n == 1 else 'are'} missing",
        "extra": f"{where} {'is' if n == 1 else 'are'} there that no such model has",
        "config": f"config.json says something else than the base's ({of[0].detail})",
    }[kind]


def scaling(of: Findings, adapted: int, them: str) -> str:
    """Adapter by adapter: by which k in how many tensors, and the mistakes that all of them may come from."""
    said = []
    for label in dict.fromkeys(label for f in of for label in f.adapters):
        its = [(f, f.adapters.index(label)) for f in of if label in f.adapters]
        its = [(f, n) for f, n in its if f.k[n] != 1]
        if not its:
            continue
        found = [f for f, _ in its]
        values = sorted({float(f"{f.k[n]:.3g}") for f, n in its})
        k = f"k = {', '.join(f'{v:g}' for v in values[:3])}{' …' if len(values) > 3 else ''}"
        common = [m for m in its[0][0].means[its[0][1]] if all(m in f.means[n] for f, n in its)]
        each = dict.fromkeys(" or ".join(f.means[n]) or "no known mistake" for f, n in its)
        whose = "" if them == "the adapter" else f" of {label}"
        where = f"all {adapted} adapted tensors" if len(found) == adapted > 1 else tensors(found)
        said.append(f"ΔW{whose} is scaled in {where} by {k}: {' or '.join(common) or '; '.join(each)}")
    return "; ".join(said)


def tensors(of: Findings) -> str:
    return of[0].name if len(of) == 1 else f"{len(of)} tensors ({of[0].name}, …)"


def as_json(findings: Findings, sentences: Sequence[str], **what: Any) -> dict[str, Any]:
    import refpeft

    return {
        "format": "refpeft audit", "refpeft": refpeft.__version__, "spec_version": refpeft.SPEC_VERSION, **what,
        "holds": all(f.right for f in findings), "verdict": sentences,
        "counts": dict(Counter(f.verdict for f in findings)),
        "tensors": [finite(asdict(f)) for f in findings],
    }  # fmt: skip


def finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    worst = row["worst"]
    return row | {"worst": worst if worst is None or worst < float("inf") else None}
