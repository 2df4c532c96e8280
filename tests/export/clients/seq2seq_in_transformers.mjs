// Runs in node with transformers.js: prompts for exported encoder-decoders as JSON in, what is written as JSON out.
//
//     node seq2seq_in_transformers.mjs PACKAGE

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [home] = process.argv.slice(2);
const { env, AutoModelForSeq2SeqLM, Tensor } = await import(pathToFileURL(`${home}/dist/transformers.node.mjs`));
Object.assign(env, { allowRemoteModels: false, localModelPath: "/" });

const int64 = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
const numbers = (value) => (Array.isArray(value) ? value.map(numbers) : Number(value));

async function answer({ folder, feeds, new: max_new_tokens }) {
  const model = await AutoModelForSeq2SeqLM.from_pretrained(folder, { subfolder: "", dtype: "fp32", device: "cpu" });
  const inputs = Object.fromEntries(Object.entries(feeds).map(([name, rows]) => [name, int64(rows)]));
  return numbers((await model.generate({ ...inputs, max_new_tokens, do_sample: false })).tolist());
}

const answers = [];
for (const question of JSON.parse(readFileSync(0))) answers.push(await answer(question));
console.log(JSON.stringify(answers));
process.exit(0);
