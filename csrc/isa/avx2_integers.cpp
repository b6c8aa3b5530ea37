// build: x86_64 -mavx2 -mpopcnt
// AVX2, integer weights: they are widened to 16 bits, and vpmaddwd multiplies two columns at a time, exactly.
#include "isa/avx2.h"

namespace rac {
namespace {

// As assembly, in place: GCC would copy the sums and run out of registers.
RAC_INLINE void add(__m256i& sum, __m256i term) { __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(term)); }
RAC_INLINE void add16(__m256i& sum, __m256i term) { __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(term)); }

struct IntIsa : Avx2Quads, SingleQuads<IntIsa> {
    static constexpr XFormat FORMAT = INTEGERS;
    static constexpr int SLOTS = 2;
    struct Quad {
        __m256i w[4];  // 16-bit weights: w[i] holds rows 4i to 4i + 3, four columns each
    };

    template <int form>
    RAC_INLINE static void load(const uint32_t* masks, const char*& values, const Zeros& zeros, Quad& quad) {
        if (form == EXPANDED) {
            for (int i = 0; i < 4; i++) quad.w[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(values) + i);
            values += 2 * QUAD;
        } else if (form == DENSE8) {
            for (int i = 0; i < 4; i++)
                quad.w[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values) + i));
            values += QUAD;
        } else if (form == LOW || form == HIGH) {
            const __m128i halves = _mm_set1_epi8(15);
            for (int i = 0; i < 4; i++) {
                const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values) + i);
                quad.w[i] = _mm256_cvtepu8_epi16(_mm_and_si128(form == LOW ? both : _mm_srli_epi16(both, 4), halves));
            }
            values += form == LOW ? 0 : QUAD;
        } else {
            __m128i bytes[4];
            spread_quad<form>(masks, values, zeros, bytes);
            RAC_UNROLL for (int i = 0; i < 4; i++) quad.w[i] = _mm256_cvtepi8_epi16(bytes[i]);
        }
    }
    RAC_INLINE static void store(void* out, int64_t q, const Quad& quad) {
        for (int i = 0; i < 4; i++) _mm256_store_si256(static_cast<__m256i*>(out) + 4 * q + i, quad.w[i]);
    }
    RAC_INLINE static void store_half(void* out, int64_t q, int half, __m256i bytes) {
        __m256i* to = static_cast<__m256i*>(out) + 4 * q + 2 * half;
        _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)));
        _mm256_store_si256(to + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)));
    }
    RAC_INLINE static Quad less(Quad quad, const Zeros& zeros) {
        for (int i = 0; i < 4; i++) quad.w[i] = _mm256_sub_epi16(quad.w[i], _mm256_cvtepi8_epi16(zeros.of[i]));
        return quad;
    }

    template <int form, int SOME>
    struct Sums {
        __m256i acc[SOME][4];

        RAC_INLINE Sums(const Slots&, int) {
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                RAC_UNROLL for (int i = 0; i < 4; i++) acc[m][i] = _mm256_setzero_si256();
        }
        RAC_INLINE void add(const Quad& quad, const char* x, int64_t step) {
            RAC_UNROLL for (int m = 0; m < SOME; m++) {
                const __m256i four = _mm256_set1_epi64x(*reinterpret_cast<const long long*>(x + m * step));
                RAC_UNROLL for (int i = 0; i < 4; i++) rac::add(acc[m][i], _mm256_madd_epi16(quad.w[i], four));
            }
        }
        RAC_INLINE void store(const Slots&, int slot, int32_t* sums) const {
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                RAC_UNROLL for (int half = 0; half < 2; half++) {
                    const __m256i eight_rows = _mm256_hadd_epi32(acc[m][2 * half], acc[m][2 * half + 1]);
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + PANEL * (slot + m) + 8 * half),
                                        _mm256_permute4x64_epi64(eight_rows, 0xd8));
                }
        }
    };

    // The sums of 16 bits, of two columns each, fit: 16 products of at most 15 * 128.
    template <int M>
    struct Parts {
        __m256i of[M][2];

        template <bool FIRST>
        RAC_INLINE void add(int m, int byte, __m256i low, __m256i x_low, __m256i high, __m256i x_high) {
            __m256i sum = _mm256_maddubs_epi16(low, x_low);
            add16(sum, _mm256_maddubs_epi16(high, x_high));
            if (FIRST)
                of[m][byte] = sum;
            else
                add16(of[m][byte], sum);
        }
        RAC_INLINE void into(__m256i (*sums)[2]) const {
            RAC_UNROLL for (int i = 0; i < 2 * M; i++)
                rac::add(sums[i / 2][i % 2], _mm256_madd_epi16(of[i / 2][i % 2], _mm256_set1_epi16(1)));
        }
    };
};

}  // namespace

extern const Integers avx2_integers = avx2_integers_of<IntIsa>();

}  // namespace rac
