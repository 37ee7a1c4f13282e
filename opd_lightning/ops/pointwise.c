/* What stands between the products of a decoder's layer, forwards and backwards: norms, gates and rotary positions, each in one
 * pass over its numbers where PyTorch makes four to eight. Built by compiling.py with the machine's C compiler, when needed.
 *
 * Numbers are bfloat16 (`half`) or float32. Forwards they are rounded where transformers rounds; backwards once, at the end.
 */
#include <omp.h>

#include "compiling.h"

static inline __mmask16 first(long count) { return count < 16 ? (__mmask16)((1u << count) - 1) : (__mmask16)0xffff; }

/* Up to sixteen numbers from place i on; 0 behind the last. */
static inline __m512 take(const void *x, long i, __mmask16 some, int half) {
    if (half) return widen(_mm256_maskz_loadu_epi16(some, (const bf16 *)x + i));
    return _mm512_maskz_loadu_ps(some, (const float *)x + i);
}

static inline void put(void *y, long i, __mmask16 some, __m512 value, int half) {
    if (half)
        _mm256_mask_storeu_epi16((bf16 *)y + i, some, narrow16(value));
    else
        _mm512_mask_storeu_ps((float *)y + i, some, value);
}

static inline __m512 in_kind(__m512 x, int half) { return half ? rounded(x) : x; }

/* y = weight * (x / root mean square of x); rows (count, width). scales (count,): 1 / root mean square. */
void opd_norm(const void *x, const void *weight, long count, long width, float eps, int half, void *y, float *scales,
              int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < count; r++) {
        long row = r * width;
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < width; i += 16) {
            __m512 v = take(x, row + i, first(width - i), half);
            sum = _mm512_fmadd_ps(v, v, sum);
        }
        scales[r] = 1.0f / __builtin_sqrtf(_mm512_reduce_add_ps(sum) / (float)width + eps);
        __m512 scale = _mm512_set1_ps(scales[r]);
        for (long i = 0; i < width; i += 16) {
            __mmask16 some = first(width - i);
            __m512 normal = in_kind(_mm512_mul_ps(take(x, row + i, some, half), scale), half);
            put(y, row + i, some, _mm512_mul_ps(take(weight, i, some, half), normal), half);
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
            __m512 sum = _mm512_setzero_ps(), scale = _mm512_set1_ps(scales[r]);
            for (long i = 0; i < width; i += 16) {
                __mmask16 some = first(width - i);
                __m512 n = _mm512_mul_ps(take(x, row + i, some, half), scale), g = take(dy, row + i, some, half);
                sum = _mm512_fmadd_ps(_mm512_mul_ps(take(weight, i, some, half), g), n, sum);
                if (own) _mm512_mask_storeu_ps(own + i, some, _mm512_fmadd_ps(n, g, _mm512_maskz_loadu_ps(some, own + i)));
            }
            __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)width);
            for (long i = 0; i < width; i += 16) {
                __mmask16 some = first(width - i);
                __m512 n = _mm512_mul_ps(take(x, row + i, some, half), scale), g = take(dy, row + i, some, half);
                __m512 u = _mm512_mul_ps(take(weight, i, some, half), g);
                put(dx, row + i, some, _mm512_mul_ps(scale, _mm512_fnmadd_ps(n, mean, u)), half);
            }
        }
    }
}

/* 1 / (1 + e^-x) */
static inline __m512 sigmoid(__m512 x) {
    __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(one, _mm512_add_ps(one, exp16(minus)));
}

/* y = silu(gate) * up, of `count` numbers. */
void opd_gate(const void *gate, const void *up, long count, int half, void *y, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i += 16) {
        __mmask16 some = first(count - i);
        __m512 g = take(gate, i, some, half);
        put(y, i, some, _mm512_mul_ps(in_kind(_mm512_mul_ps(g, sigmoid(g)), half), take(up, i, some, half)), half);
    }
}

/* dup = silu(gate) dy, dgate = s (1 + gate (1 - s)) up dy with s = sigmoid(gate). */
void opd_gate_back(const void *gate, const void *up, const void *dy, long count, int half, void *dgate, void *dup,
                   int threads) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long i = 0; i < count; i += 16) {
        __mmask16 some = first(count - i);
        __m512 g = take(gate, i, some, half), d = take(dy, i, some, half), s = sigmoid(g);
        __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
        put(dup, i, some, _mm512_mul_ps(_mm512_mul_ps(g, s), d), half);
        put(dgate, i, some, _mm512_mul_ps(_mm512_mul_ps(slope, take(up, i, some, half)), d), half);
    }
}

/* Rotary positions of x (tokens, heads, size), cos and sin (tokens, size): y = x cos + turned(x) sin, where turned(x) is minus
 * the second half and then the first. `back`: the same transposed, which carries gradients back. */
void opd_rotate(const void *x, const void *cos, const void *sin, long tokens, long heads, long size, int half, int back,
                void *y, int threads) {
    long middle = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < tokens; t++) {
        for (long i = 0; i < middle; i += 16) {
            __mmask16 some = first(middle - i);
            __m512 c = take(cos, t * size + i, some, half), c2 = take(cos, t * size + middle + i, some, half);
            __m512 s = take(sin, t * size + i, some, half), s2 = take(sin, t * size + middle + i, some, half);
            for (long h = 0; h < heads; h++) {
                long at = (t * heads + h) * size + i;
                __m512 low = take(x, at, some, half), high = take(x, at + middle, some, half), a, b;
                if (back) {
                    a = _mm512_fmadd_ps(low, c, _mm512_mul_ps(high, s2));
                    b = _mm512_fmsub_ps(high, c2, _mm512_mul_ps(low, s));
                } else {
                    a = _mm512_sub_ps(in_kind(_mm512_mul_ps(low, c), half), in_kind(_mm512_mul_ps(high, s), half));
                    b = _mm512_add_ps(in_kind(_mm512_mul_ps(high, c2), half), in_kind(_mm512_mul_ps(low, s2), half));
                }
                put(y, at, some, a, half);
                put(y, at + middle, some, b, half);
            }
        }
    }
}
