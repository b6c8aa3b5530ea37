// AVX2 with FMA: a byte of the mask picks a shuffle that spreads 8 stored values over their lanes.
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace rac {
namespace {

// By mask byte: for each lane which stored value goes there, in bytes for vpshufb and in values for vpermd; 0x80: none.
struct Tables {
    alignas(64) uint8_t bytes[256][16];
    alignas(64) int8_t lanes[256][8];
    constexpr Tables() : bytes(), lanes() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0, stored = 0; lane < 8; lane++) {
                const bool set = mask >> lane & 1;
                bytes[mask][2 * lane] = static_cast<uint8_t>(set ? 2 * stored : 0x80);
                bytes[mask][2 * lane + 1] = static_cast<uint8_t>(set ? 2 * stored + 1 : 0x80);
                lanes[mask][lane] = static_cast<int8_t>(set ? stored : -128);
                stored += set;
            }
    }
};
constexpr Tables tables;

}  // namespace
}  // namespace rac

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,popcnt")
#endif

namespace rac {
namespace {

// A word's weights as fp32: w[k][h] holds column k, rows 8h to 8h + 7. Returns where the next word's values start.
struct Pair {
    __m256 w[2][2];
};

inline __m128i bytes_at(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

template <int form>
inline const char* expand_word(uint32_t mask, const char* values, Pair& pair);

template <>
inline const char* expand_word<BF16>(uint32_t mask, const char* values, Pair& pair) {
    const char* starts[4] = {values, values + 2 * RAC_COUNT(mask & 0xff),
                             values + 2 * RAC_COUNT(mask & 0xffff),
                             values + 2 * RAC_COUNT(mask & 0xffffff)};
    for (int half = 0; half < 2; half++) {
        const uint32_t two = mask >> (16 * half);
        const __m256i stored = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes_at(starts[2 * half])),
                                                       bytes_at(starts[2 * half + 1]), 1);
        const __m256i order = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes_at(tables.bytes[two & 0xff])),
                                                      bytes_at(tables.bytes[two >> 8 & 0xff]), 1);
        const __m256i spread = _mm256_shuffle_epi8(stored, order);  // (k0, k1) of 8 rows, 16 bits each
        pair.w[0][half] = _mm256_castsi256_ps(_mm256_slli_epi32(spread, 16));
        pair.w[1][half] = _mm256_castsi256_ps(_mm256_and_si256(spread, _mm256_set1_epi32(int(0xffff0000))));
    }
    return values + 2 * RAC_COUNT(mask);
}

template <>
inline const char* expand_word<FP32>(uint32_t mask, const char* values, Pair& pair) {
    const char* starts[4] = {values, values + 4 * RAC_COUNT(mask & 0xff),
                             values + 4 * RAC_COUNT(mask & 0xffff),
                             values + 4 * RAC_COUNT(mask & 0xffffff)};
    for (int quarter = 0; quarter < 4; quarter++) {
        const int8_t* lanes = tables.lanes[mask >> (8 * quarter) & 0xff];
        const __m256i order = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(lanes)));
        const __m256 stored = _mm256_loadu_ps(reinterpret_cast<const float*>(starts[quarter]));
        const __m256 spread = _mm256_permutevar8x32_ps(stored, order);
        pair.w[quarter / 2][quarter % 2] = _mm256_blendv_ps(spread, _mm256_setzero_ps(), _mm256_castsi256_ps(order));
    }
    return values + 4 * RAC_COUNT(mask);
}

template <>
inline const char* expand_word<DENSE>(uint32_t, const char* values, Pair& pair) {
    const float* weights = reinterpret_cast<const float*>(values);
    for (int k = 0; k < 2; k++)
        for (int half = 0; half < 2; half++) pair.w[k][half] = _mm256_loadu_ps(weights + 16 * k + 8 * half);
    return values + 128;
}

template <int form, int M>
void dot(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    // One row of x has too few accumulators to hide the latency of a multiplication: it gets a set for each column.
    constexpr int SETS = M == 1 ? 2 : 1;
    __m256 acc[SETS][M][2];
    for (int set = 0; set < SETS; set++)
        for (int m = 0; m < M; m++) acc[set][m][0] = acc[set][m][1] = _mm256_setzero_ps();
    for (int64_t word = 0; word < pairs; word++) {
        Pair pair;
        if (form != DENSE) _mm_prefetch(values + 1024, _MM_HINT_T0);
        values = expand_word<form>(form == DENSE ? 0 : masks[word], values, pair);
        for (int m = 0; m < M; m++)
            for (int k = 0; k < 2; k++) {
                const __m256 factor = _mm256_broadcast_ss(x + m * stride + 2 * word + k);
                for (int half = 0; half < 2; half++)
                    acc[k % SETS][m][half] = _mm256_fmadd_ps(pair.w[k][half], factor, acc[k % SETS][m][half]);
            }
    }
    for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) {
            __m256 sum = acc[0][m][half];
            if (SETS == 2) sum = _mm256_add_ps(sum, acc[SETS - 1][m][half]);
            float* to = out + 16 * m + 8 * half;
            _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), sum));
        }
}

template <Type type>
const char* expand(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2) {
        Pair pair;
        values = expand_word<type>(masks[column / 2], values, pair);
        for (int k = 0; k < 2 && column + k < columns; k++)
            for (int half = 0; half < 2; half++)
                _mm256_storeu_ps(static_cast<float*>(out) + (column + k) * stride + 8 * half, pair.w[k][half]);
    }
    return values;
}

const char* expand_bf16(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2) {
        Pair pair;
        values = expand_word<BF16>(masks[column / 2], values, pair);
        for (int k = 0; k < 2 && column + k < columns; k++) {
            const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(pair.w[k][0]), 16);
            const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(pair.w[k][1]), 16);
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
            uint16_t* to = static_cast<uint16_t*>(out) + (column + k) * stride;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), both);
        }
    }
    return values;
}

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

#define RAC_FOUR(form) dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>
extern const Kernel avx2_kernel = {
    4,
    6,  // 12 of the 16 registers accumulate
    {{RAC_FOUR(BF16)}, {RAC_FOUR(FP32)}, {RAC_FOUR(DENSE), dot<DENSE, 5>, dot<DENSE, 6>}},
    {expand<BF16>, expand<FP32>},
    expand_bf16,
};

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}

}  // namespace rac
#else
namespace rac {
extern const Kernel avx2_kernel = {};
bool has_avx2() { return false; }
}  // namespace rac
#endif
