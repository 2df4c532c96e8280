"""A story as a script that needs only the library itself, for a bug report: the model, its weights, the steps, and
what the formula says after each.

    refpeft replay CASE peft --script story.py

The script ends with exit code 1 and the first step after which the library says something else.
"""

import pprint
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from refpeft.conformance import chain
from refpeft.conformance.case import Case
from refpeft.conformance.targets.spec_stories import RATE
from refpeft.conformance.yardstick import Yardstick
from refpeft.ops import Array

WRITERS: Mapping[str, str] = {"peft": "story.peft.py.jinja"}  # target → its template
CONFIGS: Mapping[str, str] = {  # method → its config in HF peft, where that is not LoRA's
    "ia3": "IA3Config", "vera": "VeraConfig", "adalora": "AdaLoraConfig", "loha": "LoHaConfig", "lokr": "LoKrConfig",
    "oft": "OFTConfig", "boft": "BOFTConfig",
}  # fmt: skip
TOLERANCE = {"float64": 1e-9, "float32": 1e-3}  # of what a difference that is reported is far above


def script(case: Case, target: str) -> str:
    """The text of the script. What is no story, and a target that has no template, is an error."""
    if target not in WRITERS:
        raise ValueError(f"scripts can be written for {', '.join(WRITERS)}, not for {target!r}")
    if case.level != "story":
        raise ValueError(f"scripts are written of stories (level story), not of a case of level {case.level}")
    if not writable(case, target):
        raise ValueError(f"scripts are written of stories about chains of layers, not about {case.method}")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(literal=literal, plain=plain, repr=repr)
    template = environment.get_template(WRITERS[target])
    return template.render(about(case, target))


def writable(case: Case, target: str) -> bool:
    """A story of a chain of layers, whose library has a template."""
    return target in WRITERS and case.meta.get("model", {}).get("model_type") == chain.FAMILY


def about(case: Case, target: str) -> dict[str, Any]:
    m, arrays = case.meta, case.arrays
    steps, expected = m["steps"], Yardstick(case).ref
    used = {step["do"] for step in steps}
    return {
        "make": CONFIGS.get(case.method, "LoraConfig"), "one_trained": case.method == "adalora",
        "id": m["id"], "dtype": m["dtype"], "layers": m["model"]["layers"], "order": m["model"]["order"],
        "weights": tensors(arrays, "model/"), "adapters": {
            name: (own["config"], values(case, name)) for name, own in m["adapters"].items()
        },
        "masks": list(masks(case)), "ids": arrays["ids"],
        "dout": arrays["dout"] if "train" in used else None, "rate": RATE, "used": used,
        "tolerance": TOLERANCE.get(m["dtype"], 1e-1),
        "steps": [(filled(step), rounded(expected[f"{k}/logits"]), line(step)) for k, step in enumerate(steps)],
    }  # fmt: skip


def values(case: Case, name: str) -> dict[str, tuple[Array, str]]:
    """The tensors of an adapter, as its file calls them, with their dtypes. VeRA's A and B are of the whole model."""
    still = case.meta["adapters"][name].get("frozen", ())
    there = tensors(case.arrays, name + "/").items()
    return {f"base_model.{'' if n in still else 'model.'}{n}": (a, a.dtype.name) for n, a in there}


def masks(case: Case) -> Iterator[Array]:
    """In the order in which HF peft asks for them: layer by layer, first those for A, then those for B."""
    for step in case.meta["steps"]:
        for path in case.meta["model"]["layers"] if step["do"] == "combine" else ():
            for name in (path, f"{path}.lora_A.weight", f"{path}.lora_B.weight"):
                keys = [f"mask/{step['adapter']}/{n}/{name}" for n in step["of"]]
                yield from (case.arrays[key] for key in keys if key in case.arrays)


def tensors(arrays: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}


def filled(step: Mapping[str, Any]) -> dict[str, Any]:
    return {"density": None, "sign": "total", "safe": False, **step}


def line(step: Mapping[str, Any]) -> str:
    """The step in words, as `merge(safe=True)`."""
    given = ", ".join(f"{name}={value!r}" for name, value in step.items() if name not in ("do", "may"))
    return f"{step['do']}({given})"


def literal(a: Array, indent: int = 8) -> str:
    """An array as a list that gives the same numbers back, in lines of their own where it is long."""
    values = np.asarray(a, np.float64 if a.dtype.kind not in "iub" else None).tolist()
    if a.dtype == np.float32:
        values = shortest(a)
    text = repr(values)
    if len(text) <= 90:
        return text
    return pprint.pformat(values, width=110, compact=True).replace("\n", "\n" + " " * indent)


def rounded(a: Array) -> Array:
    """Twelve figures, which is more than is asked for."""
    return np.vectorize(lambda x: float(f"{x:.12g}"))(a)


def shortest(a: Array) -> Any:
    """The shortest decimal of each number of 32 bits."""
    return [shortest(row) for row in a] if a.ndim else float(str(a))


def plain(values: Mapping[str, Any]) -> str:
    """A config as arguments."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
