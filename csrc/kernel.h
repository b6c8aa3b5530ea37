// What each instruction set (ISA) provides, and the product that all of them compute: out = x W^T + bias, summed in fp32.
//
// A `row` is a row of the weight, a `line` is a row of x. A `pair` is two neighbouring columns, which share a mask word.
#pragma once
#include <cstring>

#include "layout.h"

namespace rac {

// In the order of preference, of x86-64 and of ARM. Each includes those below it, but AVX512 does not include AVXVNNI, and SVE includes
// neither DOTPROD nor I8MM. SVE is preferred only where prefers_sve().
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVXVNNI = 2, AVX512 = 3, AMX = 4, NEON = 5, DOTPROD = 6, I8MM = 7, SVE = 8, ISAS };

// The forms of a weight that a kernel multiplies: stored values of a Type with their masks, or a block, which is some columns
// of a panel that ExpandAndMultiply expanded.
constexpr int DENSE = 2, FORMS = 3;

// acc[m][n] += sum of x[m][k] w[n][k] over the columns k of `pairs`, for one panel and a few lines, `stride` apart. With an
// odd number of pairs the kernel may read one more mask word: it is zero, and so are these columns of x.
template <class X>
using Dot = void (*)(const uint32_t* masks, const char* values, int64_t pairs, const X* x, int64_t stride, float* acc);

// A panel as dense columns: out[k * stride + n] for k < columns and n < 16, in the type that the function is named after.
// Returns the address after the values of these columns.
using Expand = const char* (*)(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride);

// For the first `dense_lines` lines: expands some columns of a panel into `block`, 16 weights per column in the order that
// dot[DENSE] reads, and multiplies them as Dot does. Returns the address after the values of these columns.
template <class X>
using ExpandAndMultiply = const char* (*)(const uint32_t* masks, const char* values, int64_t pairs, const X* x,
                                          int64_t stride, float* acc, X* block);

// Where the sums of some panels are: pairs of panels are `pair` numbers apart, the second of a pair is `second` after the first,
// and lines are `line` apart.
struct Sums {
    const float* data;
    int64_t pair, second, line;
};

// Writes the sums of `count` panels from `panel` on and of `lines` lines from `first` on to the output: times the scale, plus
// the bias, rounded to nearest even where it is bf16, without the rows that only pad the last panel.
struct Product;
using Store = void (*)(const Product& product, int64_t panel, int64_t count, int64_t first, int64_t lines, const Sums& sums);

constexpr int MOST_LINES = 12;

// As dot[DENSE], for the blocks of two panels at once: each number of x is read once for both.
template <class X>
using DotTwoPanels = void (*)(const X* first, const X* second, int64_t pairs, const X* x, int64_t stride, float* acc,
                              float* acc_of_second);

// How x of one type is multiplied: fp32, or bf16 as uint16_t.
template <class X>
struct Dots {
    int lines, dense_lines;           // how many entries of `dot` exist, for each Type and for DENSE
    Dot<X> dot[FORMS][MOST_LINES];    // by form, and by the number of lines minus one
    ExpandAndMultiply<X> expand_and_multiply[4];  // by Type; null for 8-bit weights that are multiplied as integers
    DotTwoPanels<X> dot_two_panels[MOST_LINES] = {};  // by the number of lines minus one; all null where the ISA has none
};

struct Kernel {
    Dots<float> dots;
    Expand to_fp32[2];  // by Type
    Expand bf16_to_bf16;
    Store store;
};

struct Product {
    Weight weight;
    const void* x;               // [m][stride], zeros after the last column; for AMX [m / 16][stride / 32][16][32]
    Type x_type;                 // fp32, or bf16 where the kernel reads bf16
    int64_t m, stride;           // m: the number of lines
    const float* scale;          // [panels * 16], or null: a factor for each row
    const void* bias;            // [rows] or null
    Type bias_type;
    void* out;                   // [m][rows]
    Type out_type;
    Store store;                 // of the kernel that runs
};

extern const Kernel portable_kernel, avx2_kernel, avx512_kernel, neon_kernel;
extern const Dots<uint16_t> avx512_bf16_dots, arm_bf16_dots;  // of bf16 weights
const Kernel& sve_kernel();  // for this processor's vectors; that of NEON where it has none
int sve_bits();              // of a vector, or 0

// Panels [first, last) of a product on AMX tiles; x and the weight are bf16. False if there is not enough memory.
bool amx_panels(const Product& product, int64_t first, int64_t last);

// AMX: lines that several panels use in turn, and these panels. With 512 columns of x they take 640 KiB of a second-level
// cache of 2 MiB, and with the sums another 384.
constexpr int64_t AMX_LINES = 384, AMX_PANELS = 16;
// Chunks of nearly equal height, so that the last one is not a line or two; whole blocks of 32.
inline int64_t amx_lines(int64_t m) {
    const int64_t chunks = (m + AMX_LINES - 1) / AMX_LINES;
    return ((m + chunks - 1) / chunks + 31) / 32 * 32;
}
bool has_avx2();
bool has_avx_vnni();
bool has_avx512();
bool has_avx512_bf16();
bool has_neon();
bool has_arm_bf16();
bool has_sve();
bool prefers_sve();
bool has_amx();  // requests permission from the operating system, once per process

// For short loops over sums: GCC keeps the sums in registers only if it unrolls the loop early.
#if defined(__clang__)
#define RAC_UNROLL _Pragma("unroll")
#else
#define RAC_UNROLL _Pragma("GCC unroll 16")
#endif

// The number of bits set. Unsigned, so that adding it to an address needs no sign extension.
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

inline float read(const void* from, Type type, int64_t index) {
    return type == BF16 ? from_bf16(static_cast<const uint16_t*>(from)[index]) : static_cast<const float*>(from)[index];
}

// Vectors, since GCC unrolls a loop over the rows of a panel and then rounds them one by one.
typedef uint32_t Words __attribute__((vector_size(4 * PANEL)));
typedef uint16_t Halves __attribute__((vector_size(2 * PANEL)));
constexpr int64_t STORED_PANELS = 16;  // at a time, at most
static_assert(AMX_PANELS <= STORED_PANELS, "they are stored together");

// Inlined into each ISA's Store, so each gets its own copy. One line after the other, so that whole cache lines are written.
namespace {
__attribute__((always_inline)) inline void store_lines(const Product& product, int64_t panel, int64_t count, int64_t first,
                                                       int64_t lines, const Sums& sums) {
    const int64_t rows = product.weight.rows;
    float bias[STORED_PANELS][PANEL];
    if (product.bias)
        for (int64_t p = 0; p < count; p++)
            for (int64_t n = 0, row = (panel + p) * PANEL; n < PANEL; n++, row++)
                bias[p][n] = row < rows ? read(product.bias, product.bias_type, row) : 0;
    for (int64_t line = 0; line < lines; line++)
        for (int64_t p = 0; p < count; p++) {
            const int64_t row = (panel + p) * PANEL, left = rows - row < PANEL ? rows - row : PANEL;
            const int64_t at = (first + line) * rows + row;
            float values[PANEL];
            std::memcpy(values, sums.data + p / 2 * sums.pair + p % 2 * sums.second + line * sums.line, sizeof values);
            if (product.scale)
                for (int64_t n = 0; n < PANEL; n++) values[n] *= product.scale[row + n];
            if (product.bias)
                for (int64_t n = 0; n < PANEL; n++) values[n] += bias[p][n];
            if (product.out_type == BF16) {
                Words bits;
                std::memcpy(&bits, values, sizeof bits);
                const Words even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
                const Words is_nan = static_cast<Words>((bits & 0x7fffffff) > 0x7f800000);
                const Halves rounded = __builtin_convertvector((is_nan & nan) | (~is_nan & even), Halves);
                uint16_t* out = static_cast<uint16_t*>(product.out) + at;
                if (left == PANEL)  // a constant length, which is a store and not a call
                    std::memcpy(out, &rounded, sizeof rounded);
                else
                    std::memcpy(out, &rounded, left * sizeof *out);
            } else {
                std::memcpy(static_cast<float*>(product.out) + at, values, left * sizeof *values);
            }
        }
}
}  // namespace

}  // namespace rac

// Ends a section that is compiled for one ISA. Such a section must not use inline functions of the standard library: the
// linker keeps one copy of each for the whole library, and could keep the copy that was compiled for this ISA.
#if defined(RAC_EMULATE)
#define RAC_TARGET_END
#elif defined(__clang__)
#define RAC_TARGET_END _Pragma("clang attribute pop")
#else
#define RAC_TARGET_END _Pragma("GCC pop_options")
#endif
