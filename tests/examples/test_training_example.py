"""examples/training: the folder, and what JavaScript makes of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import refpeft
from refpeft.checkpoint import safetensors
from refpeft.export import training

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "training"
STUB = """
import { readFile, writeFile } from "node:fs/promises";
import { open } from "%s";

class Tensor { constructor(type, data, dims) { Object.assign(this, { type, data, dims }); } }
const seen = [];
const session = {  // every number that goes round is one more
  inputNames: %s, outputNames: %s,
  async run(feeds) {
    const shown = ([n, t]) => [n, [t.type, t.dims, [...t.data].map(Number)]];
    seen.push(Object.fromEntries(Object.entries(feeds).map(shown)));
    const next = Object.entries(feeds).filter(([n]) => n.startsWith("adapter.") || n.startsWith("state."));
    const more = t => new Tensor(t.type, t.data.map(v => v + (t.type === "int64" ? 1n : 1)), t.dims);
    return { loss: new Tensor("float32", new Float32Array([7]), []),
      logits: new Tensor("float32", new Float32Array([0, Math.log(3)]), [1, 2]),
      ...Object.fromEntries(next.map(([n, t]) => ["next." + n, more(t)])) };
  },
};
class Tokenizer { encode(text) { return { ids: text.split(" ").map(Number) }; } }
const ort = { Tensor, InferenceSession: { create: async () => session }, providers: [] };
const trainer = await open(ort, Tokenizer, async name => new Uint8Array(await readFile("%s/" + name)));
const { loss } = await trainer.step([{ text: "5 6 7", label: 1 }, { text: "8", label: 0 }], 0.5);
await trainer.step([{ text: "5", label: 1 }], 0.25);
const p = await trainer.probabilities(["4"]);
await writeFile("%s", trainer.adapter());
console.log(JSON.stringify({ seen, loss, p }));
"""


def ran(*command: str | Path) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("example") / "trainer"
    assert "ratio" in ran(sys.executable, EXAMPLE / "make.py", "--quick", "--out", out)
    return out


@pytest.mark.ort
def test_the_specification_learns(folder: Path) -> None:
    found = json.loads((folder / "examples.json").read_text())
    assert len(found["losses"]) == 5 * len(found["rows"]) / found["batch"]
    assert found["losses"][-1] < 0.8 * found["losses"][0]


@pytest.mark.node
@pytest.mark.ort
def test_the_loop_in_javascript(folder: Path, tmp_path: Path) -> None:
    """With a graph that adds one to everything: what goes in, what goes round, and the file that is written."""
    start = safetensors.read(folder / "start.safetensors")
    tokens = ["input_ids", "attention_mask", "token_type_ids", "labels", "learning_rate"]
    names = json.dumps([*tokens, *start]), json.dumps(["loss", "logits", *(f"next.{n}" for n in start)])
    script, file = tmp_path / "stub.mjs", tmp_path / "trained.safetensors"
    script.write_text(STUB % ((EXAMPLE / "trainer.mjs").as_uri(), *names, folder.as_posix(), file.as_posix()))
    said = json.loads(ran("node", script))
    first, second, asked = said["seen"]
    assert first["input_ids"] == ["int64", [2, 3], [5, 6, 7, 8, 0, 0]]
    assert first["attention_mask"] == ["int64", [2, 3], [1, 1, 1, 1, 0, 0]]
    assert first["labels"] == ["int64", [2], [1, 0]]
    assert (first["learning_rate"], second["learning_rate"]) == (["float32", [], [0.5]], ["float32", [], [0.25]])
    assert [run["state.step"] for run in said["seen"]] == [["int64", [], [n]] for n in (0, 1, 2)]
    assert asked["labels"] == ["int64", [1], [-100]]
    assert said["loss"] == 7
    np.testing.assert_allclose(said["p"], [[0.25, 0.75]], rtol=1e-6)
    written = safetensors.read(file)
    assert written.keys() == {n for n in start if n.startswith("adapter.")}
    assert all(np.array_equal(a, start[n] + np.float32(1) + np.float32(1)) for n, a in written.items())
    adapter = training.save(folder, file, tmp_path / "my-adapter")
    assert (tmp_path / "my-adapter" / "adapter_config.json").is_file()
    assert isinstance(adapter, refpeft.Adapter)


@pytest.mark.node
@pytest.mark.ort
@pytest.mark.npm
def test_training_in_node_is_the_specifications(folder: Path, tmp_path: Path) -> None:
    """The program compares the losses by itself."""
    said = ran("node", EXAMPLE / "train.mjs", folder, tmp_path / "trained.safetensors")
    assert "48 sentences" in said
    assert said.count("specification") == 31
    training.save(folder, tmp_path / "trained.safetensors", tmp_path / "my-adapter")
