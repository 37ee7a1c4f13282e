/* From logits to tokens, one draw a row, in float32 or bfloat16; and the loop of steps and draws, in which nothing is left to
 * Python until a row ends. Built by compiling.py with the machine's C compiler, when it is needed.
 */
#include <stdlib.h>

#include "vectors.h"

#define BLOCK 256

/* Probabilities but for a factor; 0 where one is no normal number beside the largest. */
static inline vec weights_at(const void *x, long i, mask some, float top, float scale, int half) {
    vec far = (get_either(x, i, some, half) - top) * scale;
    return only(zero_below(far, exp_of(far), -87.0f), some);
}

/* The first token at which the running sum passes the share `uniform` of the whole; one that has mass, if any does. */
static int64_t drawn(const void *x, long size, float scale, float uniform, float *mass, int half, float *logprob) {
    vec most = each(-INFINITY);
    double sum = 0.0, running = 0.0, before = 0.0;
    long block = 0, place = 0;
    for (long i = 0; i < size; i += LANES) {
        mask here = first(size - i);
        most = larger(most, least_where(get_either(x, i, here, half), here));
    }
    float top = largest(most), weights[BLOCK];
    for (long start = 0; start < size; start += BLOCK) {
        vec part = each(0.0f);
        for (long i = start; i < least(start + BLOCK, size); i += LANES)
            part += weights_at(x, i, first(size - i), top, scale, half);
        mass[start / BLOCK] = total(part);
        sum += mass[start / BLOCK];
    }
    double point = uniform * sum;
    for (long b = 0; b < (size + BLOCK - 1) / BLOCK; b++) {
        if (mass[b] > 0.0f) block = b, before = running;
        running += mass[b];
        if (running > point) break;
    }
    running = before;
    long start = block * BLOCK;
    for (long i = 0; i < BLOCK; i += LANES)
        put(weights + i, first(LANES), weights_at(x, start + i, first(size - start - i), top, scale, half));
    for (long i = 0; i < BLOCK; i++) {
        if (weights[i] > 0.0f) place = start + i;
        running += weights[i];
        if (weights[i] > 0.0f && running > point) break;
    }
    *logprob = (total(get_either(x, place, first(1), half)) - top) * scale - (float)log(sum);
    return place;
}

/* How tokens are drawn: from softmax(scale * logits) of `size` entries, with numbers in [0, 1). Rows of logits, which are bfloat16
 * if `half`, are `apart` numbers from each other, those of uniforms, tokens and logprobs `steps`. */
typedef struct {
    void *logits;
    const float *uniforms;
    int64_t *tokens;
    float *logprobs;
    int64_t apart, size, steps, half;
    float scale;
} Draws;

/* Step `n`: one token a row, and its log-probability. */
void opd_draw(const Draws *d, long n, long rows, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *mass = malloc((size_t)(d->size / BLOCK + 1) * sizeof *mass);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            const char *x = (const char *)d->logits + r * d->apart * (d->half ? 2 : 4);
            long at = r * d->steps + n;
            d->tokens[at] = drawn(x, d->size, d->scale, d->uniforms[at], mass, (int)d->half, d->logprobs + at);
        }
        free(mass);
    }
}

/* `opd_step` of a decoder. */
typedef void (*Step)(const void *model, const int64_t *ids, const int64_t *places, long rows, const void *space, void *logits,
                     int threads);

/* Write up to `d->steps` tokens a row behind ids (rows,), which stand at places (rows,), and move both on. Stops behind the first
 * step in which a row draws one of the tokens that `ends` marks; returns how many steps it took. */
long opd_write(Step step, const void *model, const void *space, const Draws *d, const uint8_t *ends, int64_t *ids,
               int64_t *places, long rows, int threads) {
    long n = 0;
    for (int over = 0; !over && n < d->steps; n++) {
        step(model, ids, places, rows, space, d->logits, threads);
        opd_draw(d, n, rows, threads);
        for (long r = 0; r < rows; r++) {
            ids[r] = d->tokens[r * d->steps + n];
            places[r]++;
            over |= ends[ids[r]];
        }
    }
    return n;
}
