/* One decoding step in bfloat16 on x86-64: a token a row goes in, its logits come out, in one call. Few rows meet many weights,
 * so what counts is that weights are read once, in order, by all cores, and that nothing else is done between them. Built by
 * compiling.py with the machine's C compiler, when it is needed.
 *
 * Rounding follows transformers: every product of a layer, every norm and every sum of the residual stream is rounded to
 * bfloat16; sums are taken in float32. `wide`: the residual stream and the norms' weights are float32, as under mixed
 * precision.
 * Each row is computed by itself, whatever other rows there are, in one order of summation.
 */
#include <stdlib.h>

#include "vectors.h"

#include "tiles.h"

/* y = x W' + b, W (out, in); beside it an adapter in float32, y + x down' up, with down (rank, in) and up (rank, out). Missing
 * biases and adapters are 0. */
typedef struct {
    const bf16 *weight, *bias;
    const float *down, *up;
    int64_t out, rank;
} Linear;

typedef struct {
    Linear qkv, output, gate_up, down;
    const void *before_attention, *before_mlp, *query_norm, *key_norm; /* of the residual stream's precision; 0 for no norm */
    bf16 *cache;                                                        /* (rows, 2 keys, room, size): keys, then values */
} Layer;

typedef struct {
    const Layer *layers;
    const void *embedding, *norm;
    Linear head;
    const float *cos, *sin; /* (places, size); sin with the sign of its half */
    int64_t count, width, inner, queries, keys, size, room, wide;
    float eps, scale;
} Model;

static inline long most(long a, long b) { return a > b ? a : b; }

/* ---- numbers ------------------------------------------------------------------------------------------------------------- */

/* Places of a column of a table with sixteen columns. */
static inline __m512i every16th(void) {
    return _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
}

/* Sixteen numbers from place i on. */
static inline __m512 take(const void *x, long i, int wide) {
    return wide ? _mm512_loadu_ps((const float *)x + i) : all_halves((const bf16 *)x + i);
}

/* The place of number i. */
static inline const void *from(const void *x, long i, int wide) { return (const char *)x + i * (wide ? 4 : 2); }

/* What a root-mean-square norm multiplies its input with. */
static inline float scale_of(const void *x, long width, float eps, int wide) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < width; i += 16) {
        __m512 v = take(x, i, wide);
        sum = _mm512_fmadd_ps(v, v, sum);
    }
    return 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / (float)width + eps);
}

/* Sixteen normalised numbers; the input and the weight may be wide, each by itself. */
static inline __m512 normed(const void *x, int wide, const void *weight, int wide_weight, long i, float scale) {
    __m512 v = _mm512_mul_ps(take(x, i, wide), _mm512_set1_ps(scale));
    v = _mm512_mul_ps(take(weight, i, wide_weight), wide ? v : rounded(v));
    return wide_weight ? v : rounded(v);
}

/* ---- what becomes of sixteen outputs of one row, which are rounded ------------------------------------------------------- */

enum { STORE, ADD, GATE };

static inline void finish(__m512 sum, __m512 up, void *y, long i, int mode, int wide) {
    if (mode == ADD) sum = _mm512_add_ps(take(y, i, wide), sum);
    if (mode == GATE) {
        __m512 minus = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_sub_ps(_mm512_setzero_ps(), sum));
        sum = _mm512_mul_ps(rounded(_mm512_div_ps(sum, _mm512_add_ps(_mm512_set1_ps(1.0f), exp_below(minus)))), up);
    }
    if (mode == ADD && wide)
        _mm512_storeu_ps((float *)y + i, sum);
    else
        _mm256_storeu_si256((__m256i *)((bf16 *)y + i), narrowed(sum));
}

/* ---- products ---------------------------------------------------------------------------------------------------------- */

/* Numbers k to k + 32 of up to sixteen rows of x as one tile: pairs of numbers, the rows beside each other. Without a norm
 * the numbers are bfloat16. */
static void pack(const void *x, int wide, const void *norm, const float *scales, long width, long k, long rows, bf16 *tile) {
    const __m512i down = every16th();
    for (long r = 0; r < rows; r++) {
        const void *row = from(x, r * width, norm && wide);
        __m512i pairs;
        if (norm) {
            __m512i low = _mm512_castsi256_si512(narrowed(normed(row, wide, norm, wide, k, scales[r])));
            pairs = _mm512_inserti64x4(low, narrowed(normed(row, wide, norm, wide, k + 16, scales[r])), 1);
        } else {
            pairs = load((const bf16 *)row + k);
        }
        _mm512_i32scatter_epi32((uint32_t *)tile + r, down, pairs, 4);
    }
}

/* ---- parts of a layer: called by all threads ----------------------------------------------------------------------------- */

/* What a step needs besides. */
typedef struct {
    char *x;                      /* (rows, width), the residual stream */
    bf16 *heads, *mixed, *inside; /* (rows, heads and their size), (rows, queries and their size), (rows, inner) */
    bf16 *tiles;                  /* what is multiplied next, its rows in groups of sixteen */
    float *scales, *low;          /* of the norm before it; (rows, rank), what an adapter makes of it */
} Space;

/* Sixteen numbers of what a layer reads: of the residual stream behind a norm, or bfloat16 ones as they are. */
static inline __m512 read16(const void *x, const void *norm, float scale, long i, int wide) {
    return norm ? rounded(normed(x, wide, norm, wide, i, scale)) : all_halves((const bf16 *)x + i);
}

/* low = x down', x of `width` numbers a row. */
static void reduce(const void *x, long rows, long width, const void *norm, const Linear *l, int wide, const Space *s) {
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        const void *row = from(x, r * width, norm && wide);
        for (long j = 0; j < l->rank; j += 8) {
            long some = least(8, l->rank - j);
            __m512 sums[8];
            for (long n = 0; n < 8; n++) sums[n] = _mm512_setzero_ps();
            for (long i = 0; i < width; i += 16) {
                __m512 v = read16(row, norm, s->scales[r], i, wide);
                for (long n = 0; n < some; n++)
                    sums[n] = _mm512_fmadd_ps(v, _mm512_loadu_ps(l->down + (j + n) * width + i), sums[n]);
            }
            for (long n = 0; n < some; n++) s->low[r * l->rank + j + n] = _mm512_reduce_add_ps(sums[n]);
        }
    }
}

/* Sixteen outputs of a layer from their products. */
static inline __m512 output16(__m512 sum, const Linear *l, const float *low, long o) {
    if (l->bias) sum = _mm512_add_ps(sum, all_halves(l->bias + o));
    sum = rounded(sum);
    if (!l->rank) return sum;
    for (long j = 0; j < l->rank; j++)
        sum = _mm512_fmadd_ps(_mm512_set1_ps(low[j]), _mm512_loadu_ps(l->up + j * l->out + o), sum);
    return rounded(sum);
}

/* What a layer makes of x (rows, width), which is normalised first if there is a norm: STORE, ADD to the residual stream y, or
 * GATE: y = silu(first half) * second half. width is a multiple of 32, the width of y at least 16, and of 16 unless STORE. */
static void linear(const void *x, long rows, long width, const void *norm, const Linear *l, void *y, int mode, const Model *m,
                   const Space *s) {
    const __m512i column = every16th();
    int wide = (int)m->wide;
    long out = mode == GATE ? l->out / 2 : l->out, groups = (rows + 15) / 16, each = mode == GATE ? 16 : 32;
    float sums[1024];
    if (norm) {
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) s->scales[r] = scale_of(from(x, r * width, wide), width, m->eps, wide);
    }
    if (l->rank) reduce(x, rows, width, norm, l, wide, s);
#pragma omp for schedule(static) /* by columns: the rows of one tile lie in the same lines of the cache */
    for (long i = 0; i < width / 32 * groups; i++) {
        long k = i / groups * 32, g = i % groups * 16;
        bf16 *tile = s->tiles + g * width + k * 16;
        pack(from(x, g * width, norm && wide), wide, norm, s->scales + g, width, k, least(rows - g, 16), tile);
    }
#pragma omp for schedule(static)
    for (long i = 0; i < (out + each - 1) / each; i++) {
        long o = least(i * each, out - 16); /* the last block may repeat some of the one before */
        long other = mode == GATE ? o + out : least(o + 16, out - 16), next = least(o + each, out - 16);
        for (long top = 0; top < rows; top += 32) {
            long some = least(rows - top, 32);
            block(l->weight + o * width, l->weight + other * width, l->weight + next * width, s->tiles + top * width, width, some, sums);
            for (long r = 0; r < some; r++) {
                long at = r / 16 * 512 + r % 16, place = (top + r) * out;
                const float *low = s->low + (top + r) * l->rank;
                __m512 sum = output16(_mm512_i32gather_ps(column, sums + at, 4), l, low, o);
                __m512 next = output16(_mm512_i32gather_ps(column, sums + at + 256, 4), l, low, other);
                finish(sum, next, y, place + o, mode, wide);
                if (mode != GATE && other != o) finish(next, next, y, place + other, mode, wide);
            }
        }
    }
}

/* Rotate a head of `size` numbers; `sin` carries the sign of the first half. */
static void turn(const bf16 *x, const void *norm, float eps, const float *cos, const float *sin, long size, int wide, bf16 *y) {
    float scale = norm ? scale_of(x, size, eps, 0) : 0.0f;
    for (long i = 0; i < size; i += 16) {
        long other = i < size / 2 ? i + size / 2 : i - size / 2;
        __m512 a = norm ? normed(x, 0, norm, wide, i, scale) : all_halves(x + i);
        __m512 b = norm ? normed(x, 0, norm, wide, other, scale) : all_halves(x + other);
        a = _mm512_mul_ps(a, _mm512_loadu_ps(cos + i));
        b = _mm512_mul_ps(b, _mm512_loadu_ps(sin + i));
        _mm256_storeu_si256((__m256i *)(y + i), narrowed(wide ? _mm512_add_ps(a, b) : _mm512_add_ps(rounded(a), rounded(b))));
    }
}

/* e^(scale x - most) in place of `count` numbers, up to a multiple of sixteen; one over their sum. */
static float softmax(float *p, long count, float scale) {
    __m512 most = _mm512_set1_ps(-3.4e38f), total = _mm512_setzero_ps(), times = _mm512_set1_ps(scale);
    for (long t = count; t % 16; t++) p[t] = -3.4e38f;
    for (long t = 0; t < count; t += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(p + t));
    __m512 peak = _mm512_mul_ps(times, _mm512_set1_ps(_mm512_reduce_max_ps(most)));
    for (long t = 0; t < count; t += 16) {
        __mmask16 here = count - t < 16 ? (__mmask16)((1u << (count - t)) - 1) : (__mmask16)-1;
        __m512 e = _mm512_maskz_mov_ps(here, exp_below(_mm512_fmsub_ps(_mm512_loadu_ps(p + t), times, peak)));
        _mm512_storeu_ps(p + t, e);
        total = _mm512_add_ps(total, e);
    }
    return 1.0f / _mm512_reduce_add_ps(total);
}

#define HEADS 4 /* that read the same keys and values together */

/* 16 `columns` numbers of each head's y = shares p v; the weights of a head take `apart` numbers of p. Asks for the values that
 * are read next. */
INLINE void read_values(const bf16 *values, const bf16 *next, long count, long size, const int columns, const int heads,
                        const float *p, long apart, const float *shares, bf16 *y) {
    __m512 read[HEADS][4];
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < columns; i++) read[h][i] = _mm512_setzero_ps();
    for (long t = 0; t < count; t++) {
        __m512 v[4];
        for (int i = 0; i < columns; i += 2) _mm_prefetch(next + t * size + 16 * i, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int i = 0; i < columns; i++) v[i] = all_halves(values + t * size + 16 * i);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            __m512 weight = _mm512_set1_ps(p[h * apart + t]);
#pragma GCC unroll 4
            for (int i = 0; i < columns; i++) read[h][i] = _mm512_fmadd_ps(weight, v[i], read[h][i]);
        }
    }
    for (int h = 0; h < heads; h++) {
        __m512 share = _mm512_set1_ps(shares[h]);
        for (int i = 0; i < columns; i++)
            _mm256_storeu_si256((__m256i *)(y + h * size + 16 * i), narrowed(_mm512_mul_ps(read[h][i], share)));
    }
}

/* `heads` query heads against the keys and values of `count` places: y = softmax(scale q k') v, of `size` numbers each; q as
 * tiles. Behind the last place lie other numbers of the cache, which are left out. Asks for the keys and values that are read
 * next: they lie in many short stretches, which the processor does not foresee. */
INLINE void read_heads(const bf16 *q, const bf16 *keys, const bf16 *values, const bf16 *next, long count, long size,
                       float scale, const int heads, float *p, long apart, bf16 *y) {
    const __m512i column = every16th();
    float tables[2][256], shares[HEADS];
    for (long t = 0; t < count; t += 16) {
        float *table = tables[t / 16 % 2];
        for (long i = 0; i < 16 * size; i += 32) _mm_prefetch(next + t * size + i, _MM_HINT_T1);
        score(keys + t * size, q, size, table);
        for (int h = 0; h < heads; h++) _mm512_storeu_ps(p + h * apart + t, _mm512_i32gather_ps(column, table + h, 4));
    }
    for (int h = 0; h < heads; h++) shares[h] = softmax(p + h * apart, count, scale);
    long i = 0;
    next += values - keys;
    for (; i + 64 <= size; i += 64) read_values(values + i, next + i, count, size, 4, heads, p, apart, shares, y + i);
    if (i < size) read_values(values + i, next + i, count, size, 2, heads, p, apart, shares, y + i);
}

/* Write this step's keys and values into the cache, then attend. p has room for the weights of four heads, q for the heads
 * themselves and their tiles. */
static void attend(const Model *m, const Layer *l, const Space *s, long rows, const int64_t *places, float *p, bf16 *q) {
    long queries = m->queries, keys = m->keys, size = m->size, of_row = (queries + 2 * keys) * size, shared = queries / keys;
    long of_key = m->room * size, apart = m->room + 16;
    int wide = (int)m->wide;
    bf16 *tiles = q + HEADS * size;
#pragma omp for schedule(static)
    for (long n = 0; n < rows * keys; n++) {
        long row = n / keys, key = n % keys, at = places[row];
        const bf16 *x = s->heads + row * of_row;
        const float *cos = m->cos + at * size, *sin = m->sin + at * size;
        bf16 *k = l->cache + (row * 2 * keys + key) * of_key, *v = k + keys * of_key;
        const bf16 *next = k + (key + 1 < keys ? 1 : row + 1 < rows ? keys + 1 : 0) * of_key;
        turn(x + (queries + key) * size, l->key_norm, m->eps, cos, sin, size, wide, k + at * size);
        memcpy(v + at * size, x + (queries + keys + key) * size, (size_t)size * sizeof *v);
        for (long h = key * shared, end = h + shared; h < end;) {
            int some = (int)least(end - h, HEADS);
            bf16 *y = s->mixed + (row * queries + h) * size;
            for (long i = 0; i < some; i++)
                turn(x + (h + i) * size, l->query_norm, m->eps, cos, sin, size, wide, q + i * size);
            for (long i = 0; i < size; i += 32) pack(q, 0, 0, 0, size, i, some, tiles + i * 16);
            switch (some) { /* known counts stay in registers */
            case 1: read_heads(tiles, k, v, next, at + 1, size, m->scale, 1, p, apart, y); break;
            case 2: read_heads(tiles, k, v, next, at + 1, size, m->scale, 2, p, apart, y); break;
            case 3: read_heads(tiles, k, v, next, at + 1, size, m->scale, 3, p, apart, y); break;
            case 4: read_heads(tiles, k, v, next, at + 1, size, m->scale, 4, p, apart, y); break;
            }
            h += some;
        }
    }
}

/* ---- the call ------------------------------------------------------------------------------------------------------------ */

/* logits (rows, vocabulary) of the tokens behind ids (rows,), which stand at places (rows,) and join the cache. All sizes of
 * vectors are multiples of 32, and the cache has room for 16 places at least. */
void opd_step(const Model *m, const int64_t *ids, const int64_t *places, long rows, const Space *s, bf16 *logits, int threads) {
    long width = m->width, bytes = width * (m->wide ? 4 : 2);
#pragma omp parallel num_threads(threads)
    {
        float *p = malloc((size_t)(HEADS * (m->room + 16)) * sizeof *p);
        bf16 *q = calloc((size_t)((HEADS + 16) * m->size), sizeof *q);
        begin_products();
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) memcpy(s->x + r * bytes, (const char *)m->embedding + ids[r] * bytes, (size_t)bytes);
        for (const Layer *l = m->layers; l < m->layers + m->count; l++) {
            linear(s->x, rows, width, l->before_attention, &l->qkv, s->heads, STORE, m, s);
            attend(m, l, s, rows, places, p, q);
            linear(s->mixed, rows, m->queries * m->size, 0, &l->output, s->x, ADD, m, s);
            linear(s->x, rows, width, l->before_mlp, &l->gate_up, s->inside, GATE, m, s);
            linear(s->inside, rows, m->inner, 0, &l->down, s->x, ADD, m, s);
        }
        linear(s->x, rows, width, m->norm, &m->head, logits, STORE, m, s);
        end_products();
        free(p);
        free(q);
    }
}
