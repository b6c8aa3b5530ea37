// Weights of 4 to 2 bits on AVX512 with VNNI: two codes per byte are widened to a byte each, vpexpandb spreads the codes of a quad over
// the codes of zero, and vpdpbusd multiplies four columns at a time.
//
// A code is unsigned, as one factor of vpdpbusd must be. What its code of zero adds to the product, which is the code times the
// sum of x, is subtracted; pruned weights have just this code.
#include "int4.h"

#if defined(__x86_64__) || defined(RAC_EMULATE)
#include <cstring>
#if defined(RAC_EMULATE)
#include "emulated_intrinsics.h"
#elif defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt"))), \
                             apply_to = function)
#else
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")
#endif

namespace rac {
namespace {

#include "add_products.h"
#include "few_bits.h"
#include "scale_of_rows.h"

// Up to 64 codes, one per byte, of a quad of INT4 with this mask; the code of zero of `zeros` where nothing is stored.
inline __m512i spread_codes(uint64_t mask, const char* codes, __m512i zeros) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i halves = _mm512_set1_epi32(0x0f0f0f0f);
    // (words | words << 4) & 0x0f0f: the low half of a byte, then the high one
    const __m512i bytes = _mm512_ternarylogic_epi32(words, _mm512_slli_epi16(words, 4), halves, 0xa8);
    return _mm512_mask_expand_epi8(zeros, mask, bytes);
}

// The address after the codes of a quad. As assembly: the shift drops the bit of an odd number into the carry, and compilers zero the
// destination of popcnt first.
inline const char* after_codes(const char* codes, uint64_t mask) {
#if defined(RAC_EMULATE)
    return codes + code_bytes(static_cast<uint64_t>(__builtin_popcountll(mask)));
#else
    uint64_t count;
    asm("popcntq %2, %0\n\tshrq %0\n\tadcq %0, %1" : "=&r"(count), "+r"(codes) : "rm"(mask) : "cc");
    return codes;
#endif
}

// 16 codes of zero as 32-bit numbers, and each one in the four bytes of its row.
struct Zeros {
    __m512i numbers, bytes;
};
inline Zeros zeros_of_rows(const uint8_t* zeros) {
    if (!zeros) return {_mm512_set1_epi32(ZERO_CODE), _mm512_set1_epi32(0x01010101 * ZERO_CODE)};
    const __m512i numbers = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    const __m512i twice = _mm512_or_si512(numbers, _mm512_slli_epi32(numbers, 8));
    return {numbers, _mm512_or_si512(twice, _mm512_slli_epi32(twice, 16))};
}

// A few lines use two sets of sums, for every other quad, since each addition depends on the one before it.
template <int M>
struct SumsOfQuads {
    static constexpr int SETS = M <= 4 ? 2 : 1;
    __m512i of[SETS][M][2];  // by the byte of x

    inline void multiply(int set, __m512i codes, const char* x) {
        RAC_UNROLL for (int i = 0; i < 2 * M; i++) add_products(of[set][i / 2][i % 2], codes, x + 4 * i);
    }
    inline __m512i byte_sum(int m, int byte) const {
        return SETS == 2 ? _mm512_add_epi32(of[0][m][byte], of[SETS - 1][m][byte]) : of[0][m][byte];
    }
    inline __m512i sum(int m) const { return _mm512_add_epi32(_mm512_slli_epi32(byte_sum(m, 0), 8), byte_sum(m, 1)); }
};

// The next lines of codes, as DENSE4 has them; of DENSE3 and DENSE2 with other bits where code_mask has none. Returns the address after
// them.
template <int form>
inline const char* load_lines(const char* codes, __m512i (&lines)[lines_widened(form)]) {
    constexpr int FROM = lines_stored(form);
    for (int i = 0; i < FROM; i++) lines[i] = _mm512_loadu_si512(codes + QUAD * i);
    if constexpr (form == DENSE2) lines[1] = _mm512_srli_epi32(lines[0], 2);
    if constexpr (form == DENSE3) {  // by tables, the second number where the third has a one, else the first
        const __m512i low = _mm512_set1_epi32(0x11111111), high = _mm512_set1_epi32(0x44444444);
        const __m512i two = _mm512_ternarylogic_epi32(_mm512_srli_epi32(lines[0], 3), _mm512_srli_epi32(lines[1], 2), low, 0xe4);
        lines[3] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(lines[2], 1), two, high, 0xe4);
    }
    return codes + QUAD * FROM;
}

// Quads of few bits of one block, from `codes` on, times M lines.
template <int form, int M>
inline const char* multiply_quads(SumsOfQuads<M>& sums, const uint32_t* masks, const char* codes, __m512i zeros, int64_t quads,
                                  const char* x) {
    constexpr int SECOND = SumsOfQuads<M>::SETS - 1;
    if (form == DENSE4) {
        const __m512i halves = _mm512_set1_epi32(0x0f0f0f0f);
        for (int64_t q = 0; q < quads; q += 2, codes += QUAD, x += 16 * M) {
            _mm_prefetch(codes + 4096, _MM_HINT_T0);
            const __m512i both = _mm512_loadu_si512(codes);
            sums.multiply(0, _mm512_and_si512(both, halves), x);
            sums.multiply(SECOND, _mm512_and_si512(_mm512_srli_epi32(both, 4), halves), x + 8 * M);
        }
        return codes;
    }
    if constexpr (is_narrow(form)) {
        constexpr int LINES = lines_widened(form), FROM = lines_stored(form);
        const __m512i of_code = _mm512_set1_epi32(0x01010101 * code_mask(form));
        for (int64_t q = 0; q < quads; q += 2 * LINES) {
            for (int i = 0; i < FROM; i++) _mm_prefetch(codes + 4096 + QUAD * i, _MM_HINT_T0);
            __m512i lines[LINES];
            codes = load_lines<form>(codes, lines);
            RAC_UNROLL for (int i = 0; i < LINES; i++, x += 16 * M) {
                sums.multiply(0, _mm512_and_si512(lines[i], of_code), x);
                sums.multiply(SECOND, _mm512_and_si512(_mm512_srli_epi32(lines[i], 4), of_code), x + 8 * M);
            }
        }
        return codes;
    }
    const auto next = [&](int64_t q) __attribute__((always_inline)) {
        uint64_t mask;
        std::memcpy(&mask, masks + 2 * q, sizeof mask);
        const __m512i quad = spread_codes(mask, codes, zeros);
        codes = after_codes(codes, mask);
        return quad;
    };
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2, x += 16 * M) {
        // The codes of two quads are at most a cache line. Processors fetch ahead by themselves, but not into the next page.
        _mm_prefetch(codes + 4096, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(masks + 2 * q) + 2048, _MM_HINT_T0);
        const __m512i first = next(q), second = next(q + 1);
        sums.multiply(0, first, x);
        sums.multiply(SECOND, second, x + 8 * M);
    }
    if (q < quads) sums.multiply(0, next(q), x);
    return codes;
}

template <int form, int M>
void dot(const Product8& product, int64_t panel, float* acc) {
    const Weight& weight = product.out.weight;
    const char* codes = weight.values_of(panel);
    const uint32_t* masks = form == INT4 ? weight.masks_of(panel) : nullptr;
    Zeros zeros = zeros_of_rows(product.zeros_of(panel, 0));
    const int64_t lines = product.out.m;  // at most 2 M
    __m512 scale = scale_of_rows(product, panel, 0);
    for (int64_t m = 0; m < lines; m++) _mm512_storeu_ps(acc + PANEL * m, _mm512_setzero_ps());
    for (int64_t block = 0; block < product.blocks; block++) {
        const int64_t column = block * product.block, left = weight.columns - column;
        const int64_t quads = ((left < product.block ? left : product.block) + 3) / 4;
        if (weight.zero_groups > 1) zeros = zeros_of_rows(product.zeros_of(panel, block));
        if (product.groups > 1) scale = scale_of_rows(product, panel, block);
        const Lines8 x = {product.x + 2 * column * M, product.stride, product.x_sums + block, product.blocks, product.bytes};
        SumsOfQuads<M> sums;
        RAC_UNROLL for (int m = 0; m < M; m++) {
            // Wrap-around is harmless: the sum of all terms fits.
            RAC_UNROLL for (int byte = 0; byte < 2; byte++)
                sums.of[0][m][byte] =
                    byte || x.bytes ? _mm512_mullo_epi32(zeros.numbers, _mm512_set1_epi32(static_cast<int>(0u - x.sum_of(m, byte))))
                                    : _mm512_setzero_si512();
            if (SumsOfQuads<M>::SETS == 2) sums.of[SumsOfQuads<M>::SETS - 1][m][0] = sums.of[SumsOfQuads<M>::SETS - 1][m][1] = _mm512_setzero_si512();
        }
        codes = multiply_quads<form, M>(sums, masks + (form == INT4 ? column / 2 : 0), codes, zeros.bytes, quads,
                                        static_cast<const char*>(x.data));
        const auto add = [&](int64_t line, __m512i sum) __attribute__((always_inline)) {
            const __m512 x_scale = _mm512_set1_ps(product.x_scale[line * product.blocks + block]);
            const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), x_scale), scale);
            float* to = acc + PANEL * line;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), scaled));
        };
        RAC_UNROLL for (int m = 0; m < M; m++) {
            if (product.bytes) {
                add(2 * m, sums.byte_sum(m, 0));
                if (2 * m + 1 < lines) add(2 * m + 1, sums.byte_sum(m, 1));
            } else {
                add(m, sums.sum(m));
            }
        }
    }
}

// An Expand4 into 8-bit quads.
template <int form>
const char* expand(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const __m512i zero = zeros_of_rows(zeros).bytes, halves = _mm512_set1_epi32(0x0f0f0f0f);
    char* to = static_cast<char*>(out);
    if constexpr (is_narrow(form)) {  // whole lines: there is room for them
        constexpr int LINES = lines_widened(form);
        const __m512i of_code = _mm512_set1_epi32(0x01010101 * code_mask(form));
        for (int64_t q = 0; q < quads; q += 2 * LINES) {
            __m512i lines[LINES];
            codes = load_lines<form>(codes, lines);
            RAC_UNROLL for (int i = 0; i < LINES; i++, to += 2 * QUAD) {
                _mm512_storeu_si512(to, _mm512_sub_epi8(_mm512_and_si512(lines[i], of_code), zero));
                _mm512_storeu_si512(to + QUAD, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi32(lines[i], 4), of_code), zero));
            }
        }
        return codes;
    }
    if (form == DENSE4) {
        for (int64_t q = 0; q < quads; q += 2, codes += QUAD) {
            const __m512i both = _mm512_loadu_si512(codes);
            _mm512_storeu_si512(to + QUAD * q, _mm512_sub_epi8(_mm512_and_si512(both, halves), zero));
            const __m512i high = _mm512_and_si512(_mm512_srli_epi32(both, 4), halves);
            if (q + 1 < quads) _mm512_storeu_si512(to + QUAD * (q + 1), _mm512_sub_epi8(high, zero));
        }
        return codes;
    }
    for (int64_t q = 0; q < quads; q++) {
        const uint64_t mask = masks[2 * q] | static_cast<uint64_t>(masks[2 * q + 1]) << 32;
        _mm512_storeu_si512(to + QUAD * q, _mm512_sub_epi8(spread_codes(mask, codes, zero), zero));
        codes += code_bytes(RAC_COUNT(masks[2 * q]) + RAC_COUNT(masks[2 * q + 1]));
    }
    return codes;
}

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

#define RAC_LINES4(form) \
    {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>, dot<form, 5>, dot<form, 6>, dot<form, 7>, dot<form, 8>}
extern const Kernel4 avx512_kernel4 = {
    {expand<INT4>, expand<DENSE4>, nullptr, expand<DENSE3>, expand<DENSE2>},
    {RAC_LINES4(INT4), RAC_LINES4(DENSE4), {}, RAC_LINES4(DENSE3), RAC_LINES4(DENSE2)},
    {QUADS, QUADS, QUADS, QUADS, QUADS},
};

}  // namespace rac
#else
namespace rac {
extern const Kernel4 avx512_kernel4 = {};
}  // namespace rac
#endif
