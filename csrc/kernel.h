// What an instruction set provides, and the one product they all compute: out = x W^T + bias, accumulated in fp32.
#pragma once
#include <cstring>

#include "layout.h"

namespace rac {

enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AMX = 3 };

// What a kernel multiplies: stored values of a Type behind masks, or a block, columns of a panel that Begin expanded.
constexpr int DENSE = 2, FORMS = 3;

// acc[m][n] += sum over the pairs of x[m][k] w[n][k], for one panel and a few rows of x (`stride` apart). The word
// behind an odd number of pairs may be read too: it is zero, and so is x there.
template <class X>
using Dot = void (*)(const uint32_t* masks, const char* values, int64_t pairs, const X* x, int64_t stride, float* acc);

// A panel as dense columns: out[k * stride + n] for k < columns, n < 16, of the type that the name says. Returns where
// the values behind these columns start.
using Expand = const char* (*)(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride);

// A block of columns for the first `dense_rows` rows of x: multiplies them as Dot does and leaves the weights expanded in
// `block`, 16 a column, in the order that dot[DENSE] reads. Returns where the values behind them start.
template <class X>
using Begin = const char* (*)(const uint32_t* masks, const char* values, int64_t pairs, const X* x, int64_t stride,
                              float* acc, X* block);

// bf16, rounded to nearest even, of `count` numbers.
using Halve = void (*)(const float* values, int64_t count, uint16_t* out);

constexpr int MOST_ROWS = 12;

// As dot[DENSE] for the blocks of two panels at once: each number of x is read for both.
template <class X>
using PairDot = void (*)(const X* first, const X* second, int64_t pairs, const X* x, int64_t stride, float* acc,
                         float* acc_of_second);

// How x of one type is multiplied: fp32, or bf16 as uint16_t.
template <class X>
struct Dots {
    int rows, dense_rows;           // how many of the entries of dot are there, for the Types and for DENSE
    Dot<X> dot[FORMS][MOST_ROWS];   // by form and rows of x minus one
    Begin<X> begin[4];              // by Type; null for 8-bit weights that are multiplied as integers
    PairDot<X> pair[MOST_ROWS] = {};  // by rows of x minus one; all null where there is none
};

struct Kernel {
    Dots<float> dots;
    Expand to_fp32[2];  // by Type
    Expand bf16_to_bf16;
    Halve halve;
};

struct Product {
    Weight weight;
    const void* x;               // [m][stride], zeros behind the last column
    Type x_type;                 // fp32, or bf16 where the kernel takes it as it is
    int64_t m, stride;
    const float* scale;          // [panels * 16], or null: what each row of the weight is multiplied by
    const void* bias;            // [rows] or null
    Type bias_type;
    void* out;                   // [m][rows]
    Type out_type;
    Halve halve;                 // where out is bf16
};

extern const Kernel portable_kernel, avx2_kernel, avx512_kernel;
extern const Dots<uint16_t> avx512_bf16_dots;  // of bf16 weights

// Panels [first, last) of a product on AMX tiles; x and the weight are bf16. False where memory ran out.
bool amx_panels(const Product& product, int64_t first, int64_t last);

bool has_avx2();
bool has_avx512();
bool has_avx512_bf16();
bool has_amx();  // asks the operating system once for permission, which holds for the process

// In front of a short loop over sums, which stay in registers only where GCC unrolls it early.
#if defined(__clang__)
#define RAC_UNROLL _Pragma("unroll")
#else
#define RAC_UNROLL _Pragma("GCC unroll 16")
#endif

// Bits set; unsigned, so that an address needs no sign extension.
#define RAC_COUNT(mask) static_cast<uint64_t>(static_cast<unsigned>(__builtin_popcount(mask)))

inline float from_bf16(uint16_t bits) {
    union {
        uint32_t integer;
        float real;
    } both = {static_cast<uint32_t>(bits) << 16};
    return both.real;
}

inline uint32_t bits_of(float value) {
    union {
        float real;
        uint32_t integer;
    } both = {value};
    return both.integer;
}

// Round to nearest even; a NaN stays one.
inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value), nan = bits >> 16 | 0x40;
    return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A Halve. Every instruction set compiles a copy of its own, by a function of it that calls this one.
inline void round_all(const float* values, int64_t count, uint16_t* out) {
    if (count == PANEL)  // a length that the compiler knows, and vectorizes
        for (int64_t n = 0; n < PANEL; n++) out[n] = to_bf16(values[n]);
    else
        for (int64_t n = 0; n < count; n++) out[n] = to_bf16(values[n]);
}

inline float read(const void* from, Type type, int64_t index) {
    return type == BF16 ? from_bf16(static_cast<const uint16_t*>(from)[index]) : static_cast<const float*>(from)[index];
}

// Accumulators of `count` panels, `panel_stride` apart, each `lines` rows of x, `stride` apart, into the output, with bias,
// without the tail's rows. A row of x at a time, so that whole cache lines are written.
inline void store(const Product& product, int64_t panel, int64_t count, int64_t first, int64_t lines, const float* acc,
                  int64_t panel_stride, int64_t stride) {
    const int64_t rows = product.weight.rows;
    for (int64_t line = 0; line < lines; line++)
        for (int64_t p = 0; p < count; p++) {
            const int64_t row = (panel + p) * PANEL, left = rows - row < PANEL ? rows - row : PANEL;
            const int64_t at = (first + line) * rows + row;
            float values[PANEL];
            std::memcpy(values, acc + p * panel_stride + line * stride, sizeof values);
            if (product.scale)
                for (int64_t n = 0; n < PANEL; n++) values[n] *= product.scale[row + n];
            if (product.bias)
                for (int64_t n = 0; n < left; n++) values[n] += read(product.bias, product.bias_type, row + n);
            if (product.out_type == BF16)
                product.halve(values, left, static_cast<uint16_t*>(product.out) + at);
            else
                std::memcpy(static_cast<float*>(product.out) + at, values, left * sizeof *values);
        }
}

}  // namespace rac

// A section compiled for an instruction set that the rest of the library may not use. Only code of our own goes in:
// an inline function of the standard library compiled here could be the copy that the linker keeps for everyone.
#if defined(RAC_EMULATE)
#define RAC_TARGET_END
#elif defined(__clang__)
#define RAC_TARGET_END _Pragma("clang attribute pop")
#else
#define RAC_TARGET_END _Pragma("GCC pop_options")
#endif
