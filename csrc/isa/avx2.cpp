// build: x86_64 -mavx2 -mfma -mpopcnt
// AVX2 with FMA, float weights: a byte of the mask selects a shuffle that spreads 8 stored values over the lanes of a vector.
//
// bf16 values keep the order of the mask's bits: a vector holds 4 rows of a panel, both columns of a pair next to each other, and is
// multiplied by the two numbers of x. The sums of even and odd columns are added at the end. A block is expanded in the same order,
// fp32 [pair][16 rows][2 columns].
#include <immintrin.h>

#include "gemm/float_loops.h"

namespace rac {
namespace {

// For each mask byte and each of 8 lanes: which stored value the lane receives. bf16: byte numbers for vpshufb, for both
// 128-bit halves; a value is put into the upper half of its lane, and 0x80 gives a zero. fp32: value numbers for vpermps,
// negative where the lane is zero.
struct Orders {
    alignas(64) uint8_t bf16[256][32];
    alignas(64) int32_t fp32[256][8];
    constexpr Orders() : bf16(), fp32() {
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
constexpr Orders orders;

// Byte j of a mask, times four. An entry of a table has 32 bytes, and an address can multiply by the remaining eight.
RAC_INLINE uint32_t times_four(uint32_t mask, int j) { return (j ? mask >> (8 * j - 2) : mask << 2) & 0x3fc; }

RAC_INLINE __m256i entry(const void* table, uint32_t times_four) {
    return _mm256_load_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(table) + 8 * uint64_t{times_four}));
}

// The 8 weights of byte j of a mask word as fp32; of a block, the vector j of its pair. Moves `values` on.
template <int form>
RAC_INLINE __m256 spread(uint32_t mask, int j, const char*& values) {
    if (form == BLOCK) {
        const __m256 weights = _mm256_load_ps(reinterpret_cast<const float*>(values));
        values += 32;
        return weights;
    }
    const uint32_t byte = times_four(mask, j);
    const __m256i order = entry(form == BF16 ? static_cast<const void*>(orders.bf16) : orders.fp32, byte);
    if (form == BF16) {
        const __m256i stored = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
        values += 2 * RAC_COUNT(byte);
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(stored, order));
    }
    const __m256 stored = _mm256_loadu_ps(reinterpret_cast<const float*>(values));
    values += 4 * RAC_COUNT(byte);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(stored, order), _mm256_setzero_ps(), _mm256_castsi256_ps(order));
}

RAC_INLINE void add_to(float* sums, __m256 more) { _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), more)); }

struct FloatIsa {
    static constexpr int TOKENS = 3;  // 12 of the 16 registers hold sums
    struct Columns {
        __m256 w[2][2];
    };

    template <int type>
    RAC_INLINE static Columns columns(uint32_t mask, const char*& values) {
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
    RAC_INLINE static void store(float* to, const __m256 (&column)[2]) {
        RAC_UNROLL for (int half = 0; half < 2; half++) _mm256_storeu_ps(to + 8 * half, column[half]);
    }

    // By pairs of columns, of BF16 and BLOCK.
    template <int form, int M>
    struct Sums {
        __m256 acc[M][4];

        RAC_INLINE Sums() {
            RAC_UNROLL for (auto& token : acc)
                RAC_UNROLL for (__m256& sums : token) sums = _mm256_setzero_ps();
        }
        template <bool keep>
        RAC_INLINE void add(uint32_t mask, const char*& values, const float* x, int64_t stride, float* block) {
            __m256 factor[M];
            RAC_UNROLL for (int m = 0; m < M; m++)
                factor[m] = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x + m * stride)));
            RAC_UNROLL for (int j = 0; j < 4; j++) {
                const __m256 weights = spread<form>(mask, j, values);
                if (keep) _mm256_store_ps(block + 8 * j, weights);
                RAC_UNROLL for (int m = 0; m < M; m++) acc[m][j] = _mm256_fmadd_ps(weights, factor[m], acc[m][j]);
            }
        }
        RAC_INLINE void add_to(float* out) const {
            RAC_UNROLL for (int m = 0; m < M; m++)
                RAC_UNROLL for (int half = 0; half < 2; half++) {
                    const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(acc[m][2 * half], acc[m][2 * half + 1]));
                    rac::add_to(out + PANEL * m + 8 * half, _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0xd8)));
                }
        }
    };
    template <int M>
    struct Sums<FP32, M> {
        // One or two tokens have too few sums to hide the latency of a multiplication: they get a set of sums per column.
        static constexpr int SETS = M <= 2 ? 2 : 1;
        __m256 acc[SETS][M][2];

        RAC_INLINE Sums() {
            RAC_UNROLL for (auto& set : acc)
                RAC_UNROLL for (auto& token : set)
                    RAC_UNROLL for (__m256& sums : token) sums = _mm256_setzero_ps();
        }
        template <bool keep>
        RAC_INLINE void add(uint32_t mask, const char*& values, const float* x, int64_t stride, float*) {
            RAC_UNROLL for (int j = 0; j < 4; j++) {
                const __m256 weights = spread<FP32>(mask, j, values);
                RAC_UNROLL for (int m = 0; m < M; m++) {
                    __m256& sums = acc[j / 2 % SETS][m][j % 2];
                    sums = _mm256_fmadd_ps(weights, _mm256_broadcast_ss(x + m * stride + j / 2), sums);
                }
            }
        }
        RAC_INLINE void add_to(float* out) const {
            RAC_UNROLL for (auto& set : acc)
                RAC_UNROLL for (int m = 0; m < M; m++)
                    RAC_UNROLL for (int half = 0; half < 2; half++) rac::add_to(out + PANEL * m + 8 * half, set[m][half]);
        }
    };
};

const char* expand_and_multiply_bf16(const uint32_t* masks, const char* values, int64_t pairs, const float* x,
                                     int64_t stride, float* out, float* block) {
    return multiply<FloatIsa, BF16, FloatIsa::TOKENS, true>(masks, values, pairs, x, stride, out, block);
}

const char* expand_and_multiply_fp32(const uint32_t* masks, const char* values, int64_t pairs, const float* x,
                                     int64_t stride, float* out, float* block) {
    float* to = block;
    for (int64_t word = 0; word < pairs; word++) {
        _mm_prefetch(values + 1024, _MM_HINT_T0);
        const auto two = FloatIsa::columns<FP32>(masks[word], values);
        RAC_UNROLL for (int half = 0; half < 2; half++, to += 16) {
            const __m256 low = _mm256_unpacklo_ps(two.w[0][half], two.w[1][half]);
            const __m256 high = _mm256_unpackhi_ps(two.w[0][half], two.w[1][half]);
            _mm256_store_ps(to, _mm256_permute2f128_ps(low, high, 0x20));
            _mm256_store_ps(to + 8, _mm256_permute2f128_ps(low, high, 0x31));
        }
    }
    dot<FloatIsa, BLOCK, FloatIsa::TOKENS>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out);
    return values;
}

constexpr Floats floats() {
    Floats floats = floats_of<FloatIsa>();
    floats.dots.expand_and_multiply[BF16] = expand_and_multiply_bf16;
    floats.dots.expand_and_multiply[FP32] = expand_and_multiply_fp32;
    return floats;
}

}  // namespace

extern const Floats avx2_floats = floats();
extern const Kernel avx2_kernel = {.name = "avx2", .title = "AVX2", .floats = &avx2_floats, .integers = &avx2_integers};

}  // namespace rac
