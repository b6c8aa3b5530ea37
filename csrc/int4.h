// What an instruction set provides for 4-bit weights, beside its Kernel8: x and what is expanded have the same forms.
#pragma once
#include "int8.h"

namespace rac {

// Quads of a 4-bit weight as an Expand8 leaves them: code minus the code of zero of each row, `zeros` [16] (null: all are
// ZERO_CODE), and 0 where nothing is stored. DENSE4 starts at a pair of quads. Returns the address after these codes.
using Expand4 = const char* (*)(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out);

// acc[m][16] = all lines of x times one panel, scaled.
using Dot4 = void (*)(const Product8& product, int64_t panel, float* acc);

struct Kernel4 {
    Expand4 expand[2];                // INT4, DENSE4
    Dot4 dot[2][LINES_TOGETHER];      // INT4, DENSE4; by the number of double lines minus one. Null, or more lines: `expand` is used
};

extern const Kernel4 portable_kernel4, avx2_kernel4, avxvnni_kernel4, avx512_kernel4, neon_kernel4, dotprod_kernel4, i8mm_kernel4;

// Bytes that `count` codes take.
inline uint64_t code_bytes(uint64_t count) { return (count + 1) / 2; }

}  // namespace rac
