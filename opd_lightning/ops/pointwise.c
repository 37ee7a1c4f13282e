/* What stands between the products of a decoder's layer, forwards and backwards: norms, gates and rotary positions, each in one
 * pass over its numbers where PyTorch makes four to eight. Built by compiling.py with the machine's C compiler, when needed.
 *
 * Numbers are bfloat16 (`half`) or float32. Forwards they are rounded where transformers rounds; backwards once, at the end.
 */
#include <omp.h>

#include "vectors.h"

/* Numbers from place i on, of which there are `left`; 0 behind the last. */
INLINE vec take(const void *x, long i, long left, int half) {
    return left < LANES ? get_either(x, i, first(left), half) : all_either(x, i, half);
}

INLINE void give(void *y, long i, long left, vec value, int half) { put_either(y, i, first(left), value, half); }

INLINE vec in_kind(vec x, int half) { return half ? rounded(x) : x; }

/* y = weight * (x / root mean square of x); rows (count, width). scales (count,): 1 / root mean square. */
void opd_norm(const void *x, const void *weight, long count, long width, float eps, int half, void *y, float *scales,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < count; r++) {
        long row = r * width;
        vec sum = each(0.0f);
        for (long i = 0; i < width; i += LANES) {
            vec v = take(x, row + i, width - i, half);
            sum += v * v;
        }
        scales[r] = 1.0f / sqrtf(total(sum) / (float)width + eps);
        vec scale = each(scales[r]);
        for (long i = 0; i < width; i += LANES) {
            vec normal = in_kind(take(x, row + i, width - i, half) * scale, half);
            give(y, row + i, width - i, take(weight, i, width - i, half) * normal, half);
        }
    }
}

/* With n = x / rms and u = weight * dy: dx = (u - n mean(n u)) / rms, dweight = sum over rows of n dy. dweight (threads,
 * width), which is zero before, or 0 if nobody needs it. */
void opd_norm_back(const void *x, const void *weight, const float *scales, const void *dy, long count, long width, int half,
                   void *dx, float *dweight, int threads) {
#pragma omp parallel num_threads(threads)
    {
        float *own = dweight ? dweight + omp_get_thread_num() * width : 0;
#pragma omp for schedule(static)
        for (long r = 0; r < count; r++) {
            long row = r * width;
            vec sum = each(0.0f), scale = each(scales[r]);
            for (long i = 0, left = width; i < width; i += LANES, left -= LANES) {
                vec n = take(x, row + i, left, half) * scale, g = take(dy, row + i, left, half);
                sum += take(weight, i, left, half) * g * n;
                if (own) give(own, i, left, n * g + take(own, i, left, 0), 0);
            }
            vec mean = each(total(sum) / (float)width);
            for (long i = 0, left = width; i < width; i += LANES, left -= LANES) {
                vec n = take(x, row + i, left, half) * scale, u = take(weight, i, left, half) * take(dy, row + i, left, half);
                give(dx, row + i, left, scale * (u - n * mean), half);
            }
        }
    }
}

/* 1 / (1 + e^-x), not below e^-87: smaller numbers are slow to compute with. */
INLINE vec sigmoid(vec x) { return each(1.0f) / (each(1.0f) + exp_of(smaller(each(87.0f), -x))); }

/* y = silu(gate) * up, of `count` numbers. */
void opd_gate(const void *gate, const void *up, long count, int half, void *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i += LANES) {
        vec g = take(gate, i, count - i, half);
        give(y, i, count - i, in_kind(g * sigmoid(g), half) * take(up, i, count - i, half), half);
    }
}

/* dup = silu(gate) dy, dgate = s (1 + gate (1 - s)) up dy with s = sigmoid(gate). */
void opd_gate_back(const void *gate, const void *up, const void *dy, long count, int half, void *dgate, void *dup,
                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i += LANES) {
        vec g = take(gate, i, count - i, half), d = take(dy, i, count - i, half), s = sigmoid(g);
        give(dup, i, count - i, g * s * d, half);
        give(dgate, i, count - i, s * (1.0f + g * (1.0f - s)) * take(up, i, count - i, half) * d, half);
    }
}

/* Rotary positions of x (tokens, heads, size), cos and sin (tokens, size): y = x cos + turned(x) sin, where turned(x) is minus
 * the second half and then the first. `back`: the same transposed, which carries gradients back. */
void opd_rotate(const void *x, const void *cos, const void *sin, long tokens, long heads, long size, int half, int back,
                void *y, int threads) {
    long middle = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < tokens; t++) {
        for (long i = 0, left = middle; i < middle; i += LANES, left -= LANES) {
            long low = t * size + i, high = low + middle;
            vec c = take(cos, low, left, half), c2 = take(cos, high, left, half);
            vec s = take(sin, low, left, half), s2 = take(sin, high, left, half);
            for (long h = 0; h < heads; h++) {
                long at = (t * heads + h) * size + i;
                vec a = take(x, at, left, half), b = take(x, at + middle, left, half);
                if (back) {
                    give(y, at, left, a * c + b * s2, half);
                    give(y, at + middle, left, b * c2 - a * s, half);
                } else {
                    give(y, at, left, in_kind(a * c, half) - in_kind(b * s, half), half);
                    give(y, at + middle, left, in_kind(b * c2, half) + in_kind(a * s2, half), half);
                }
            }
        }
    }
}
