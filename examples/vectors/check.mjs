// Golden vectors in JavaScript, for node, with no dependency: LoRA, rsLoRA, DoRA and (IA)³ on one layer.
//
//     refpeft vectors my-vectors
//     node examples/vectors/check.mjs my-vectors [--wrong scale|gradient|merge|norm]
//
// What is in the files is said in docs/vectors.md. `layer` below is the implementation under test; --wrong breaks it on
// purpose. Exit code 0: all are as expected. 1: some are not. 2: could not run.

import { readFileSync } from "node:fs";
import { join } from "node:path";

const WANTS = ["output", "first_row", "grads", "merged", "changed"];
const WRONG = ["scale", "gradient", "merge", "norm"];

// y = x W′ᵀ + b′, with W′ and b′ of the method;   shapes as in the formulae
function layer({ method, config, layer: { kind }, want }, { W, b, x, dy, ...rest }, wrong) {
  const turned = kind !== "linear"; // Conv1D and embeddings store Wᵀ
  const w = turned ? T(W) : W;
  const X = kind === "embedding" ? onehot(x, w.shape[1]) : x;
  const [make, names] = METHODS[method];
  const adapted = at => {
    const f = make({ method, config, w, b }, Object.fromEntries(names.map(p => [p, rest[at + p]])), wrong);
    return { ...f, y: shifted(matmul(X, T(f.W1)), f.b1) };
  };
  const { W1, b1, y, gradients } = adapted("");
  const answers = {
    output: () => ({ y }),
    first_row: () => ({ y_row: first(y) }),
    merged: () => {
      const M = wrong === "merge" && W1.shape[0] === W1.shape[1] ? T(W1) : W1;
      return { W_merged: turned ? T(M) : M, y_merged: shifted(matmul(X, T(M)), b1), ...(b1 && { b_merged: b1 }) };
    },
    grads: () => {
      const d = flat(dy), G = matmul(T(d), flat(X)), db = rowsums(T(d)); // dW′ [o, i], db′ [o]
      return { ...(kind !== "embedding" && { dx: matmul(dy, W1) }), ...gradients(G, db) };
    },
    changed: () => ({ y, y_changed: adapted("new/").y }),
  };
  return Object.assign({}, ...want.map(name => answers[name]()));
}

// W′ = diag(g) V,  V = W + s B A,  g = m/‖V‖ for DoRA, else 1;   b′ = b + s β
function matrices({ method, config, w, b }, { A, B, m, bias }, wrong) {
  const s = scale(method, config, wrong);
  const V = plus(w, times(s, matmul(B, A))), n = norms(wrong === "norm" ? T(V) : V);
  const g = m ? n.map((v, o) => m.data[o] / v) : null;
  const b1 = b && bias ? plus(b, times(s, bias)) : bias ? times(s, bias) : b;
  const gradients = (G, db) => {
    const dV = g ? scaled(g, G) : G; // the norm counts as a constant
    return {
      dA: times(s, matmul(T(B), dV)),
      dB: times(wrong === "gradient" ? 1 : s, matmul(dV, T(A))),
      ...(m && { dm: { ...m, data: rowsums(product(G, V)).map((v, o) => v / n[o]) } }),
      ...(bias && { dbias: { ...bias, data: db.map(v => s * v) } }),
    };
  };
  return { W1: g ? scaled(g, V) : V, b1, gradients };
}

// W′ = diag(l) W,  b′ = l ⊙ b,  l [o, 1];   where the layer is feed-forward W′ = W diag(l),  b′ = b,  l [1, i]
function vectors({ config, w, b }, { l }, wrong) {
  const takes = config.feedforward_modules.length > 0;
  const v = wrong === "scale" ? l.data.map(k => 1 + k) : l.data; // broken: 1 + l
  const b1 = b && !takes ? { ...b, data: b.data.map((k, o) => v[o] * k) } : b;
  const gradients = (G, db) => {
    const sums = rowsums(takes ? T(product(G, w)) : product(G, w));
    const ofBias = b && !takes && wrong !== "gradient" ? db.map((d, o) => d * b.data[o]) : sums.map(() => 0);
    return { dl: { ...l, data: sums.map((d, k) => d + ofBias[k]) } };
  };
  return { W1: takes ? T(scaled(v, T(w))) : scaled(v, w), b1, gradients };
}

const METHODS = { // how each is computed, and from which parameters
  lora: [matrices, ["A", "B", "bias"]],
  rslora: [matrices, ["A", "B", "bias"]],
  dora: [matrices, ["A", "B", "m"]],
  ia3: [vectors, ["l"]],
};

function scale(method, { r, lora_alpha }, wrong) {
  const root = (method === "rslora") !== (wrong === "scale"); // broken: one for the other
  return lora_alpha / (root ? Math.sqrt(r) : r);
}

// a row of zeros has no direction, and stays one
const norms = V => rowsums(product(V, V)).map(q => Math.sqrt(q) || 1);

// ── matrices: { shape, data }, computed in double precision ─────────────────────────────────────────────────────────

const size = shape => shape.reduce((n, k) => n * k, 1);
const flat = a => ({ shape: [size(a.shape.slice(0, -1)), a.shape.at(-1)], data: a.data });
const times = (s, a) => ({ ...a, data: a.data.map(v => s * v) });
const plus = (a, b) => ({ ...a, data: a.data.map((v, k) => v + b.data[k]) });
const product = (a, b) => ({ ...a, data: a.data.map((v, k) => v * b.data[k]) });
const shifted = (y, b) => (b ? { ...y, data: y.data.map((v, k) => v + b.data[k % b.data.length]) } : y);
const scaled = (g, a) => ({ ...a, data: a.data.map((v, k) => g[Math.floor(k / a.shape[1])] * v) });
const rowsums = ({ shape: [n, m], data }) =>
  Array.from({ length: n }, (_, k) => data.slice(k * m, k * m + m).reduce((sum, v) => sum + v, 0));
const first = a => ({ shape: [1, ...a.shape.slice(1)], data: a.data.slice(0, size(a.shape.slice(1))) });
const T = ({ shape: [n, m], data }) =>
  ({ shape: [m, n], data: Array.from({ length: n * m }, (_, k) => data[(k % n) * m + Math.floor(k / n)]) });
const onehot = (ids, v) =>
  ({ shape: [...ids.shape, v], data: ids.data.flatMap(id => Array.from({ length: v }, (_, k) => Number(k === id))) });

function matmul(a, b) {
  const [inner, m] = b.shape;
  const shape = [...a.shape.slice(0, -1), m];
  const data = Array.from({ length: size(shape) }, (_, k) => {
    let sum = 0;
    for (let j = 0; j < inner; j++) sum += a.data[Math.floor(k / m) * inner + j] * b.data[j * m + (k % m)];
    return sum;
  });
  return { shape, data };
}

// ── safetensors: the length of the header in 8 bytes, the header in JSON, the arrays one after the other ────────────

const TYPES = {
  F32: [4, (v, at) => v.getFloat32(at, true)],
  F64: [8, (v, at) => v.getFloat64(at, true)],
  I64: [8, (v, at) => Number(v.getBigInt64(at, true))],
  BF16: [2, (v, at) => bfloat(v.getUint16(at, true))],
  F16: [2, (v, at) => half(v.getUint16(at, true))],
  BOOL: [1, (v, at) => v.getUint8(at)],
};

function bfloat(bits) {
  const view = new DataView(new ArrayBuffer(4));
  view.setUint32(0, bits << 16);
  return view.getFloat32(0);
}

function half(bits) {
  const [sign, e, f] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (e === 31) return f ? NaN : sign * Infinity;
  return sign * (e ? 2 ** (e - 15) * (1 + f / 1024) : 2 ** -14 * (f / 1024));
}

function read(path) {
  const bytes = new Uint8Array(readFileSync(path)).buffer;
  const start = 8 + Number(new DataView(bytes).getBigUint64(0, true));
  const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(bytes.slice(8, start)));
  const [arrays, view] = [{}, new DataView(bytes, start)];
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const [width, get] = TYPES[dtype];
    if (to - from !== size(shape) * width) throw new Error(`${path}: ${name} has the wrong number of bytes`);
    arrays[name] = { dtype, shape, data: Array.from({ length: size(shape) }, (_, k) => get(view, from + k * width)) };
  }
  return [JSON.parse(__metadata__.refpeft), arrays];
}

// ── the verdict: equal as numbers where an answer has no unit, and elsewhere at most `limit` units off ──────────────

function off({ units }, name, got, expect) {
  if (!got || got.shape.join() !== expect.shape.join()) return Infinity;
  const unit = units[name];
  if (!unit) return got.data.every((v, k) => v === expect.data[k]) ? 0 : Infinity;
  const d = Math.hypot(...got.data.map((v, k) => v - expect.data[k])) / unit;
  return Number.isFinite(d) ? d : Infinity;
}

function check(path, wrong) {
  const [meta, arrays] = read(path);
  const got = layer(meta, arrays, wrong);
  const names = Object.keys(arrays).filter(name => name.startsWith("expect/"));
  if (names.length !== Object.keys(got).length) return { ratio: Infinity, worst: "names" };
  const all = names.map(n => [off(meta, n.slice(7), got[n.slice(7)], arrays[n]), n.slice(7)]);
  const [ratio, worst] = all.reduce((a, b) => (b[0] > a[0] ? b : a));
  return { ratio, worst, limit: meta.limit };
}

function main([folder, flag, wrong = ""]) {
  if (!folder || (flag && (flag !== "--wrong" || !WRONG.includes(wrong))))
    throw new Error(`usage: node check.mjs DIR [--wrong ${WRONG.join("|")}]`);
  const { vectors } = JSON.parse(readFileSync(join(folder, "index.json"), "utf8"));
  const known = vectors.filter(v => v.method in METHODS && v.level === "layer");
  const mine = known.filter(v => v.want.every(w => WANTS.includes(w)));
  let failed = 0;
  console.log(`${"vector".padEnd(34)} ${"regime".padEnd(7)} ${"units".padStart(8)}  verdict`);
  for (const { id, file, regime } of mine) {
    const { ratio, worst, limit } = check(join(folder, file), wrong);
    const ok = ratio <= limit;
    failed += !ok;
    const units = Number.isFinite(ratio) ? ratio.toPrecision(2) : "-";
    console.log(`${id.padEnd(34)} ${regime.padEnd(7)} ${units.padStart(8)}  ${ok ? "ok" : `WRONG: ${worst}`}`);
  }
  console.log(`${mine.length} of ${vectors.length} vectors are of layers and methods that are written here, ` +
    `${known.length - mine.length} more ask of them what is not; ${failed} of them are wrong.`);
  return failed || !mine.length ? 1 : 0;
}

try {
  process.exitCode = main(process.argv.slice(2));
} catch (error) {
  console.error(`check.mjs: ${error.message}`);
  process.exitCode = 2;
}
