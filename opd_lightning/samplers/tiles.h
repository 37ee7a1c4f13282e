/* Products of bfloat16 rows with up to sixteen packed ones, in float32: by tiles (AMX) where the processor has them, by vectors
 * elsewhere. A packed tile holds 32 numbers of each row: pairs of numbers, the rows beside each other. Part of thin.c.
 */
static inline __m512i load(const bf16 *x) { return _mm512_loadu_si512(x); }

#ifdef __AMX_BF16__

typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
} Tiles;

static void begin_products(void) {
    Tiles tiles;
    memset(&tiles, 0, sizeof tiles);
    tiles.palette = 1;
    for (int i = 0; i < 8; i++) tiles.bytes[i] = 64, tiles.rows[i] = 16;
    _tile_loadconfig(&tiles);
}

static void end_products(void) { _tile_release(); }

/* Sixteen rows at a and sixteen at b, of a weight, times up to 32 rows of x in groups of sixteen: (groups, a and b, 16 of the
 * weight, 16 of x) float32. `next` is read after them. Tiles that follow each other have names of their own, so that loads need not wait for products. */
static void block(const bf16 *a, const bf16 *b, const bf16 *next, const bf16 *packed, long width, long rows, float *sums) {
    (void)next;
    long k = 0, apart = width * 2;
    const bf16 *second = packed + width * 16;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    if (rows <= 16) {
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

/* Sixteen rows at a times a packed tile's rows: (16 of a, 16 packed). */
static inline void score(const bf16 *a, const bf16 *packed, long width, float *sums) {
    _tile_zero(0);
    for (long k = 0; k < width; k += 32) {
        _tile_loadd(4, a + k, width * 2);
        _tile_loadd(6, packed + k * 16, 64);
        _tile_dpbf16ps(0, 4, 6);
    }
    _tile_stored(0, sums, 64);
}

#else

static inline void begin_products(void) {}
static inline void end_products(void) {}

/* Sixteen rows at a times the first rows of a packed tile, as many as a vector has places: each pair of a row meets the same
 * pair of all packed ones. (16, 16) float32, of which that many columns are written. Asks for the sixteen rows that are read
 * next: a row is too short for the processor to foresee the one after it. */
#define MULTIPLY(name, vector, pairs, zero, load, repeat, dot, store)                                                       \
    static inline void name(const bf16 *a, const bf16 *packed, long width, const bf16 *next, float *sums) {                  \
        vector total[16];                                                                                                    \
        for (int i = 0; i < 16; i++) total[i] = zero();                                                                      \
        for (long k = 0; k < width; k += 32) {                                                                               \
            _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++) _mm_prefetch(next + 16 * k + 32 * i, _MM_HINT_T1);         \
            for (long j = k; j < k + 32; j += 2) {                                                                           \
                pairs x = (pairs)load((const void *)(packed + j * 16));                                                      \
                _Pragma("GCC unroll 16") for (int i = 0; i < 16; i++)                                                        \
                    total[i] = dot(total[i], x, (pairs)repeat(*(const int32_t *)(a + i * width + j)));                       \
            }                                                                                                                \
        }                                                                                                                    \
        for (int i = 0; i < 16; i++) store(sums + 16 * i, total[i]);                                                         \
    }

MULTIPLY(four, __m128, __m128bh, _mm_setzero_ps, _mm_loadu_si128, _mm_set1_epi32, _mm_dpbf16_ps, _mm_storeu_ps)
MULTIPLY(eight, __m256, __m256bh, _mm256_setzero_ps, _mm256_loadu_si256, _mm256_set1_epi32, _mm256_dpbf16_ps, _mm256_storeu_ps)
MULTIPLY(sixteen, __m512, __m512bh, _mm512_setzero_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_dpbf16_ps, _mm512_storeu_ps)

/* The same with two groups of sixteen packed rows, eight rows of a at a time: each pair that is repeated meets both. */
static void both(const bf16 *a, const bf16 *packed, long width, const bf16 *next, float *sums) {
    const bf16 *second = packed + width * 16;
    for (int half = 0; half < 16; half += 8) {
        const bf16 *rows = a + half * width;
        __m512 total[8], other[8];
        for (int i = 0; i < 8; i++) total[i] = other[i] = _mm512_setzero_ps();
        for (long k = 0; k < width; k += 32) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) _mm_prefetch(next + 16 * k + 32 * (half + i), _MM_HINT_T1);
            for (long j = k; j < k + 32; j += 2) {
                __m512bh x = (__m512bh)load(packed + j * 16), y = (__m512bh)load(second + j * 16);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    __m512bh pair = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(rows + i * width + j));
                    total[i] = _mm512_dpbf16_ps(total[i], x, pair);
                    other[i] = _mm512_dpbf16_ps(other[i], y, pair);
                }
            }
        }
        for (int i = 0; i < 8; i++) {
            _mm512_storeu_ps(sums + 16 * (half + i), total[i]);
            _mm512_storeu_ps(sums + 512 + 16 * (half + i), other[i]);
        }
    }
}

static void block(const bf16 *a, const bf16 *b, const bf16 *next, const bf16 *packed, long width, long rows, float *sums) {
    void (*multiply)(const bf16 *, const bf16 *, long, const bf16 *, float *) = rows > 16 ? both : rows > 8 ? sixteen : eight;
    multiply(a, packed, width, b, sums);
    multiply(b, packed, width, next, sums + 256);
}

static inline void score(const bf16 *a, const bf16 *packed, long width, float *sums) {
    four(a, packed, width, a + 16 * width, sums);
}

#endif
