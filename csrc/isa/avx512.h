// What the sources for AVX512 and AMX share.
#pragma once
#if defined(RAC_EMULATE)
#include "emulated_intrinsics.h"
#else
#include <immintrin.h>
#endif
#include <cstring>

#include "gemm/kernel.h"

namespace rac {
namespace {

#if !defined(RAC_EMULATE)
// The bytes from `values` on, spread to where the mask has ones, with zeros elsewhere. Written as assembly on a zeroed register:
// on a Zen 5 the instruction depends on its destination although it keeps nothing of it, and compilers choose a register that
// was used shortly before.
RAC_INLINE __m512i expand_bytes(uint64_t mask, const char* values) {
    __m512i bytes = _mm512_setzero_si512();
    asm("vpexpandb %2, %0%{%1%}%{z%}"
        : "+v"(bytes)
        : "Yk"(static_cast<__mmask64>(mask)), "m"(*reinterpret_cast<const char(*)[64]>(values)));
    return bytes;
}

// Add four products, of unsigned bytes of w and signed bytes of x, to each sum. As assembly: with the intrinsic, GCC uses two
// registers per sum and copies or spills them at every step.
RAC_INLINE void add_products(__m512i& sums, __m512i w, const char* x) {
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(w), "m"(*reinterpret_cast<const char(*)[4]>(x)));
}

// Four bytes in every lane. As assembly: compilers would load them again for each use.
RAC_INLINE __m512i four_bytes(const char* x) {
    __m512i all;
    asm("vpbroadcastd %1, %0" : "=v"(all) : "m"(*reinterpret_cast<const char(*)[4]>(x)));
    return all;
}

RAC_INLINE void add_products(__m512i& sums, __m512i w, __m512i x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
}
#endif

// The scales of the 16 rows of a panel in a block of columns.
RAC_INLINE __m512 scale_of_rows(const IntMatmul& matmul, int64_t panel, int64_t block) {
    const int64_t at = matmul.scale_at(panel, block);
    if (matmul.scale_type == FP32) return _mm512_loadu_ps(static_cast<const float*>(matmul.scale) + at);
    const uint16_t* bf16 = static_cast<const uint16_t*>(matmul.scale) + at;
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

}  // namespace
}  // namespace rac
