/* Decoding steps in bfloat16 on x86-64: few rows meet many weights, so what counts is that weights are read once, in order, by
 * all cores, and that nothing else is done between them. Built by compiling.py with the machine's C compiler, when it is needed.
 *
 * Rounding follows transformers: every product of a layer, every norm and every sum of the residual stream is rounded to
 * bfloat16; sums are taken in float32. `wide`: the residual stream and the norms' weights are float32, as under mixed
 * precision.
 * Each row is computed by itself, whatever other rows there are, in one order of summation.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

/* ---- numbers ------------------------------------------------------------------------------------------------------------ */

static inline __m512 wide16(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

static inline __m512i load(const bf16 *x) { return _mm512_loadu_si512(x); }

static inline __m256i narrow16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow16(x)), 16));
}

/* e^x by 2^n and a polynomial: relative error below 3e-7. What is not a number stays so. */
static inline __m512 exp16(__m512 x) {
    const __m512 least = _mm512_set1_ps(-87.0f), most = _mm512_set1_ps(88.0f);
    __m512 held = _mm512_min_ps(most, _mm512_max_ps(least, x)); /* of two operands, NaN in the second is kept */
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(held, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), held);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Places of a column of a table with sixteen columns. */
static inline __m512i every16th(void) {
    return _mm512_set_epi32(240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 80, 64, 48, 32, 16, 0);
}

/* Sixteen numbers from place i on. */
static inline __m512 take(const void *x, long i, int wide) {
    return wide ? _mm512_loadu_ps((const float *)x + i) : wide16((const bf16 *)x + i);
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

/* ---- what becomes of 16 outputs of one row ------------------------------------------------------------------------------ */

enum { STORE, ADD, GATE };

static inline void finish(__m512 sum, __m512 up, const bf16 *bias, const bf16 *up_bias, void *y, long i, int mode, int wide) {
    if (bias) sum = _mm512_add_ps(sum, wide16(bias));
    sum = rounded(sum);
    if (mode == ADD) sum = _mm512_add_ps(take(y, i, wide), sum);
    if (mode == GATE) {
        if (up_bias) up = _mm512_add_ps(up, wide16(up_bias));
        __m512 one = _mm512_set1_ps(1.0f);
        __m512 swish = _mm512_div_ps(sum, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), sum))));
        sum = _mm512_mul_ps(rounded(swish), rounded(up));
    }
    if (mode == ADD && wide)
        _mm512_storeu_ps((float *)y + i, sum);
    else
        _mm256_storeu_si256((__m256i *)((bf16 *)y + i), narrow16(sum));
}

/* ---- linear layers ------------------------------------------------------------------------------------------------------ */

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

static void set_tiles(void) {
    Tiles tiles;
    memset(&tiles, 0, sizeof tiles);
    tiles.palette = 1;
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
}

/* Sixteen rows at a and sixteen at b, of a weight, times one or two groups of sixteen rows of x: (groups, a and b, 16 of the
 * weight, 16 of x) float32. Tiles that follow each other have names of their own, so that loads need not wait for products. */
static void block(const bf16 *a, const bf16 *b, const bf16 *packed, long width, int groups, float *sums) {
    long k = 0, apart = width * 2;
    const bf16 *second = packed + width * 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (groups == 1) {
        for (; k + 64 <= width; k += 64) {
            _tile_loadd(6, packed + k * 16, 64);
            _tile_loadd(4, a + k, apart);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, b + k, apart);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(7, packed + (k + 32) * 16, 64);
            _tile_loadd(2, a + k + 32, apart);
            _tile_dpbf16ps(0, 2, 7);
            _tile_loadd(3, b + k + 32, apart);
            _tile_dpbf16ps(1, 3, 7);
        }
        if (k < width) {
            _tile_loadd(6, packed + k * 16, 64);
            _tile_loadd(4, a + k, apart);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, b + k, apart);
            _tile_dpbf16ps(1, 5, 6);
        }
    } else {
        for (; k < width; k += 32) {
            _tile_loadd(4, a + k, apart);
            _tile_loadd(6, packed + k * 16, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, b + k, apart);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(7, second + k * 16, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(2, sums + 512, 64);
        _tile_stored(3, sums + 768, 64);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
}

/* Numbers k to k + 32 of up to sixteen rows of x as one tile: pairs of numbers, the rows beside each other. Without a norm
 * the numbers are bfloat16. */
static void pack(const void *x, int wide, const void *norm, const float *scales, long width, long k, long rows, bf16 *tile) {
    const __m512i down = every16th();
    for (long r = 0; r < rows; r++) {
        const void *row = from(x, r * width, norm && wide);
        __m512i pairs;
        if (norm) {
            __m512i low = _mm512_castsi256_si512(narrow16(normed(row, wide, norm, wide, k, scales[r])));
            pairs = _mm512_inserti64x4(low, narrow16(normed(row, wide, norm, wide, k + 16, scales[r])), 1);
        } else {
            pairs = load((const bf16 *)row + k);
        }
        _mm512_i32scatter_epi32((uint32_t *)tile + r, down, pairs, 4);
    }
}

/* ---- the two calls ------------------------------------------------------------------------------------------------------ */

/* y = x W' + b of (rows, width), W (out, width); norm: x, of the residual stream, is normalised first; STORE, ADD to the stream
 * y, or GATE: W holds 2 out rows and y = silu(first half) * second half. width is a multiple of 32, out at least 16, and of 16
 * unless STORE; room holds (width + 2) numbers for each of the rows, whose count is rounded up to 16. */
void opd_linear(const void *x, long rows, long width, const void *norm, float eps, const bf16 *weight, const bf16 *bias,
                long out, void *y, int mode, int wide, bf16 *room, int threads) {
    const __m512i column = every16th();
    long groups = (rows + 15) / 16, each = mode == GATE ? 16 : 32; /* outputs of a block */
    float *scales = (float *)(room + groups * 16 * width);
#pragma omp parallel num_threads(threads)
    {
        float sums[1024];
        set_tiles();
        if (norm) {
#pragma omp for schedule(static)
            for (long r = 0; r < rows; r++) scales[r] = scale_of(from(x, r * width, wide), width, eps, wide);
        }
#pragma omp for schedule(static) /* by columns: the rows of one tile lie in the same lines of the cache */
        for (long i = 0; i < width / 32 * groups; i++) {
            long k = i / groups * 32, g = i % groups * 16;
            long some = rows - g < 16 ? rows - g : 16;
            pack(from(x, g * width, norm && wide), wide, norm, scales + g, width, k, some, room + g * width + k * 16);
        }
#pragma omp for schedule(static)
        for (long i = 0; i < (out + each - 1) / each; i++) {
            long o = i * each > out - 16 ? out - 16 : i * each; /* the last block may repeat some of the one before */
            long other = mode == GATE ? o + out : o + 16 > out - 16 ? out - 16 : o + 16;
            for (long first = 0; first < rows; first += 32) {
                long some = rows - first < 32 ? rows - first : 32;
                block(weight + o * width, weight + other * width, room + first * width, width, some > 16 ? 2 : 1, sums);
                for (long r = 0; r < some; r++) {
                    long at = r / 16 * 512 + r % 16, place = (first + r) * out;
                    __m512 sum = _mm512_i32gather_ps(column, sums + at, 4);
                    __m512 next = _mm512_i32gather_ps(column, sums + at + 256, 4);
                    finish(sum, next, bias ? bias + o : 0, bias ? bias + out + o : 0, y, place + o, mode, wide);
                    if (mode != GATE && other != o)
                        finish(next, next, bias ? bias + other : 0, 0, y, place + other, mode, wide);
                }
            }
        }
        _tile_release();
    }
}

/* Rotate a head of `size` numbers; `sin` carries the sign of the first half. */
static void turn(const bf16 *x, const void *norm, float eps, const float *cos, const float *sin, long size, int wide, bf16 *y) {
    float scale = norm ? scale_of(x, size, eps, 0) : 0.0f;
    for (long i = 0; i < size; i += 16) {
        long other = i < size / 2 ? i + size / 2 : i - size / 2;
        __m512 a = norm ? normed(x, 0, norm, wide, i, scale) : wide16(x + i);
        __m512 b = norm ? normed(x, 0, norm, wide, other, scale) : wide16(x + other);
        a = _mm512_mul_ps(a, _mm512_loadu_ps(cos + i));
        b = _mm512_mul_ps(b, _mm512_loadu_ps(sin + i));
        _mm256_storeu_si256((__m256i *)(y + i), narrow16(wide ? _mm512_add_ps(a, b) : _mm512_add_ps(rounded(a), rounded(b))));
    }
}

/* One query head against the keys and values of `count` places: y = softmax(scale q k') v, of `size` numbers. */
static inline __attribute__((always_inline)) void read_head(const bf16 *q, const bf16 *keys, const bf16 *values, long count,
                                                            const long size, float scale, float *p, bf16 *y) {
    __m512 most = _mm512_set1_ps(-3.4e38f), total = _mm512_setzero_ps(), times = _mm512_set1_ps(scale), read[16];
    for (long t = 0; t < count; t++) {
        __m512 sum = _mm512_setzero_ps();
        for (long i = 0; i < size; i += 32)
            sum = _mm512_dpbf16_ps(sum, (__m512bh)load(q + i), (__m512bh)load(keys + t * size + i));
        p[t] = _mm512_reduce_add_ps(sum);
    }
    for (long t = count; t % 16; t++) p[t] = -3.4e38f;
    for (long t = 0; t < count; t += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(p + t));
    __m512 peak = _mm512_mul_ps(times, _mm512_set1_ps(_mm512_reduce_max_ps(most)));
    for (long t = 0; t < count; t += 16) {
        __mmask16 here = count - t < 16 ? (__mmask16)((1u << (count - t)) - 1) : (__mmask16)-1;
        __m512 e = _mm512_maskz_mov_ps(here, exp16(_mm512_fmsub_ps(_mm512_loadu_ps(p + t), times, peak)));
        _mm512_storeu_ps(p + t, e);
        total = _mm512_add_ps(total, e);
    }
    __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
    for (long i = 0; i < size / 16; i++) read[i] = _mm512_setzero_ps();
    for (long t = 0; t < count; t++) {
        __m512 weight = _mm512_set1_ps(p[t]);
        for (long i = 0; i < size / 16; i++) read[i] = _mm512_fmadd_ps(weight, wide16(values + t * size + i * 16), read[i]);
    }
    for (long i = 0; i < size / 16; i++) _mm256_storeu_si256((__m256i *)(y + i * 16), narrow16(_mm512_mul_ps(read[i], share)));
}

/* Write this step's keys and values into the cache, then attend.
 * heads (rows, queries + 2 keys, size) as the projections gave them; cos, sin (rows, size) float32; cache (rows, 2 keys, room,
 * size); places (rows,) of the new token; y (rows, queries, size). size is a multiple of 32, up to 256. */
void opd_attend(const bf16 *heads, long rows, long queries, long keys, long size, const float *cos, const float *sin,
                const void *query_norm, const void *key_norm, float eps, int wide, bf16 *cache, long room,
                const int64_t *places, float scale, bf16 *y, int threads) {
    long of_row = (queries + 2 * keys) * size, shared = queries / keys;
#pragma omp parallel num_threads(threads)
    {
        float *p = malloc((size_t)(room + 16) * sizeof *p);
        bf16 *q = malloc((size_t)size * sizeof *q);
#pragma omp for schedule(static)
        for (long n = 0; n < rows * keys; n++) {
            long row = n / keys, key = n % keys, at = places[row];
            const bf16 *x = heads + row * of_row;
            const float *c = cos + row * size, *s = sin + row * size;
            bf16 *k = cache + (row * 2 * keys + key) * room * size, *v = k + keys * room * size;
            turn(x + (queries + key) * size, key_norm, eps, c, s, size, wide, k + at * size);
            memcpy(v + at * size, x + (queries + keys + key) * size, (size_t)size * sizeof *v);
            for (long h = key * shared; h < (key + 1) * shared; h++) {
                turn(x + h * size, query_norm, eps, c, s, size, wide, q);
                bf16 *to = y + (row * queries + h) * size;
                if (size == 64) /* known sizes stay in registers */
                    read_head(q, k, v, at + 1, 64, scale, p, to);
                else if (size == 128)
                    read_head(q, k, v, at + 1, 128, scale, p, to);
                else
                    read_head(q, k, v, at + 1, size, scale, p, to);
            }
        }
        free(p);
        free(q);
    }
}
