// What an instruction set provides for weights of few bits, beside its Kernel8: x and what is expanded have the same forms.
#pragma once
#include "int8.h"

namespace rac {

// Quads of a weight of few bits as an Expand8 leaves them: code minus the code of zero of each row, `zeros` [16] (null: all are
// ZERO_CODE), and 0 where nothing is stored. Types without masks start at lines that hold whole quads. Returns the address after these
// codes.
using Expand4 = const char* (*)(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out);

// acc[m][16] = all lines of x times one panel, scaled.
using Dot4 = void (*)(const Product8& product, int64_t panel, float* acc);

constexpr int FEW_BITS = TYPES - INT4;

struct Kernel4 {
    Expand4 expand[FEW_BITS];            // by Type from INT4 on; null where the ISA cannot multiply this type
    Dot4 dot[FEW_BITS][LINES_TOGETHER];  // by the number of double lines minus one. Null, or more lines: `expand` is used
    Format8 format[FEW_BITS];            // of x, for `dot`
};

extern const Kernel4 portable_kernel4, avx2_kernel4, avxvnni_kernel4, avx512_kernel4, neon_kernel4, dotprod_kernel4, i8mm_kernel4;
const Kernel4& sve_kernel4();  // as sve_kernel

// An Expand4 of PLANES4 to [16 rows][4 columns] of signed bytes, for processors with AVX2 and pdep.
extern const Expand4 avx2_planes_to_bytes;

// Whether an instruction set multiplies PLANES4 on this processor, and whether that is faster than INT4.
bool runs_planes(int32_t isa);
bool prefers_planes(int32_t isa);
bool has_pdep();
bool has_fast_pdep();

// Bytes that `count` codes take.
inline uint64_t code_bytes(uint64_t count) { return (count + 1) / 2; }

}  // namespace rac
