"""An implementation of one's own, judged by the suite: LoRA on a linear layer, running and merged.

    refpeft check python:examples.my_lora:Mine            from the folder above this one

`info` declares what it can do, and only that is asked. `run` answers a case with the arrays that the case wants.
Change the sign of something below, or forget the scale in `merged`, and see what the suite makes of it.
"""

from typing import Any

from refpeft.conformance.case import Case


class Mine:
    def info(self) -> dict[str, Any]:
        return {
            "name": "my LoRA", "version": "1", "levels": ["layer"], "methods": ["lora"],
            "dtypes": ["float32", "float64"], "features": ["forward", "merge"],
        }  # fmt: skip

    def run(self, case: Case) -> dict[str, Any]:
        c, a = case.meta["config"], case.arrays  # x [… i], W [o, i], A [r, i], B [o, r], and b [o] where there is one
        if unknown := sorted(set(c) - {"r", "lora_alpha"}):
            raise ValueError(f"no idea what {unknown[0]} is")  # better than to do something else than was asked
        s, x, W, A, B, b = c["lora_alpha"] / c["r"], a["x"], a["W"], a["A"], a["B"], a.get("b", 0)

        def y(x: Any) -> Any:
            return x @ W.T + b + s * (x @ A.T @ B.T)

        answers: dict[str, Any] = {}
        if "output" in case.meta["want"]:
            answers["y"] = y(x)
        if "first_row" in case.meta["want"]:
            answers["y_row"] = y(x[:1])
        if "merged" in case.meta["want"]:
            answers["W_merged"] = W + s * (B @ A)
            answers["y_merged"] = x @ answers["W_merged"].T + b
            answers |= {"b_merged": a["b"]} if "b" in a else {}
        return answers
