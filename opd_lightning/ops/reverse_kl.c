/* The reverse KL of two models' bfloat16 logits, with the gradient of the student's logits and what is measured of both laws.
 * What PyTorch does in twenty passes over blocks of float32 numbers are three here, over bfloat16 rows that stay in a core's
 * cache. Built by compiling.py with the machine's C compiler, when it is needed.
 *
 * Each row is computed by itself, whatever other rows there are, in one order of summation.
 */
#include <math.h>

#include "compiling.h"

/* The least log-probability, log(FLT_MIN), as `floor_of` in logprobs.py says. */
#define FLOOR -87.33654f

/* Entries that are summed in float32, before their sum is added in float64. */
#define CHUNK 4096

/* One model's row: its logits, the largest of them, and 1 / temperature. */
typedef struct { const bf16 *logits; __m512 top, scale; } Row;

static inline __mmask16 first(long count) { return count < 16 ? (__mmask16)((1u << count) - 1) : (__mmask16)0xffff; }

/* Sixteen logits from place i on; behind the last one, minus infinity. */
static inline __m512 take(const bf16 *x, long i, long size) {
    return widen(_mm256_mask_loadu_epi16(_mm256_set1_epi16((short)0xff80), first(size - i), x + i));
}

/* The same as log-probabilities that lack the row's constant, not below `least`. Of two operands, NaN in the second is kept. */
static inline __m512 shifted(Row row, long i, long size, __m512 least) {
    return _mm512_max_ps(least, _mm512_mul_ps(_mm512_sub_ps(take(row.logits, i, size), row.top), row.scale));
}

static Row row_of(const bf16 *x, long size, float scale) {
    __m512 a = _mm512_set1_ps(-INFINITY), b = a;
    for (long i = 0; i < size; i += 32) {
        a = _mm512_max_ps(take(x, i, size), a);
        if (i + 16 < size) b = _mm512_max_ps(take(x, i + 16, size), b);
    }
    return (Row){x, _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(a, b))), _mm512_set1_ps(scale)};
}

/* A token's log-probability, given the logarithm of the row's sum. */
static float of_token(Row row, int64_t token, float log_sum) {
    __m512 x = shifted(row, token, token + 1, _mm512_set1_ps(-INFINITY));
    float found = _mm512_cvtss_f32(x) - log_sum;
    return found < FLOOR ? FLOOR : found;
}

/* Sums over the entries, of the student's s and the teacher's t: e^s, e^t, e^s s, e^t t, e^s (s - t). Returns the least t. */
static float sums(Row ours, Row theirs, long size, __m512 our_least, __m512 their_least, double *total) {
    __m512 low = _mm512_setzero_ps();
    for (int k = 0; k < 5; k++) total[k] = 0.0;
    for (long start = 0; start < size; start += CHUNK) {
        long stop = start + CHUNK < size ? start + CHUNK : size;
        __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a, e = a;
        for (long i = start; i < stop; i += 16) {
            __m512 s = shifted(ours, i, size, our_least), t = shifted(theirs, i, size, their_least);
            __m512 p = exp16(s), q = exp16(t);
            a = _mm512_add_ps(a, p), b = _mm512_add_ps(b, q);
            c = _mm512_fmadd_ps(p, s, c), d = _mm512_fmadd_ps(q, t, d), e = _mm512_fmadd_ps(p, _mm512_sub_ps(s, t), e);
            low = _mm512_min_ps(t, low);
        }
        total[0] += _mm512_reduce_add_ps(a), total[1] += _mm512_reduce_add_ps(b), total[2] += _mm512_reduce_add_ps(c);
        total[3] += _mm512_reduce_add_ps(d), total[4] += _mm512_reduce_add_ps(e);
    }
    return _mm512_reduce_min_ps(low);
}

/* Gradients are of `factors * value`, and close-packed; steps are from row to row. `out` takes, for all rows each: the value,
 * the tokens' log-probabilities under student and teacher, and the entropies of both. */
void opd_reverse_kl(const bf16 *ours, long our_step, const bf16 *theirs, long their_step, long rows, long size, float scale,
                    const int64_t *tokens, const float *factors, bf16 *gradient, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (long row = 0; row < rows; row++) {
        Row x = row_of(ours + row * our_step, size, scale), y = row_of(theirs + row * their_step, size, scale);
        double total[5];
        __m512 least = _mm512_set1_ps(FLOOR);
        float low = sums(x, y, size, least, least, total);
        float x_log = logf((float)total[0]), y_log = logf((float)total[1]), y_floor = FLOOR + y_log;
        __m512 y_least = _mm512_set1_ps(y_floor);
        if (low < y_floor) { /* the floor holds for log-probabilities: where it counts, the sum that it enters is taken again */
            double again[5];
            sums(x, y, size, least, y_least, again);
            total[4] = again[4];
        }
        float mean = (float)(total[4] / total[0]);
        out[row] = mean - x_log + y_log;
        out[rows + row] = of_token(x, tokens[row], x_log);
        out[2 * rows + row] = of_token(y, tokens[row], y_log);
        out[3 * rows + row] = (float)(x_log - total[2] / total[0]);
        out[4 * rows + row] = (float)(y_log - total[3] / total[1]);
        __m512 middle = _mm512_set1_ps(mean), weight = _mm512_set1_ps((float)(factors[row] * scale / total[0]));
        for (long i = 0; i < size; i += 16) {
            __m512 s = shifted(x, i, size, least), gap = _mm512_sub_ps(s, shifted(y, i, size, y_least));
            __m512 v = _mm512_mul_ps(_mm512_mul_ps(exp16(s), weight), _mm512_sub_ps(gap, middle));
            _mm256_mask_storeu_epi16(gradient + row * size + i, first(size - i), (__m256i)_mm512_cvtneps_pbh(v));
        }
    }
}
