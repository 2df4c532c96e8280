"""Writing with an exported graph: the tokens of transformers and peft, and draws that are what they say."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refpeft
from refpeft.export.generation import Options, open_writer, pick, probabilities, write
from refpeft.export.program import export
from refpeft.export.readapter import adapter_only
from tests.export.adapters import made, moved
from tests.models import tiny

F32 = np.float32
WRITERS = ("gpt2", "llama", "qwen2")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]
EVEN = [[3, 1, 4], [9, 2, 6]]


def written(folder: Path, prompts: list[list[int]], adapter: Any = None, bare: bool = False, **options: Any) -> Any:
    steps = write(open_writer(folder, adapter, bare), prompts, Options(**{"max_new_tokens": 8, **options}))
    return [[t for t in row if t is not None] for row in zip(*steps, strict=True)]


def of_peft(folder: Path, prompts: list[list[int]], new: int = 8) -> list[list[int]]:
    """What transformers and peft write, greedily, from rows padded on the left. With a prompt or a prefix, the tokens
    that peft's forward pass finds likeliest: its `generate` has others, see docs/findings."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tuned = PeftModel.from_pretrained(model, str(folder / "adapter")).eval()
    s = max(map(len, prompts))
    ids = torch.tensor([[0] * (s - len(p)) + p for p in prompts])
    if tuned.active_peft_config.is_prompt_learning:
        for _ in range(new):
            logits = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    else:
        mask = torch.tensor([[0] * (s - len(p)) + [1] * len(p) for p in prompts])
        ids = tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    rows: list[list[int]] = ids[:, -new:].tolist()
    return rows


FORMS = {
    "merged": ("lora", PROMPTS), "unmerged": ("dora", PROMPTS), "inputs": ("rslora", PROMPTS),
    "prompt": ("prompt_tuning", EVEN), "prefix": ("prefix_tuning", EVEN),
}  # fmt: skip


@pytest.mark.peft
@pytest.mark.ort
@pytest.mark.filterwarnings("ignore")  # of what transformers and peft say to each other
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", WRITERS)
def test_greedy_is_that_of_transformers_and_peft(family: str, form: str, tmp_path: Path) -> None:
    """Prompts and prefixes without padding: peft counts it among the positions there."""
    method, prompts = FORMS[form]
    model, adapter = made(method, family, **({"prefix_projection": False} if form == "prefix" else {}))
    refpeft.save(model, tmp_path / "model")
    refpeft.save_adapter(adapter, tmp_path / "adapter")
    adapter = refpeft.load_adapter(tmp_path / "adapter", model)
    export(model, adapter, tmp_path / "out", form, decode=True, verify=False)
    assert written(tmp_path / "out", prompts) == of_peft(tmp_path, prompts)


@pytest.mark.ort
@pytest.mark.parametrize("form", FORMS)
def test_greedy_is_that_of_the_specification(form: str, tmp_path: Path) -> None:
    """Each row alone, without a cache, the likeliest token of the whole text so far."""
    method, _ = FORMS[form]
    model, adapter = made(method, "gpt2")
    export(model, adapter, tmp_path / "out", form, decode=True, verify=False)
    expected = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(model(np.array([ids]), adapter)[0][0, -1].argmax()))
        expected.append(ids[len(prompt) :])
    assert written(tmp_path / "out", PROMPTS) == expected


@pytest.mark.ort
def test_adapters_by_file(tmp_path: Path) -> None:
    model = tiny("llama", dtype=F32)
    one, other = (moved(refpeft.init("lora", {"r": r}, model, r), r) for r in (2, 4))
    refpeft.save_adapter(other, tmp_path / "other")
    export(model, one, tmp_path / "inputs", "inputs", decode=True, verify=False)
    adapter_only(tmp_path / "inputs", [tmp_path / "other"], tmp_path / "file")
    for adapter, how in (
        (one, {}), (other, {"adapter": tmp_path / "file"}), (None, {"bare": True}),
    ):  # fmt: skip
        name = str(len(list(tmp_path.iterdir())))
        export(model, adapter, tmp_path / name, decode=True, verify=False)
        assert written(tmp_path / "inputs", PROMPTS, **how) == written(tmp_path / name, PROMPTS)


@pytest.mark.ort
def test_a_prompt_in_a_template(tmp_path: Path) -> None:
    """(P₁, x, P₂): the ids of the virtual tokens stand where the template has them."""
    model, adapter = made("p_tuning", "llama", placement="template")
    export(model, adapter, tmp_path / "out", "prompt", decode=True, verify=False)
    template = [29, 30, 3, 1, 4, 31]
    ids = list(template)
    for _ in range(8):
        ids.append(int(model(np.array([ids]), adapter)[0][0, -1].argmax()))
    assert written(tmp_path / "out", [template]) == [ids[len(template) :]]


@pytest.mark.ort
def test_rows_end_on_their_own(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32, eos_token_id=7)
    export(model, None, tmp_path / "out", decode=True, verify=False)
    free = written(tmp_path / "out", PROMPTS)
    stop = free[0][2]
    stopped = written(tmp_path / "out", PROMPTS, stop=[stop])
    assert stopped == [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert stopped != free
    assert open_writer(tmp_path / "out").stop == [7]


@pytest.mark.ort
def test_draws(tmp_path: Path) -> None:
    """One seed, one text, whatever stands in the other rows; another seed, another."""
    model = tiny("gpt2", dtype=F32)
    export(model, None, tmp_path / "out", decode=True, verify=False)
    hot = {"temperature": 1.5, "max_new_tokens": 16}
    alone = written(tmp_path / "out", PROMPTS[:1], seed=1, **hot)
    assert written(tmp_path / "out", PROMPTS, seed=1, **hot)[0] == alone[0]
    assert written(tmp_path / "out", PROMPTS[:1], seed=2, **hot) != alone
    assert written(tmp_path / "out", PROMPTS, temperature=1.0, top_k=1) == written(tmp_path / "out", PROMPTS)


def test_draws_have_the_probabilities() -> None:
    logits = np.log([[0.5, 0.3, 0.15, 0.05]])
    assert np.allclose(probabilities(logits, Options(temperature=1.0)), [[0.5, 0.3, 0.15, 0.05]])
    assert np.allclose(probabilities(logits, Options(temperature=0.5)), np.array([[25, 9, 2.25, 0.25]]) / 36.5)
    assert np.allclose(probabilities(logits, Options(temperature=1.0, top_k=2)), [[0.625, 0.375, 0, 0]])
    assert np.allclose(probabilities(logits, Options(temperature=1.0, top_p=0.6)), [[0.625, 0.375, 0, 0]])
    assert np.allclose(probabilities(logits, Options(temperature=1.0, top_p=0.01)), [[1, 0, 0, 0]])
    draws = [np.random.default_rng(k) for k in range(4000)]
    counts = Counter(pick(np.repeat(logits, 4000, axis=0), Options(temperature=1.0), draws).tolist())
    for token, p in enumerate([0.5, 0.3, 0.15, 0.05]):
        assert abs(counts[token] / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5


@pytest.mark.peft
def test_what_is_left_is_what_transformers_leaves() -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(5, 40)) * 3
    for temperature, k, p in ((0.7, 12, 0.8), (1.3, 40, 0.95), (2.0, 3, 0.5)):
        scores = torch.tensor(logits)
        for warp in (TemperatureLogitsWarper(temperature), TopKLogitsWarper(k), TopPLogitsWarper(p)):
            scores = warp(None, scores)
        expected = scores.softmax(-1).numpy()
        got = probabilities(logits, Options(temperature=temperature, top_k=k, top_p=p))
        assert np.allclose(got, expected, atol=1e-12)


@pytest.mark.ort
def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2", dtype=F32)
    export(model, None, tmp_path / "plain", verify=False)
    export(model, None, tmp_path / "out", decode=True, verify=False)
    with pytest.raises(ValueError, match="does not decode: export it with --decode"):
        open_writer(tmp_path / "plain")
    for prompts, message in (
        ([[]], "at least one token"), ([], "at least one token"), ([[29]], "has the token 29, and the model 29 tokens"),
        ([[1] * 25], "25 positions does not fit the model, which has 24"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            written(tmp_path / "out", prompts)
    assert len(written(tmp_path / "out", [[1] * 22], max_new_tokens=9)[0]) == 3  # then the positions are used up
    for wrong in (
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"temperature": float("nan")},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            Options(**wrong)


@pytest.mark.ort
def test_a_folder_that_is_not_what_it_says(tmp_path: Path) -> None:
    """What a folder claims is checked, and what is wrong is named."""
    model, adapter = made("prefix_tuning", "gpt2")
    export(model, adapter, tmp_path / "out", "prefix", verify=False)
    whole = json.loads((tmp_path / "out" / "refpeft.json").read_text())

    def changed(message: str, **fields: Any) -> None:
        card = {n: v for n, v in (whole | fields).items() if v is not None}
        (tmp_path / "out" / "refpeft.json").write_text(json.dumps(card))
        with pytest.raises(ValueError, match=message):
            open_writer(tmp_path / "out")

    changed("format must be 'refpeft export', found 'other'", format="other")
    changed("decode must be a bool, found 'yes'", decode="yes")
    changed("adapters must be a list, found None", adapters=None)
    changed("facts is missing, which the form prefix has", facts=None)
    (tmp_path / "out" / "model.onnx").write_bytes(b"no graph")
    changed(r"model\.onnx: expected \d+ bytes, as it was exported, found 8")
    changed(r"model\.onnx: not an ONNX model", files=None)
    (tmp_path / "out" / "refpeft.json").write_text("{")
    with pytest.raises(ValueError, match=r"refpeft\.json: not JSON"):
        open_writer(tmp_path / "out")
