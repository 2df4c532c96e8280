// Trains in node what make.py made, and says whether the losses are the specification's.
//
//     npm install
//     node train.mjs FOLDER [TRAINED.safetensors]
//
// Then:   refpeft export --adapter-only FOLDER --adapter TRAINED.safetensors --out my-adapter

import { readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

import { open } from "./trainer.mjs";

const [folder, file] = process.argv.slice(2);
if (!folder) {
  console.error("usage: node train.mjs FOLDER [TRAINED.safetensors]");
  process.exit(2);
}
const { InferenceSession, Tensor } = ort.default ?? ort;
const trainer = await open({ InferenceSession, Tensor, providers: ["cpu"] }, Tokenizer, async name => new Uint8Array(await readFile(join(folder, name))));
const { labels, batch, rate, rows, tests, losses } = trainer.examples;

async function right() {
  const p = await trainer.probabilities(tests.map(row => row.text));
  return tests.filter((row, k) => p[k].indexOf(Math.max(...p[k])) === row.label).length;
}

console.log(`${rows.length} sentences (${labels.join(", ")}), ${trainer.parameters.toLocaleString("en")} parameters`);
console.log(`before: ${await right()} of ${tests.length} others right`);
const turns = rows.length / batch;
let worst = 0;
for (let n = 0; n < losses.length; n++) {
  const at = (n % turns) * batch;
  const { loss } = await trainer.step(rows.slice(at, at + batch), rate);
  worst = Math.max(worst, Math.abs(loss - losses[n]) / losses[n]);
  console.log(`step ${String(n + 1).padStart(2)}   loss ${loss.toFixed(6)}   specification ${losses[n].toFixed(6)}`);
}
console.log(`after: ${await right()} of ${tests.length} others right`);
console.log(`largest difference of a loss from the specification's: ${worst.toExponential(1)}`);
if (file) await writeFile(file, trainer.adapter());
if (!(worst < 1e-3)) {
  console.error("these are not the losses of the specification");
  process.exit(1);
}
