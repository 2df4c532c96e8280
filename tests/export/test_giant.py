"""A LLaMA of 7 billion parameters, exported at full size: how long it takes, and how much memory.

Nothing of that size is run here. What is looked at instead: each tensor that the graph points at is the one of that
name in the safetensors header, with its dtype, shape and bytes; and the graph has the nodes of a model of 2 layers,
which is verified, and for each layer more what a third one adds to that.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import refpeft
from refpeft.export.program import export
from refpeft.export.verification import LIMIT
from tests.export import giant
from tests.export.test_weights import lora, ratio

BYTES = {"F16": onnx.TensorProto.FLOAT16, "F32": onnx.TensorProto.FLOAT}
NARROW = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48,
          "vocab_size": 29, "max_position_embeddings": 24}  # fmt: skip


def headers(folder: Path) -> dict[str, tuple[str, int, dict[str, Any]]]:
    """Of each tensor its file, where the bytes of that begin, and what the header says."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
        found |= {name: (file.name, 8 + length, entry) for name, entry in header.items()}
    return found


def exported(model: Path, out: Path, *options: str) -> dict[str, float]:
    """In a process of its own, which says what it took."""
    command = [sys.executable, "-m", "tests.export.giant", str(model), str(out), *options]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def ops(folder: Path) -> Counter[str]:
    """How many nodes there are of each kind."""
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    return Counter(n.op_type for n in graph.node)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return giant.make(tmp_path_factory.mktemp("giant") / "model", np.float16)


@pytest.mark.ort
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["merged", "unmerged", "inputs"])
def test_seven_billion_parameters(form: str, checkpoint: Path, tmp_path: Path) -> None:
    measured = exported(checkpoint, tmp_path / "out", form, "float16", "link")
    largest = 32000 * 4096 * 2
    assert measured["above"] <= (1.5 * largest if form == "merged" else 100e6)
    assert measured["seconds"] < 60
    proto = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    want = headers(checkpoint)
    seen, written = set(), set()
    for t in proto.graph.initializer:
        said = {e.key: e.value for e in t.external_data}
        if t.name not in want:
            assert t.name.startswith(("adapter.", "Constant"))
            continue
        file, start, entry = want[t.name]
        begin, end = entry["data_offsets"]
        assert (list(t.dims), t.data_type) == (entry["shape"], BYTES[entry["dtype"]])
        if said["location"] == file:
            assert (int(said["offset"]), int(said["length"])) == (start + begin, end - begin)
            seen.add(t.name)
        else:
            assert said["location"] == "model.onnx.data"
            assert int(said["length"]) == math.prod(entry["shape"]) * 2
            written.add(t.name)
    changed = re.compile(r"model\.layers\.31\.self_attn\.[qv]_proj\.weight" if form == "merged" else "^$")
    assert written == {name for name in want if changed.fullmatch(name)}
    assert seen | written == want.keys()


@pytest.mark.ort
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("form", "dtype", "weights", "limit"), [
    ("merged", "float32", "link", 45e6), ("inputs", "float32", "link", 45e6), ("merged", "float32", "copy", 100e6),
    ("unmerged", "bfloat16", "copy", 100e6), ("inputs", "int4", "link", 100e6),
    ("merged", "int4", "inside", 100e6),
])  # fmt: skip
def test_a_small_gpt2_takes_little_memory(form: str, dtype: str, weights: str, limit: float, tmp_path: Path) -> None:
    """Its largest tensor has 154 MB."""
    model = giant.make(tmp_path / "model", np.float32, giant.GPT2)
    measured = exported(model, tmp_path / "out", form, dtype, weights)
    assert measured["above"] <= limit
    assert (tmp_path / "out" / "model.onnx").stat().st_size > (200e6 if weights == "inside" else 0)
    shutil.rmtree(tmp_path / "out")


def shallow(tmp_path: Path, layers: int, form: str, verify: bool) -> Any:
    config = {**giant.CONFIG, **NARROW, "num_hidden_layers": layers}
    where = giant.make(tmp_path / f"{form}-{layers}", np.float32, config, shard=20_000)
    model = refpeft.load(where)
    adapter = lora(model, target_modules=["q_proj", "v_proj"], r=8)
    out = tmp_path / f"out-{form}-{layers}"
    return export(model, adapter, out, form, "float16", source=where, decode=True, link=True, verify=verify)


@pytest.mark.ort
@pytest.mark.parametrize("form", ["merged", "inputs"])
def test_the_graph_of_the_giant_is_that_of_a_verified_model(form: str, checkpoint: Path, tmp_path: Path) -> None:
    """Two layers are verified; of 32 there are 30 times more of what a third one adds."""
    small, third = shallow(tmp_path, 2, form, True), shallow(tmp_path, 3, form, False)
    assert ratio(small) <= LIMIT
    model = refpeft.load(checkpoint)
    adapter = lora(
        model, target_modules=["q_proj", "v_proj"], r=8, layers_to_transform=None if form != "merged" else [0]
    )
    export(model, adapter, tmp_path / "out", form, "float16", source=checkpoint, decode=True, link=True, verify=False)
    two, three = ops(small.folder), ops(third.folder)
    one = {op: three[op] - two[op] for op in three}
    got = ops(tmp_path / "out")
    casts = {"Cast"}  # the small ones are stored in float32
    assert {op: n for op, n in got.items() if op not in casts} == {
        op: two[op] + 30 * one[op] for op in three if op not in casts
    }
