// What an instruction set (ISA) provides for out = x W^T + bias, summed in fp32: a Kernel of function tables, made by isa/ISA.cpp.
// format/layout.h says what a panel, a pair, a quad, a slot and a form are.
//
// Each function that walks over a panel returns the address after the values that it read.
#pragma once
#include "format/layout.h"

namespace rac {

// GCC keeps the sums of a short loop in registers only if it unrolls the loop early.
#if defined(__clang__)
#define RAC_UNROLL _Pragma("unroll")
#else
#define RAC_UNROLL _Pragma("GCC unroll 16")
#endif

// The number of bits set. Unsigned, so that adding it to an address needs no sign extension.
#define RAC_COUNT(mask) static_cast<uint64_t>(static_cast<unsigned>(__builtin_popcount(mask)))

RAC_INLINE float from_bits(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
RAC_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
RAC_INLINE float from_bf16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

RAC_INLINE float read(const void* from, Type type, int64_t index) {
    return type == BF16 ? from_bf16(static_cast<const uint16_t*>(from)[index]) : static_cast<const float*>(from)[index];
}

// ---- Floats: weights of BF16 and FP32 ----

// Forms next to BF16 and FP32. BLOCK: columns that ExpandAndMultiply expanded.
constexpr int BLOCK = 2, FLOAT_FORMS = 3;
constexpr int MOST_TOKENS = 12;  // that a Dot multiplies at a time

// acc[m][n] += sum of x[m][k] w[n][k] over the columns k of `pairs`, for a panel and a few tokens, `stride` apart. With an odd
// number of pairs the kernel may read one more mask word: it is zero, and so are these columns of x.
template <class X>
using Dot = const char* (*)(const uint32_t* masks, const char* values, int64_t pairs, const X* x, int64_t stride, float* acc);

// A panel as dense columns: out[k * stride + n] for k < columns and n < 16.
using ExpandColumns = const char* (*)(const uint32_t* masks, const char* values, int64_t columns, float* out, int64_t stride);

// For the first `block_tokens` tokens: expand some columns of a panel into `block`, 16 weights per column in the order that
// dot[BLOCK] reads, and multiply them as Dot does.
template <class X>
using ExpandAndMultiply = const char* (*)(const uint32_t* masks, const char* values, int64_t pairs, const X* x,
                                          int64_t stride, float* acc, X* block);

// dot[BLOCK] for the blocks of two panels: each number of x is read once for both.
template <class X>
using DotTwoPanels = void (*)(const X* first, const X* second, int64_t pairs, const X* x, int64_t stride, float* acc,
                              float* second_acc);

// How x of a type is multiplied: fp32, or bf16 as uint16_t.
template <class X>
struct Dots {
    int tokens;                                        // entries of `dot` for each Type that it multiplies
    int block_tokens;                                  // entries of `dot` for BLOCK
    bool two_panels = false;                           // there is `dot_two_panels`
    Dot<X> dot[FLOAT_FORMS][MOST_TOKENS] = {};         // by form, and by the number of tokens minus one
    ExpandAndMultiply<X> expand_and_multiply[4] = {};  // by Type, for those that are multiplied as floats
    DotTwoPanels<X> dot_two_panels[MOST_TOKENS] = {};  // by the number of tokens minus one
};

// The sums of some panels: pairs of panels are `pair` numbers apart, the second of a pair is `second` after the first, tokens are
// `token` apart.
struct Sums {
    const float* data;
    int64_t pair, second, token;
};

// Write the sums of `count` panels from `panel` on and of `tokens` tokens from `first` on to the output: times the scale, plus
// the bias, rounded to nearest even where the output is bf16, without the rows that only pad the last panel.
struct Matmul;
using Store = void (*)(const Matmul& matmul, int64_t panel, int64_t count, int64_t first, int64_t tokens, const Sums& sums);

struct Floats {
    Dots<float> dots;
    ExpandColumns expand[2];  // by Type
    Store store;
};

struct Matmul {
    Weight weight;
    const void* x;       // [m][stride], zeros after the last column; for AMX [m / 16][stride / 32][16][32]
    int64_t m, stride;   // m: tokens
    const float* scale;  // [panels * 16], or null: a factor per row
    const void* bias;    // [rows] or null
    Type bias_type;
    void* out;           // [m][rows]
    Type out_type;
    Store store;         // of the kernel that runs
};

// ---- Integers: weights of INT8 and of codes ----
//
// The arithmetic between two roundings is exact. x is rounded to 16-bit integers, with a scale per token and block of columns. At
// the end of a block its integer sums become fp32, times the scales of x and of the weight.
//
// An outlier in x therefore reduces the accuracy of the other columns of its block, and of no others. As long as the outlier is
// less than about 500 times larger, 16 bits are more accurate than bf16. The sums of a block fit 32 bits: 512 products of at most
// 128 * 32639. A value that is not finite makes its token of the result NaN.
//
// Where the weight has byte_x, x is rounded to bytes. With two tokens per slot, a kernel that multiplies bytes needs half of the
// instructions per token.

constexpr int64_t BLOCK_MOST = 512;              // columns of a block
constexpr int64_t BLOCK_ROOM = BLOCK_MOST + 64;  // the last block of a token includes its padding
constexpr int LEVELS = 127 * 256 + 127;  // the largest integer of x: both its bytes, signed, are within -127..127
constexpr int BYTE_LEVELS = 127;
constexpr int MOST_SLOTS = 8;  // interleaved in QUADS

// INT_FORMS next to INT8 and the Types after it. EXPANDED: what ExpandQuads wrote. CODES: what widen_codes wrote, a byte per code.
// LOW and HIGH: the two quads of a line of DENSE4.
constexpr int EXPANDED = TYPES, CODES = TYPES + 1, LOW = TYPES + 2, HIGH = TYPES + 3;

// How a kernel reads x. INTEGERS: int16 [m][stride]. The others are for instructions that multiply bytes, x = 256 first + second.
// TILES: [m / 16][stride / 64][2][16][64]. QUADS: up to 8 slots interleaved, [stride / 4][slots][2][4]. With x of bytes, first and
// second belong to two tokens: neighbours in QUADS, 16 apart in TILES. Zeros multiply what comes after the last column; stride is
// a multiple of 64.
enum XFormat { INTEGERS, TILES, QUADS };

// Some slots in a block of columns. `sums`: the sum of each token's integers, `sums_stride` apart. `bytes`: x has a byte per number.
struct Slots {
    const char* data;
    int64_t stride;
    const int32_t* sums;
    int64_t sums_stride;
    bool bytes;

    RAC_INLINE int per_slot() const { return bytes ? 2 : 1; }
    // The sum of the integers that the sums of byte `byte` of a slot belong to: 0 for the first of two bytes.
    RAC_INLINE uint32_t sum_of(int64_t slot, int byte) const {
        if (bytes) return static_cast<uint32_t>(sums[(2 * slot + byte) * sums_stride]);
        return byte ? static_cast<uint32_t>(sums[slot * sums_stride]) : 0;
    }
};

struct IntMatmul {
    Matmul out;             // weight, m, bias, out
    const char* x;          // in an XFormat, `stride` numbers of two bytes per slot
    int64_t stride;
    const float* x_scale;   // [m][blocks]
    const int32_t* x_sums;  // [m][blocks], the sums of the integers; with `bytes`, these and x_scale have an even number of tokens
    bool bytes;             // x has a byte per number
    int64_t block, blocks;  // columns of a block, a multiple of 4, for AMX of 64; number of blocks
    const void* scale;      // [panels][groups][16]
    Type scale_type;        // FP32, or BF16 for codes
    int64_t groups;         // 1, or as many as blocks

    RAC_INLINE int64_t per_slot() const { return bytes ? 2 : 1; }
    RAC_INLINE int64_t slots(int64_t tokens) const { return (tokens + per_slot() - 1) / per_slot(); }
    RAC_INLINE int64_t scale_at(int64_t panel, int64_t number) const {
        return (panel * groups + (groups > 1 ? number : 0)) * PANEL;
    }
    RAC_INLINE int64_t columns_of(int64_t number) const {
        const int64_t left = out.weight.columns - number * block;
        return left < block ? left : block;
    }
    RAC_INLINE void read_scale(int64_t panel, int64_t number, float* to) const {
        for (int64_t n = 0; n < PANEL; n++) to[n] = read(scale, scale_type, scale_at(panel, number) + n);
    }
    RAC_INLINE int64_t quads_of(int64_t number) const { return (columns_of(number) + 3) / 4; }
};

// sums[m][n] = sum over the columns of x[m] w[n], for `quads` of a panel and each token of some slots.
using IntDot = const char* (*)(const uint32_t* masks, const char* values, int64_t quads, const Slots& x, int32_t* sums);

// Quads in the kernel's dense form, at most 2 bytes per weight. Of codes: the code minus the code of zero of each row, `zeros` [16]
// (null: all are ZERO_CODE), and 0 where nothing is stored. Codes without masks start at lines that hold whole quads.
using ExpandQuads = const char* (*)(const uint32_t* masks, const char* values, const uint8_t* zeros, int64_t quads, void* out);

// `columns` numbers of x, of a token and block, as integers of at most `levels` and as the two bytes of each. Returns their scale:
// NaN if a value is not finite, 0 if all are zero or nearly zero.
using Quantize = float (*)(const void* x, Type type, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]);

// acc[m][n] += sums[m][n] * x_scale[m * stride] * scale[n].
using AddScaled = void (*)(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t tokens,
                           float* acc);

// Some slots times two panels of expanded quads, the second panel PANEL * BLOCK_MOST bytes after the first:
// acc[token][n] += sum * x_scale[token * Slots::sums_stride] * scale[n] for the first `tokens` tokens. The sums of the second panel are
// `second` numbers after those of the first, with the 16 scales that come next.
struct PairSums {
    int64_t tokens;
    const float *x_scale, *scale;
    float* acc;
    int64_t second;
};
using DotPair = void (*)(const char* expanded, int64_t quads, const Slots& x, const PairSums& to);

// acc[m][16] = all tokens of x times a panel of codes, scaled.
using FewTokens = void (*)(const IntMatmul& matmul, int64_t panel, float* acc);

constexpr int CODE_TYPES = TYPES - INT4;

struct Integers {
    XFormat format;
    Quantize quantize;
    AddScaled add_scaled;
    int slots;                            // entries of `dot`
    int expanded_slots;                   // entries of `dot_expanded`
    int direct_slots;                     // so many slots multiply 8-bit weights as stored, a group of `slots` after the other
    bool signed_bytes = false;            // `expand` writes [16 rows][4 columns] of signed bytes
    bool pairs = false;                   // there is `pair`: panels are multiplied two by two
    int few_slots[CODE_TYPES] = {};       // by Type: so many slots are multiplied by `few_tokens`, MOST_SLOTS at a time
    XFormat few_format[CODE_TYPES] = {};  // of x, for `few_tokens`

    ExpandQuads expand[TYPES - INT8] = {};
    IntDot dot[2][MOST_SLOTS] = {};  // weights as stored: INT8, DENSE8; by the number of slots minus one
    IntDot dot_expanded[MOST_SLOTS] = {};
    DotPair pair[MOST_SLOTS] = {};
    FewTokens few_tokens[CODE_TYPES][MOST_SLOTS] = {};
};

// ---- AMX: whole panels on tiles ----

// Panels [first, last). False if there is not enough memory.
struct Tiles {
    bool (*floats)(const Matmul& matmul, int64_t first, int64_t last);  // x and the weight are bf16
    bool (*integers)(const IntMatmul& matmul, int64_t first, int64_t last);
    bool (*codes)(const IntMatmul& matmul, int64_t first, int64_t last);  // out.x is bf16; each weight is rounded to bf16
};

// Up to how many tokens the kernel is faster than a dense matmul of torch with expanded panels; -1: always.
struct Crossover {
    int32_t floats = -1, int8 = -1, int4 = -1;
};

struct Kernel {
    const char* name;   // RAC_KERNEL=name selects the kernel
    const char* title;  // for people
    const Floats* floats;
    const Dots<uint16_t>* bf16 = nullptr;  // of x and weights in bf16, where has_avx512_bf16(); or null
    const Integers* integers;
    const Tiles* tiles = nullptr;  // or null
    Crossover crossover = {};
};

// Kernels share the tables of lower instruction sets.
extern const Floats portable_floats, avx2_floats, avx512_floats, neon_floats;
extern const Dots<uint16_t> avx512_bf16;
extern const Integers portable_integers, avx2_integers, avx512_integers, amx_integers;
bool amx_int_panels(const IntMatmul& matmul, int64_t first, int64_t last);

}  // namespace rac
