// Products with weights of 8 to 2 bits: exact integer arithmetic between two roundings. First x is rounded to 16-bit integers, with
// one scale per line and block of columns. At the end the sums of a block become fp32, times the scales of x and of the weight.
//
// An outlier in x therefore reduces the accuracy of the other columns of its own block, and of no others. As long as it is
// less than about 500 times larger than they are, 16 bits are more accurate than bf16. The sums of a block fit 32 bits: 512
// products of at most 128 * 32639. A value that is not finite makes its line of the result NaN.
//
// Where a weight says so (byte_x), x is rounded to bytes. Then a kernel that multiplies bytes gets two lines in place of the two bytes of
// one, and multiplies them in the same instructions: half of these for each line. Both, a line of two bytes and two lines of one, are a
// `double line`.
#pragma once
#include "kernel.h"

namespace rac {

constexpr int64_t BLOCK_MOST = 512;  // columns
constexpr int64_t BLOCK_ROOM = BLOCK_MOST + 64;  // the last block of a line includes its padding
constexpr int LEVELS = 127 * 256 + 127;  // the largest integer of x: both its bytes, signed, are within -127..127
constexpr int BYTE_LEVELS = 127;  // of one byte

// How a kernel reads x. INTEGERS: int16 [m][stride]. The others are for instructions that multiply bytes, with
// x = 256 first + second. TILES: [m / 16][stride / 64][2][16][64]. QUADS: up to 8 lines interleaved,
// [stride / 4][lines][2][4]. With x of one byte, first and second are those of two lines: neighbours in QUADS, 16 apart in TILES. What comes after the last column is multiplied by zero; stride is a multiple of 64.
enum Format8 { INTEGERS, TILES, QUADS };
constexpr int LINES_TOGETHER = 8;  // interleaved in QUADS: double lines

// Some double lines in one block of columns. `sums`: the sum of each line's integers, `sums_stride` apart. `bytes`: x has one byte.
struct Lines8 {
    const void* data;
    int64_t stride;
    const int32_t* sums;
    int64_t sums_stride;
    bool bytes;

    int per_double() const { return bytes ? 2 : 1; }
    // The sum of the integers that the products with byte `byte` of double line `m` belong to: 0 for the first byte of two.
    uint32_t sum_of(int64_t m, int byte) const {
        if (bytes) return static_cast<uint32_t>(sums[(2 * m + byte) * sums_stride]);
        return byte ? static_cast<uint32_t>(sums[m * sums_stride]) : 0;
    }
};

// sums[m][n] = sum over the columns of x[m] w[n], for `quads` of one panel and each line of some double lines. Returns the address after the values of these.
using Dot8 = const char* (*)(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums);

// Quads in the kernel's own dense form, at most 2 bytes per weight; [16 rows][4 columns] of signed bytes, but on AVX2 and AVXVNNI. Returns the address after the values of these.
using Expand8 = const char* (*)(const uint32_t* masks, const char* values, int64_t quads, void* out);

// `columns` numbers of x, of one line and block, as integers of at most `levels` and as the two bytes of each. Returns their scale: NaN if a value
// is not finite, 0 if all are zero or nearly zero.
using Quantize = float (*)(const void* x, Type type, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]);

// acc[m][n] += sums[m][n] * x_scale[m * stride] * scale[n].
using AddScaled = void (*)(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines,
                           float* acc);

// Where the sums of two panels go: acc[line][n] += sum * x_scale[line * Lines8::sums_stride] * scale[n], of the first `lines` lines. Those
// of the second panel are `second` numbers behind, with the 16 scales that come next.
struct Sums8 {
    int64_t lines;
    const float *x_scale, *scale;
    float* acc;
    int64_t second;
};

// Some double lines times two panels of expanded quads, the second one PANEL * BLOCK_MOST bytes behind the first.
using Pair8 = void (*)(const char* expanded, int64_t quads, const Lines8& x, const Sums8& to);

struct Kernel8 {
    Format8 format;
    Quantize quantize;
    AddScaled add;
    int lines, expanded_lines;  // how many entries of `dot` and of `dot_expanded` exist
    Dot8 dot[2][MOST_LINES];    // weights as stored: INT8, DENSE8; by the number of double lines minus one
    Expand8 expand[2];          // INT8, DENSE8
    Dot8 dot_expanded[MOST_LINES];
    Pair8 pair[MOST_LINES] = {};  // of two panels; null where they are multiplied one by one
};

extern const Kernel8 portable_kernel8, avx2_kernel8, avxvnni_kernel8, avx512_kernel8, neon_kernel8, dotprod_kernel8, i8mm_kernel8;
const Kernel8& sve_kernel8();  // as sve_kernel
bool has_vnni();
bool has_amx_int8();
bool has_dotprod();
bool has_i8mm();

struct Product8 {
    Product out;               // weight, m, bias, out
    const char* x;             // in a Format8, `stride` numbers of two bytes per line
    int64_t stride;
    const float* x_scale;      // [m][blocks]
    const int32_t* x_sums;     // [m][blocks], the sums of the integers; with `bytes`, these and x_scale have an even number of lines
    bool bytes;                // x has one byte per number: lines are multiplied in twos
    int64_t block, blocks;     // columns; a multiple of 4, for AMX of 64
    const void* scale;         // [panels][groups][16]
    Type scale_type;           // FP32, or BF16 of weights of few bits
    int64_t groups;            // 1, or one per block

    int64_t per_double() const { return bytes ? 2 : 1; }
    int64_t doubles(int64_t lines) const { return (lines + per_double() - 1) / per_double(); }
    int64_t scale_at(int64_t panel, int64_t block) const { return (panel * groups + (groups > 1 ? block : 0)) * PANEL; }
    void read_scale(int64_t panel, int64_t block, float* to) const {
        for (int64_t n = 0; n < PANEL; n++) to[n] = read(scale, scale_type, scale_at(panel, block) + n);
    }
    const uint8_t* zeros_of(int64_t panel, int64_t block) const {
        return out.weight.zeros_of(panel, out.weight.zero_groups > 1 ? block : 0);
    }
};

// Panels [first, last) on AMX tiles. False if there is not enough memory.
bool amx_panels8(const Product8& product, int64_t first, int64_t last);

// Inlined into each ISA's translation unit, so each gets its own copy.
namespace {
#define RAC_INLINE __attribute__((always_inline)) inline

template <class Read>
RAC_INLINE float quantize_as(Read read, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
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
    const float inverse = some ? static_cast<float>(levels) / largest : 0;
    for (int64_t k = 0; k < columns; k++) {
        const float value = some ? numbers[k] * inverse : 0;
        integers[k] = static_cast<int16_t>(static_cast<int32_t>(value + (value < 0 ? -0.5f : 0.5f)));
    }
    for (int64_t k = 0; k < columns; k++) {
        bytes[1][k] = static_cast<int8_t>(integers[k] & 0xff);
        bytes[0][k] = static_cast<int8_t>((integers[k] - bytes[1][k]) >> 8);
    }
    return some ? largest / static_cast<float>(levels) : finite ? 0 : __builtin_nanf("");
}

RAC_INLINE float quantize_block(const void* x, Type type, int64_t columns, int levels, int16_t* integers,
                                int8_t (*bytes)[BLOCK_ROOM]) {
    if (type == BF16) {
        const uint16_t* from = static_cast<const uint16_t*>(x);
        return quantize_as([=](int64_t k) __attribute__((always_inline)) { return from_bf16(from[k]); }, columns, levels, integers, bytes);
    }
    const float* from = static_cast<const float*>(x);
    return quantize_as([=](int64_t k) __attribute__((always_inline)) { return from[k]; }, columns, levels, integers, bytes);
}

// An AddScaled.
RAC_INLINE void add_scaled_sums(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale,
                                int64_t lines, float* acc) {
    for (int64_t m = 0; m < lines; m++, sums += PANEL, acc += PANEL) {
        float added[PANEL];
        for (int n = 0; n < PANEL; n++) added[n] = static_cast<float>(sums[n]) * x_scale[m * stride] * scale[n];
        for (int n = 0; n < PANEL; n++) acc[n] += added[n];
    }
}
}  // namespace

// Add the integer sums of one block, one panel and some lines to the fp32 sums.
inline void add_block(const Product8& product, AddScaled add, int64_t panel, int64_t block, int64_t line, int64_t lines,
                      const int32_t* sums, float* acc) {
    float scale[PANEL];
    product.read_scale(panel, block, scale);
    add(sums, product.x_scale + line * product.blocks + block, product.blocks, scale, lines, acc);
}

}  // namespace rac
