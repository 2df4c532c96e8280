/* Golden vectors in C, with the standard library alone: LoRA, rsLoRA, DoRA and (IA)³ on one layer.

       refpeft vectors my-vectors
       cc -std=c11 -O2 examples/vectors/check.c -o check -lm
       ./check my-vectors [--wrong scale|gradient|merge|norm]

   What is in the files is said in docs/vectors.md. `layer` below is the implementation under test; --wrong breaks it on
   purpose. Exit code 0: all are as expected. 1: some are not. 2: could not run. For little-endian machines. */

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const char *what, const char *about) {
    fprintf(stderr, "check: %s: %s\n", about, what);
    exit(2);
}

static void *room(size_t bytes) {  /* nothing is freed: the program is short */
    void *p = calloc(1, bytes ? bytes : 1);
    if (!p) die("no memory is left", "calloc");
    return p;
}

static int same(const char *a, const char *b) { return strcmp(a, b) == 0; }

static char *joined(const char *a, const char *b) {
    char *s = room(strlen(a) + strlen(b) + 1);
    return strcat(strcpy(s, a), b);
}

/* ── JSON ───────────────────────────────────────────────────────────────────────────────────────────────────────── */

typedef struct Json {
    char *text;  /* of a string, or the letters of a number or a constant; NULL in objects and lists */
    char *name;  /* in an object */
    struct Json *first, *next;
} Json;

static const char *at;  /* where the parser is */

static void space(void) { at += strspn(at, " \t\r\n"); }

static char *string(void) {
    char *s = room(strlen(at) + 1), *end = s;
    for (at++; *at != '"'; at++) {
        if (!*at) die("a string does not end", "JSON");
        if (*at != '\\') { *end++ = *at; continue; }
        at++;
        if (*at == 'u') { at += 4; *end++ = '?'; }  /* no name or number in these files needs it */
        else *end++ = *at == 'n' ? '\n' : *at == 't' ? '\t' : *at;
    }
    at++;
    return s;
}

static Json *json(void) {
    Json *j = room(sizeof *j), **link = &j->first;
    space();
    if (*at == '"') { j->text = string(); return j; }
    if (*at != '{' && *at != '[') {
        size_t n = strcspn(at, ",]} \t\r\n");
        if (!n) die("a value is missing", "JSON");
        j->text = memcpy(room(n + 1), at, n);
        at += n;
        return j;
    }
    char close = *at++ == '{' ? '}' : ']';
    for (space(); *at != close; space()) {
        char *name = NULL;
        if (close == '}') { name = string(); space(); at++; }
        *link = json();
        (*link)->name = name;
        link = &(*link)->next;
        space();
        if (*at == ',') { at++; space(); } else if (*at != close) die("expected a comma or the end", "JSON");
    }
    at++;
    return j;
}

static Json *parsed(const char *text) { at = text; return json(); }

static Json *get(const Json *j, const char *name) {
    for (Json *k = j ? j->first : NULL; k; k = k->next) if (k->name && same(k->name, name)) return k;
    return NULL;
}

static const char *text(const Json *j, const char *name) {
    Json *k = get(j, name);
    if (!k || !k->text) die("a field is missing", name);
    return k->text;
}

static int has(const Json *list, const char *value) {
    for (Json *k = list->first; k; k = k->next) if (k->text && same(k->text, value)) return 1;
    return 0;
}

/* ── arrays, and matrices of two axes: rows, columns ────────────────────────────────────────────────────────────── */

typedef struct { char *name; int n, m, axes; int shape[4]; double *v; } Array;  /* v: n rows of m numbers */
typedef struct { Array a[96]; int count; } Arrays;

static Array zeros(int n, int m) { return (Array){"", n, m, 2, {n, m}, room(sizeof(double) * n * m)}; }

static Array *named(Arrays *all, const char *name) {
    for (int k = 0; k < all->count; k++) if (same(all->a[k].name, name)) return &all->a[k];
    return NULL;
}

static void put(Arrays *all, const char *name, Array a) {
    if (all->count == 96) die("there are too many arrays", name);
    a.name = joined(name, "");
    all->a[all->count++] = a;
}

static Array shaped(Array a, const Array *like, int m) {  /* the axes of `like`, but for the last */
    a.axes = like->axes;
    memcpy(a.shape, like->shape, sizeof a.shape);
    a.shape[a.axes - 1] = m;
    return a;
}

static Array T(Array a) {
    Array t = zeros(a.m, a.n);
    for (int k = 0; k < a.n * a.m; k++) t.v[(k % a.m) * a.n + k / a.m] = a.v[k];
    return t;
}

static Array matmul(Array a, Array b) {
    Array c = zeros(a.n, b.m);
    for (int i = 0; i < a.n; i++)
        for (int j = 0; j < a.m; j++)
            for (int k = 0; k < b.m; k++) c.v[i * b.m + k] += a.v[i * a.m + j] * b.v[j * b.m + k];
    return c;
}

static Array times(double s, Array a) {
    Array c = zeros(a.n, a.m);
    for (int k = 0; k < a.n * a.m; k++) c.v[k] = s * a.v[k];
    return c;
}

static Array plus(Array a, Array b) {
    Array c = times(1, a);
    for (int k = 0; k < a.n * a.m; k++) c.v[k] += b.v[k];
    return c;
}

static Array scaled(const double *g, Array a) {  /* diag(g) a */
    Array c = zeros(a.n, a.m);
    for (int k = 0; k < a.n * a.m; k++) c.v[k] = (g ? g[k / a.m] : 1) * a.v[k];
    return c;
}

static Array vector(Array a) { a.n = 1; a.m = a.shape[0]; a.axes = 1; return a; }

static Array rowsums(Array a, Array b) {  /* Σ a ⊙ b over each row */
    Array c = zeros(1, a.n);
    for (int k = 0; k < a.n * a.m; k++) c.v[k / a.m] += a.v[k] * b.v[k];
    c.axes = 1;
    c.shape[0] = a.n;
    return c;
}

static Array onehot(Array ids, int v) {
    Array x = zeros(ids.n * ids.m, v);
    for (int k = 0; k < x.n; k++) x.v[k * v + (int)ids.v[k]] = 1;
    x.axes = ids.axes + 1;
    memcpy(x.shape, ids.shape, sizeof x.shape);
    x.shape[x.axes - 1] = v;
    return x;
}

/* ── the implementation under test ──────────────────────────────────────────────────────────────────────────────── */

typedef struct { Array V, W1, y; Array n, b1; double s, *g; int biased; } Adapted;

static double scale(const Json *meta, const char *wrong) {
    const Json *config = get(meta, "config");
    double r = atof(text(config, "r")), alpha = atof(text(config, "lora_alpha"));
    int root = same(text(meta, "method"), "rslora") != same(wrong, "scale");  /* broken: one for the other */
    return alpha / (root ? sqrt(r) : r);
}

/* W′ = diag(g) V,  V = W + s B A,  g = m/‖V‖ for DoRA, else 1;   b′ = b + s β */
static Adapted matrices(const Json *meta, Arrays *in, const char *new, Array w, const char *wrong) {
    Array *A = named(in, joined(new, "A")), *B = named(in, joined(new, "B"));
    Array *m = named(in, joined(new, "m")), *beta = named(in, joined(new, "bias")), *b = named(in, "b");
    double s = scale(meta, wrong);
    Adapted f = {.V = plus(w, times(s, matmul(*B, *A))), .s = s};
    Array U = same(wrong, "norm") ? T(f.V) : f.V;
    f.n = rowsums(U, U);
    for (int o = 0; o < f.n.m; o++) f.n.v[o] = f.n.v[o] > 0 ? sqrt(f.n.v[o]) : 1;  /* a row of zeros stays one */
    if (m) {
        f.g = room(sizeof(double) * f.V.n);
        for (int o = 0; o < f.V.n; o++) f.g[o] = m->v[o] / (o < f.n.m ? f.n.v[o] : 1);
    }
    f.biased = b || beta;
    if (f.biased) f.b1 = b && beta ? plus(vector(*b), times(s, vector(*beta))) : b ? *b : times(s, vector(*beta));
    f.W1 = scaled(f.g, f.V);
    return f;
}

static int takes(const Json *meta) { return get(get(meta, "config"), "feedforward_modules")->first != NULL; }

/* W′ = diag(l) W,  b′ = l ⊙ b,  l [o, 1];   where the layer is feed-forward W′ = W diag(l),  b′ = b,  l [1, i] */
static Adapted vectors(const Json *meta, Arrays *in, const char *new, Array w, const char *wrong) {
    Array *l = named(in, joined(new, "l")), *b = named(in, "b");
    Array v = times(1, *l);
    for (int k = 0; same(wrong, "scale") && k < v.n * v.m; k++) v.v[k] += 1;  /* broken: 1 + l */
    Adapted f = {.V = w, .W1 = takes(meta) ? T(scaled(v.v, T(w))) : scaled(v.v, w), .biased = b != NULL};
    if (b) f.b1 = times(1, vector(*b));
    for (int o = 0; b && !takes(meta) && o < w.n; o++) f.b1.v[o] *= v.v[o];
    return f;
}

/* y = x W′ᵀ + b′, with W′ and b′ of the method */
static Adapted adapted(const Json *meta, Arrays *in, const char *new, Array w, Array X, const char *wrong) {
    Adapted f = (same(text(meta, "method"), "ia3") ? vectors : matrices)(meta, in, new, w, wrong);
    if (f.biased) f.b1 = (Array){"", 1, w.n, 1, {w.n}, f.b1.v};
    f.y = shaped(matmul(X, T(f.W1)), &X, w.n);
    for (int k = 0; f.biased && k < f.y.n * f.y.m; k++) f.y.v[k] += f.b1.v[k % w.n];
    return f;
}

static void of_matrices(Arrays *in, Arrays *out, Adapted f, Array G, const char *wrong) {
    Array *dy = named(in, "dy"), *A = named(in, "A"), *B = named(in, "B");
    Array dV = scaled(f.g, G);  /* the norm counts as a constant */
    put(out, "dA", times(f.s, matmul(T(*B), dV)));
    put(out, "dB", times(same(wrong, "gradient") ? 1 : f.s, matmul(dV, T(*A))));
    if (f.g) {
        Array dm = rowsums(G, f.V);
        for (int o = 0; o < dm.m; o++) dm.v[o] /= o < f.n.m ? f.n.v[o] : 1;
        put(out, "dm", dm);
    }
    if (named(in, "bias")) {
        Array ones = zeros(dy->m, dy->n), d = T(*dy);
        for (int k = 0; k < ones.n * ones.m; k++) ones.v[k] = f.s;
        put(out, "dbias", rowsums(d, ones));
    }
}

static void of_vectors(const Json *meta, Arrays *in, Arrays *out, Adapted f, Array G, const char *wrong) {
    Array *l = named(in, "l"), *b = named(in, "b"), *dy = named(in, "dy");
    Array d = takes(meta) ? rowsums(T(G), T(f.V)) : rowsums(G, f.V), dl = times(1, *l);
    for (int k = 0; k < d.m; k++) dl.v[k] = d.v[k];
    for (int k = 0; b && !takes(meta) && !same(wrong, "gradient") && k < dy->n * dy->m; k++)
        dl.v[k % dy->m] += dy->v[k] * b->v[k % dy->m];
    put(out, "dl", shaped(dl, l, l->m));
}

static void gradients(const Json *meta, Arrays *in, Arrays *out, Adapted f, Array X, int embedding, const char *wrong) {
    Array *dy = named(in, "dy"), G = matmul(T(*dy), X);  /* dW′ [o, i] */
    if (!embedding) put(out, "dx", shaped(matmul(*dy, f.W1), dy, f.W1.m));
    if (same(text(meta, "method"), "ia3")) of_vectors(meta, in, out, f, G, wrong);
    else of_matrices(in, out, f, G, wrong);
}

static void layer(const Json *meta, Arrays *in, Arrays *out, const char *wrong) {
    const char *kind = text(get(meta, "layer"), "kind");
    int turned = !same(kind, "linear"), embedding = same(kind, "embedding");  /* Conv1D and embeddings store Wᵀ */
    Array w = turned ? T(*named(in, "W")) : *named(in, "W");
    Array X = embedding ? onehot(*named(in, "x"), w.m) : *named(in, "x");
    Adapted f = adapted(meta, in, "", w, X, wrong);
    for (Json *want = get(meta, "want")->first; want; want = want->next) {
        if (same(want->text, "output") || same(want->text, "changed")) put(out, "y", f.y);
        if (same(want->text, "changed")) put(out, "y_changed", adapted(meta, in, "new/", w, X, wrong).y);
        if (same(want->text, "grads")) gradients(meta, in, out, f, X, embedding, wrong);
        if (same(want->text, "first_row")) {
            Array y = f.y;
            y.n = y.n / (y.shape[0] ? y.shape[0] : 1);
            y.shape[0] = y.shape[0] ? 1 : 0;
            put(out, "y_row", y);
        }
        if (same(want->text, "merged")) {
            Array M = same(wrong, "merge") && w.n == w.m ? T(f.W1) : f.W1, y = matmul(X, T(M));
            for (int k = 0; f.biased && k < y.n * y.m; k++) y.v[k] += f.b1.v[k % w.n];
            put(out, "W_merged", turned ? T(M) : M);
            put(out, "y_merged", shaped(y, &X, w.n));
            if (f.biased) put(out, "b_merged", f.b1);
        }
    }
}

/* ── safetensors: the length of the header in 8 bytes, the header in JSON, the arrays one after the other ───────── */

static char *whole(const char *path, size_t *size) {
    FILE *f = fopen(path, "rb");
    if (!f) die("no such file", path);
    fseek(f, 0, SEEK_END);
    *size = (size_t)ftell(f);
    rewind(f);
    char *bytes = room(*size + 1);
    if (fread(bytes, 1, *size, f) != *size) die("could not be read", path);
    fclose(f);
    return bytes;
}

static int width(const char *dtype) {
    return same(dtype, "BOOL") ? 1 : strstr(dtype, "16") ? 2 : strstr(dtype, "32") ? 4 : 8;
}

static double number(const char *dtype, const char *p) {
    if (same(dtype, "F64")) { double v; memcpy(&v, p, 8); return v; }
    if (same(dtype, "I64")) { int64_t v; memcpy(&v, p, 8); return (double)v; }
    if (same(dtype, "F32")) { float v; memcpy(&v, p, 4); return v; }
    if (same(dtype, "BOOL")) return *p;
    uint16_t bits;
    memcpy(&bits, p, 2);
    if (same(dtype, "BF16")) { uint32_t wide = (uint32_t)bits << 16; float v; memcpy(&v, &wide, 4); return v; }
    if (!same(dtype, "F16")) die("of another dtype than F64, F32, F16, BF16, I64 and BOOL", dtype);
    int e = bits >> 10 & 31, f = bits & 1023;
    double v = e == 31 ? (f ? NAN : INFINITY) : e ? ldexp(1024 + f, e - 25) : ldexp(f, -24);
    return bits >> 15 ? -v : v;
}

static Json *read_vector(const char *path, Arrays *all) {
    size_t size;
    uint64_t length = 0;
    char *bytes = whole(path, &size);
    if (size >= 8) memcpy(&length, bytes, 8);
    if (size < 8 || length > size - 8) die("no safetensors file", path);
    char *data = bytes + 8 + length;
    Json *header = parsed(memcpy(room(length + 1), bytes + 8, length));
    for (Json *e = header->first; e; e = e->next) {
        if (same(e->name, "__metadata__")) continue;
        Array a = {.n = 1, .m = 1};
        for (Json *k = get(e, "shape")->first; k && a.axes < 4; k = k->next) a.shape[a.axes++] = atoi(k->text);
        for (int k = 0; k < a.axes; k++) *(k == a.axes - 1 ? &a.m : &a.n) *= a.shape[k];
        size_t from = strtoul(get(e, "data_offsets")->first->text, NULL, 10);
        const char *dtype = text(e, "dtype");
        if (8 + length + from + (size_t)a.n * a.m * width(dtype) > size) die("an array lies outside the file", path);
        a.v = room(sizeof(double) * a.n * a.m);
        for (int k = 0; k < a.n * a.m; k++) a.v[k] = number(dtype, data + from + (size_t)k * width(dtype));
        put(all, e->name, a);
    }
    return parsed(text(get(header, "__metadata__"), "refpeft"));
}

/* ── the verdict: equal as numbers where an answer has no unit, and elsewhere at most `limit` units off ─────────── */

static double off(const Json *meta, const Array *got, const Array *expect, const char *name) {
    if (!got || got->axes != expect->axes) return INFINITY;
    if (memcmp(got->shape, expect->shape, sizeof(int) * got->axes)) return INFINITY;
    double sum = 0;
    for (int k = 0; k < expect->n * expect->m; k++) sum += pow(got->v[k] - expect->v[k], 2);
    Json *unit = get(get(meta, "units"), name);
    if (unit) return isfinite(sum) ? sqrt(sum) / atof(unit->text) : INFINITY;
    return sum == 0 ? 0 : INFINITY;
}

static int check(const char *path, const char *id, const char *regime, const char *wrong) {
    Arrays in = {.count = 0}, out = {.count = 0};
    Json *meta = read_vector(path, &in);
    const char *worst = "names";
    double ratio = 0;
    int expected = 0;
    layer(meta, &in, &out, wrong);
    for (int k = 0; k < in.count; k++) {
        if (strncmp(in.a[k].name, "expect/", 7)) continue;
        const char *name = in.a[k].name + 7;
        double d = off(meta, named(&out, name), &in.a[k], name);
        if (d > ratio) { ratio = d; worst = name; }
        expected++;
    }
    if (expected != out.count) ratio = INFINITY;
    int ok = ratio <= atof(text(meta, "limit"));
    printf("%-34s %-7s ", id, regime);
    if (isfinite(ratio)) printf("%8.2g", ratio); else printf("%8s", "-");
    if (ok) printf("  ok\n"); else printf("  WRONG: %s\n", worst);
    return ok;
}

static int known(const char *method, const char *level) {
    int mine = same(method, "lora") || same(method, "rslora") || same(method, "dora") || same(method, "ia3");
    return same(level, "layer") && mine;
}

static int able(const Json *want) {
    return !has(want, "trained") && !has(want, "fresh") && !has(want, "unmerged") && !has(want, "unloaded") &&
           !has(want, "disabled");
}

int main(int n, char **words) {
    const char *wrong = n == 4 ? words[3] : "";
    int broken = same(wrong, "scale") || same(wrong, "gradient") || same(wrong, "merge") || same(wrong, "norm");
    if (n != 2 && !(n == 4 && same(words[2], "--wrong") && broken))
        die("usage: check DIR [--wrong scale|gradient|merge|norm]", "check");
    size_t size;
    char *folder = joined(words[1], "/");
    Json *list = get(parsed(whole(joined(folder, "index.json"), &size)), "vectors");
    int all = 0, mine = 0, others = 0, failed = 0;
    if (!list) die("it lists no vectors", "index.json");
    printf("%-34s %-7s %8s  verdict\n", "vector", "regime", "units");
    for (Json *v = list->first; v; v = v->next, all++) {
        if (!known(text(v, "method"), text(v, "level"))) continue;
        if (!able(get(v, "want"))) { others++; continue; }
        mine++;
        failed += !check(joined(folder, text(v, "file")), text(v, "id"), text(v, "regime"), wrong);
    }
    printf("%d of %d vectors are of layers and methods that are written here, ", mine, all);
    printf("%d more ask of them what is not; %d of them are wrong.\n", others, failed);
    return failed || !mine;
}
