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
constexpr int LEVELS = 127 * 256 + 127;  // the largest integer of x: both its bytes, signed, are within -127..127

// Rows of x as integers: int16 [m][stride], or, for instructions that multiply bytes, two planes of int8 a row,
// [m][2][stride], with x = 256 first + second. What is behind the last column is multiplied by zero; stride is a multiple
// of 64.
struct Rows8 {
    const void* data;
    int64_t stride;
};

// sums[m][n] = sum over the columns of x[m] w[n], for `quads` of four columns of one panel. Returns the next values.
using Dot8 = const char* (*)(const uint32_t* masks, const char* values, int64_t quads, const Rows8& x, int32_t* sums);

// Quads as the kernel's own dense form, at most 2 bytes a weight. Returns the next values.
using Spread8 = const char* (*)(const uint32_t* masks, const char* values, int64_t quads, void* out);

// How a kernel reads x; PLANES_PLUS has 128 added to each byte, for instructions that take one factor without a sign.
enum Format8 { INTEGERS, PLANES, PLANES_PLUS };

using AddScaled = void (*)(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines,
                           float* acc);

struct Kernel8 {
    Format8 format;
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
    Product out;               // weight, m, bias, out; x is in `rows`
    Rows8 rows;
    const float* x_scale;      // [m][blocks]
    int64_t block, blocks;     // columns; a multiple of 4, for AMX of 64
    const float* scale;        // [panels][groups][16]
    int64_t groups;            // 1, or one a block
};

// Panels [first, last) on AMX tiles. False where memory ran out.
bool amx_panels8(const Product8& product, int64_t first, int64_t last);

// sums[m][n] times the scales of a row of x, `stride` apart, and of a row of the weight, into acc. Every instruction set
// compiles a copy of its own.
namespace {
inline void add_scaled(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines,
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
