// The C interface, and the product: who multiplies which panels, and with what.
//
// Functions that can fail return null or a message, valid until the thread's next call.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "int8_product.h"

#define RAC_EXPORT extern "C" __attribute__((visibility("default")))

namespace rac {
namespace {

const Kernel* kernel_of(int32_t isa) {
    return isa >= AVX512 ? &avx512_kernel : isa == AVX2 ? &avx2_kernel : &portable_kernel;
}

bool runs(int32_t isa) {
    switch (isa) {
        case PORTABLE: return true;
        case AVX2: return has_avx2();
        case AVX512: return has_avx512();
        case AMX: return has_amx();
        default: return false;
    }
}

// x as a kernel reads it: `type`, rows padded to whole tiles with zeros. Null where memory ran out.
void* padded(const void* x, Type from, Type to, int64_t m, int64_t lines, int64_t columns, int64_t stride) {
    const int64_t size = to == BF16 ? 2 : 4;
    char* copy = static_cast<char*>(std::aligned_alloc(64, lines * stride * size));
    if (!copy) return nullptr;
    for (int64_t line = 0; line < m; line++) {
        char* at = copy + line * stride * size;
        if (from == to) {
            std::memcpy(at, static_cast<const char*>(x) + line * columns * size, columns * size);
        } else {
            const uint16_t* source = static_cast<const uint16_t*>(x) + line * columns;
            for (int64_t column = 0; column < columns; column++)
                reinterpret_cast<float*>(at)[column] = from_bf16(source[column]);
        }
        std::memset(at + columns * size, 0, (stride - columns) * size);
    }
    std::memset(copy + m * stride * size, 0, (lines - m) * stride * size);
    return copy;
}

// Columns of a panel that are expanded at a time: 16 KiB of fp32, half a first-level cache, or two panels of bf16.
constexpr int64_t BLOCK_COLUMNS = 256;
// Rows of x that many panels share: with BLOCK_COLUMNS 240 KiB, half a second-level cache of 512 KiB.
template <class X>
constexpr int64_t CHUNK = sizeof(X) == 2 ? 480 : 240;
constexpr int64_t GROUP = 8;  // panels that pass by such a piece of x while it is there
constexpr int64_t FEW = 32;   // rows of x that stay in a cache by themselves: panels are read one by one

// Rows [line, line + lines) of x times `count` panels from `first` on, into acc [count][lines][PANEL]. A few rows multiply
// a panel as it is stored. More multiply it expanded, a block of columns at a time.
template <class X>
void multiply_group(const Product& product, const Dots<X>& dots, int64_t first, int64_t count, int64_t line,
                    int64_t lines, float* acc) {
    const Weight& weight = product.weight;
    const X* x = static_cast<const X*>(product.x) + line * product.stride;
    if (lines <= dots.rows && weight.type < INT8) {
        for (int64_t p = 0; p < count; p++)
            dots.dot[weight.type][lines - 1](weight.masks_of(first + p), weight.values_of(first + p), weight.pairs(), x,
                                             product.stride, acc + p * lines * PANEL);
        return;
    }
    const int64_t size = size_of(product.out_type), line_bytes = weight.rows * size;
    const char* out = static_cast<const char*>(product.out) + line * line_bytes + first * PANEL * size;
    alignas(64) X block[2][BLOCK_COLUMNS * PANEL];
    const char* values[GROUP];
    for (int64_t p = 0; p < count; p++) values[p] = weight.values_of(first + p);
    for (int64_t column = 0; column < weight.columns; column += BLOCK_COLUMNS) {
        const int64_t pairs = (std::min(weight.columns - column, BLOCK_COLUMNS) + 1) / 2;
        const X* from = x + column;
        for (int64_t p = 0; p < count;) {
            const int64_t panels = dots.pair[0] && p + 1 < count ? 2 : 1;
            float* sums = acc + p * lines * PANEL;
            for (int64_t i = 0; i < panels; i++, p++) {
                const uint32_t* masks = weight.masks_of(first + p) + (weight.type == DENSE8 ? 0 : column / 2);
                values[p] = dots.begin[weight.type](masks, values[p], pairs, from, product.stride,
                                                    sums + i * lines * PANEL, block[i]);
            }
            const int64_t most = panels == 2 ? MOST_ROWS : dots.dense_rows;
            for (int64_t at = dots.dense_rows; at < lines; at += most) {
                const int64_t rows = std::min(lines - at, most);
                const X* rest = from + at * product.stride;
                float* to = sums + at * PANEL;
                if (column + BLOCK_COLUMNS >= weight.columns)  // the results come next, into lines far apart
                    for (int64_t m = at; m < at + rows; m++)
                        __builtin_prefetch(out + m * line_bytes + (p - panels) * PANEL * size, 1);
                if (panels == 2)
                    dots.pair[rows - 1](block[0], block[1], pairs, rest, product.stride, to, to + lines * PANEL);
                else
                    dots.dot[DENSE][rows - 1](nullptr, reinterpret_cast<const char*>(block[0]), pairs, rest,
                                              product.stride, to);
            }
        }
    }
}

template <class X>
bool vector_panels(const Product& product, const Dots<X>& dots, int64_t first, int64_t last) {
    const int64_t group = product.m <= FEW ? 1 : GROUP;
    const int64_t most = std::min(product.m, CHUNK<X>) * group * PANEL * static_cast<int64_t>(sizeof(float));
    float* acc = static_cast<float*>(std::malloc(most));
    if (!acc) return false;
    const int64_t chunks = (product.m + CHUNK<X> - 1) / CHUNK<X>, chunk = (product.m + chunks - 1) / chunks;
    for (int64_t line = 0; line < product.m; line += chunk) {  // of like height: none is left with a row or two
        const int64_t lines = std::min(product.m - line, chunk);
        for (int64_t panel = first; panel < last; panel += group) {
            const int64_t count = std::min(last - panel, group);
            std::memset(acc, 0, count * lines * PANEL * sizeof(float));
            multiply_group(product, dots, panel, count, line, lines, acc);
            store(product, panel, count, line, lines, acc, lines * PANEL, PANEL);
        }
    }
    std::free(acc);
    return true;
}

// Each thread takes a contiguous share of the panels, an even number of them for the tiles of AMX.
bool multiply(const Product& product, int32_t isa, int threads) {
    const int64_t pairs = (product.weight.panels + 1) / 2;
    if (threads > pairs) threads = static_cast<int>(pairs);
    bool done = true;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : done) if (threads > 1)
    for (int share = 0; share < threads; share++) {
        int64_t first = 2 * (pairs * share / threads), last = 2 * (pairs * (share + 1) / threads);
        if (last > product.weight.panels) last = product.weight.panels;
        bool mine;
        if (isa == AMX)
            mine = amx_panels(product, first, last);
        else if (product.x_type == BF16)
            mine = vector_panels(product, avx512_bf16_dots, first, last);
        else
            mine = vector_panels(product, kernel_of(isa)->dots, first, last);
        done = done && mine;
    }
    return done;
}

}  // namespace
}  // namespace rac

using namespace rac;

// The best instruction set that this processor and operating system run.
RAC_EXPORT int32_t rac_best_isa() {
    for (int32_t isa = AMX; isa > PORTABLE; isa--)
        if (runs(isa)) return isa;
    return PORTABLE;
}

RAC_EXPORT const char* rac_compiler() {
#if defined(_OPENMP)
#define RAC_THREADS ", OpenMP"
#else
#define RAC_THREADS ", one thread: no OpenMP"
#endif
#if defined(__clang__)
    return "Clang " __clang_version__ RAC_THREADS;
#else
    return "GCC " __VERSION__ RAC_THREADS;
#endif
}

// Bytes of a packed weight, or -1 for sizes that there cannot be.
RAC_EXPORT int64_t rac_bytes(int64_t rows, int64_t columns, int64_t nonzeros, int32_t type) {
    Layout layout;
    return layout_of(rows, columns, nonzeros, type, &layout) ? layout.bytes : -1;
}

RAC_EXPORT const char* rac_pack(const void* values, int64_t count, const uint8_t* bitmask, int64_t rows,
                                int64_t columns, int32_t type, void* data, int64_t bytes, int32_t threads) {
    return pack(values, count, bitmask, rows, columns, type, data, bytes, threads < 1 ? 1 : threads);
}

// All of it, once, when a weight is made: after this no kernel leaves the buffer.
RAC_EXPORT const char* rac_check(const void* data, int64_t bytes, int64_t rows, int64_t columns, int32_t type) {
    Weight weight;
    if (const char* wrong = view(data, bytes, &weight)) return wrong;
    if (weight.rows != rows || weight.columns != columns || weight.type != type)
        return failure("its header says [%lld, %lld] of type %d", (long long)weight.rows, (long long)weight.columns,
                       weight.type);
    return check(weight);
}

// The value type in the header: BF16, FP32, INT8 or DENSE8, or -1.
RAC_EXPORT int32_t rac_type(const void* data, int64_t bytes) {
    Weight weight;
    return view(data, bytes, &weight) ? -1 : weight.type;
}

// Panels [first, last) as dense columns, without any scale: out[columns][stride], 16 rows of the weight a panel, beginning at out[0][0].
RAC_EXPORT const char* rac_expand(const void* data, int64_t bytes, int64_t first, int64_t last, void* out,
                                  int32_t out_type, int64_t stride, int32_t isa, int32_t threads) {
    Weight weight;
    if (const char* wrong = view(data, bytes, &weight)) return wrong;
    if (first < 0 || first > last || last > weight.panels || stride < PANEL * (last - first)) return "no such panels";
    if (out_type != FP32 && !(out_type == BF16 && weight.type != FP32)) return "no such expansion";
    if (!runs(isa)) return "this processor lacks the instruction set asked for";
    const Kernel& kernel = *kernel_of(isa);
    const bool integers = weight.type >= INT8;
    const Expand expand = integers ? nullptr : out_type == FP32 ? kernel.to_fp32[weight.type] : kernel.bf16_to_bf16;
    const int64_t size = out_type == BF16 ? 2 : 4;
    (void)threads;
#pragma omp parallel for num_threads(threads < 1 ? 1 : threads) schedule(static) if (threads > 1)
    for (int64_t panel = first; panel < last; panel++) {
        char* to = static_cast<char*>(out) + (panel - first) * PANEL * size;
        if (integers)
            expand8(weight, panel, isa, to, static_cast<Type>(out_type), stride);
        else
            expand(weight.masks_of(panel), weight.values_of(panel), weight.columns, to, stride);
    }
    return nullptr;
}

// out[m][rows] = x[m][columns] W^T + bias, all contiguous; out is of x's type. On AMX, fp32 takes AVX512.
//
// `scale` is fp32 [panels][groups][16]: what each row of the weight, cut into `groups` of equally many columns, is
// multiplied by. 8-bit weights need one. Others may have one with a single group, or null.
RAC_EXPORT const char* rac_linear(const void* data, int64_t bytes, int64_t rows, int64_t columns, const void* x,
                                  int32_t x_type, int64_t m, const float* scale, int64_t groups,
                                  const void* bias, int32_t bias_type, void* out, int32_t isa, int32_t threads) {
    Product product;
    if (const char* wrong = view(data, bytes, &product.weight)) return wrong;
    if (product.weight.rows != rows || product.weight.columns != columns) return "its header is of another shape";
    if (x_type < BF16 || x_type > FP32 || bias_type < BF16 || bias_type > FP32) return "no such type";
    if (m < 0 || m >= int64_t{1} << 31) return "no such number of rows of x";
    if (!runs(isa)) return "this processor lacks the instruction set asked for";
    if (m == 0) return nullptr;
    product.m = m;
    product.scale = nullptr;
    product.bias = bias;
    product.bias_type = static_cast<Type>(bias_type);
    product.out = out;
    product.out_type = static_cast<Type>(x_type);
    product.halve = kernel_of(isa)->halve;
    const bool bf16_units = isa == AVX512 && x_type == BF16 && has_avx512_bf16();
    // More rows of x than go together multiply integers faster as bf16, which they are exactly, than in two planes of bytes.
    const bool as_bf16 = product.weight.type >= INT8 && bf16_units && m > TOGETHER && groups == 1 && scale;
    if (product.weight.type >= INT8 && !as_bf16)
        return linear8(product, x, product.out_type, scale, groups, isa, threads < 1 ? 1 : threads);
    if (scale && groups != 1) return "only 8-bit weights have scales in groups";
    product.scale = scale;
    const bool halves = product.weight.type == BF16 && x_type == BF16;
    if (isa == AMX && !halves) isa = AVX512;
    const Type type = as_bf16 || (halves && (isa == AMX || bf16_units)) ? BF16 : FP32;
    product.x_type = type;
    product.stride = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    // AMX reads whole blocks of 16 rows once there are more than two.
    const int64_t lines = isa == AMX && m > 32 ? (m + 15) / 16 * 16 : m;
    void* copy = nullptr;
    product.x = x;
    if (x_type != type || product.stride != columns || lines != m) {
        product.x = copy = padded(x, product.out_type, type, m, lines, columns, product.stride);
        if (!copy) return "no memory for the activations";
    }
    const bool done = multiply(product, isa, threads < 1 ? 1 : threads);
    std::free(copy);
    return done ? nullptr : "no memory for the accumulators";
}
