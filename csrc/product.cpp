// The product with float weights: which kernel multiplies which panels and lines.
#include "product.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "int8_product.h"
#include "shares.h"

namespace rac {
namespace {

const Kernel& kernel_of(int32_t isa) {
    switch (isa) {
        case PORTABLE: return portable_kernel;
        case AVX2:
        case AVXVNNI: return avx2_kernel;
        case NEON:
        case DOTPROD:
        case I8MM: return neon_kernel;
        case SVE: return sve_kernel();
        default: return avx512_kernel;
    }
}

// How an ISA multiplies bf16 by bf16 without tiles, or null.
const Dots<uint16_t>* bf16_dots_of(int32_t isa) {
    if (isa == AVX512 && has_avx512_bf16()) return &avx512_bf16_dots;
    return isa == I8MM && has_arm_bf16() ? &arm_bf16_dots : nullptr;
}

// A copy of x as a kernel reads it: of type `to`, lines padded with zeros to `stride`. Null if there is not enough memory.
void* copy_padded(const void* x, Type from, Type to, int64_t m, int64_t columns, int64_t stride) {
    const int64_t size = size_of(to);
    char* copy = static_cast<char*>(std::aligned_alloc(64, m * stride * size));
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
    return copy;
}

// A copy of x as AMX reads it: tiles of 16 lines and TILE_COLUMNS columns one after the other, so that a tile is 1 KiB of
// memory in order, zeros after the last line and column. Null if there is not enough memory.
void* copy_in_tiles(const uint16_t* x, int64_t m, int64_t columns, int64_t stride, int threads) {
    const int64_t blocks = (m + 15) / 16;
    uint16_t* copy = static_cast<uint16_t*>(std::aligned_alloc(64, blocks * 16 * stride * sizeof *x));
    if (!copy) return nullptr;
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && m * columns > 32768)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t column = 0; column < stride; column += TILE_COLUMNS)
            for (int64_t i = 0; i < 16; i++) {
                uint16_t* to = copy + block * 16 * stride + 16 * column + i * TILE_COLUMNS;
                const int64_t line = 16 * block + i, left = line < m ? columns - column : 0;
                const int64_t count = std::clamp<int64_t>(left, 0, TILE_COLUMNS);
                if (count == TILE_COLUMNS) {  // a constant length
                    std::memcpy(to, x + line * columns + column, TILE_COLUMNS * sizeof *x);
                    continue;
                }
                std::memcpy(to, x + (count ? line * columns + column : 0), count * sizeof *x);
                std::memset(to + count, 0, (TILE_COLUMNS - count) * sizeof *x);
            }
    return copy;
}

// Columns of a panel that are expanded at a time: 16 KiB of fp32, half a first-level cache, or two panels of bf16.
constexpr int64_t BLOCK_COLUMNS = 256;
// Lines that several panels use in turn: with BLOCK_COLUMNS 240 KiB, half of a second-level cache of 512 KiB.
template <class X>
constexpr int64_t CHUNK = sizeof(X) == 2 ? 480 : 240;
constexpr int64_t PANELS_PER_CHUNK = 8;  // panels that are multiplied by such lines while these are in the cache
constexpr int64_t FEW_LINES = 32;  // so few lines stay in the cache anyway: panels are read one by one

// Lines [line, line + lines) times `count` panels from `first` on, into acc [count][lines][PANEL]. For a few lines the panel
// is multiplied as it is stored. For more it is expanded, a block of columns at a time.
template <class X>
void multiply_panels(const Product& product, const Dots<X>& dots, int64_t first, int64_t count, int64_t line,
                     int64_t lines, float* acc) {
    const Weight& weight = product.weight;
    const X* x = static_cast<const X*>(product.x) + line * product.stride;
    if (lines <= dots.lines && weight.type < INT8) {
        for (int64_t p = 0; p < count; p++)
            dots.dot[weight.type][lines - 1](weight.masks_of(first + p), weight.values_of(first + p), weight.pairs(), x,
                                             product.stride, acc + p * lines * PANEL);
        return;
    }
    const int64_t size = size_of(product.out_type), line_bytes = weight.rows * size;
    const char* out = static_cast<const char*>(product.out) + line * line_bytes + first * PANEL * size;
    alignas(64) X block[2][BLOCK_COLUMNS * PANEL];
    const char* values[PANELS_PER_CHUNK];
    for (int64_t p = 0; p < count; p++) values[p] = weight.values_of(first + p);
    for (int64_t column = 0; column < weight.columns; column += BLOCK_COLUMNS) {
        const int64_t pairs = (std::min(weight.columns - column, BLOCK_COLUMNS) + 1) / 2;
        const X* from = x + column;
        for (int64_t p = 0; p < count;) {
            const int64_t panels = dots.dot_two_panels[0] && p + 1 < count ? 2 : 1;
            float* sums = acc + p * lines * PANEL;
            for (int64_t i = 0; i < panels; i++, p++) {
                const uint32_t* masks = weight.masks_of(first + p) + (weight.type == DENSE8 ? 0 : column / 2);
                values[p] = dots.expand_and_multiply[weight.type](masks, values[p], pairs, from, product.stride,
                                                                  sums + i * lines * PANEL, block[i]);
            }
            const int64_t most = panels == 2 ? MOST_LINES : dots.dense_lines;
            for (int64_t at = dots.dense_lines; at < lines; at += most) {
                const int64_t some = std::min(lines - at, most);
                const X* rest = from + at * product.stride;
                float* to = sums + at * PANEL;
                if (column + BLOCK_COLUMNS >= weight.columns)  // the results are written next, to addresses far apart
                    for (int64_t m = at; m < at + some; m++)
                        __builtin_prefetch(out + m * line_bytes + (p - panels) * PANEL * size, 1);
                if (panels == 2)
                    dots.dot_two_panels[some - 1](block[0], block[1], pairs, rest, product.stride, to,
                                                  to + lines * PANEL);
                else
                    dots.dot[DENSE][some - 1](nullptr, reinterpret_cast<const char*>(block[0]), pairs, rest,
                                              product.stride, to);
            }
        }
    }
}

template <class X>
bool vector_panels(const Product& product, const Dots<X>& dots, int64_t first, int64_t last) {
    const int64_t step = product.m <= FEW_LINES ? 1 : PANELS_PER_CHUNK;
    const int64_t most = std::min(product.m, CHUNK<X>) * step * PANEL * static_cast<int64_t>(sizeof(float));
    float* acc = static_cast<float*>(std::malloc(most));
    if (!acc) return false;
    // Chunks of nearly equal height, so that the last one is not a line or two.
    const int64_t chunks = (product.m + CHUNK<X> - 1) / CHUNK<X>, chunk = (product.m + chunks - 1) / chunks;
    for (int64_t line = 0; line < product.m; line += chunk) {
        const int64_t lines = std::min(product.m - line, chunk);
        for (int64_t panel = first; panel < last; panel += step) {
            const int64_t count = std::min(last - panel, step);
            std::memset(acc, 0, count * lines * PANEL * sizeof(float));
            multiply_panels(product, dots, panel, count, line, lines, acc);
            product.store(product, panel, count, line, lines, {acc, 2 * lines * PANEL, lines * PANEL, PANEL});
        }
    }
    std::free(acc);
    return true;
}

bool multiply(const Product& product, int32_t isa, int threads) {
    return in_shares(product.weight.panels, threads, product.m <= FEW_LINES ? 1 : SHARE_PAIRS, [&](int64_t first, int64_t last) {
        if (isa == AMX) return amx_panels(product, first, last);
        if (product.x_type == BF16) return vector_panels(product, *bf16_dots_of(isa), first, last);
        return vector_panels(product, kernel_of(isa).dots, first, last);
    });
}

}  // namespace

bool runs(int32_t isa) {
    switch (isa) {
        case PORTABLE: return true;
        case AVX2: return has_avx2();
        case AVXVNNI: return has_avx_vnni();
        case AVX512: return has_avx512();
        case AMX: return has_amx();
        case NEON: return has_neon();
        case DOTPROD: return has_dotprod();
        case I8MM: return has_i8mm();
        case SVE: return has_sve();
        default: return false;
    }
}

Status linear(const Product& out, const void* x, const void* scale, Type scale_type, int64_t groups, int32_t isa,
              int threads) {
    Product product = out;
    const int64_t m = out.m, columns = out.weight.columns;
    const bool integers = out.weight.type >= INT8, bf16_x = out.out_type == BF16;
    product.store = kernel_of(isa).store;
    product.scale = nullptr;
    const bool bf16_units = isa == AVX512 && bf16_x && has_avx512_bf16();
    // Integers are exact in bf16. From more lines than fit together on, multiplying them as bf16 is faster than as two
    // planes of bytes.
    const bool as_bf16 = integers && !is_few_bits(out.weight.type) && bf16_units && m > LINES_TOGETHER && groups == 1 && scale &&
                         !out.weight.byte_x;
    if (integers && !as_bf16) return linear8(product, x, out.out_type, scale, scale_type, groups, isa, threads);
    if (scale && groups != 1) return fail(BAD_ARGUMENT, "scale: only weights of integers have scales in groups");
    if (scale && scale_type != FP32) return fail(BAD_ARGUMENT, "scale: only weights of few bits have one that is not fp32");
    product.scale = static_cast<const float*>(scale);
    const bool both_bf16 = out.weight.type == BF16 && bf16_x;
    // With one line AVX512 is faster than tiles of 16 lines.
    if (isa == AMX && (!both_bf16 || (m == 1 && has_avx512_bf16()))) isa = AVX512;
    const Type type = as_bf16 || (both_bf16 && (isa == AMX || bf16_dots_of(isa))) ? BF16 : FP32;
    product.x_type = type;
    product.stride = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    void* copy = nullptr;
    product.x = x;
    if (isa == AMX || out.out_type != type || product.stride != columns) {
        copy = isa == AMX ? copy_in_tiles(static_cast<const uint16_t*>(x), m, columns, product.stride, threads)
                          : copy_padded(x, out.out_type, type, m, columns, product.stride);
        if (!copy) return fail(NO_MEMORY, "no memory for the activations");
        product.x = copy;
    }
    const bool done = multiply(product, isa, threads);
    std::free(copy);
    return done ? OK : fail(NO_MEMORY, "no memory for the accumulators");
}

Status expand(const Weight& weight, int64_t first, int64_t last, void* out, Type out_type, int32_t isa, int threads) {
    const Kernel& kernel = kernel_of(isa);
    const bool integers = weight.type >= INT8;
    const Expand expand_panel =
        integers ? nullptr : out_type == FP32 ? kernel.to_fp32[weight.type] : kernel.bf16_to_bf16;
    const int64_t stride = PANEL * (last - first);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = first; panel < last; panel++) {
        char* to = static_cast<char*>(out) + (panel - first) * PANEL * size_of(out_type);
        if (integers)
            expand8(weight, panel, isa, to, out_type, stride);
        else
            expand_panel(weight.masks_of(panel), weight.values_of(panel), weight.columns, to, stride);
    }
    return OK;
}

}  // namespace rac
