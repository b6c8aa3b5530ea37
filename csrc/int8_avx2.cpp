// 8-bit and 4-bit weights on AVX2: they are widened to 16 bits, and vpmaddwd multiplies two columns at a time, exactly.
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

constexpr int EXPANDED = 4;  // a form: 16-bit weights of whole quads

// Four vectors of 16-bit weights: w[i] holds rows 4i to 4i + 3, four columns each.
struct Quad {
    __m256i w[4];
};

// 8 bytes from each of two addresses.
inline __m128i two(const void* low, const void* high) {
    const __m128i half = _mm_loadl_epi64(static_cast<const __m128i*>(low));
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(half), static_cast<const __m64*>(high)));
}

// As assembly: compilers zero the destination first, which helps old processors only and is one in ten instructions here.
inline uint64_t count(uint64_t mask) {
    uint64_t bits;
    __asm__("popcntq %1, %0" : "=r"(bits) : "r"(mask));
    return bits;
}

// As assembly, in place: GCC would copy the sums and run out of registers.
inline void add(__m256i& sum, __m256i term) { __asm__("vpaddd %1, %0, %0" : "+x"(sum) : "x"(term)); }

// The 16 weights of the lowest 16 bits of the mask.
inline __m256i expand16(uint64_t mask, const char* values) {
    const uint64_t low = mask & 0xff, high = mask >> 8 & 0xff;
    const __m128i stored = two(values, values + count(low));
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(stored, two(tables.low[low], tables.high[high])));
}

template <int form>
inline const char* expand_quad(const uint32_t* masks, const char* values, Quad& quad) {
    if (form == EXPANDED) {
        for (int i = 0; i < 4; i++) quad.w[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(values) + i);
        return values + 2 * QUAD;
    }
    if (form == DENSE8) {
        for (int i = 0; i < 4; i++)
            quad.w[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values) + i));
        return values + QUAD;
    }
    const uint64_t first = masks[0], second = masks[1];
    const char* middle = values + count(first);
    quad.w[0] = expand16(first, values);
    quad.w[1] = expand16(first >> 16, values + count(first & 0xffff));
    quad.w[2] = expand16(second, middle);
    quad.w[3] = expand16(second >> 16, middle + count(second & 0xffff));
    return middle + count(second);
}

template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums) {
    const int16_t* lines = static_cast<const int16_t*>(x.data);
    __m256i acc[M][4];
    for (int m = 0; m < M; m++)
        for (int i = 0; i < 4; i++) acc[m][i] = _mm256_setzero_si256();
    for (int64_t q = 0; q < quads; q++) {
        Quad quad;
        if (form != EXPANDED) _mm_prefetch(values + 1024, _MM_HINT_T0);
        values = expand_quad<form>(masks + 2 * q, values, quad);
        for (int m = 0; m < M; m++) {
            const __m256i four =
                _mm256_set1_epi64x(*reinterpret_cast<const long long*>(lines + m * x.stride + 4 * q));
            for (int i = 0; i < 4; i++) add(acc[m][i], _mm256_madd_epi16(quad.w[i], four));
        }
    }
    for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) {
            const __m256i eight_rows = _mm256_hadd_epi32(acc[m][2 * half], acc[m][2 * half + 1]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 16 * m + 8 * half),
                                _mm256_permute4x64_epi64(eight_rows, 0xd8));
        }
    return values;
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

// The 16 codes of zero, plus `more`, each one in the four columns of its row, as 16-bit numbers.
inline Quad zeros_of_rows(const uint8_t* zeros, int more) {
    alignas(32) int16_t columns[QUAD];
    for (int i = 0; i < QUAD; i++) columns[i] = static_cast<int16_t>(more + (zeros ? zeros[i / 4] : ZERO_CODE));
    Quad quad;
    for (int i = 0; i < 4; i++) quad.w[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(columns) + i);
    return quad;
}

// An Expand4 of DENSE4, at most BLOCK_MOST columns.
const char* expand_dense4(const uint32_t*, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const Quad zero = zeros_of_rows(zeros, 0);
    const __m128i halves = _mm_set1_epi8(15);
    __m256i* to = static_cast<__m256i*>(out);
    for (int64_t q = 0; q < quads; q += 2, codes += QUAD, to += 8)
        for (int i = 0; i < 4; i++) {
            const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i);
            const __m128i low = _mm_and_si128(both, halves), high = _mm_and_si128(_mm_srli_epi16(both, 4), halves);
            _mm256_store_si256(to + i, _mm256_sub_epi16(_mm256_cvtepu8_epi16(low), zero.w[i]));
            if (q + 1 < quads) _mm256_store_si256(to + 4 + i, _mm256_sub_epi16(_mm256_cvtepu8_epi16(high), zero.w[i]));
        }
    return codes;
}

// An Expand4 of INT4, at most BLOCK_MOST columns: first each code becomes a byte, then these are spread as 8-bit weights are.
const char* expand_int4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    constexpr int PLUS = 16;  // so that a stored code is not 0
    const Quad zero = zeros_of_rows(zeros, PLUS);
    const __m128i halves = _mm_set1_epi8(15), plus = _mm_set1_epi8(PLUS);
    uint64_t size = 0;
    for (int64_t q = 0; q < quads; q++) size += code_bytes(count(masks[2 * q]) + count(masks[2 * q + 1]));
    char bytes[PANEL * BLOCK_MOST + 64];
    for (uint64_t at = 0; at < size; at += 16) {  // the codes have 64 bytes of padding
        _mm_prefetch(codes + at + 1024, _MM_HINT_T0);
        const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at));
        const __m128i low = _mm_or_si128(_mm_and_si128(both, halves), plus);
        const __m128i high = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(both, 4), halves), plus);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * at), _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * at + 16), _mm_unpackhi_epi8(low, high));
    }
    __m256i* to = static_cast<__m256i*>(out);
    const char* values = bytes;
    for (int64_t q = 0; q < quads; q++, to += 4) {
        Quad quad;
        const char* end = expand_quad<INT8>(masks + 2 * q, values, quad);
        for (int i = 0; i < 4; i++) {
            const __m256i stored = _mm256_cmpgt_epi16(quad.w[i], _mm256_setzero_si256());
            _mm256_store_si256(to + i, _mm256_and_si256(_mm256_sub_epi16(quad.w[i], zero.w[i]), stored));
        }
        values += 2 * code_bytes(static_cast<uint64_t>(end - values));
    }
    return codes + size;
}

float quantize(const void* x, Type type, int64_t columns, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    return quantize_block(x, type, columns, integers, bytes);
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

extern const Kernel4 avx2_kernel4 = {{expand_int4, expand_dense4}, 0, {}};

}  // namespace rac
#else
namespace rac {
extern const Kernel8 avx2_kernel8 = {};
extern const Kernel4 avx2_kernel4 = {};
}  // namespace rac
#endif
