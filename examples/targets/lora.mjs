// A target that is a program: LoRA on linear layers in JavaScript, for node, with no dependency.
//
//     refpeft check "program:node examples/targets/lora.mjs" --method lora --level layer
//
// What a program has to do is in docs/conformance-protocol.md; `lora` below is the implementation under test.

import { readFileSync, writeFileSync } from "node:fs";
import { createInterface } from "node:readline";

const INFO = {
  name: "lora.mjs", version: "1.0", levels: ["layer"], methods: ["lora"],
  dtypes: ["float32", "float64"], features: ["forward", "grads", "merge"],
};

// y = x W′ᵀ + b with W′ = W + s B A: everything a case can want, by the names the protocol gives it
function lora(config, { x, W, A, B, dy, b }) {
  const { r, lora_alpha, ...unknown } = config;
  for (const name in unknown) throw new Error(`no idea what ${name} is`); // better than to do something else
  const s = lora_alpha / r;
  const shift = y => (b ? plus(y, b) : y);
  const W1 = plus(W, times(s, matmul(B, A)));
  const y = plus(shift(matmul(x, T(W))), times(s, matmul(matmul(x, T(A)), T(B))));
  const [rows, drows] = [x, dy].map(flat);
  return {
    output: { y },
    first_row: { y_row: first(y) },
    grads: {
      dx: matmul(dy, W1),
      dA: times(s, matmul(T(matmul(drows, B)), rows)),
      dB: times(s, matmul(T(drows), matmul(rows, T(A)))),
    },
    merged: { W_merged: W1, y_merged: shift(matmul(x, T(W1))), ...(b && { b_merged: b }) },
  };
}

// ── matrices: { dtype, shape, data }, computed in double precision, rounded when written ────────────────────────────

const size = shape => shape.reduce((n, k) => n * k, 1);
const flat = a => ({ ...a, shape: [size(a.shape.slice(0, -1)), a.shape.at(-1)] });
const times = (s, a) => ({ ...a, data: a.data.map(v => s * v) });
const plus = (a, b) => ({ ...a, data: a.data.map((v, k) => v + b.data[k % b.data.length]) });
const T = a => {
  const [n, m] = a.shape;
  return { ...a, shape: [m, n], data: Array.from({ length: n * m }, (_, k) => a.data[(k % n) * m + Math.floor(k / n)]) };
};

const first = a => {
  const shape = [Math.min(1, a.shape[0]), ...a.shape.slice(1)];
  return { ...a, shape, data: a.data.slice(0, size(shape)) };
};

function matmul(a, b) {
  const [inner, m] = b.shape;
  const shape = [...a.shape.slice(0, -1), m];
  const data = Array.from({ length: size(shape) }, (_, k) => {
    let sum = 0;
    for (let j = 0; j < inner; j++) sum += a.data[Math.floor(k / m) * inner + j] * b.data[j * m + (k % m)];
    return sum;
  });
  return { dtype: a.dtype, shape, data };
}

// ── safetensors: the length of the header in 8 bytes, the header in JSON, the arrays one after the other ────────────

const TYPES = { F32: Float32Array, F64: Float64Array };

function read(path) {
  const bytes = new Uint8Array(readFileSync(path));
  const start = 8 + Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(bytes.subarray(8, start)));
  const arrays = {};
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header))
    arrays[name] = { dtype, shape, data: Array.from(new TYPES[dtype](bytes.slice(start + from, start + to).buffer)) };
  return [JSON.parse(__metadata__.refpeft), arrays];
}

function write(path, arrays) {
  const header = {}, parts = [];
  let end = 0;
  for (const [name, { dtype, shape, data }] of Object.entries(arrays)) {
    const values = new TYPES[dtype](data);
    header[name] = { dtype, shape, data_offsets: [end, (end += values.byteLength)] };
    parts.push(Buffer.from(values.buffer));
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(path, Buffer.concat([length, text, ...parts]));
}

function run(path, out) {
  const [meta, arrays] = read(path);
  const answers = lora(meta.config, arrays);
  write(out, Object.assign({}, ...meta.want.map(name => answers[name])));
  return { ok: true };
}

for await (const line of createInterface({ input: process.stdin })) {
  const message = JSON.parse(line);
  if (message.stop) break;
  let reply;
  try {
    reply = message.start ? INFO : run(message.run, message.out);
  } catch (error) {
    reply = { error: String(error) };
  }
  console.log(JSON.stringify(reply));
}
