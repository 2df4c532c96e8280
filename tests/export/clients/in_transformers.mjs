// Runs in node with transformers.js: questions about exported folders as JSON in, answers as JSON out.
//
//     node in_transformers.mjs PACKAGE node|web ROOT        the build for node, or the one that browsers load
//
// The web build asks whether it is in node; here it is told no. It fetches folders over HTTP, and runs on wasm.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [home, build, root] = process.argv.slice(2);
const questions = JSON.parse(readFileSync(0));
const web = build === "web";
if (web) Object.defineProperty(process, "release", { value: { name: "browser" } });
const file = web ? "transformers.web.js" : "transformers.node.mjs";
const transformers = await import(pathToFileURL(`${home}/dist/${file}`));
const { env, Tensor, DynamicCache } = transformers;

const server = createServer(async (request, response) => {
  const data = await readFile(root + decodeURIComponent(request.url)).catch(() => null);
  response.writeHead(data ? 200 : 404, { connection: "close", ...(data && { "content-length": data.length }) });
  response.end(request.method === "HEAD" || !data ? undefined : data);
});
if (web) {
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  const wasm = pathToFileURL(`${home}/../../onnxruntime-web/dist/`).href;
  Object.assign(env, { allowRemoteModels: true, allowLocalModels: false, useBrowserCache: false });
  Object.assign(env, { remoteHost: `http://127.0.0.1:${server.address().port}/`, remotePathTemplate: "{model}" });
  Object.assign(env.backends.onnx.wasm, { wasmPaths: wasm, numThreads: 1 });
} else {
  Object.assign(env, { allowRemoteModels: false, localModelPath: "/" });
}

const int64 = (rows) => {
  const nested = Array.isArray(rows[0]);
  return new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), nested ? [rows.length, rows[0].length] : [rows.length]);
};
const numbers = (value) => (Array.isArray(value) ? value.map(numbers) : Number(value));

async function answer(q) {
  const where = web ? q.folder.slice(root.length + 1) : q.folder;
  const options = { subfolder: "", dtype: "fp32", device: web ? "wasm" : "cpu", ...q.options };
  if (q.text !== undefined) {
    const write = await transformers.pipeline("text-generation", where, options);
    const [{ generated_text }] = await write(q.text, { max_new_tokens: q.new, do_sample: false });
    const { input_ids } = write.tokenizer(q.text);
    return { ids: numbers(input_ids.tolist()[0]), text: generated_text };
  }
  const model = await transformers[q.class].from_pretrained(where, options);
  const feeds = Object.fromEntries(Object.entries(q.feeds).map(([name, rows]) => [name, int64(rows)]));
  if (!q.new) {
    const out = await model(feeds);
    return Object.fromEntries(Object.entries(out).map(([name, value]) => [name, numbers(value.tolist())]));
  }
  const given = q.prefix ? { ...feeds, ...prefixed(q.feeds, q.prefix) } : feeds;
  const out = await model.generate({ ...given, max_new_tokens: q.new, do_sample: false });
  return numbers(out.tolist()).map((row) => row.slice(given.input_ids.dims[1]));
}

// The prefix as the past of every row; as many ids as there are in the past are cut off.
function prefixed({ input_ids, attention_mask }, tensors) {
  const past = {};
  let n = 0;
  for (const [name, { dims, data }] of Object.entries(tensors)) {
    const rows = Float32Array.from(input_ids.flatMap(() => data));
    past[name] = new Tensor("float32", rows, [input_ids.length, ...dims.slice(1)]);
    n = dims[2];
  }
  const behind = (rows, value) => int64(rows.map((row) => [...Array(n).fill(value), ...row]));
  return {
    input_ids: behind(input_ids, 0), attention_mask: behind(attention_mask, 1), past_key_values: new DynamicCache(past),
  };
}

const answers = [];
for (const q of questions) {
  answers.push(await answer(q).then((found) => ({ answer: found }), (error) => ({ error: String(error) })));
}
console.log(JSON.stringify(answers));
process.exit(0);
