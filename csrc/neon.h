// What the kernels of ARM processors share. NEON is part of every 64-bit one; the memory order must be little-endian.
#pragma once
#include "int4.h"

#if defined(__aarch64__) && !defined(__AARCH64EB__)
#define RAC_NEON 1
#include <arm_neon.h>

namespace rac {

// Expand8 and Expand4 into 8-bit quads, [16 rows][4 columns].
const char* neon_expand_int8(const uint32_t* masks, const char* values, int64_t quads, void* out);
const char* neon_expand_dense8(const uint32_t* masks, const char* values, int64_t quads, void* out);

// The codes of some quads of INT4, of at most BLOCK_MOST columns: each one becomes a byte of `bytes`, where those of a quad start at an
// even address. Returns the address after these codes.
const char* widen(const uint32_t* masks, const char* codes, int64_t quads, char* bytes);
constexpr int64_t WIDENED = PANEL * BLOCK_MOST + 64;  // bytes that it may write

const char* neon_expand_int4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out);
const char* neon_expand_dense4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out);
const char* neon_expand_dense3(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out);
const char* neon_expand_dense2(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out);
#define RAC_EXPAND4 {neon_expand_int4, neon_expand_dense4, nullptr, neon_expand_dense3, neon_expand_dense2}
#define RAC_DOT4                                                                                                             \
    {RAC_FEW_LINES(INT4, neon_add), RAC_FEW_LINES(DENSE4, neon_add), {}, RAC_FEW_LINES(DENSE3, neon_add), RAC_FEW_LINES(DENSE2, neon_add)}
#define RAC_FORMAT4 {FORMAT, FORMAT, FORMAT, FORMAT, FORMAT}

float neon_quantize(const void* x, Type type, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]);
void neon_add(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines, float* acc);

// Inlined into each ISA's translation unit, so each gets its own copy.
namespace {

// Byte i of the result: the number of bits that are set in bytes 0 to i of the mask.
RAC_INLINE uint64_t ends_of_bytes(uint64_t mask) {
    return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0) * 0x0101010101010101;
}

// A quad of 8-bit weights: w[i] holds rows 4i to 4i + 3, four columns each.
struct Quad {
    int8x16_t w[4];
};

}  // namespace
}  // namespace rac
#endif
