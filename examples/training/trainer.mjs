// A folder of `refpeft export --form training`, trained with any onnxruntime for JavaScript, in node and in a browser.
//
//     const trainer = await open(ort, Tokenizer, name => bytes of that file of the folder)
//     const { loss } = await trainer.step(rows, rate)         rows: [{ text, label }]
//     const [[p, …], …] = await trainer.probabilities(texts)
//     trainer.adapter()                                       bytes of trained.safetensors
//
// There is nothing to a loop but this: what comes out as next.X goes in again as X.

const NEXT = "next.";
const IGNORE = -100;

export async function open(ort, Tokenizer, read) {
  const json = async name => JSON.parse(new TextDecoder().decode(await read(name)));
  const session = await ort.InferenceSession.create(await read("model.onnx"), { executionProviders: ort.providers });
  const tokenizer = new Tokenizer(await json("tokenizer.json"), await json("tokenizer_config.json"));
  const start = tensors(ort, await read("start.safetensors"));
  let values = start;

  async function run(texts, labels, rate) {
    const feeds = { ...batch(ort, tokenizer, texts, labels), learning_rate: new ort.Tensor("float32", [rate], []) };
    const wanted = Object.fromEntries(session.inputNames.map(name => [name, values[name] ?? feeds[name]]));
    return session.run(wanted);
  }

  return {
    examples: await json("examples.json"),
    parameters: Object.entries(start).filter(([name]) => name.startsWith("adapter."))
      .reduce((n, [, tensor]) => n + tensor.data.length, 0),
    async step(rows, rate) {
      const out = await run(rows.map(row => row.text), rows.map(row => row.label), rate);
      values = Object.fromEntries(session.outputNames.filter(name => name.startsWith(NEXT))
        .map(name => [name.slice(NEXT.length), out[name]]));
      return { loss: out.loss.data[0] };
    },
    async probabilities(texts) {  // nothing is learned from labels that are ignored, and nothing is kept
      const { logits } = await run(texts, texts.map(() => IGNORE), 0);
      const width = logits.dims[1];
      return texts.map((_, k) => softmax([...logits.data.slice(k * width, (k + 1) * width)]));
    },
    reset() { values = start; },
    adapter() {
      return safetensors(Object.fromEntries(Object.entries(values).filter(([name]) => name.startsWith("adapter."))));
    },
  };
}

// ── from texts to tensors ───────────────────────────────────────────────────────────────────────────────────────────

function batch(ort, tokenizer, texts, labels) {
  const rows = texts.map(text => tokenizer.encode(text).ids);
  const length = Math.max(...rows.map(ids => ids.length));
  const table = of => ints(ort, rows.flatMap(ids => Array.from({ length }, (_, k) => of(ids, k))), [rows.length, length]);
  return {
    input_ids: table((ids, k) => ids[k] ?? 0),
    attention_mask: table((ids, k) => Number(k < ids.length)),
    token_type_ids: table(() => 0),
    labels: ints(ort, labels, [rows.length]),
  };
}

const ints = (ort, numbers, shape) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), shape);

function softmax(x) {
  const top = Math.max(...x);
  const e = x.map(v => Math.exp(v - top));
  const sum = e.reduce((a, b) => a + b);
  return e.map(v => v / sum);
}

// ── safetensors: the length of a header, the header in JSON, the numbers ────────────────────────────────────────────

const KINDS = { F32: ["float32", Float32Array], I64: ["int64", BigInt64Array] };

function tensors(ort, bytes) {
  const copy = bytes.slice();  // from the beginning of a buffer, so that all is aligned
  const begin = 8 + Number(new DataView(copy.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(copy.subarray(8, begin)));
  delete header.__metadata__;
  return Object.fromEntries(Object.entries(header).map(([name, { dtype, shape, data_offsets: [a, z] }]) => {
    const [kind, Numbers] = KINDS[dtype];
    return [name, new ort.Tensor(kind, new Numbers(copy.buffer.slice(begin + a, begin + z)), shape)];
  }));
}

function safetensors(named) {
  const header = {}, parts = [];
  let end = 0;
  for (const [name, { data, dims }] of Object.entries(named)) {
    header[name] = { dtype: "F32", shape: [...dims], data_offsets: [end, end += data.byteLength] };
    parts.push(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  }
  let text = JSON.stringify(header);
  text += " ".repeat(-new TextEncoder().encode(text).length & 7);
  const head = new TextEncoder().encode(text);
  const file = new Uint8Array(8 + head.length + end);
  new DataView(file.buffer).setBigUint64(0, BigInt(head.length), true);
  file.set(head, 8);
  parts.reduce((at, part) => (file.set(part, at), at + part.length), 8 + head.length);
  return file;
}
