/* Causal attention of rows that lie behind each other in one line of tokens, forwards and backwards. A row is a segment of the
 * line; before its own tokens it may see others, which it shares with other rows. Every table of scores is made for a few
 * queries of one head, in a core's cache; whatever is behind a query is left out. Computed in float32, read and written in
 * float32 or bfloat16 (`half`). Built by compiling.py with the machine's C compiler, when it is needed.
 *
 * Each item of work writes what no other writes, in one order of summation: results do not depend on the number of threads.
 */
#include <stdlib.h>

#include "vectors.h"

typedef struct {
    const void *q, *k, *v;   /* (tokens, heads, size), and (tokens, keys, size) twice */
    const int64_t *segments; /* (count, 4): first token and the one behind the last, first of its spans and the one behind */
    const int64_t *spans;    /* (, 2): tokens that segments see before their own, in order */
    int64_t count, heads, keys, size, half;
    float scale;
} Line;

#define BLOCK 24 /* queries that are taken at once: whole tiles */
#define FAR -80.0f /* in nats: what is so much less likely than the likeliest has no weight; products stay normal numbers */

#ifdef __AVX512F__
#define TALL 6 /* rows and vectors of a tile, which is summed in registers */
#define WIDE 4
#else
#define TALL 4
#define WIDE 2
#endif

static inline long up(long n, long to) { return (n + to - 1) / to * to; }

/* What one thread works in, in float32. Rows have `wide` numbers, tables `apart`; what lies behind the numbers is 0. */
typedef struct {
    long wide, apart;
    float *k, *v, *turned_k, *turned_v;   /* keys and values of one head; the same with a column a token */
    float *q, *gradient, *out, *p, *of_p; /* a block of queries, what they get and give, and their tables */
    float *of_k, *of_v;
} Room;

/* ---- numbers in and out -------------------------------------------------------------------------------------------------- */

/* Tokens from `start` to `stop` of one of the heads of x, times a factor: rows of y. */
static void fetch(const Line *l, const void *x, long heads, long head, long start, long stop, float factor, long wide, float *y) {
    long at = (start * heads + head) * l->size, apart = heads * l->size;
    for (long t = start; t < stop; t++, y += wide, at += apart)
        for (long i = 0; i < l->size; i += LANES) {
            put(y + i, first(LANES), factor * get_either(x, at + i, first(l->size - i), (int)l->half));
        }
}

static void store(const Line *l, const float *y, long wide, void *x, long heads, long head, long start, long stop) {
    for (long t = start; t < stop; t++, y += wide)
        for (long i = 0; i < l->size; i += LANES) {
            long at = (t * heads + head) * l->size + i;
            put_either(x, at, first(l->size - i), all(y + i), (int)l->half);
        }
}

static void clear(float *x, long count) { memset(x, 0, (size_t)count * sizeof *x); }

static void scale(float *x, long count, float factor) {
    for (long i = 0; i < count; i += LANES) put(x + i, first(LANES), all(x + i) * factor);
}

/* Rows become columns: y (wide, apart) of x (count, wide). What x has behind its rows, up to a vector, is 0. */
static void turn(const float *x, long count, long wide, long apart, float *y) {
    for (long t = 0; t < count; t += LANES)
        for (long i = 0; i < wide; i += LANES) {
            vec part[LANES];
            for (long r = 0; r < LANES; r++) part[r] = all(x + (t + r) * wide + i);
            transposed(part);
            for (long r = 0; r < LANES; r++) put(y + (i + r) * apart + t, first(LANES), part[r]);
        }
}

/* ---- products ------------------------------------------------------------------------------------------------------------ */

INLINE void tile(const float *a, long down, long along, const float *b, long of_b, long depth, const int vectors, float *c,
                 long of_c, int add) {
    vec sum[TALL][WIDE];
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) sum[r][j] = add ? all(c + r * of_c + j * LANES) : each(0.0f);
    for (long k = 0; k < depth; k++) {
        vec part[WIDE];
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) part[j] = all(b + k * of_b + j * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < TALL; r++) {
            vec own = each(a[r * down + k * along]);
#pragma GCC unroll 8
            for (int j = 0; j < vectors; j++) sum[r][j] += own * part[j];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++)
#pragma GCC unroll 8
        for (int j = 0; j < vectors; j++) put(c + r * of_c + j * LANES, first(LANES), sum[r][j]);
}

/* c (rows, columns) = or += a (rows, depth) b (depth, columns). Numbers of a are `down` and `along` apart; rows fill whole tiles,
 * columns whole vectors. */
static void multiply(const float *a, long down, long along, const float *b, long of_b, long rows, long depth, long columns,
                     float *c, long of_c, int add) {
    for (long j = 0; j < columns; j += WIDE * LANES)
        for (long r = 0; r < rows; r += TALL) {
            const float *left = a + r * down, *right = b + j;
            float *to = c + r * of_c + j;
            switch (least(columns - j, WIDE * LANES) / LANES) {
            case 1: tile(left, down, along, right, of_b, depth, 1, to, of_c, add); break;
            case 2: tile(left, down, along, right, of_b, depth, 2, to, of_c, add); break;
#if WIDE == 4
            case 3: tile(left, down, along, right, of_b, depth, 3, to, of_c, add); break;
            case 4: tile(left, down, along, right, of_b, depth, 4, to, of_c, add); break;
#endif
            }
        }
}

/* ---- forwards ------------------------------------------------------------------------------------------------------------ */

/* e^(x - top) where that counts */
static inline vec weight_of(vec x, vec top) {
    vec far = x - top;
    return zero_below(far, exp_below(far), FAR);
}

/* e^(x - the largest) of the first `count` numbers, 0 up to `end`; the largest, and one over their sum. */
static void powers(float *x, long count, long end, float *size) {
    vec most = each(-INFINITY), sum = each(0.0f);
    long t = 0;
    for (; t + LANES <= count; t += LANES) most = larger(most, all(x + t));
    if (t < count) most = larger(most, least_where(all(x + t), first(count - t)));
    vec top = each(largest(most));
    for (t = 0; t + LANES <= count; t += LANES) {
        vec found = weight_of(all(x + t), top);
        put(x + t, first(LANES), found);
        sum += found;
    }
    for (; t < end; t += LANES) {
        vec found = only(weight_of(all(x + t), top), first(count - t));
        put(x + t, first(LANES), found);
        sum += found;
    }
    size[0] = largest(most), size[1] = 1.0f / total(sum);
}

static void read_keys(const Line *l, Room *m, long key, long start, long stop, long at) {
    fetch(l, l->k, l->keys, key, start, stop, 1.0f, m->wide, m->k + at * m->wide);
    fetch(l, l->v, l->keys, key, start, stop, 1.0f, m->wide, m->v + at * m->wide);
}

/* Keys and values of all that a segment sees, its own last. Returns how many come before its own. */
static long collect(const Line *l, Room *m, const int64_t *segment, long key) {
    long before = 0;
    for (const int64_t *span = l->spans + 2 * segment[2]; span < l->spans + 2 * segment[3]; span += 2) {
        read_keys(l, m, key, span[0], span[1], before);
        before += span[1] - span[0];
    }
    read_keys(l, m, key, segment[0], segment[1], before);
    long count = before + segment[1] - segment[0], rest = (up(count, LANES) - count) * m->wide;
    clear(m->k + count * m->wide, rest), clear(m->v + count * m->wide, rest);
    turn(m->k, count, m->wide, m->apart, m->turned_k);
    return before;
}

/* `count` queries of a head from token t on, times the scale of the scores. */
static void ask(const Line *l, Room *m, long head, long t, long count) {
    fetch(l, l->q, l->heads, head, t, t + count, l->scale, m->wide, m->q);
    clear(m->q + count * m->wide, (up(count, TALL) - count) * m->wide);
}

static void attend(const Line *l, Room *m, const int64_t *segment, long key, void *out, float *sizes) {
    long before = collect(l, m, segment, key), shared = l->heads / l->keys;
    for (long head = key * shared; head < (key + 1) * shared; head++)
        for (long t = segment[0]; t < segment[1]; t += BLOCK) {
            long count = least(BLOCK, segment[1] - t), seen = before + t - segment[0] + count, columns = up(seen, LANES);
            ask(l, m, head, t, count);
            multiply(m->q, m->wide, 1, m->turned_k, m->apart, up(count, TALL), l->size, columns, m->p, m->apart, 0);
            float *size = sizes + 2 * (t * l->heads + head);
            for (long r = 0; r < count; r++)
                powers(m->p + r * m->apart, seen - count + r + 1, columns, size + 2 * r * l->heads);
            multiply(m->p, m->apart, 1, m->v, m->wide, up(count, TALL), seen, m->wide, m->out, m->wide, 0);
            for (long r = 0; r < count; r++) scale(m->out + r * m->wide, m->wide, size[2 * r * l->heads + 1]);
            store(l, m->out, m->wide, out, l->heads, head, t, t + count);
        }
}

/* ---- backwards ----------------------------------------------------------------------------------------------------------- */

/* What the backward pass is given, and what it makes. */
typedef struct {
    const void *out, *gradient; /* (tokens, heads, size) */
    const float *sizes;         /* (tokens, heads, 2): the largest score, and one over the sum of all weights beside it */
    void *of_q, *of_k, *of_v;
} Back;

/* For `count` queries of a head from token t on: tables of their weights p and of the scores' gradients p (dp - p dp) over
 * `columns` keys, of which query r sees the first `seen + r`, or all `seen` where there is no order (`ordered` is 0). */
static void derive(const Line *l, const Back *b, Room *m, long head, long t, long count, long seen, int ordered, long columns) {
    ask(l, m, head, t, count);
    fetch(l, b->gradient, l->heads, head, t, t + count, 1.0f, m->wide, m->gradient);
    fetch(l, b->out, l->heads, head, t, t + count, 1.0f, m->wide, m->out);
    clear(m->gradient + count * m->wide, (up(count, TALL) - count) * m->wide);
    multiply(m->q, m->wide, 1, m->turned_k, m->apart, up(count, TALL), l->size, columns, m->p, m->apart, 0);
    multiply(m->gradient, m->wide, 1, m->turned_v, m->apart, up(count, TALL), l->size, columns, m->of_p, m->apart, 0);
    for (long r = 0; r < count; r++) {
        float *p = m->p + r * m->apart, *of_p = m->of_p + r * m->apart;
        const float *size = b->sizes + 2 * ((t + r) * l->heads + head);
        vec inner = each(0.0f), top = each(size[0]), share = each(size[1]);
        for (long i = 0; i < m->wide; i += LANES) inner += all(m->out + r * m->wide + i) * all(m->gradient + r * m->wide + i);
        inner = each(total(inner));
        for (long c = 0; c < columns; c += LANES) {
            vec weight = only(weight_of(all(p + c), top) * share, first(seen + ordered * r - c));
            put(p + c, first(LANES), weight);
            put(of_p + c, first(LANES), weight * (all(of_p + c) - inner));
        }
    }
}

/* Add what a block's tables give the keys of `rows` columns from `column` on. */
static void give(Room *m, long column, long rows, long count) {
    multiply(m->p + column, 1, m->apart, m->gradient, m->wide, up(rows, TALL), count, m->wide, m->of_v, m->wide, 1);
    multiply(m->of_p + column, 1, m->apart, m->q, m->wide, up(rows, TALL), count, m->wide, m->of_k, m->wide, 1);
}

/* Gradients of a segment's queries, and of its keys and values as far as they come from its own queries. */
static void attend_back(const Line *l, const Back *b, Room *m, const int64_t *segment, long key) {
    long before = collect(l, m, segment, key), own = segment[1] - segment[0], shared = l->heads / l->keys;
    turn(m->v, before + own, m->wide, m->apart, m->turned_v);
    clear(m->of_k, up(own, TALL) * m->wide), clear(m->of_v, up(own, TALL) * m->wide);
    for (long head = key * shared; head < (key + 1) * shared; head++)
        for (long t = segment[0]; t < segment[1]; t += BLOCK) {
            long count = least(BLOCK, segment[1] - t), seen = before + t - segment[0];
            derive(l, b, m, head, t, count, seen + 1, 1, up(seen + count, LANES));
            multiply(m->of_p, m->apart, 1, m->k, m->wide, up(count, TALL), seen + count, m->wide, m->out, m->wide, 0);
            scale(m->out, count * m->wide, l->scale);
            store(l, m->out, m->wide, b->of_q, l->heads, head, t, t + count);
            give(m, before, seen - before + count, count);
        }
    store(l, m->of_k, m->wide, b->of_k, l->keys, key, segment[0], segment[1]);
    store(l, m->of_v, m->wide, b->of_v, l->keys, key, segment[0], segment[1]);
}

/* Add to the gradients of some keys and values what comes from the segments that see them before their own. */
static void share_back(const Line *l, const Back *b, Room *m, long start, long stop, long key) {
    long count = stop - start, rest = (up(count, LANES) - count) * m->wide, shared = l->heads / l->keys;
    read_keys(l, m, key, start, stop, 0);
    clear(m->k + count * m->wide, rest), clear(m->v + count * m->wide, rest);
    turn(m->k, count, m->wide, m->apart, m->turned_k), turn(m->v, count, m->wide, m->apart, m->turned_v);
    fetch(l, b->of_k, l->keys, key, start, stop, 1.0f, m->wide, m->of_k);
    fetch(l, b->of_v, l->keys, key, start, stop, 1.0f, m->wide, m->of_v);
    for (const int64_t *segment = l->segments; segment < l->segments + 4 * l->count; segment += 4) {
        int sees = 0;
        for (const int64_t *span = l->spans + 2 * segment[2]; span < l->spans + 2 * segment[3]; span += 2)
            sees |= span[0] <= start && stop <= span[1];
        for (long head = key * shared; sees && head < (key + 1) * shared; head++)
            for (long t = segment[0]; t < segment[1]; t += BLOCK) {
                long queries = least(BLOCK, segment[1] - t);
                derive(l, b, m, head, t, queries, count, 0, up(count, LANES));
                give(m, 0, count, queries);
            }
    }
    store(l, m->of_k, m->wide, b->of_k, l->keys, key, start, stop);
    store(l, m->of_v, m->wide, b->of_v, l->keys, key, start, stop);
}

/* ---- calls --------------------------------------------------------------------------------------------------------------- */

/* Room for segments that see up to `longest` tokens. Returns what to free. */
static float *enter(const Line *l, Room *m, long longest, int back) {
    long wide = up(l->size, LANES), rows = up(longest, LANES) + LANES + TALL, apart = rows | 16, table = BLOCK * apart, block = BLOCK * wide;
    float *free_ = malloc((size_t)((back ? 4 : 2) * rows * wide + (back ? 2 : 1) * (wide * apart + table) + 3 * block) * sizeof *free_);
    float *next = free_;
    *m = (Room){.wide = wide, .apart = apart};
    m->k = next, next += rows * wide;
    m->v = next, next += rows * wide;
    m->turned_k = next, next += wide * apart;
    m->p = next, next += table;
    m->q = next, next += block;
    m->gradient = next, next += block;
    m->out = next, next += block;
    if (back) {
        m->of_k = next, next += rows * wide;
        m->of_v = next, next += rows * wide;
        m->turned_v = next, next += wide * apart;
        m->of_p = next;
    }
    return free_;
}

/* out and sizes, as the backward pass takes them. `longest`: most tokens that a segment sees. */
void opd_attend(const Line *l, long longest, void *out, float *sizes, int threads) {
    long chunk = l->count < 4 * threads ? 1 : l->keys; /* heads of a row lie beside each other */
#pragma omp parallel num_threads(threads)
    {
        Room m;
        float *held = enter(l, &m, longest, 0);
#pragma omp for schedule(dynamic, chunk)
        for (long n = 0; n < l->count * l->keys; n++) attend(l, &m, l->segments + 4 * (n / l->keys), n % l->keys, out, sizes);
        free(held);
    }
}

/* Gradients of q, k and v. pieces (shared, 2): tokens that several segments see before their own, in short pieces. */
void opd_attend_back(const Line *l, long longest, const Back *b, const int64_t *pieces, long shared, int threads) {
    long chunk = l->count < 4 * threads ? 1 : l->keys; /* heads of a row lie beside each other */
#pragma omp parallel num_threads(threads)
    {
        Room m;
        float *held = enter(l, &m, longest, 1);
#pragma omp for schedule(dynamic, chunk)
        for (long n = 0; n < l->count * l->keys; n++) attend_back(l, b, &m, l->segments + 4 * (n / l->keys), n % l->keys);
#pragma omp for schedule(dynamic)
        for (long n = 0; n < shared * l->keys; n++) {
            const int64_t *piece = pieces + 2 * (n / l->keys);
            share_back(l, b, &m, piece[0], piece[1], n % l->keys);
        }
        free(held);
    }
}
