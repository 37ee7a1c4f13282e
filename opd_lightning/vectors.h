/* Sixteen numbers at a time on x86-64 processors with AVX-512, eight on those with AVX2; functions whose loops are written once
 * for both. Part of the sources that name it.
 */
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))

static inline long least(long a, long b) { return a < b ? a : b; }

#ifdef __AVX512F__
#define LANES 16
typedef __m512 vec;
typedef __mmask16 mask;
static inline mask first(long n) { return (mask)(n >= LANES ? 0xffff : n > 0 ? (1 << n) - 1 : 0); }
static inline vec each(float x) { return _mm512_set1_ps(x); }
static inline vec all(const float *x) { return _mm512_loadu_ps(x); }
static inline vec get(const float *x, mask some) { return _mm512_maskz_loadu_ps(some, x); }
static inline void put(float *x, mask some, vec y) { _mm512_mask_storeu_ps(x, some, y); }
static inline vec larger(vec x, vec y) { return _mm512_max_ps(x, y); } /* of two operands, NaN in the second is kept */
static inline vec smaller(vec x, vec y) { return _mm512_min_ps(x, y); }
static inline vec whole(vec x) { return _mm512_roundscale_ps(x, 0); }
static inline vec scaled(vec x, vec n) { return _mm512_scalef_ps(x, n); } /* x 2^n */
static inline vec only(vec x, mask some) { return _mm512_maskz_mov_ps(some, x); }
static inline vec least_where(vec x, mask some) { return _mm512_mask_mov_ps(each(-INFINITY), some, x); }
static inline vec zero_below(vec x, vec y, float limit) {
    return _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask(x, each(limit), _CMP_LT_OQ), _mm512_setzero_ps());
}
static inline vec where_larger(vec x, vec y, vec z) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_GT_OQ), z); }
static inline vec widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
static inline __m256i narrowed(vec y) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(y);
#else
    __m512i bits = _mm512_castps_si512(y), odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    near = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)); /* NaN stays so */
    return _mm512_cvtepi32_epi16(near);
#endif
}
static inline vec rounded(vec x) { return widened(narrowed(x)); }
static inline vec all_halves(const bf16 *x) { return widened(_mm256_loadu_si256((const __m256i *)x)); }
static inline vec halves(const bf16 *x, mask some) { return widened(_mm256_maskz_loadu_epi16(some, x)); }
static inline void put_halves(bf16 *x, mask some, vec y) { _mm256_mask_storeu_epi16(x, some, narrowed(y)); }
static inline float total(vec x) { return _mm512_reduce_add_ps(x); }
static inline float largest(vec x) { return _mm512_reduce_max_ps(x); }
/* y, where the bit of a place is set that of x `by` places further. */
static inline vec moved(vec y, int places, vec x, int by) {
    __m512i from = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_mask_permutexvar_ps(y, (mask)places, _mm512_add_epi32(from, _mm512_set1_epi32(by)), x);
}
#else
#define LANES 8
typedef __m256 vec;
typedef __m256i mask;
static inline mask first(long n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)least(n, LANES)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vec each(float x) { return _mm256_set1_ps(x); }
static inline vec all(const float *x) { return _mm256_loadu_ps(x); }
static inline vec get(const float *x, mask some) { return _mm256_maskload_ps(x, some); }
static inline void put(float *x, mask some, vec y) { _mm256_maskstore_ps(x, some, y); }
static inline vec larger(vec x, vec y) { return _mm256_max_ps(x, y); }
static inline vec smaller(vec x, vec y) { return _mm256_min_ps(x, y); }
static inline vec whole(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vec scaled(vec x, vec n) {
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline vec only(vec x, mask some) { return _mm256_and_ps(x, _mm256_castsi256_ps(some)); }
static inline vec least_where(vec x, mask some) { return _mm256_blendv_ps(each(-INFINITY), x, _mm256_castsi256_ps(some)); }
static inline vec zero_below(vec x, vec y, float limit) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, each(limit), _CMP_LT_OQ), y);
}
static inline vec where_larger(vec x, vec y, vec z) { return _mm256_and_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ), z); }
static inline vec widened(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
static inline __m128i narrowed(vec y) {
    __m256i bits = _mm256_castps_si256(y), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i near = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    near = _mm256_blendv_epi8(near, _mm256_set1_epi32(0x7fc0), _mm256_castps_si256(_mm256_cmp_ps(y, y, _CMP_UNORD_Q)));
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(near, near), 0x08));
}
static inline vec rounded(vec x) { return widened(narrowed(x)); }
static inline vec all_halves(const bf16 *x) { return widened(_mm_loadu_si128((const __m128i *)x)); }
static inline size_t count_of(mask some) {
    return (size_t)_mm_popcnt_u32((unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(some)));
}
static inline vec halves(const bf16 *x, mask some) {
    bf16 near[LANES] = {0};
    if (count_of(some) == LANES) return all_halves(x);
    memcpy(near, x, count_of(some) * sizeof *x);
    return all_halves(near);
}
static inline void put_halves(bf16 *x, mask some, vec y) {
    __m128i near = narrowed(y);
    if (count_of(some) == LANES)
        _mm_storeu_si128((__m128i *)x, near);
    else
        memcpy(x, &near, count_of(some) * sizeof *x);
}
static inline float total(vec x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
static inline float largest(vec x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
static inline vec moved(vec y, int places, vec x, int by) {
    __m256i from = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i here = _mm256_cmpgt_epi32(_mm256_and_si256(_mm256_set1_epi32(places), bits), _mm256_setzero_si256());
    return _mm256_blendv_ps(y, _mm256_permutevar8x32_ps(x, _mm256_add_epi32(from, _mm256_set1_epi32(by))),
                            _mm256_castsi256_ps(here));
}
#endif

/* Some of the numbers of x or y from place i on, bfloat16 ones (`half`) or float32. */
INLINE vec get_either(const void *x, long i, mask some, int half) {
    return half ? halves((const bf16 *)x + i, some) : get((const float *)x + i, some);
}
INLINE vec all_either(const void *x, long i, int half) {
    return half ? all_halves((const bf16 *)x + i) : all((const float *)x + i);
}
INLINE void put_either(void *y, long i, mask some, vec value, int half) {
    if (half)
        put_halves((bf16 *)y + i, some, value);
    else
        put((float *)y + i, some, value);
}

/* e^x for x from -1e5 to 88, by 2^n and a polynomial: relative error below 3e-7 where it is a normal number, small below. What
 * is not a number stays so. */
static inline vec exp_below(vec x) {
#if LANES == 8
    x = larger(each(-87.0f), x);
#endif
    vec n = whole(x * 1.44269504f), r = (x - n * 0.693359375f) + n * 2.12194440e-4f, p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return scaled(p, n);
}

/* e^x for x from -87 to 88, and beyond as at these. */
static inline vec exp_of(vec x) { return exp_below(smaller(each(88.0f), larger(each(-87.0f), x))); }

/* LANES vectors become those of the columns of their table. */
static inline void transposed(vec *a) {
#pragma GCC unroll 4
    for (int step = 1; step < LANES; step *= 2) {
        const int upper = 0xffff / (1 + (1 << step)) << step; /* places whose number has this bit */
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & step)) {
                vec x = a[i], y = a[i + step];
                a[i] = moved(x, upper, y, -step), a[i + step] = moved(y, ~upper, x, step);
            }
    }
}
