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

using Rows = __m512;
inline Rows no_rows() { return _mm512_setzero_ps(); }
inline Rows load_rows(const float* from) { return _mm512_loadu_ps(from); }
inline void store_rows(float* to, Rows rows) { _mm512_storeu_ps(to, rows); }
inline Rows add_rows(Rows a, Rows b) { return _mm512_add_ps(a, b); }
inline Rows multiply_add(Rows w, float x, Rows sums) { return _mm512_fmadd_ps(w, _mm512_set1_ps(x), sums); }

constexpr int LINES = 8;  // at a time
constexpr int sets_of_sums(int) { return 2; }

#include "by_column.h"

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
