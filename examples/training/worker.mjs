// The trainer in a thread of its own, so that the page stays awake: { id, call, args } → { id, result } or { id, error }.

import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

import { open } from "./trainer.mjs";

let trainer;

async function start(folder) {
  const read = async name => {
    const answer = await fetch(new URL(name, folder));
    if (!answer.ok) throw new Error(`${new URL(name, folder)}: ${answer.status} ${answer.statusText}`);
    return new Uint8Array(await answer.arrayBuffer());
  };
  const { InferenceSession, Tensor } = ort;
  trainer = await open({ InferenceSession, Tensor, providers: ["wasm"] }, Tokenizer, read);
  return { examples: trainer.examples, parameters: trainer.parameters };
}

onmessage = async ({ data: { id, call, args } }) => {
  try {
    postMessage({ id, result: await (call === "start" ? start(...args) : trainer[call](...args)) });
  } catch (error) {
    postMessage({ id, error: String(error?.message ?? error) });
  }
};
