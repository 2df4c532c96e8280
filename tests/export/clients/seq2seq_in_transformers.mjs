// Runs in node with transformers.js: prompts for exported encoder-decoders as JSON in, what is written as JSON out.
//
//     node seq2seq_in_transformers.mjs PACKAGE node|web ROOT        the build for node, or the one that browsers load
//
// The web build is told that it is not in node. It fetches folders over HTTP, and has to be told of the weights' file.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [home, build, root] = process.argv.slice(2);
const web = build === "web";
if (web) Object.defineProperty(process, "release", { value: { name: "browser" } });
const file = web ? "transformers.web.js" : "transformers.node.mjs";
const { env, AutoModelForSeq2SeqLM, Tensor } = await import(pathToFileURL(`${home}/dist/${file}`));
if (web) {
  const server = createServer(async (request, response) => {
    const data = await readFile(root + decodeURIComponent(request.url)).catch(() => null);
    response.writeHead(data ? 200 : 404, data ? { "content-length": data.length } : {});
    response.end(request.method === "HEAD" || !data ? undefined : data);
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  Object.assign(env, { allowRemoteModels: true, allowLocalModels: false, useBrowserCache: false });
  Object.assign(env, { remoteHost: `http://127.0.0.1:${server.address().port}/`, remotePathTemplate: "{model}" });
  const wasmPaths = pathToFileURL(`${home}/../../onnxruntime-web/dist/`).href;
  Object.assign(env.backends.onnx.wasm, { wasmPaths, numThreads: 1 });
} else {
  Object.assign(env, { allowRemoteModels: false, localModelPath: "/" });
}

const weights = { session_options: { externalData: [{ path: "model.onnx.data", data: "model.onnx.data" }] } };
const options = { subfolder: "", dtype: "fp32", device: web ? "wasm" : "cpu", ...(web ? weights : {}) };
const int64 = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
const numbers = (value) => (Array.isArray(value) ? value.map(numbers) : Number(value));

async function answer({ folder, feeds, new: max_new_tokens }) {
  const model = await AutoModelForSeq2SeqLM.from_pretrained(web ? folder.slice(root.length + 1) : folder, options);
  const inputs = Object.fromEntries(Object.entries(feeds).map(([name, rows]) => [name, int64(rows)]));
  return numbers((await model.generate({ ...inputs, max_new_tokens, do_sample: false })).tolist());
}

const answers = [];
for (const question of JSON.parse(readFileSync(0))) answers.push(await answer(question));
console.log(JSON.stringify(answers));
process.exit(0);
