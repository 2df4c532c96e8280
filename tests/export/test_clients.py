"""Other programs load what is exported, as it is: optimum, onnxruntime-genai, transformers.js. Each is asked in an
environment of its own, in one process, and answers what `refpeft generate` and the specification answer."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refpeft.conformance.targets import libraries
from refpeft.export import adapters as files
from refpeft.export.forms import FORMS
from tests.export.clients.folders import ADAPTER_IDS, ENDS, IDS, MASK, NEW, READERS, WRITERS, generated, make, specified
from tests.export.graphs import gap

HERE = Path(__file__).parent / "clients"
PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
Json = dict[str, Any]
UNEVEN, EVEN = [[3, 1, 4, 1, 5], [9, 2]], [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
TEXT = "abc def"

# ── what the page says ───────────────────────────────────────────────────────────────────────────────────────────────

YES, BARE, NOT = "✓", "base", ""
LOADS: Mapping[str, Mapping[str, str]] = {  # client → form → with the adapter, without it, or not at all; else: YES
    "optimum": {"inputs": BARE, "prompt": BARE, "multi": NOT, "training": NOT},
    "genai": {"prefix": NOT, "training": NOT},
    "node": {"inputs": BARE, "prompt": BARE, "multi": NOT, "training": NOT},
    "web": {"inputs": BARE, "prompt": BARE, "multi": NOT, "training": NOT},
}
REFUSALS = {
    ("optimum", "multi"): "adapter_ids is required", ("optimum", "training"): "does not support pkv cache",
    ("genai", "prefix"): "genai_config.json", ("genai", "training"): "genai_config.json",
    ("node", "multi"): "adapter_ids", ("node", "training"): "labels",
    ("web", "multi"): "adapter_ids", ("web", "training"): "Missing the following inputs",
}  # fmt: skip
NODE = [pytest.mark.transformersjs, pytest.mark.node]
MARKS = {"optimum": [pytest.mark.optimum], "genai": [pytest.mark.genai], "node": NODE, "web": NODE}


def loads(client: str, form: str) -> str:
    return LOADS[client].get(form, YES)


def each(cases: Any, *clients: str) -> Any:
    """A test for every client and case."""
    pairs = [pytest.param(c, case, marks=MARKS[c]) for c in clients for case in cases]
    return pytest.mark.parametrize(("client", "case"), pairs)


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clients")
    make(folder)
    return folder


@cache
def answers(client: str, root: Path) -> Mapping[str, Json]:
    """All that a client is asked, by `writers/case` or `readers/case`."""
    asked = {f"writers/{case}": written(client, root / "writers" / case, case) for case in WRITERS}
    asked |= {} if client == "genai" else {f"readers/{case}": read(client, root, case) for case in READERS}
    if client == "genai":
        asked["padded"] = {**asked["writers/llama"], "new": 0, "feeds": padded(UNEVEN)}
    if client != "optimum":
        asked["text"] = {"folder": str(root / "writers" / "gpt2"), "text": TEXT, "new": NEW}
    words = json.dumps(list(asked.values()))
    run = subprocess.run(command(client, root), input=words, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return dict(zip(asked, json.loads(run.stdout.splitlines()[-1]), strict=True))


def command(client: str, root: Path) -> list[str]:
    if client in libraries.EVERY:
        return [libraries.elsewhere(client) or sys.executable, str(HERE / f"in_{client}.py")]
    script, package = str(HERE / "in_transformers.mjs"), str(libraries.package_of("transformersjs"))
    return ["node", "--liftoff-only", script, package, client, str(root)]  # node waits until all wasm is optimised


def prompts(client: str, case: str) -> list[list[int]]:
    """genai does not mask padding."""
    return EVEN if client == "genai" or case == "prefix" else UNEVEN


def written(client: str, folder: Path, case: str) -> Json:
    form, rows, file = WRITERS[case][0], prompts(client, case), folder / "adapter.onnx_adapter"
    q: Json = {"folder": str(folder), "new": NEW, "prefix": None, "adapter": None, "adapter_ids": None}
    if client == "genai":
        front = [29, 30, 31] if form == "prompt" else []  # its three rows
        q["adapter"] = str(file) if form in ("inputs", "prompt") else None
        q["adapter_ids"] = ADAPTER_IDS if form == "multi" else None
        return q | {"feeds": {"input_ids": [[*front, *row] for row in rows]}}
    q["class"] = "ORTModelForCausalLM" if client == "optimum" else "AutoModelForCausalLM"
    if form == "prefix":
        past = {name: {"dims": a.shape, "data": a.ravel().tolist()} for name, a in files.read(file).items()}
        q["prefix"] = str(file) if client == "optimum" else past
    if client == "web" and case == "external":
        q["options"] = {"session_options": {"externalData": [{"path": "model.onnx.data", "data": "model.onnx.data"}]}}
    return q | {"feeds": padded(rows)}


def padded(rows: list[list[int]]) -> Json:
    """On the left."""
    s = max(map(len, rows))
    mask = [[0] * (s - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": [[0] * (s - len(row)) + row for row in rows], "attention_mask": mask}


def read(client: str, root: Path, case: str) -> Json:
    _, family, architecture = READERS[case]
    names = {"Model": "ForFeatureExtraction"} if client == "optimum" else {"Model": ""}
    kind = ("ORTModel" if client == "optimum" else "AutoModel") + names.get(architecture, architecture)
    feeds = {"input_ids": IDS, "attention_mask": MASK}
    if family == "bert":
        feeds["token_type_ids"] = [[0] * 5] * 2
    return {"folder": str(root / "readers" / case), "class": kind, "new": 0, "feeds": feeds}


# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def until_the_end(row: list[int], client: str) -> list[int]:
    """Behind the token that ends a row is padding; transformers.js goes on in a row until all have ended."""
    last = next((k for k, t in enumerate(row) if t in ENDS), len(row) - 1)
    assert client in ("node", "web") or set(row[last + 1 :]) <= {0}
    return row[: last + 1]


@pytest.mark.ort
@each(WRITERS, *MARKS)
def test_it_writes_what_refpeft_generate_writes(client: str, case: str, root: Path) -> None:
    form, found = WRITERS[case][0], answers(client, root)[f"writers/{case}"]
    if loads(client, form) == NOT:
        assert REFUSALS[client, form] in found["error"]
        return
    bare = loads(client, form) == BARE
    assert "error" not in found
    assert [until_the_end(row, client) for row in found["answer"]] == generated(root, case, prompts(client, case), bare)


@pytest.mark.ort
def test_some_texts_end_early_and_adapters_make_a_difference(root: Path) -> None:
    """So that equal answers say something."""
    whole = {case: generated(root, case, EVEN) for case, (form, *_) in WRITERS.items() if form != "training"}
    lengths = {len(row) for rows in whole.values() for row in rows}
    assert lengths > {NEW}
    for case in ("inputs", "prompt", "prefix"):
        assert whole[case] != generated(root, case, EVEN, bare=True)
    assert whole["multi"] != whole["llama"]


@pytest.mark.ort
@each(READERS, "optimum", "node", "web")
def test_it_answers_what_the_specification_answers(client: str, case: str, root: Path) -> None:
    form, family, architecture = READERS[case]
    found = answers(client, root)[f"readers/{case}"]
    if client != "optimum" and case in ("gpt2-classifies", "llama-classifies"):
        assert f"Unsupported model type: {family}" in found["error"]
        return
    name = "last_hidden_state" if architecture == "Model" else "logits"
    expected = specified(case, loads(client, form) == BARE)
    got, real = np.array(found["answer"][name]), np.array(MASK, bool)
    rows = real if got.ndim == 3 and got.shape[1] == 5 else slice(None)
    assert gap(got[rows], expected[rows]) < 1e-6


@pytest.mark.ort
@each(["text"], "genai", "node", "web")
def test_it_reads_the_tokenizer(client: str, case: str, root: Path) -> None:
    from tests.export.test_generate_cli import words

    found, ids = answers(client, root)[case]["answer"], words().encode(TEXT).ids
    assert found["ids"] == ids
    if client == "genai":
        assert found["text"] == TEXT
        return
    (new,) = generated(root, "gpt2", [ids])
    assert found["text"] == words().decode([*ids, *new])


@pytest.mark.ort
@pytest.mark.genai
def test_genai_does_not_mask_padding(root: Path) -> None:
    """As the page says; the padding here is pad_token_id of its own config."""
    written = json.loads((root / "writers" / "llama" / "genai_config.json").read_text())
    assert written["model"]["pad_token_id"] == padded(UNEVEN)["input_ids"][1][0] == 0
    found = answers("genai", root)["padded"]["answer"]
    assert found == {"attention_mask": [[1] * 5] * 2, "position_ids": [[0, 1, 2, 3, 4]] * 2}


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = {
    "optimum": "optimum",
    "onnxruntime-genai": "genai",
    "transformers.js, node": "node",
    "transformers.js, web": "web",
}


def test_the_table_of_clients_is_what_is_tested() -> None:
    assert {form for form, *_ in WRITERS.values()} == FORMS.keys()
    for row, client in ROWS.items():
        (cells,) = re.findall(rf"^\| {re.escape(row)} [^|]*\|(.*)\|$", PAGE, re.MULTILINE)
        assert [cell.strip() for cell in cells.split("|")] == [loads(client, form) for form in FORMS]


def test_the_page_names_the_versions_that_are_tested() -> None:
    for name in ("optimum", "genai", "transformersjs"):
        version = re.split("==|@", libraries.EVERY[name].requires[0])[-1]
        assert version in PAGE.partition("## Programs that load the folder")[2]
