// Weights of 8 to 2 bits on AVX-VNNI, which processors without AVX512 have: weights are spread as on AVX2, and vpdpbusd multiplies four
// columns at a time.
//
// One factor of vpdpbusd is unsigned. So 128 is added to every 8-bit weight, pruned ones included, and what this adds to the product,
// 128 times the sum of x, is subtracted again. Codes of few bits are unsigned as they are.
#include "int4.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#include <cpuid.h>
#include <immintrin.h>

namespace rac {
namespace {

#include "quad_tables.h"

}  // namespace
}  // namespace rac

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avxvnni,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,avxvnni,popcnt")
#endif

namespace rac {
namespace {

#include "avx2_quads.h"
#include "few_bits.h"

// Two vectors of unsigned bytes: w[i] holds rows 8i to 8i + 7, four columns each.
struct Quad {
    __m256i w[2];
};

// Returns the address after the values of this quad.
template <int form>
inline const char* expand_quad(const uint32_t* masks, const char* values, Quad& quad, const Zeros& zeros = {}) {
    const __m256i halves = _mm256_set1_epi8(15), plus = _mm256_set1_epi8(-128);
    if (form == INT8 || form == CODES) {
        __m128i bytes[4];
        values = spread_quad<form>(masks, values, zeros, bytes);
        for (int i = 0; i < 2; i++) quad.w[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(bytes[2 * i]), bytes[2 * i + 1], 1);
    } else {
        for (int i = 0; i < 2; i++) quad.w[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values) + i);
        values += form == LOW ? 0 : QUAD;
    }
    for (__m256i& w : quad.w) {
        if (form == INT8 || form == DENSE8) w = _mm256_xor_si256(w, plus);
        if (form == LOW) w = _mm256_and_si256(w, halves);
        if (form == HIGH) w = _mm256_and_si256(_mm256_srli_epi16(w, 4), halves);
    }
    return values;
}

// Add four products, of unsigned bytes of w and signed bytes of x, to each sum. As assembly: with the intrinsic, GCC copies the sums.
inline void add_products(__m256i& sums, __m256i w, __m256i x) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(w), "x"(x));
}

constexpr int LINES = 2;  // at a time: 8 of the 16 registers hold sums

template <int SOME>
inline void add_quad(__m256i (&acc)[SOME][2][2], const Quad& quad, const char* x) {
    RAC_UNROLL for (int m = 0; m < SOME; m++)
        RAC_UNROLL for (int byte = 0; byte < 2; byte++) {
            int32_t four;
            std::memcpy(&four, x + 8 * m + 4 * byte, sizeof four);
            const __m256i of_all = _mm256_set1_epi32(four);
            RAC_UNROLL for (int i = 0; i < 2; i++) add_products(acc[m][byte][i], quad.w[i], of_all);
        }
}

template <int form, int M, int SOME>
RAC_INLINE const char* dot_some(const uint32_t* masks, const char* values, const Zeros& zeros, int64_t quads,
                                const Lines8& lines, int line, int32_t* sums) {
    const char* x = static_cast<const char*>(lines.data) + 8 * line;
    __m256i acc[SOME][2][2];
    RAC_UNROLL for (int m = 0; m < SOME; m++)
        RAC_UNROLL for (int i = 0; i < 2; i++) {
            // Wrap-around is harmless: the sum of both terms fits.
            const bool of_codes = form == CODES || form == DENSE4;
            RAC_UNROLL for (int byte = 0; byte < 2; byte++)
                acc[m][byte][i] = _mm256_set1_epi32(of_codes ? 0 : static_cast<int>(-128u * lines.sum_of(line + m, byte)));
        }
    Quad quad;
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2, x += 16 * M) {
        if (form != EXPANDED && form != CODES) _mm_prefetch(values + 1024, _MM_HINT_T0);
        if (form == INT8 || form == DENSE8) _mm_prefetch(values + 1024 + QUAD, _MM_HINT_T0);
        values = expand_quad<first_of(form)>(masks + 2 * q, values, quad, zeros);
        add_quad<SOME>(acc, quad, x);
        values = expand_quad<second_of(form)>(masks + 2 * q + 2, values, quad, zeros);
        add_quad<SOME>(acc, quad, x + 8 * M);
    }
    if (q < quads) {
        values = expand_quad<first_of(form)>(masks + 2 * q, values, quad, zeros);
        add_quad<SOME>(acc, quad, x);
    }
    RAC_UNROLL for (int m = 0; m < SOME; m++)
        RAC_UNROLL for (int i = 0; i < 2; i++) {
            __m256i* to = reinterpret_cast<__m256i*>(sums + PANEL * lines.per_double() * (line + m)) + i;
            if (lines.bytes) {
                _mm256_storeu_si256(to, acc[m][0][i]);
                _mm256_storeu_si256(to + 2, acc[m][1][i]);
            } else {
                _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_slli_epi32(acc[m][0][i], 8), acc[m][1][i]));
            }
        }
    return values;
}

#include "interleaved_lines.h"

// Quads as EXPANDED has them, 128 added: of 8-bit weights, and of 4-bit ones, whose code of zero is subtracted.
inline void store_quad(void* out, int64_t q, const Quad& quad) {
    for (int i = 0; i < 2; i++) _mm256_storeu_si256(static_cast<__m256i*>(out) + 2 * q + i, quad.w[i]);
}

template <int form>
const char* expand(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    for (int64_t q = 0; q < quads; q++) {
        Quad quad;
        if (form == INT8 || form == DENSE8) _mm_prefetch(values + 1024, _MM_HINT_T0);
        values = expand_quad<form>(masks + 2 * q, values, quad);
        store_quad(out, q, quad);
    }
    return values;
}

template <int form>
inline const char* expand_codes(const uint32_t* masks, const char* codes, const Zeros& zeros, int64_t q, void* out) {
    Quad quad;
    codes = expand_quad<form>(masks, codes, quad, zeros);
    for (int i = 0; i < 2; i++) {
        const __m256i zero = _mm256_inserti128_si256(_mm256_castsi128_si256(zeros.of[2 * i]), zeros.of[2 * i + 1], 1);
        quad.w[i] = _mm256_sub_epi8(_mm256_add_epi8(quad.w[i], _mm256_set1_epi8(-128)), zero);
    }
    store_quad(out, q, quad);
    return codes;
}

template <int form>
const char* expand4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const Zeros zero = zeros_of_rows(zeros);
    if (form == DENSE4) {
        for (int64_t q = 0; q < quads; q += 2) {
            codes = expand_codes<LOW>(nullptr, codes, zero, q, out);
            if (q + 1 < quads) codes = expand_codes<HIGH>(nullptr, codes, zero, q + 1, out);
        }
        return codes;
    }
    char bytes[WIDENED];
    const char *end = widen(masks, codes, quads, bytes), *values = bytes;
    for (int64_t q = 0; q < quads; q++) values = expand_codes<CODES>(masks + 2 * q, values, zero, q, out);
    return end;
}

// Eight parts of a weight of few bits times x.
template <int M>
struct Parts {
    __m256i of[M][2];

    template <bool FIRST>
    inline void add(int m, int byte, __m256i low, __m256i x_low, __m256i high, __m256i x_high) {
        if (FIRST) of[m][byte] = _mm256_setzero_si256();
        add_products(of[m][byte], low, x_low);
        add_products(of[m][byte], high, x_high);
    }
    inline void into(__m256i (*sums)[2]) const {
        RAC_UNROLL for (int i = 0; i < 2 * M; i++) sums[i / 2][i % 2] = _mm256_add_epi32(sums[i / 2][i % 2], of[i / 2][i % 2]);
    }
};

inline void store_part(void* out, int64_t quad, int half, __m256i bytes) {
    _mm256_storeu_si256(static_cast<__m256i*>(out) + 2 * quad + half, _mm256_add_epi8(bytes, _mm256_set1_epi8(-128)));
}

#include "avx2_lines4.h"

float quantize(const void* x, Type type, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    return quantize_block(x, type, columns, levels, integers, bytes);
}

void add(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines, float* acc) {
    add_scaled_sums(sums, x_scale, stride, scale, lines, acc);
}

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

extern const Kernel8 avxvnni_kernel8 = {
    QUADS,
    quantize,
    add,
    LINES,
    LINES_TOGETHER,
    {{dot<INT8, 1>, dot<INT8, 2>}, {dot<DENSE8, 1>, dot<DENSE8, 2>}},
    {expand<INT8>, expand<DENSE8>},
    RAC_LINES(EXPANDED),
};

extern const Kernel4 avxvnni_kernel4 = {
    {expand4<INT4>, expand4<DENSE4>, expand_planes<store_part>, expand_lines<DENSE3, store_part>, expand_lines<DENSE2, store_part>},
    {RAC_FEW_LINES(INT4, add), RAC_FEW_LINES4},
    {QUADS, QUADS, QUADS, QUADS, QUADS},
};

// cpuid is asked once: it is slow in a virtual machine.
bool has_avx_vnni() {
    static const bool there = [] {
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
    }();
    return there && has_avx2();
}

}  // namespace rac
#else
namespace rac {
extern const Kernel8 avxvnni_kernel8 = {};
extern const Kernel4 avxvnni_kernel4 = {};
bool has_avx_vnni() { return false; }
}  // namespace rac
#endif
