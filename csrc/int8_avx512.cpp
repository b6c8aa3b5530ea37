// 8-bit weights on AVX512 with VNNI: vpexpandb spreads a quad over a vector, vpdpbusd multiplies four columns at a time.
//
// vpdpbusd takes one factor without a sign: 128 is added to both bytes of x beforehand, and what that adds to the product,
// a multiple of the sum of the weights, is taken off again.
#include "int8.h"

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

constexpr int SPREAD = 4;  // a form: expanded quads, in the first-level cache

template <int form>
inline __m512i expand_quad(const uint32_t* masks, const char*& values) {
    const __m512i stored = _mm512_loadu_si512(values);
    if (form != INT8) {
        values += QUAD;
        return stored;
    }
    uint64_t mask;
    std::memcpy(&mask, masks, sizeof mask);
    values += static_cast<uint64_t>(__builtin_popcountll(mask));
    return _mm512_maskz_expand_epi8(mask, stored);
}

// Four bytes of x, 128 added to each, in every lane.
inline __m512i four(const uint8_t* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

// Sums of four products of unsigned bytes of x and signed ones of w. As an instruction, because GCC gives the intrinsic's
// sums two registers each, and copies or spills them at every step.
inline void add_products(__m512i& sums, __m512i x, __m512i w) {
#if defined(RAC_EMULATE)
    sums = _mm512_dpbusd_epi32(sums, x, w);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
#endif
}

template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Rows8& x, int32_t* sums) {
    const uint8_t* rows = static_cast<const uint8_t*>(x.data);
    const __m512i ones = _mm512_set1_epi32(0x01010101);
    __m512i acc[M][2], weights = _mm512_setzero_si512();
    RAC_UNROLL for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; q++) {
        if (form != SPREAD) _mm_prefetch(values + 4096, _MM_HINT_T0);
        const __m512i w = expand_quad<form>(masks + 2 * q, values);
        add_products(weights, ones, w);
        RAC_UNROLL for (int m = 0; m < M; m++)
            RAC_UNROLL for (int plane = 0; plane < 2; plane++)
                add_products(acc[m][plane], four(rows + (2 * m + plane) * x.stride + 4 * q), w);
    }
    // 128 * 257 more than x itself; differences are right even where a term wraps around
    const __m512i excess = _mm512_add_epi32(_mm512_slli_epi32(weights, 15), _mm512_slli_epi32(weights, 7));
    RAC_UNROLL for (int m = 0; m < M; m++) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(acc[m][0], 8), acc[m][1]);
        _mm512_storeu_si512(sums + PANEL * m, _mm512_sub_epi32(sum, excess));
    }
    return values;
}

template <int form>
const char* spread(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    for (int64_t q = 0; q < quads; q++)
        _mm512_storeu_si512(static_cast<char*>(out) + QUAD * q, expand_quad<form>(masks + 2 * q, values));
    return values;
}

void add(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines, float* acc) {
    add_scaled(sums, x_scale, stride, scale, lines, acc);
}

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

#define RAC_ROWS(form) \
    {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>, dot<form, 5>, dot<form, 6>, dot<form, 7>, dot<form, 8>}
extern const Kernel8 avx512_kernel8 = {
    PLANES_PLUS, add, 8, 8, {RAC_ROWS(INT8), RAC_ROWS(DENSE8)}, {spread<INT8>, spread<DENSE8>}, RAC_ROWS(SPREAD),
};

bool has_vnni() {
#if defined(RAC_EMULATE)
    return true;
#else
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
#endif
}

}  // namespace rac
#else
namespace rac {
extern const Kernel8 avx512_kernel8 = {};
bool has_vnni() { return false; }
}  // namespace rac
#endif
