/* One decoding step in float32: a token a row goes in, its logits come out, in one call. Few rows meet many weights, so weights
 * are read once, in order, by all cores, and nothing is done between two products but what belongs there. Those of small models
 * may be packed: then many rows are shared out among the threads, and short prompts are read here, too.
 *
 * Built by compiling.py with the machine's C compiler, when it is needed. Each row is computed by itself, whatever other rows
 * there are, in one order of summation.
 */
#include <stdlib.h>

#include "vectors.h"

/* Weights are (out, in), or packed; biases and head norms may be missing. */
typedef struct {
    const float *before_attention, *qkv, *qkv_bias, *query_norm, *key_norm, *out, *out_bias;
    const float *before_mlp, *gate_up, *gate_up_bias, *down, *down_bias;
    float *cache; /* (rows, 2 keys, room, size): keys, then values */
} Layer;

typedef struct {
    const Layer *layers;
    const float *embedding, *norm, *head, *head_bias, *cos, *sin; /* cos, sin (places, size); sin with the sign of its half */
    int64_t count, width, inner, queries, keys, size, vocab, room, packed;
    float eps, scale;
} Model;

/* ---- vectors: ROWS of x times four rows of a weight are summed in registers -------------------------------------------- */

#define AHEAD 8 /* rows of a weight that are asked for, into the second cache, ahead of their use */
#define LINES (LANES / 4) /* that four rows have for each vector of a row */

#ifdef __AVX512F__
#define ROWS 4
/* Totals of four vectors in every quarter, summed over the quarter alone. */
static inline vec quarters(const vec *a) {
    vec low = _mm512_unpacklo_ps(a[0], a[1]) + _mm512_unpackhi_ps(a[0], a[1]);
    vec high = _mm512_unpacklo_ps(a[2], a[3]) + _mm512_unpackhi_ps(a[2], a[3]);
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(low), _mm512_castps_pd(high))) +
           _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(low), _mm512_castps_pd(high)));
}
#define EVEN(x, y) _mm512_shuffle_f32x4(x, y, 0x88)
#define ODD(x, y) _mm512_shuffle_f32x4(x, y, 0xdd)
static inline vec totals(vec a[ROWS][4], const int rows) {
    vec none = _mm512_setzero_ps(), b = rows > 1 ? quarters(a[1]) : none, c = rows > 2 ? quarters(a[2]) : none;
    vec d = rows > 3 ? quarters(a[3]) : none, first = quarters(a[0]);
    vec low = EVEN(first, b) + ODD(first, b), high = EVEN(c, d) + ODD(c, d);
    return EVEN(low, high) + ODD(low, high);
}
#else
#define ROWS 2
static inline vec halves_of(const vec *a) {
    return _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
}
static inline vec totals(vec a[ROWS][4], const int rows) {
    vec first = halves_of(a[0]), second = rows > 1 ? halves_of(a[1]) : _mm256_setzero_ps();
    return _mm256_permute2f128_ps(first, second, 0x20) + _mm256_permute2f128_ps(first, second, 0x31);
}
#endif

/* ---- parts of a layer -------------------------------------------------------------------------------------------------- */

/* y = weight * x / (root mean square of x) */
static void norm_of(const float *x, const float *weight, long width, float eps, float *y) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < width; i++) sum += x[i] * x[i];
    float scale = 1.0f / sqrtf(sum / (float)width + eps);
#pragma omp simd
    for (long i = 0; i < width; i++) y[i] = weight[i] * (x[i] * scale);
}

/* Inner products of four rows of a weight with `rows` rows of x: sums[row][of the weight]. With each vector it asks for `lines`
 * lines of what is needed later. */
INLINE void products(const float *w, const float *const *x, long width, const int rows, const float *later, const int lines,
                     float sums[][4]) {
    vec a[ROWS][4] = {0};
    long i = 0;
    for (; i + LANES <= width; i += LANES) {
        vec part[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) part[j] = all(w + j * width + i);
#pragma GCC unroll 4
        for (int j = 0; j < lines; j++) __builtin_prefetch(later + 16 * (i / LANES * lines + j), 0, 2);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vec own = all(x[r] + i);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) a[r][j] += own * part[j];
        }
    }
    if (i < width) {
        mask here = first(width - i);
        vec part[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) part[j] = get(w + j * width + i, here);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            vec own = get(x[r] + i, here);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) a[r][j] += own * part[j];
        }
    }
    put(sums[0], first(LANES), totals(a, rows));
}

/* ---- packed weights: for PANEL outputs at a time, what each input is multiplied with ------------------------------------- */

#define PANEL (2 * LANES)
#define ACROSS (LANES / 2) /* rows that meet a panel at once */
#define TERMS 8            /* that are summed up before they are added to the others, for the sake of rounding */

static long panels(long out) { return (out + PANEL - 1) / PANEL; }

int64_t opd_packed(long out, long width) { return panels(out) * PANEL * width; }

/* weight (out, width) to (panels, width, PANEL), with zeros behind the last output. */
void opd_pack(const float *weight, long out, long width, float *packed) {
    for (long o = 0; o < panels(out) * PANEL; o += LANES) {
        float *to = packed + o / PANEL * PANEL * width + o % PANEL;
        for (long i = 0; i < width; i += LANES) {
            vec table[LANES];
            for (long j = 0; j < LANES; j++)
                table[j] = o + j < out ? get(weight + (o + j) * width + i, first(width - i)) : each(0.0f);
            transposed(table);
            for (long j = 0; j < least(LANES, width - i); j++) put(to + (i + j) * PANEL, first(LANES), table[j]);
        }
    }
}

/* `rows` rows of x times a panel: `count` outputs of each, `apart` numbers from each other. */
INLINE void times_panel(const float *x, long width, const float *w, const int rows, const float *bias, long count, long apart,
                        float *y, int add) {
    vec a[ACROSS][2] = {0};
    mask low = first(count), high = first(count - LANES);
    for (long start = 0; start < width; start += TERMS) {
        vec part[ACROSS][2] = {0};
        for (long i = start; i < least(start + TERMS, width); i++) {
            vec some = all(w + i * PANEL), others = all(w + i * PANEL + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) {
                vec own = each(x[r * width + i]);
                part[r][0] += own * some, part[r][1] += own * others;
            }
        }
        for (int r = 0; r < rows; r++) a[r][0] += part[r][0], a[r][1] += part[r][1];
    }
    for (int r = 0; r < rows; r++) {
        float *to = y + r * apart;
        if (bias) a[r][0] += get(bias, low), a[r][1] += get(bias + LANES, high);
        if (add) a[r][0] += get(to, low), a[r][1] += get(to + LANES, high);
        put(to, low, a[r][0]), put(to + LANES, high, a[r][1]);
    }
}

static void linear_packed(const float *x, long rows, long width, const float *weight, const float *bias, long out, float *y,
                          int add) {
#pragma omp for schedule(static)
    for (long p = 0; p < panels(out); p++) {
        long o = p * PANEL, r = 0;
        const float *w = weight + o * width, *b = bias ? bias + o : 0;
#define ROWS_AT_ONCE(n)                                                                                                        \
    for (; r + (n) <= rows; r += (n)) times_panel(x + r * width, width, w, n, b, out - o, out, y + r * out + o, add)
        ROWS_AT_ONCE(ACROSS);
        ROWS_AT_ONCE(4);
        ROWS_AT_ONCE(2);
        ROWS_AT_ONCE(1);
    }
}

/* y = x W' + b, or y += it; `out` is a multiple of 4 if it is added. Called by all threads. */
static void linear(const float *x, long rows, long width, const float *weight, const float *bias, long out, float *y, int add) {
#pragma omp for schedule(static)
    for (long i = 0; i < (out + 3) / 4; i++) {
        long o = least(4 * i, out - 4); /* the last block may repeat some of the one before */
        const float *w = weight + o * width, *later = w + AHEAD * width;
        for (long top = 0; top < rows; top += ROWS) {
            const float *some[ROWS];
            float sums[ROWS][4];
            for (long r = 0; r < ROWS; r++) some[r] = x + least(top + r, rows - 1) * width;
            /* what the block after next needs is asked for bit by bit, as the memory answers */
            if (rows <= ROWS)
                products(w, some, width, ROWS, later, LINES, sums);
            else if (top < 2 * ROWS)
                products(w, some, width, ROWS, later + top / ROWS * 2 * width, LINES / 2, sums);
            else
                products(w, some, width, ROWS, later, 0, sums);
            for (long r = 0; r < least(ROWS, rows - top); r++) {
                float *to = y + (top + r) * out + o;
                __m128 sum = _mm_loadu_ps(sums[r]);
                if (bias) sum += _mm_loadu_ps(bias + o);
                if (add) sum += _mm_loadu_ps(to);
                _mm_storeu_ps(to, sum);
            }
        }
    }
}

/* Rotate a head to its place. */
static void turn(const float *x, const float *norm, const float *cos, const float *sin, long size, float eps, float *y) {
    long half = size / 2;
    if (norm) norm_of(x, norm, size, eps, y), x = y;
    for (long i = 0; i < half; i += LANES) {
        mask here = first(half - i);
        vec low = get(x + i, here), high = get(x + i + half, here);
        put(y + i, here, low * get(cos + i, here) + high * get(sin + i, here));
        put(y + i + half, here, high * get(cos + i + half, here) + low * get(sin + i + half, here));
    }
}

/* p = e^(scale p) of `count` numbers, but for a factor; one over their sum */
static float powers(float *p, long count, float scale) {
    vec most = each(-INFINITY), sum = each(0.0f);
    for (long t = 0; t < count; t += LANES) most = larger(most, least_where(get(p + t, first(count - t)), first(count - t)));
    vec top = each(largest(most));
    for (long t = 0; t < count; t += LANES) {
        mask here = first(count - t);
        vec found = only(exp_of((get(p + t, here) - top) * scale), here);
        put(p + t, here, found);
        sum += found;
    }
    return 1.0f / total(sum);
}

#define TOGETHER 4 /* places whose values are summed at once for one head, which would wait for each otherwise */

/* Ask for numbers that are needed soon: four places of a head. */
static inline void ask(const float *x, long size) {
    for (long i = 0; i < 4 * size; i += 16) __builtin_prefetch(x + i, 0, 3);
}

/* `rows` query heads against the keys and values of `count` places: y = softmax(scale q k') v. The weights of a head take
 * `apart` numbers of p; the keys `then` are read after these. */
INLINE void read_heads(const float *q, const float *keys, const float *values, long count, long size, float scale,
                       const int rows, float *p, long apart, float *y, const float *then) {
    const float *own[ROWS];
    const int parts = rows == 1 ? TOGETHER : 1;
    float sums[ROWS][4], share[ROWS];
    for (int r = 0; r < rows; r++) own[r] = q + r * size;
    for (long t = 0; t < count; t += 4) { /* behind the last place lie other numbers of the cache, which are left out */
        ask(values + t * size, size);
        products(keys + t * size, own, size, rows, keys, 0, sums);
        for (int r = 0; r < rows; r++) _mm_storeu_ps(p + r * apart + t, _mm_loadu_ps(sums[r]));
    }
    for (int r = 0; r < rows; r++) share[r] = powers(p + r * apart, count, scale);
    for (long i = 0; i < size; i += 2 * LANES) {
        mask here = first(size - i), there = first(size - i - LANES);
        vec a[TOGETHER][ROWS][2] = {0};
        long t = 0;
        for (; t + parts <= count; t += parts) {
            if (i == 0 && t % 4 == 0) ask(then + t * size, size);
#pragma GCC unroll 4
            for (int k = 0; k < parts; k++) {
                vec low = get(values + (t + k) * size + i, here), high = get(values + (t + k) * size + i + LANES, there);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) {
                    vec weight = each(p[r * apart + t + k]);
                    a[k][r][0] += weight * low, a[k][r][1] += weight * high;
                }
            }
        }
        for (; t < count; t++) {
            vec low = get(values + t * size + i, here), high = get(values + t * size + i + LANES, there);
            for (int r = 0; r < rows; r++) {
                vec weight = each(p[r * apart + t]);
                a[0][r][0] += weight * low, a[0][r][1] += weight * high;
            }
        }
        for (int r = 0; r < rows; r++) {
            for (int k = 1; k < parts; k++) a[0][r][0] += a[k][r][0], a[0][r][1] += a[k][r][1];
            put(y + r * size + i, here, a[0][r][0] * share[r]), put(y + r * size + i + LANES, there, a[0][r][1] * share[r]);
        }
    }
}

/* Write the keys and values of `rows` tokens into the cache, whose rows they stand in follow from `begin` on, or are `homes`;
 * then attend, if it is asked for. Called by all threads. */
static void attend(const Model *m, const Layer *l, const float *heads, long begin, const int64_t *homes, long rows,
                   const int64_t *places, float *p, float *mixed) {
    long size = m->size, shared = m->queries / m->keys, of_row = (m->queries + 2 * m->keys) * size, apart = m->room + 4;
#pragma omp for schedule(static)
    for (long n = 0; n < rows * m->keys; n++) {
        long row = n / m->keys, key = n % m->keys, at = places[row], home = homes ? homes[row] : begin + row;
        const float *x = heads + row * of_row, *c = m->cos + at * size, *s = m->sin + at * size;
        float *k = l->cache + (home * 2 * m->keys + key) * m->room * size, *v = k + m->keys * m->room * size;
        float *q = p + ROWS * apart, *then = key + 1 < m->keys ? k + m->room * size : v + m->room * size;
        turn(x + (m->queries + key) * size, l->key_norm, c, s, size, m->eps, k + at * size);
        memcpy(v + at * size, x + (m->queries + m->keys + key) * size, (size_t)size * sizeof *v);
        for (long h = key * shared, end = mixed ? h + shared : 0; h < end;) {
            int some = (int)least(end - h, ROWS);
            float *y = mixed + (row * m->queries + h) * size;
            for (long r = 0; r < some; r++) turn(x + (h + r) * size, l->query_norm, c, s, size, m->eps, q + r * size);
            switch (some) {
            case 1: read_heads(q, k, v, at + 1, size, m->scale, 1, p, apart, y, then); break;
            case 2: read_heads(q, k, v, at + 1, size, m->scale, 2, p, apart, y, then); break;
#if ROWS == 4
            case 3: read_heads(q, k, v, at + 1, size, m->scale, 3, p, apart, y, then); break;
            case 4: read_heads(q, k, v, at + 1, size, m->scale, 4, p, apart, y, then); break;
#endif
            }
            h += some;
        }
    }
}

/* y = silu(gate) * up of one row. */
static void gate_row(const float *gate, const float *up, long inner, float *y) {
    for (long i = 0; i < inner; i += LANES) {
        mask here = first(inner - i);
        vec x = get(gate + i, here);
        put(y + i, here, x / (1.0f + exp_of(-x)) * get(up + i, here));
    }
}

static void norm_rows(const float *x, const float *weight, long rows, long width, float eps, float *y) {
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) norm_of(x + r * width, weight, width, eps, y + r * width);
}

/* Numbers of room that a row needs. */
static long numbers(const Model *m) {
    return 2 * m->width + 2 * (m->queries + m->keys) * m->size + 3 * m->inner;
}

int64_t opd_room(const Model *m, long rows) { return rows * numbers(m); }

/* The step of `rows` tokens, of which ids, places, room and logits are the own; where they stand `attend` says. Without logits
 * nothing is computed behind the last layer's keys and values. */
static void step(const Model *m, const int64_t *ids, const int64_t *places, long begin, const int64_t *homes, long rows,
                 float *room, float *logits, int threads) {
    long width = m->width, inner = m->inner, of_heads = (m->queries + 2 * m->keys) * m->size, of_mixed = m->queries * m->size;
    float *x = room, *normal = x + rows * width, *heads = normal + rows * width, *mixed = heads + rows * of_heads;
    float *both = mixed + rows * of_mixed, *inside = both + rows * 2 * inner;
    void (*product)(const float *, long, long, const float *, const float *, long, float *, int) =
        m->packed ? linear_packed : linear;
#pragma omp parallel num_threads(threads)
    {
        float *p = malloc((size_t)(ROWS * (m->room + 4 + m->size)) * sizeof *p);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) memcpy(x + r * width, m->embedding + ids[r] * width, (size_t)width * sizeof *x);
        for (const Layer *l = m->layers, *last = l + m->count - 1; l <= last; l++) {
            norm_rows(x, l->before_attention, rows, width, m->eps, normal);
            product(normal, rows, width, l->qkv, l->qkv_bias, of_heads, heads, 0);
            attend(m, l, heads, begin, homes, rows, places, p, l < last || logits ? mixed : 0);
            if (l == last && !logits) break;
            product(mixed, rows, of_mixed, l->out, l->out_bias, width, x, 1);
            norm_rows(x, l->before_mlp, rows, width, m->eps, normal);
            product(normal, rows, width, l->gate_up, l->gate_up_bias, 2 * inner, both, 0);
#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++)
                gate_row(both + r * 2 * inner, both + (r * 2 + 1) * inner, inner, inside + r * inner);
            product(inside, rows, inner, l->down, l->down_bias, width, x, 1);
        }
        if (logits) {
            norm_rows(x, m->norm, rows, width, m->eps, normal);
            product(normal, rows, width, m->head, m->head_bias, m->vocab, logits, 0);
        }
        free(p);
    }
}

#define ENOUGH 16 /* rows of a thread that are worth reading all weights, if these are packed */

/* logits (rows, vocab) of the tokens behind ids (rows,), which stand at places (rows,) and join the cache. With few rows the
 * threads share the weights, and wait for each other behind every product; with many, and a small model, each takes some of the
 * rows. */
void opd_step(const Model *m, const int64_t *ids, const int64_t *places, long rows, float *room, float *logits, int threads) {
    if (threads == 1 || rows < ENOUGH * threads || !m->packed) {
        step(m, ids, places, 0, 0, rows, room, logits, threads);
        return;
    }
    long groups = (rows + ACROSS - 1) / ACROSS;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < threads; t++) { /* what is parallel inside is done by one thread */
        long from = groups * t / threads * ACROSS, to = least(groups * (t + 1) / threads * ACROSS, rows);
        step(m, ids + from, places + from, from, 0, to - from, room + from * numbers(m), logits + from * m->vocab, 1);
    }
}

#define TOKENS 96 /* that a thread reads together: their numbers stay in its cache */

/* Read prompts, one after another in ids, places and homes (tokens,); prompt n is tokens starts[n] to starts[n + 1]. */
void opd_read(const Model *m, const int64_t *ids, const int64_t *places, const int64_t *homes, const int64_t *starts,
              long prompts, int threads) {
    long longest = 1;
    for (long n = 0; n < prompts; n++)
        if (starts[n + 1] - starts[n] > longest) longest = starts[n + 1] - starts[n];
    long together = longest < TOKENS ? TOKENS / longest : 1;
#pragma omp parallel num_threads(threads)
    {
        float *room = malloc((size_t)(together * longest * numbers(m)) * sizeof *room);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < prompts; n += together) {
            long from = starts[n], count = starts[least(n + together, prompts)] - from;
            step(m, ids + from, places + from, 0, homes + from, count, room, 0, 1);
        }
        free(room);
    }
}
