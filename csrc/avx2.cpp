// AVX2 with FMA: a byte of the mask selects a shuffle that spreads 8 stored values over 8 fp32 lanes.
//
// bf16 values keep the order of the mask's bits: a vector holds 4 rows of a panel, with both columns of a pair side by side,
// and is multiplied by the two numbers of x side by side. The sums of even and odd columns are added at the end. A block is
// expanded in the same order, fp32 [pair][16 rows][2 columns].
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace rac {
namespace {

// For each mask byte and each of 8 lanes: which stored value the lane receives. bf16: byte numbers for vpshufb, for both
// 128-bit halves; a value is put into the upper half of its lane, and 0x80 gives a zero. fp32: value numbers for vpermps,
// negative where the lane is zero.
struct Tables {
    alignas(64) uint8_t bf16[256][32];
    alignas(64) int32_t fp32[256][8];
    constexpr Tables() : bf16(), fp32() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0, stored = 0; lane < 8; lane++) {
                const bool set = mask >> lane & 1;
                bf16[mask][4 * lane] = bf16[mask][4 * lane + 1] = 0x80;
                bf16[mask][4 * lane + 2] = static_cast<uint8_t>(set ? 2 * stored : 0x80);
                bf16[mask][4 * lane + 3] = static_cast<uint8_t>(set ? 2 * stored + 1 : 0x80);
                fp32[mask][lane] = set ? stored : -1;
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

constexpr int LINES = 3;  // at a time: 12 of the 16 registers hold sums

// Byte j of a mask, times four. An entry of a table has 32 bytes, and an address can multiply by the remaining eight.
inline uint32_t times_four(uint32_t mask, int j) { return (j ? mask >> (8 * j - 2) : mask << 2) & 0x3fc; }

inline __m256i entry(const void* table, uint32_t times_four) {
    const char* at = static_cast<const char*>(table) + 8 * uint64_t{times_four};
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(at));
}

// The 8 weights of byte j of a mask word as fp32. Moves `values` past those that are stored.
template <Type type>
inline __m256 spread(uint32_t mask, int j, const char*& values);

template <>
inline __m256 spread<BF16>(uint32_t mask, int j, const char*& values) {
    const uint32_t byte = times_four(mask, j);
    const __m256i stored = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    const __m256i order = entry(tables.bf16, byte);
    values += 2 * RAC_COUNT(byte);
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(stored, order));
}

template <>
inline __m256 spread<FP32>(uint32_t mask, int j, const char*& values) {
    const uint32_t byte = times_four(mask, j);
    const __m256i order = entry(tables.fp32, byte);
    const __m256 stored = _mm256_loadu_ps(reinterpret_cast<const float*>(values));
    values += 4 * RAC_COUNT(byte);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(stored, order), _mm256_setzero_ps(), _mm256_castsi256_ps(order));
}

// Two neighbouring numbers of x, repeated.
inline __m256 two_of(const float* x) {
    return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
}

inline void add_to(float* sums, __m256 more) { _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), more)); }

// Add the even and the odd columns' sums, of 4 rows x 2 columns per vector, and add the result to `out`.
template <int M>
inline void add_columns(float* out, const __m256 (&acc)[M][4]) {
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int half = 0; half < 2; half++) {
            const __m256 sums = _mm256_hadd_ps(acc[m][2 * half], acc[m][2 * half + 1]);
            add_to(out + 16 * m + 8 * half,
                   _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(sums), 0xd8)));
        }
}

// With `keep`, the expanded weights are also written to `block`.
template <int M, bool keep>
inline const char* multiply_bf16(const uint32_t* masks, const char* values, int64_t pairs, const float* x,
                                 int64_t stride, float* out, float* block) {
    __m256 acc[M][4];
    RAC_UNROLL for (auto& line : acc)
        RAC_UNROLL for (__m256& sums : line) sums = _mm256_setzero_ps();
    for (int64_t word = 0; word < pairs; word++) {
        _mm_prefetch(values + 1024, _MM_HINT_T0);
        __m256 factor[M];
        RAC_UNROLL for (int m = 0; m < M; m++) factor[m] = two_of(x + m * stride + 2 * word);
        RAC_UNROLL for (int j = 0; j < 4; j++) {
            const __m256 weights = spread<BF16>(masks[word], j, values);
            if (keep) _mm256_store_ps(block + 32 * word + 8 * j, weights);
            RAC_UNROLL for (int m = 0; m < M; m++) acc[m][j] = _mm256_fmadd_ps(weights, factor[m], acc[m][j]);
        }
    }
    add_columns(out, acc);
    return values;
}

template <int M>
void dot_bf16(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    multiply_bf16<M, false>(masks, values, pairs, x, stride, out, nullptr);
}

template <int M>
void dot_fp32(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    // One or two lines have too few sums to hide the latency of a multiplication: they get a set of sums per column.
    constexpr int SETS = M <= 2 ? 2 : 1;
    __m256 acc[SETS][M][2];
    RAC_UNROLL for (auto& set : acc)
        RAC_UNROLL for (auto& line : set)
            RAC_UNROLL for (__m256& sums : line) sums = _mm256_setzero_ps();
    for (int64_t word = 0; word < pairs; word++) {
        _mm_prefetch(values + 1024, _MM_HINT_T0);
        RAC_UNROLL for (int j = 0; j < 4; j++) {
            const __m256 weights = spread<FP32>(masks[word], j, values);
            RAC_UNROLL for (int m = 0; m < M; m++) {
                __m256& sums = acc[j / 2 % SETS][m][j % 2];
                sums = _mm256_fmadd_ps(weights, _mm256_broadcast_ss(x + m * stride + 2 * word + j / 2), sums);
            }
        }
    }
    RAC_UNROLL for (auto& set : acc)
        RAC_UNROLL for (int m = 0; m < M; m++)
            RAC_UNROLL for (int half = 0; half < 2; half++) add_to(out + 16 * m + 8 * half, set[m][half]);
}

// `values` is an expanded block.
template <int M>
void dot_block(const uint32_t*, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    const float* weights = reinterpret_cast<const float*>(values);
    __m256 acc[M][4];
    RAC_UNROLL for (auto& line : acc)
        RAC_UNROLL for (__m256& sums : line) sums = _mm256_setzero_ps();
    for (int64_t word = 0; word < pairs; word++, weights += 32) {
        __m256 factor[M];
        RAC_UNROLL for (int m = 0; m < M; m++) factor[m] = two_of(x + m * stride + 2 * word);
        RAC_UNROLL for (int j = 0; j < 4; j++) {
            const __m256 four = _mm256_load_ps(weights + 8 * j);
            RAC_UNROLL for (int m = 0; m < M; m++) acc[m][j] = _mm256_fmadd_ps(four, factor[m], acc[m][j]);
        }
    }
    add_columns(out, acc);
}

// The weights of a mask word as fp32: w[k][h] holds column k, rows 8h to 8h + 7.
struct Columns {
    __m256 w[2][2];
};

template <Type type>
inline Columns by_column(uint32_t mask, const char*& values) {
    Columns two;
    if (type == FP32) {
        RAC_UNROLL for (int j = 0; j < 4; j++) two.w[j / 2][j % 2] = spread<FP32>(mask, j, values);
        return two;
    }
    RAC_UNROLL for (int half = 0; half < 2; half++) {
        const __m256 four = spread<BF16>(mask, 2 * half, values), next = spread<BF16>(mask, 2 * half + 1, values);
        const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(four, next, 0x88));
        const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(four, next, 0xdd));
        two.w[0][half] = _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8));
        two.w[1][half] = _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8));
    }
    return two;
}

template <Type type>
const char* expand(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2) {
        const Columns two = by_column<type>(masks[column / 2], values);
        for (int k = 0; k < 2 && column + k < columns; k++)
            RAC_UNROLL for (int half = 0; half < 2; half++)
                _mm256_storeu_ps(static_cast<float*>(out) + (column + k) * stride + 8 * half, two.w[k][half]);
    }
    return values;
}

const char* expand_bf16(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2) {
        const Columns two = by_column<BF16>(masks[column / 2], values);
        for (int k = 0; k < 2 && column + k < columns; k++) {
            const __m256i low = _mm256_srli_epi32(_mm256_castps_si256(two.w[k][0]), 16);
            const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(two.w[k][1]), 16);
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
            uint16_t* to = static_cast<uint16_t*>(out) + (column + k) * stride;
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), both);
        }
    }
    return values;
}

const char* expand_and_multiply_bf16(const uint32_t* masks, const char* values, int64_t pairs, const float* x,
                                     int64_t stride, float* out, float* block) {
    return multiply_bf16<LINES, true>(masks, values, pairs, x, stride, out, block);
}

const char* expand_and_multiply_fp32(const uint32_t* masks, const char* values, int64_t pairs, const float* x,
                                     int64_t stride, float* out, float* block) {
    float* to = block;
    for (int64_t word = 0; word < pairs; word++) {
        _mm_prefetch(values + 1024, _MM_HINT_T0);
        const Columns two = by_column<FP32>(masks[word], values);
        RAC_UNROLL for (int half = 0; half < 2; half++, to += 16) {
            const __m256 low = _mm256_unpacklo_ps(two.w[0][half], two.w[1][half]);
            const __m256 high = _mm256_unpackhi_ps(two.w[0][half], two.w[1][half]);
            _mm256_store_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
            _mm256_store_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
        }
    }
    dot_block<LINES>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out);
    return values;
}

void store(const Product& product, int64_t panel, int64_t count, int64_t first, int64_t lines, const Sums& sums) {
    store_lines(product, panel, count, first, lines, sums);
}

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

extern const Kernel avx2_kernel = {
    {LINES,
     LINES,
     {{dot_bf16<1>, dot_bf16<2>, dot_bf16<3>},
      {dot_fp32<1>, dot_fp32<2>, dot_fp32<3>},
      {dot_block<1>, dot_block<2>, dot_block<3>}},
     {expand_and_multiply_bf16, expand_and_multiply_fp32}},
    {expand<BF16>, expand<FP32>},
    expand_bf16,
    store,
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
