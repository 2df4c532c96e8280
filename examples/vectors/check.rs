//! Golden vectors in Rust, with the standard library alone: LoRA, rsLoRA, LoHa and LoKr on one layer.
//!
//!     refpeft vectors my-vectors
//!     rustc --edition 2021 -O examples/vectors/check.rs -o check
//!     ./check my-vectors [--wrong scale|gradient|merge|factors]
//!
//! What is in the files is said in docs/vectors.md. `layer` below is the implementation under test; --wrong breaks it on
//! purpose. Exit code 0: all are as expected. 1: some are not. 2: could not run.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

type Result<T> = std::result::Result<T, String>;
type Arrays = BTreeMap<String, Array>;

const METHODS: [&str; 4] = ["lora", "rslora", "loha", "lokr"];
const WANTS: [&str; 5] = ["output", "first_row", "grads", "merged", "changed"];
const WRONG: [&str; 4] = ["scale", "gradient", "merge", "factors"];

// ── the implementation under test ───────────────────────────────────────────────────────────────────────────────────

/// y = x W′ᵀ + b′,  W′ = W + ΔW,  b′ = b + s β (which LoRA may have);   Conv1D and embeddings store Wᵀ
fn layer(meta: &Json, arrays: &Arrays, wrong: &str) -> Result<Arrays> {
    let kind = meta.at("layer")?.text("kind")?;
    let turned = |a: &Array| if kind == "linear" { a.clone() } else { a.t() };
    let get = |name: &str| arrays.get(name).ok_or(format!("an array is missing: {name}"));
    let w = turned(get("W")?);
    let x = if kind == "embedding" { onehot(get("x")?, w.m()) } else { get("x")?.clone() };
    let adapted = |new: &str| -> Result<(Delta, Array, Option<Array>)> {
        let own = |name: &str| arrays.get(&format!("{new}{name}"));
        let delta = delta(meta, &own, wrong)?;
        let w1 = w.plus(&delta.dw);
        let scaled = own("bias").map(|beta| beta.times(delta.s));
        let b1 = match (arrays.get("b"), scaled) {
            (Some(b), Some(beta)) => Some(b.plus(&beta)),
            (b, beta) => b.cloned().or(beta),
        };
        Ok((delta, w1, b1))
    };
    let (delta, w1, b1) = adapted("")?;
    let y = x.matmul(&w1.t()).shifted(&b1);
    let mut found = Arrays::new();
    for want in meta.at("want")?.list()? {
        match want.as_text()? {
            "output" => drop(found.insert("y".into(), y.clone())),
            "first_row" => drop(found.insert("y_row".into(), y.first())),
            "changed" => {
                let (_, w1, b1) = adapted("new/")?;
                found.insert("y".into(), y.clone());
                found.insert("y_changed".into(), x.matmul(&w1.t()).shifted(&b1));
            }
            "merged" => {
                let m = if wrong == "merge" && w1.n() == w1.m() { w1.t() } else { w1.clone() };
                found.insert("y_merged".into(), x.matmul(&m.t()).shifted(&b1));
                found.insert("W_merged".into(), turned(&m));
                b1.iter().for_each(|b| drop(found.insert("b_merged".into(), b.clone())));
            }
            "grads" => {
                let dy = get("dy")?;
                let g = dy.t().matmul(&x.rows()); // dW′ [o, i]
                found.extend((delta.gradients)(&g).into_iter().map(|(name, d)| (format!("d{name}"), d)));
                if kind != "embedding" {
                    found.insert("dx".into(), dy.matmul(&w1));
                }
                if arrays.contains_key("bias") {
                    let db = dy.t().sums().times(if wrong == "gradient" { 1.0 } else { delta.s });
                    found.insert("dbias".into(), db);
                }
            }
            other => return Err(format!("{other} is not written here")),
        }
    }
    Ok(found)
}

/// ΔW [o, i], and from dW′ to the gradients of what it is made of.
struct Delta {
    dw: Array,
    s: f64,
    gradients: Box<dyn Fn(&Array) -> Vec<(&'static str, Array)>>,
}

/// ΔW = s B A;   s P ⊙ Q,  P = B₁ A₁,  Q = B₂ A₂;   s C ⊗ D,  D = B A and C = C_b C_a where they are products
fn delta<'a>(meta: &Json, own: &dyn Fn(&str) -> Option<&'a Array>, wrong: &str) -> Result<Delta> {
    let (method, config) = (meta.text("method")?, meta.at("config")?);
    let r = config.number("r")?;
    let alpha = config.number("alpha").or(config.number("lora_alpha"))?;
    let root = (method == "rslora") != (wrong == "scale"); // broken: one for the other
    let s = alpha / if root { r.sqrt() } else { r };
    let s_back = if wrong == "gradient" { 1.0 } else { s };
    let product = |b, a| -> Result<Factor> { Ok(factored(b, a, need(own, b)?, need(own, a)?)) };
    if method == "loha" {
        let (p, q) = (product("B1", "A1")?, product("B2", "A2")?);
        let both = if wrong == "factors" { p.value.plus(&q.value) } else { p.value.product(&q.value) };
        let gradients = move |g: &Array| {
            let (dp, dq) = (g.product(&q.value).times(s_back), g.product(&p.value).times(s));
            (p.back)(&dp).into_iter().chain((q.back)(&dq)).collect()
        };
        return Ok(Delta { dw: both.times(s), s, gradients: Box::new(gradients) });
    }
    if method == "lokr" {
        let c = if own("C").is_some() { whole("C", need(own, "C")?) } else { product("Cb", "Ca")? };
        let d = if own("D").is_some() { whole("D", need(own, "D")?) } else { product("B", "A")? };
        let dw = if wrong == "factors" { kron(&d.value, &c.value) } else { kron(&c.value, &d.value) };
        let gradients = move |g: &Array| {
            let (dc, dd) = parts(g, &c.value, &d.value);
            (c.back)(&dc.times(s_back)).into_iter().chain((d.back)(&dd.times(s))).collect()
        };
        return Ok(Delta { dw: dw.times(s), s, gradients: Box::new(gradients) });
    }
    let ba = product("B", "A")?;
    let dw = ba.value.times(s);
    Ok(Delta { dw, s, gradients: Box::new(move |g| (ba.back)(&g.times(s_back))) })
}

fn need<'a>(own: &dyn Fn(&str) -> Option<&'a Array>, name: &str) -> Result<&'a Array> {
    own(name).ok_or(format!("an array is missing: {name}"))
}

/// A matrix, and from its gradient to those of what it is made of.
struct Factor {
    value: Array,
    back: Box<dyn Fn(&Array) -> Vec<(&'static str, Array)>>,
}

fn whole(name: &'static str, a: &Array) -> Factor {
    Factor { value: a.clone(), back: Box::new(move |d| vec![(name, d.clone())]) }
}

/// B A;   dB = d Aᵀ,  dA = Bᵀ d
fn factored(b: &'static str, a: &'static str, x: &Array, y: &Array) -> Factor {
    let (x, y) = (x.clone(), y.clone());
    Factor { value: x.matmul(&y), back: Box::new(move |d| vec![(b, d.matmul(&y.t())), (a, x.t().matmul(d))]) }
}

/// (C ⊗ D)[a k + b, c n + d] = C_ac D_bd
fn kron(c: &Array, d: &Array) -> Array {
    let (k, n) = (d.n(), d.m());
    Array::of(c.n() * k, c.m() * n, |i, j| c.get(i / k, j / n) * d.get(i % k, j % n))
}

/// dC = Σ_kn G D  and  dD = Σ_lm G C,  with G as [l, k, m, n]
fn parts(g: &Array, c: &Array, d: &Array) -> (Array, Array) {
    let (mut dc, mut dd) = (c.times(0.0), d.times(0.0));
    for i in 0..g.n() {
        for j in 0..g.m() {
            let (a, b, e, f) = (i / d.n(), i % d.n(), j / d.m(), j % d.m());
            dc.data[a * c.m() + e] += g.get(i, j) * d.get(b, f);
            dd.data[b * d.m() + f] += g.get(i, j) * c.get(a, e);
        }
    }
    (dc, dd)
}

// ── arrays: a shape, and numbers row by row; as a matrix, all axes but the last are its rows ────────────────────────

#[derive(Clone)]
struct Array {
    shape: Vec<usize>,
    data: Vec<f64>,
}

impl Array {
    fn of(n: usize, m: usize, f: impl Fn(usize, usize) -> f64) -> Array {
        Array { shape: vec![n, m], data: (0..n * m).map(|k| f(k / m, k % m)).collect() }
    }
    fn m(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }
    fn n(&self) -> usize {
        self.shape[..self.shape.len() - 1].iter().product()
    }
    fn get(&self, i: usize, j: usize) -> f64 {
        self.data[i * self.m() + j]
    }
    fn rows(&self) -> Array {
        Array { shape: vec![self.n(), self.m()], data: self.data.clone() }
    }
    fn t(&self) -> Array {
        Array::of(self.m(), self.n(), |i, j| self.get(j, i))
    }
    fn times(&self, s: f64) -> Array {
        Array { shape: self.shape.clone(), data: self.data.iter().map(|v| s * v).collect() }
    }
    fn with(&self, other: &Array, f: impl Fn(f64, f64) -> f64) -> Array {
        let data = self.data.iter().zip(&other.data).map(|(a, b)| f(*a, *b)).collect();
        Array { shape: self.shape.clone(), data }
    }
    fn plus(&self, other: &Array) -> Array {
        self.with(other, |a, b| a + b)
    }
    fn product(&self, other: &Array) -> Array {
        self.with(other, |a, b| a * b)
    }
    fn matmul(&self, b: &Array) -> Array {
        let mut c = Array::of(self.n(), b.m(), |i, k| (0..self.m()).map(|j| self.get(i, j) * b.get(j, k)).sum());
        c.shape = [&self.shape[..self.shape.len() - 1], &[b.m()]].concat();
        c
    }
    fn shifted(&self, b: &Option<Array>) -> Array {
        let at = |k: usize| b.as_ref().map_or(0.0, |b| b.data[k % b.data.len()]);
        let data = self.data.iter().enumerate().map(|(k, v)| v + at(k)).collect();
        Array { shape: self.shape.clone(), data }
    }
    fn sums(&self) -> Array {
        let data = (0..self.n()).map(|i| (0..self.m()).map(|j| self.get(i, j)).sum()).collect();
        Array { shape: vec![self.n()], data }
    }
    fn first(&self) -> Array {
        let size = self.shape[1..].iter().product::<usize>() * self.shape[0].min(1);
        let shape = [&[self.shape[0].min(1)], &self.shape[1..]].concat();
        Array { shape, data: self.data[..size].to_vec() }
    }
}

fn onehot(ids: &Array, v: usize) -> Array {
    let mut x = Array::of(ids.data.len(), v, |i, j| if ids.data[i] == j as f64 { 1.0 } else { 0.0 });
    x.shape = [&ids.shape[..], &[v]].concat();
    x
}

// ── safetensors: the length of the header in 8 bytes, the header in JSON, the arrays one after the other ────────────

fn read_vector(path: &Path) -> Result<(Json, Arrays)> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let odd = |what: &str| format!("{}: {what}", path.display());
    let start = bytes.first_chunk::<8>().ok_or(odd("no safetensors file"))?;
    let end = usize::try_from(u64::from_le_bytes(*start)).ok().and_then(|n| n.checked_add(8));
    let end = end.filter(|end| *end <= bytes.len()).ok_or(odd("no safetensors file"))?;
    let header = parsed(std::str::from_utf8(&bytes[8..end]).map_err(|e| odd(&e.to_string()))?)?;
    let mut arrays = Arrays::new();
    for (name, about) in header.object()?.iter().filter(|(name, _)| name != "__metadata__") {
        let shape = about.at("shape")?.list()?.iter().map(Json::as_index).collect::<Result<Vec<_>>>()?;
        let offsets = about.at("data_offsets")?.list()?.iter().map(Json::as_index).collect::<Result<Vec<_>>>()?;
        let [from, to] = offsets[..] else { return Err(odd("an array has no two offsets")) };
        let span = bytes[end..].get(from..to).ok_or(odd("an array lies outside the file"))?;
        let data = numbers(about.text("dtype")?, span)?;
        if data.len() != shape.iter().product() {
            return Err(odd("an array has not as many numbers as its shape says"));
        }
        arrays.insert(name.clone(), Array { shape, data });
    }
    Ok((parsed(header.at("__metadata__")?.text("refpeft")?)?, arrays))
}

fn numbers(dtype: &str, bytes: &[u8]) -> Result<Vec<f64>> {
    fn each<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f64) -> Result<Vec<f64>> {
        Ok(bytes.chunks_exact(N).map(|b| f(b.try_into().expect("N bytes"))).collect())
    }
    match dtype {
        "F64" => each(bytes, f64::from_le_bytes),
        "F32" => each(bytes, |b| f32::from_le_bytes(b) as f64),
        "BF16" => each(bytes, |b| f32::from_bits((u16::from_le_bytes(b) as u32) << 16) as f64),
        "F16" => each(bytes, |b| half(u16::from_le_bytes(b))),
        "I64" => each(bytes, |b| i64::from_le_bytes(b) as f64),
        "BOOL" => each(bytes, |[b]| b as f64),
        other => Err(format!("a tensor has dtype {other}: expected F64, F32, F16, BF16, I64 or BOOL")),
    }
}

fn half(bits: u16) -> f64 {
    let (e, f, sign) = ((bits >> 10 & 31) as i32, (bits & 1023) as f64, if bits >> 15 == 1 { -1.0 } else { 1.0 });
    sign * match e {
        0 => f * 2f64.powi(-24),
        31 => {
            if f == 0.0 {
                f64::INFINITY
            } else {
                f64::NAN
            }
        }
        _ => (1024.0 + f) * 2f64.powi(e - 25),
    }
}

// ── JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────────

enum Json {
    Word(String), // a number or a constant
    Text(String),
    List(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl Json {
    fn get(&self, name: &str) -> Option<&Json> {
        self.object().ok()?.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }
    fn at(&self, name: &str) -> Result<&Json> {
        self.get(name).ok_or(format!("a field is missing: {name}"))
    }
    fn object(&self) -> Result<&[(String, Json)]> {
        if let Json::Object(o) = self {
            Ok(o)
        } else {
            Err("expected an object".into())
        }
    }
    fn list(&self) -> Result<&[Json]> {
        if let Json::List(l) = self {
            Ok(l)
        } else {
            Err("expected a list".into())
        }
    }
    fn as_text(&self) -> Result<&str> {
        if let Json::Text(s) = self {
            Ok(s)
        } else {
            Err("expected a string".into())
        }
    }
    fn as_index(&self) -> Result<usize> {
        let Json::Word(w) = self else { return Err("expected a number".into()) };
        w.parse().map_err(|_| format!("expected a whole number, found {w}"))
    }
    fn text(&self, name: &str) -> Result<&str> {
        self.at(name)?.as_text()
    }
    fn number(&self, name: &str) -> Result<f64> {
        let Json::Word(w) = self.at(name)? else { return Err(format!("expected a number: {name}")) };
        w.parse().map_err(|_| format!("expected a number, found {w}"))
    }
}

fn parsed(text: &str) -> Result<Json> {
    value(&mut text.chars().peekable())
}

type Letters<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// The next letter that is no space, which stays.
fn peek(at: &mut Letters) -> Result<char> {
    while at.next_if(|c| c.is_ascii_whitespace()).is_some() {}
    at.peek().copied().ok_or("JSON that does not end".into())
}

fn value(at: &mut Letters) -> Result<Json> {
    match peek(at)? {
        '"' => Ok(Json::Text(string(at)?)),
        '[' => Ok(Json::List(between(at, ']', value)?)),
        '{' => Ok(Json::Object(between(at, '}', |at| {
            peek(at)?;
            let name = string(at)?;
            if peek(at)? != ':' {
                return Err(format!("JSON: expected a colon after {name}"));
            }
            at.next();
            Ok((name, value(at)?))
        })?)),
        _ => {
            let word: String =
                std::iter::from_fn(|| at.next_if(|c| !c.is_whitespace() && !",]}".contains(*c))).collect();
            if word.is_empty() {
                Err("JSON: a value is missing".into())
            } else {
                Ok(Json::Word(word))
            }
        }
    }
}

fn between<T>(at: &mut Letters, close: char, item: impl Fn(&mut Letters) -> Result<T>) -> Result<Vec<T>> {
    at.next();
    let mut found = Vec::new();
    while peek(at)? != close {
        found.push(item(at)?);
        if peek(at)? == ',' {
            at.next();
        } else if peek(at)? != close {
            return Err(format!("JSON: expected a comma or {close}"));
        }
    }
    at.next();
    Ok(found)
}

fn string(at: &mut Letters) -> Result<String> {
    let mut found = String::new();
    if at.next() != Some('"') {
        return Err("JSON: expected a string".into());
    }
    loop {
        match at.next().ok_or("JSON: a string does not end")? {
            '"' => return Ok(found),
            '\\' => match at.next().ok_or("JSON: a string does not end")? {
                'n' => found.push('\n'),
                't' => found.push('\t'),
                'u' => {
                    let code: String = at.take(4).collect(); // no name or number in these files needs more
                    let code = u32::from_str_radix(&code, 16).map_err(|_| "JSON: expected four digits after \\u")?;
                    found.push(char::from_u32(code).unwrap_or('?'));
                }
                other => found.push(other),
            },
            other => found.push(other),
        }
    }
}

// ── the verdict: equal as numbers where an answer has no unit, and elsewhere at most `limit` units off ───────────────

fn off(meta: &Json, name: &str, got: Option<&Array>, expect: &Array) -> Result<f64> {
    let Some(got) = got.filter(|got| got.shape == expect.shape) else { return Ok(f64::INFINITY) };
    let norm = got.data.iter().zip(&expect.data).map(|(g, e)| (g - e).powi(2)).sum::<f64>().sqrt();
    let units = meta.at("units")?;
    let ratio = match units.get(name) {
        Some(_) => norm / units.number(name)?,
        None if norm == 0.0 => 0.0,
        None => f64::INFINITY,
    };
    Ok(if ratio.is_nan() { f64::INFINITY } else { ratio })
}

fn check(path: &Path, wrong: &str) -> Result<(f64, f64, String)> {
    let (meta, arrays) = read_vector(path)?;
    let got = layer(&meta, &arrays, wrong).map_err(|e| format!("{}: {e}", path.display()))?;
    let expect: Vec<_> = arrays.iter().filter_map(|(n, a)| Some((n.strip_prefix("expect/")?, a))).collect();
    let mut worst = (if expect.len() == got.len() { 0.0 } else { f64::INFINITY }, "names");
    for (name, e) in expect {
        let ratio = off(&meta, name, got.get(name), e)?;
        if ratio > worst.0 {
            worst = (ratio, name);
        }
    }
    Ok((worst.0, meta.number("limit")?, worst.1.to_string()))
}

fn all(folder: &Path, wrong: &str) -> Result<bool> {
    let path = folder.join("index.json");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let index = parsed(&text)?;
    let vectors = index.at("vectors")?.list()?;
    let (mut mine, mut others, mut failed) = (0, 0, 0);
    println!("{:<34} {:<7} {:>8}  verdict", "vector", "regime", "units");
    for v in vectors {
        if v.text("level")? != "layer" || !METHODS.contains(&v.text("method")?) {
            continue;
        }
        let cores = v.text("id")? == "loha/layer/cores"; // between its factors, which are not written here
        if cores || !v.at("want")?.list()?.iter().all(|w| w.as_text().is_ok_and(|w| WANTS.contains(&w))) {
            others += 1;
            continue;
        }
        let (ratio, limit, worst) = check(&folder.join(v.text("file")?), wrong)?;
        let ok = ratio <= limit;
        let units = if ratio.is_finite() { format!("{ratio:.2}") } else { "-".into() };
        let verdict = if ok { "ok".into() } else { format!("WRONG: {worst}") };
        println!("{:<34} {:<7} {units:>8}  {verdict}", v.text("id")?, v.text("regime")?);
        mine += 1;
        failed += usize::from(!ok);
    }
    print!("{mine} of {} vectors are of layers and methods that are written here, ", vectors.len());
    println!("{others} more ask of them what is not; {failed} of them are wrong.");
    Ok(failed == 0 && mine > 0)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words[..] {
        [folder] => all(Path::new(folder), ""),
        [folder, "--wrong", wrong] if WRONG.contains(&wrong) => all(Path::new(folder), wrong),
        _ => Err("usage: check DIR [--wrong scale|gradient|merge|factors]".into()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(why) => {
            eprintln!("check: {why}");
            ExitCode::from(2)
        }
    }
}
