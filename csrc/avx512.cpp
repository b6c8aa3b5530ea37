// AVX512 with VBMI2: vpexpandw and vpexpandd spread the stored values of a mask word over their lanes, one instruction per
// vector.
#include "kernel.h"

#if defined(__x86_64__) || defined(RAC_EMULATE)
#if defined(RAC_EMULATE)
#include "emulated_intrinsics.h"
#elif defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt"))), apply_to = function)
#else
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")
#endif

namespace rac {
namespace {

// The weights of a mask word as fp32: w[k] holds column k.
struct Columns {
    __m512 w[2];
};

// Returns the address of the next word's values.
template <int form>
inline const char* expand_word(uint32_t mask, const char* values, Columns& two);

template <>
inline const char* expand_word<BF16>(uint32_t mask, const char* values, Columns& two) {
    const __m512i spread = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
    two.w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(spread, 16));
    two.w[1] = _mm512_castsi512_ps(_mm512_and_si512(spread, _mm512_set1_epi32(int(0xffff0000))));
    return values + 2 * RAC_COUNT(mask);
}

template <>
inline const char* expand_word<FP32>(uint32_t mask, const char* values, Columns& two) {
    const char* second = values + 4 * RAC_COUNT(mask & 0xffff);
    two.w[0] = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_loadu_ps(values));
    two.w[1] = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask >> 16), _mm512_loadu_ps(second));
    return values + 4 * RAC_COUNT(mask);
}

template <>
inline const char* expand_word<DENSE>(uint32_t, const char* values, Columns& two) {
    two.w[0] = _mm512_loadu_ps(values);
    two.w[1] = _mm512_loadu_ps(values + 64);
    return values + 128;
}

constexpr int LINES = 8;  // at a time

template <int form, int M>
void dot(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    __m512 acc[M][2];  // a set of sums per column of the pair hides the latency of a multiplication
    RAC_UNROLL for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    for (int64_t word = 0; word < pairs; word++) {
        Columns two;
        if (form != DENSE) _mm_prefetch(values + 1024, _MM_HINT_T0);
        values = expand_word<form>(form == DENSE ? 0 : masks[word], values, two);
        RAC_UNROLL for (int m = 0; m < M; m++)
            RAC_UNROLL for (int k = 0; k < 2; k++)
                acc[m][k] = _mm512_fmadd_ps(two.w[k], _mm512_set1_ps(x[m * stride + 2 * word + k]), acc[m][k]);
    }
    RAC_UNROLL for (int m = 0; m < M; m++) {
        const __m512 sum = _mm512_add_ps(acc[m][0], acc[m][1]);
        _mm512_storeu_ps(out + 16 * m, _mm512_add_ps(_mm512_loadu_ps(out + 16 * m), sum));
    }
}

template <Type type>
const char* expand(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2) {
        Columns two;
        values = expand_word<type>(masks[column / 2], values, two);
        for (int k = 0; k < 2 && column + k < columns; k++)
            _mm512_storeu_ps(static_cast<float*>(out) + (column + k) * stride, two.w[k]);
    }
    return values;
}

const char* expand_bf16(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2) {
        const uint32_t mask = masks[column / 2];
        const __m512i spread = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
        values += 2 * RAC_COUNT(mask);
        uint16_t* to = static_cast<uint16_t*>(out) + column * stride;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(spread));
        if (column + 1 < columns)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + stride),
                                _mm512_cvtepi32_epi16(_mm512_srli_epi32(spread, 16)));
    }
    return values;
}

template <Type type>
const char* expand_and_multiply(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride,
                                float* out, float* block) {
    values = expand<type>(masks, values, 2 * pairs, block, PANEL);
    dot<DENSE, LINES>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out);
    return values;
}

void store(const Product& product, int64_t panel, int64_t count, int64_t first, int64_t lines, const Sums& sums) {
    store_lines(product, panel, count, first, lines, sums);
}

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

#define RAC_LINES(form) \
    {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>, dot<form, 5>, dot<form, 6>, dot<form, 7>, dot<form, 8>}
extern const Kernel avx512_kernel = {
    {LINES,
     LINES,
     {RAC_LINES(BF16), RAC_LINES(FP32), RAC_LINES(DENSE)},
     {expand_and_multiply<BF16>, expand_and_multiply<FP32>}},
    {expand<BF16>, expand<FP32>},
    expand_bf16,
    store,
};

bool has_avx512() {
#if defined(RAC_EMULATE)
    return true;
#else
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi2");
#endif
}

}  // namespace rac
#else
namespace rac {
extern const Kernel avx512_kernel = {};
bool has_avx512() { return false; }
}  // namespace rac
#endif
