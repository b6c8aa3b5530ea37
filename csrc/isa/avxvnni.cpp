// build: x86_64 -mavx2 -mavxvnni -mpopcnt
// AVX-VNNI, of processors without AVX512: AVX2 spreads integer weights, and vpdpbusd multiplies four columns at a time.
//
// One factor of vpdpbusd is unsigned. So 128 is added to every 8-bit weight, pruned ones included, and what this adds to the sums,
// 128 times the sum of x, is subtracted again. Codes are unsigned as they are.
#include "isa/avx2.h"

namespace rac {
namespace {

// Add four products, of unsigned bytes of w and signed bytes of x, to each sum. As assembly: with the intrinsic, GCC copies the sums.
RAC_INLINE void add_products(__m256i& sums, __m256i w, __m256i x) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));
}

RAC_INLINE __m256i both_halves(__m128i low, __m128i high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

struct IntIsa : Avx2Quads, SingleQuads<IntIsa> {
    static constexpr XFormat FORMAT = QUADS;
    static constexpr int SLOTS = 2;  // 8 of the 16 registers hold sums
    struct Quad {
        __m256i w[2];  // unsigned bytes: w[i] holds rows 8i to 8i + 7, four columns each
    };

    template <int form>
    RAC_INLINE static void load(const uint32_t* masks, const char*& values, const Zeros& zeros, Quad& quad) {
        const __m256i halves = _mm256_set1_epi8(15), plus = _mm256_set1_epi8(-128);
        if (form == INT8 || form == CODES) {
            __m128i bytes[4];
            spread_quad<form>(masks, values, zeros, bytes);
            for (int i = 0; i < 2; i++) quad.w[i] = both_halves(bytes[2 * i], bytes[2 * i + 1]);
        } else {
            for (int i = 0; i < 2; i++) quad.w[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values) + i);
            values += form == LOW ? 0 : QUAD;
        }
        for (__m256i& w : quad.w) {
            if (form == INT8 || form == DENSE8) w = _mm256_xor_si256(w, plus);
            if (form == LOW) w = _mm256_and_si256(w, halves);
            if (form == HIGH) w = _mm256_and_si256(_mm256_srli_epi16(w, 4), halves);
        }
    }
    // The dense form is that of 8-bit weights, 128 added.
    RAC_INLINE static void store(void* out, int64_t q, const Quad& quad) {
        for (int i = 0; i < 2; i++) _mm256_storeu_si256(static_cast<__m256i*>(out) + 2 * q + i, quad.w[i]);
    }
    RAC_INLINE static void store_half(void* out, int64_t q, int half, __m256i bytes) {
        _mm256_storeu_si256(static_cast<__m256i*>(out) + 2 * q + half, _mm256_add_epi8(bytes, _mm256_set1_epi8(-128)));
    }
    RAC_INLINE static Quad less(Quad quad, const Zeros& zeros) {
        for (int i = 0; i < 2; i++)
            quad.w[i] = _mm256_sub_epi8(_mm256_add_epi8(quad.w[i], _mm256_set1_epi8(-128)),
                                        both_halves(zeros.of[2 * i], zeros.of[2 * i + 1]));
        return quad;
    }

    template <int form, int SOME>
    struct Sums {
        __m256i acc[SOME][2][2];

        RAC_INLINE Sums(const Slots& x, int slot) {
            const bool of_codes = form == CODES || form == DENSE4;
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                RAC_UNROLL for (int i = 0; i < 2; i++)
                    // Wrap-around is harmless: the sum of both terms fits.
                    RAC_UNROLL for (int byte = 0; byte < 2; byte++)
                        acc[m][byte][i] = _mm256_set1_epi32(of_codes ? 0 : static_cast<int>(-128u * x.sum_of(slot + m, byte)));
        }
        RAC_INLINE void add(const Quad& quad, const char* x, int64_t step) {
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                RAC_UNROLL for (int byte = 0; byte < 2; byte++) {
                    int32_t four;
                    std::memcpy(&four, x + m * step + 4 * byte, sizeof four);
                    const __m256i of_all = _mm256_set1_epi32(four);
                    RAC_UNROLL for (int i = 0; i < 2; i++) add_products(acc[m][byte][i], quad.w[i], of_all);
                }
        }
        RAC_INLINE void store(const Slots& x, int slot, int32_t* sums) const {
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                RAC_UNROLL for (int i = 0; i < 2; i++) {
                    __m256i* to = reinterpret_cast<__m256i*>(sums + PANEL * x.per_slot() * (slot + m)) + i;
                    if (x.bytes) {
                        _mm256_storeu_si256(to, acc[m][0][i]);
                        _mm256_storeu_si256(to + 2, acc[m][1][i]);
                    } else {
                        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_slli_epi32(acc[m][0][i], 8), acc[m][1][i]));
                    }
                }
        }
    };

    template <int M>
    struct Parts {
        __m256i of[M][2];

        template <bool FIRST>
        RAC_INLINE void add(int m, int byte, __m256i low, __m256i x_low, __m256i high, __m256i x_high) {
            if (FIRST) of[m][byte] = _mm256_setzero_si256();
            add_products(of[m][byte], low, x_low);
            add_products(of[m][byte], high, x_high);
        }
        RAC_INLINE void into(__m256i (*sums)[2]) const {
            RAC_UNROLL for (int i = 0; i < 2 * M; i++)
                sums[i / 2][i % 2] = _mm256_add_epi32(sums[i / 2][i % 2], of[i / 2][i % 2]);
        }
    };
};

constexpr Integers integers = avx2_integers_of<IntIsa>();

}  // namespace

extern const Kernel avxvnni_kernel = {
    .name = "avxvnni", .title = "AVX-VNNI", .floats = &avx2_floats, .integers = &integers, .crossover = {.int8 = 512, .int4 = 512}};

}  // namespace rac
