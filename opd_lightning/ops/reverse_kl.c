/* The reverse KL of two models' logits, in float32 or bfloat16 (`half`), with the gradient of the student's logits and what is
 * measured of both laws. What PyTorch does in twenty passes over blocks of float32 numbers are a few here, over rows that
 * stay in a core's cache. Built by compiling.py with the machine's C compiler, when it is needed.
 *
 * Each row is computed by itself, whatever other rows there are, in one order of summation.
 */
#include "vectors.h"

/* The least log-probability, log(FLT_MIN), as `floor_of` in logprobs.py says. */
#define FLOOR -87.33654f

/* Entries that are summed in float32, before their sum is added in float64. */
#define CHUNK 1024

/* For every vector from place `i` on: whole ones, then what is left before `end`. */
#define EACH(end, ...)                                                                                                          \
    for (; i + LANES <= (end); i += LANES) { const int whole_ = 1; __VA_ARGS__ }                                                \
    for (; i < (end); i += LANES) { const int whole_ = 0; __VA_ARGS__ }

/* One model's row: its logits, the largest of them, and 1 / temperature. */
typedef struct {
    const void *logits;
    vec top, scale;
} Row;

/* Logits from place i on; behind the last one, minus infinity. */
INLINE vec take(const void *x, long i, long size, const int half, const int whole_) {
    mask here = first(size - i);
    return whole_ ? all_either(x, i, half) : least_where(get_either(x, i, here, half), here);
}

/* The same as log-probabilities that lack the row's constant, not below `least`. Of two operands, NaN in the second is kept. */
INLINE vec shifted(Row row, long i, long size, vec least, const int half, const int whole_) {
    return larger(least, (take(row.logits, i, size, half, whole_) - row.top) * row.scale);
}

/* The same for one place. */
INLINE float at(Row row, long place, float least, const int half) {
    return largest(shifted(row, place, place + 1, each(least), half, 0));
}

INLINE Row row_of(const void *x, long size, float scale, const int half) {
    vec a = each(-INFINITY), b = a;
    long i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES)
        a = larger(take(x, i, size, half, 1), a), b = larger(take(x, i + LANES, size, half, 1), b);
    for (; i < size; i += LANES) a = larger(take(x, i, size, half, 0), a);
    return (Row){x, each(largest(larger(a, b))), each(scale)};
}

/* A token's log-probability, given the logarithm of the row's sum. */
INLINE float of_token(Row row, int64_t token, float log_sum, const int half) {
    float found = at(row, token, -INFINITY, half) - log_sum;
    return found < FLOOR ? FLOOR : found;
}

/* Where a row is largest. */
INLINE long place_of_top(Row row, long size, const int half) {
    for (long i = 0; i < size; i += LANES)
        if (largest(take(row.logits, i, size, half, 0) - row.top) == 0.0f)
            for (long j = i; j < least(i + LANES, size); j++)
                if (at(row, j, -INFINITY, half) == 0.0f) return j;
    return 0;
}

/* Sums over the entries, of the student's s and the teacher's t: e^s, e^t, e^s s, e^t t, e^s (s - t - gap). Returns the least
 * t. */
INLINE float sums(Row ours, Row theirs, long size, vec our_least, vec their_least, vec gap, double *all_of, const int half) {
    vec low = each(0.0f);
    for (int k = 0; k < 5; k++) all_of[k] = 0.0;
    for (long i = 0, start = 0; start < size; start += CHUNK) {
        vec a = each(0.0f), b = a, c = a, d = a, e = a;
        EACH(least(start + CHUNK, size), {
            mask here = whole_ ? first(LANES) : first(size - i);
            vec s = shifted(ours, i, size, our_least, half, whole_), t = shifted(theirs, i, size, their_least, half, whole_);
            vec p = exp_below(s), q = exp_below(t);
            if (!whole_) p = only(p, here), q = only(q, here);
            a += p, b += q, c += p * s, d += q * t, e += p * (s - t - gap);
            low = smaller(whole_ ? t : only(t, here), low);
        })
        all_of[0] += total(a), all_of[1] += total(b), all_of[2] += total(c), all_of[3] += total(d), all_of[4] += total(e);
    }
    return -largest(-low);
}

typedef struct {
    const void *ours, *theirs;
    const int64_t *tokens;
    const float *factors;
    void *gradient;
    float *out;
    int64_t our_step, their_step, step, rows, size;
    float scale;
} Laws;

INLINE void compare(const Laws *l, long row, const int half, const int more) {
    long size = l->size, wide = half ? 2 : 4, i = 0;
    Row x = row_of((const char *)l->ours + row * l->our_step * wide, size, l->scale, half);
    Row y = row_of((const char *)l->theirs + row * l->their_step * wide, size, l->scale, half);
    /* Gaps are taken from the one at the likeliest token: of a law that is nearly sure of it, sums would lose all else. */
    float origin = -at(y, place_of_top(x, size, half), FLOOR, half);
    vec gap = each(origin), floor_ = each(FLOOR);
    double found[5], again[5];
    float low = sums(x, y, size, floor_, floor_, gap, found, half);
    float x_log = logf((float)found[0]), y_log = logf((float)found[1]);
    vec y_floor = each(FLOOR + y_log);
    if (low < FLOOR + y_log) { /* the floor holds for log-probabilities: where it counts, the sum that it enters is taken again */
        sums(x, y, size, floor_, y_floor, gap, again, half);
        found[4] = again[4];
    }
    float mean = (float)(found[4] / found[0]), *out = l->out + row;
    out[0] = mean + origin - x_log + y_log;
    out[l->rows] = of_token(x, l->tokens[row], x_log, half);
    out[2 * l->rows] = of_token(y, l->tokens[row], y_log, half);
    out[3 * l->rows] = (float)(x_log - found[2] / found[0]);
    out[4 * l->rows] = (float)(y_log - found[3] / found[1]);
    vec middle = each(mean), weight = each((float)(l->factors[row] * l->scale / found[0]));
    vec even = each(y_log - x_log);
    double liked = 0.0, likes = 0.0, rejected = 0.0;
    char *gradient = (char *)l->gradient + row * l->step * wide;
    for (long start = 0; start < size; start += CHUNK) {
        vec a = each(0.0f), b = a, c = a;
        EACH(least(start + CHUNK, size), {
            mask here = whole_ ? first(LANES) : first(size - i);
            vec s = shifted(x, i, size, floor_, half, whole_), t = shifted(y, i, size, y_floor, half, whole_);
            vec p = exp_below(s), v = p * weight * (s - t - gap - middle);
            if (more) { /* behind the last entry both are at the floor: nothing to speak of */
                vec above = t - s;
                a += where_larger(above, even, p), b += where_larger(above, even, exp_below(t));
                c += where_larger(even, above, p);
            }
            put_either(gradient, i, here, v, half);
        })
        if (more) liked += total(a), likes += total(b), rejected += total(c);
    }
    if (!more) return;
    out[5 * l->rows] = (float)(liked / found[0]);
    out[6 * l->rows] = (float)(likes / found[1]);
    out[7 * l->rows] = (float)(rejected / found[0]);
    out[8 * l->rows] = total(only(x.top * x.scale, first(1))) + x_log;
    out[9 * l->rows] = total(only(y.top * y.scale, first(1))) + y_log;
}

/* Gradients are of `factors * value`; they may take the place of the student's logits. Steps are from row to row. `out` takes,
 * for all rows each: the value, the tokens' log-probabilities under student and teacher, and the entropies of both; if there
 * shall be `more`, also the probability of what the teacher likes more under student and teacher, that of what it likes less
 * under the student, and what logits / temperature of both exceed log-probabilities by. */
void opd_reverse_kl(const Laws *l, int half, int more, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long row = 0; row < l->rows; row++) {
        switch (2 * !!half + !!more) {
        case 0: compare(l, row, 0, 0); break;
        case 1: compare(l, row, 0, 1); break;
        case 2: compare(l, row, 1, 0); break;
        case 3: compare(l, row, 1, 1); break;
        }
    }
}
