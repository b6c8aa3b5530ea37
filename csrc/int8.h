// Products with 8-bit weights. They are exact integer arithmetic between two roundings: x becomes 16-bit integers, one
// scale for each row and block of columns, and a block's sums become fp32, times the scales of x and of the weight.
//
// An outlier therefore costs the other columns of its own block accuracy, and only those; 16 bits leave them more than
// bf16 has as long as it is less than some 500 times larger than they are. In a block, sums fit 32 bits: 512 products of
// at most 128 * 32639. A value that is not finite makes its row of the result NaN.
#pragma once
#include "kernel.h"

namespace rac {

constexpr int64_t BLOCK_MOST = 512;  // columns
constexpr int64_t BLOCK_ROOM = BLOCK_MOST + 64;  // the last block of a row goes on to its end
constexpr int LEVELS = 127 * 256 + 127;  // the largest integer of x: both its bytes, signed, are within -127..127

// How a kernel reads x: int16 [m][stride], or, for instructions that multiply bytes, x = 256 first + second, either as two
// planes a row, [m][2][stride], or, for up to 8 rows at a time, as [stride / 4][rows][2][4]. What is behind the last column is
// multiplied by zero; stride is a multiple of 64.
enum Format8 { INTEGERS, PLANES, QUADS };
constexpr int TOGETHER = 8;  // rows of QUADS

// Rows of x in one block of columns. `sums` has the sum of each row's, `apart` from row to row; only for QUADS.
struct Rows8 {
    const void* data;
    int64_t stride;
    const int32_t* sums;
    int64_t apart;
};

// sums[m][n] = sum over the columns of x[m] w[n], for `quads` of four columns of one panel. Returns the next values.
using Dot8 = const char* (*)(const uint32_t* masks, const char* values, int64_t quads, const Rows8& x, int32_t* sums);

// Quads as the kernel's own dense form, at most 2 bytes a weight. Returns the next values.
using Spread8 = const char* (*)(const uint32_t* masks, const char* values, int64_t quads, void* out);

// `columns` numbers of x, of one row and block, as integers, and both bytes of each. Returns their scale: NaN where a value is
// not finite, 0 where all are (next to) nothing.
using Quantize = float (*)(const void* x, Type type, int64_t columns, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]);

using AddScaled = void (*)(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines,
                           float* acc);

struct Kernel8 {
    Format8 format;
    Quantize quantize;
    AddScaled add;
    int rows, spread_rows;     // entries of dot (stored weights) and of dot_spread
    Dot8 dot[2][MOST_ROWS];    // INT8, DENSE8
    Spread8 spread[2];
    Dot8 dot_spread[MOST_ROWS];
};

extern const Kernel8 portable_kernel8, avx2_kernel8, avx512_kernel8;
bool has_vnni();
bool has_amx_int8();

struct Product8 {
    Product out;               // weight, m, bias, out
    const char* x;             // by Format8, `stride` numbers of two bytes a row
    int64_t stride;
    const float* x_scale;      // [m][blocks]
    const int32_t* x_sums;     // the same
    int64_t block, blocks;     // columns; a multiple of 4, for AMX of 64
    const float* scale;        // [panels][groups][16]
    int64_t groups;            // 1, or one a block
};

// Panels [first, last) on AMX tiles. False where memory ran out.
bool amx_panels8(const Product8& product, int64_t first, int64_t last);

// Every instruction set compiles copies of its own of these, by functions of it that they become part of.
namespace {
#define RAC_INLINE __attribute__((always_inline)) inline

template <class Read>
RAC_INLINE float quantize_as(Read read, int64_t columns, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    float numbers[BLOCK_MOST];
    uint32_t most = 0;
    for (int64_t k = 0; k < columns; k++) {
        numbers[k] = read(k);
        uint32_t bits;
        std::memcpy(&bits, numbers + k, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    const bool finite = most < 0x7f800000, some = finite && largest >= 1e-30f;
    const float inverse = some ? LEVELS / largest : 0;
    for (int64_t k = 0; k < columns; k++) {
        const float value = some ? numbers[k] * inverse : 0;
        integers[k] = static_cast<int16_t>(static_cast<int32_t>(value + (value < 0 ? -0.5f : 0.5f)));
    }
    for (int64_t k = 0; k < columns; k++) {
        bytes[1][k] = static_cast<int8_t>(integers[k] & 0xff);
        bytes[0][k] = static_cast<int8_t>((integers[k] - bytes[1][k]) >> 8);
    }
    return some ? largest / LEVELS : finite ? 0 : __builtin_nanf("");
}

RAC_INLINE float quantize_block(const void* x, Type type, int64_t columns, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    if (type == BF16) {
        const uint16_t* from = static_cast<const uint16_t*>(x);
        return quantize_as([=](int64_t k) __attribute__((always_inline)) { return from_bf16(from[k]); }, columns, integers, bytes);
    }
    const float* from = static_cast<const float*>(x);
    return quantize_as([=](int64_t k) __attribute__((always_inline)) { return from[k]; }, columns, integers, bytes);
}

// sums[m][n] times the scales of a row of x, `stride` apart, and of a row of the weight, into acc.
RAC_INLINE void add_scaled(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines,
                       float* acc) {
    for (int64_t m = 0; m < lines; m++, sums += PANEL, acc += PANEL) {
        float added[PANEL];
        for (int n = 0; n < PANEL; n++) added[n] = static_cast<float>(sums[n]) * x_scale[m * stride] * scale[n];
        for (int n = 0; n < PANEL; n++) acc[n] += added[n];
    }
}
}  // namespace

// A block's sums of one panel and some rows of x, into fp32.
inline void add_block(const Product8& product, AddScaled add, int64_t panel, int64_t block, int64_t line, int64_t lines,
                      const int32_t* sums, float* acc) {
    const float* scale = product.scale + (panel * product.groups + (product.groups > 1 ? block : 0)) * PANEL;
    add(sums, product.x_scale + line * product.blocks + block, product.blocks, scale, lines, acc);
}

}  // namespace rac
