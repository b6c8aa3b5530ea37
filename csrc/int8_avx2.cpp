// Weights of 8 to 2 bits on AVX2: they are widened to 16 bits, and vpmaddwd multiplies two columns at a time, exactly.
#include "int4.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace rac {
namespace {

#include "quad_tables.h"

}  // namespace
}  // namespace rac

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,popcnt")
#endif

namespace rac {
namespace {

#include "avx2_quads.h"
#include "few_bits.h"

// Four vectors of 16-bit weights: w[i] holds rows 4i to 4i + 3, four columns each.
struct Quad {
    __m256i w[4];
};

// As assembly, in place: GCC would copy the sums and run out of registers.
inline void add(__m256i& sum, __m256i term) { __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(term)); }

// Returns the address after the values of this quad.
template <int form>
inline const char* expand_quad(const uint32_t* masks, const char* values, Quad& quad, const Zeros& zeros = {}) {
    if (form == EXPANDED) {
        for (int i = 0; i < 4; i++) quad.w[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(values) + i);
        return values + 2 * QUAD;
    }
    if (form == DENSE8) {
        for (int i = 0; i < 4; i++)
            quad.w[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values) + i));
        return values + QUAD;
    }
    if (form == LOW || form == HIGH) {
        const __m128i halves = _mm_set1_epi8(15);
        for (int i = 0; i < 4; i++) {
            const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values) + i);
            quad.w[i] = _mm256_cvtepu8_epi16(_mm_and_si128(form == LOW ? both : _mm_srli_epi16(both, 4), halves));
        }
        return form == LOW ? values : values + QUAD;
    }
    __m128i bytes[4];
    values = spread_quad<form>(masks, values, zeros, bytes);
    RAC_UNROLL for (int i = 0; i < 4; i++) quad.w[i] = _mm256_cvtepi8_epi16(bytes[i]);
    return values;
}

template <int M>
inline void add_quad(__m256i (&acc)[M][4], const Quad& quad, const int16_t* x, int64_t stride) {
    RAC_UNROLL for (int m = 0; m < M; m++) {
        const __m256i four = _mm256_set1_epi64x(*reinterpret_cast<const long long*>(x + m * stride));
        RAC_UNROLL for (int i = 0; i < 4; i++) add(acc[m][i], _mm256_madd_epi16(quad.w[i], four));
    }
}

// A Dot8, which takes codes of zero too.
template <int form, int M>
inline const char* multiply(const uint32_t* masks, const char* values, const Zeros& zeros, int64_t quads, const Lines8& x,
                            int32_t* sums) {
    const int16_t* lines = static_cast<const int16_t*>(x.data);
    __m256i acc[M][4];
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int i = 0; i < 4; i++) acc[m][i] = _mm256_setzero_si256();
    Quad quad;
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2) {
        if (form != EXPANDED && form != CODES) _mm_prefetch(values + 1024, _MM_HINT_T0);
        if (form == INT8 || form == DENSE8) _mm_prefetch(values + 1024 + 64, _MM_HINT_T0);
        values = expand_quad<first_of(form)>(masks + 2 * q, values, quad, zeros);
        add_quad<M>(acc, quad, lines + 4 * q, x.stride);
        values = expand_quad<second_of(form)>(masks + 2 * q + 2, values, quad, zeros);
        add_quad<M>(acc, quad, lines + 4 * q + 4, x.stride);
    }
    if (q < quads) {
        values = expand_quad<first_of(form)>(masks + 2 * q, values, quad, zeros);
        add_quad<M>(acc, quad, lines + 4 * q, x.stride);
    }
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int half = 0; half < 2; half++) {
            const __m256i eight_rows = _mm256_hadd_epi32(acc[m][2 * half], acc[m][2 * half + 1]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * m + 8 * half),
                                _mm256_permute4x64_epi64(eight_rows, 0xd8));
        }
    return values;
}

template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums) {
    return multiply<form, M>(masks, values, {}, quads, x, sums);
}

template <int form>
const char* expand(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    __m256i* to = static_cast<__m256i*>(out);
    for (int64_t q = 0; q < quads; q++, to += 4) {
        Quad quad;
        _mm_prefetch(values + 1024, _MM_HINT_T0);
        values = expand_quad<form>(masks + 2 * q, values, quad);
        for (int i = 0; i < 4; i++) _mm256_store_si256(to + i, quad.w[i]);
    }
    return values;
}

constexpr Format8 FORMAT = INTEGERS;
#include "few_lines4.h"

// The next quad of a 4-bit weight as 16-bit values.
template <int form>
inline const char* expand_codes(const uint32_t* masks, const char* codes, const Zeros& zeros, __m256i* out) {
    Quad quad;
    codes = expand_quad<form>(masks, codes, quad, zeros);
    for (int i = 0; i < 4; i++)
        _mm256_store_si256(out + i, _mm256_sub_epi16(quad.w[i], _mm256_cvtepi8_epi16(zeros.of[i])));
    return codes;
}

// An Expand4 of DENSE4.
const char* expand_dense4(const uint32_t*, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const Zeros zero = zeros_of_rows(zeros);
    __m256i* to = static_cast<__m256i*>(out);
    for (int64_t q = 0; q < quads; q += 2, to += 8) {
        codes = expand_codes<LOW>(nullptr, codes, zero, to);
        if (q + 1 < quads) codes = expand_codes<HIGH>(nullptr, codes, zero, to + 4);
    }
    return codes;
}

// An Expand4 of INT4: first each code becomes a byte, then these are spread as 8-bit weights are.
const char* expand_int4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const Zeros zero = zeros_of_rows(zeros);
    char bytes[WIDENED];
    const char *end = widen(masks, codes, quads, bytes), *values = bytes;
    for (int64_t q = 0; q < quads; q++)
        values = expand_codes<CODES>(masks + 2 * q, values, zero, static_cast<__m256i*>(out) + 4 * q);
    return end;
}

// Eight parts of a weight of few bits times x. The sums of 16 bits, of two columns each, fit: 16 products of at most 15 * 127.
template <int M>
struct Parts {
    __m256i of[M][2];

    template <bool FIRST>
    inline void add(int m, int byte, __m256i low, __m256i x_low, __m256i high, __m256i x_high) {
        __m256i sum = _mm256_maddubs_epi16(low, x_low);
        add16(sum, _mm256_maddubs_epi16(high, x_high));
        if (FIRST)
            of[m][byte] = sum;
        else
            add16(of[m][byte], sum);
    }
    inline void into(__m256i (*sums)[2]) const {
        RAC_UNROLL for (int i = 0; i < 2 * M; i++)
            rac::add(sums[i / 2][i % 2], _mm256_madd_epi16(of[i / 2][i % 2], _mm256_set1_epi16(1)));
    }
    static inline void add16(__m256i& sum, __m256i term) { __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(term)); }
};

inline void store_part(void* out, int64_t quad, int half, __m256i bytes) {
    __m256i* to = static_cast<__m256i*>(out) + 4 * quad + 2 * half;
    _mm256_store_si256(to, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)));
    _mm256_store_si256(to + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)));
}

inline void store_bytes(void* out, int64_t quad, int half, __m256i bytes) {
    _mm256_storeu_si256(static_cast<__m256i*>(out) + 2 * quad + half, bytes);
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

#define RAC_LINES(form) {dot<form, 1>, dot<form, 2>}
extern const Kernel8 avx2_kernel8 = {
    INTEGERS, quantize, add, 2, 2, {RAC_LINES(INT8), RAC_LINES(DENSE8)}, {expand<INT8>, expand<DENSE8>}, RAC_LINES(EXPANDED),
};

extern const Expand4 avx2_planes_to_bytes = expand_planes<store_bytes>;

extern const Kernel4 avx2_kernel4 = {
    {expand_int4, expand_dense4, expand_planes<store_part>, expand_lines<DENSE3, store_part>, expand_lines<DENSE2, store_part>},
    {RAC_FEW_LINES(INT4, add), RAC_FEW_LINES4},
    {INTEGERS, QUADS, QUADS, QUADS, QUADS},
};

}  // namespace rac
#else
namespace rac {
extern const Kernel8 avx2_kernel8 = {};
extern const Kernel4 avx2_kernel4 = {};
extern const Expand4 avx2_planes_to_bytes = nullptr;
}  // namespace rac
#endif
