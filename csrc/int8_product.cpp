// Products with 8-bit weights: x into integers, and who multiplies what with which kernel.
#include "int8_product.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

namespace rac {
namespace {

// One block of one row of x. Returns its scale: NaN where a value is not finite, 0 where all are (next to) nothing.
float quantize(const float* x, int64_t columns, int16_t* out) {
    int32_t most = 0;
    for (int64_t k = 0; k < columns; k++) {
        int32_t bits;
        std::memcpy(&bits, x + k, sizeof bits);
        bits &= 0x7fffffff;
        most = bits > most ? bits : most;
    }
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    if (most >= 0x7f800000 || largest < 1e-30f) {
        std::memset(out, 0, columns * sizeof *out);
        return most >= 0x7f800000 ? NAN : 0;
    }
    const float inverse = LEVELS / largest;
    for (int64_t k = 0; k < columns; k++) {
        const float value = x[k] * inverse;
        out[k] = static_cast<int16_t>(static_cast<int32_t>(value + (value < 0 ? -0.5f : 0.5f)));
    }
    return largest / LEVELS;
}

// Both bytes of each integer, as planes of a row, with `flip` 0x80 128 more.
void split(const int16_t* from, int64_t columns, uint8_t flip, uint8_t* high, uint8_t* low) {
    for (int64_t k = 0; k < columns; k++) {
        const int8_t second = static_cast<int8_t>(from[k] & 0xff);
        high[k] = static_cast<uint8_t>((from[k] - second) >> 8) ^ flip;
        low[k] = static_cast<uint8_t>(second) ^ flip;
    }
}

void quantize_row(const void* x, Type type, int64_t line, int64_t columns, Format8 format, int64_t stride, int64_t block,
                  int16_t* out, float* scales) {
    float floats[BLOCK_MOST];
    int16_t integers[BLOCK_MOST];
    uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
    const bool planes = format != INTEGERS;
    for (int64_t first = 0; first < columns; first += block) {
        const int64_t count = std::min(block, columns - first);
        const float* from = static_cast<const float*>(x) + line * columns + first;
        if (type == BF16) {
            const uint16_t* half = static_cast<const uint16_t*>(x) + line * columns + first;
            for (int64_t k = 0; k < count; k++) floats[k] = from_bf16(half[k]);
            from = floats;
        }
        *scales++ = quantize(from, count, planes ? integers : out + first);
        if (planes) split(integers, count, format == PLANES_PLUS ? 0x80 : 0, bytes + first, bytes + stride + first);
    }
    if (planes) {
        std::memset(bytes + columns, 0, stride - columns);
        std::memset(bytes + stride + columns, 0, stride - columns);
    } else {
        std::memset(out + columns, 0, (stride - columns) * sizeof *out);
    }
}

constexpr int64_t CHUNK = 240;  // rows of x that many panels share: with BLOCK_MOST half a second-level cache
constexpr int64_t GROUP = 8;    // panels that pass by such a piece of x while it is there
constexpr int64_t FEW = 32;     // rows of x that stay in a cache by themselves: panels are read one by one

// Rows [line, line + lines) of x times one block of one panel, into acc [lines][PANEL]. Returns where the next block's
// values start.
const char* multiply_block(const Product8& product, const Kernel8& kernel, int64_t panel, int64_t block,
                           const char* values, int64_t line, int64_t lines, float* acc) {
    const Weight& weight = product.out.weight;
    const int64_t form = weight.type - INT8, line_bytes = 2 * product.rows.stride, column = block * product.block;
    const int64_t quads = (std::min(product.block, weight.columns - column) + 3) / 4;
    const uint32_t* masks = weight.masks_of(panel) + (form ? 0 : column / 2);
    // A plane's columns are bytes, an integer's two.
    const char* x =
        static_cast<const char*>(product.rows.data) + line * line_bytes + column * (kernel.format == INTEGERS ? 2 : 1);
    int32_t sums[MOST_ROWS * PANEL];
    if (product.out.m <= kernel.rows) {
        values = kernel.dot[form][lines - 1](masks, values, quads, {x, product.rows.stride}, sums);
        add_block(product, kernel.add, panel, block, line, lines, sums, acc);
        return values;
    }
    alignas(64) char spread[2 * PANEL * BLOCK_MOST];
    values = kernel.spread[form](masks, values, quads, spread);
    for (int64_t at = 0; at < lines; at += kernel.spread_rows) {
        const int64_t rows = std::min<int64_t>(lines - at, kernel.spread_rows);
        kernel.dot_spread[rows - 1](nullptr, spread, quads, {x + at * line_bytes, product.rows.stride}, sums);
        add_block(product, kernel.add, panel, block, line + at, rows, sums, acc + at * PANEL);
    }
    return values;
}

bool vector_panels8(const Product8& product, const Kernel8& kernel, int64_t first, int64_t last) {
    const int64_t m = product.out.m, group = m <= FEW ? 1 : GROUP;
    float* acc = static_cast<float*>(std::malloc(std::min(m, CHUNK) * group * PANEL * sizeof(float)));
    if (!acc) return false;
    for (int64_t line = 0; line < m; line += CHUNK) {
        const int64_t lines = std::min(m - line, CHUNK);
        for (int64_t panel = first; panel < last; panel += group) {
            const int64_t count = std::min(last - panel, group);
            const char* values[GROUP];
            for (int64_t p = 0; p < count; p++) values[p] = product.out.weight.values_of(panel + p);
            std::memset(acc, 0, count * lines * PANEL * sizeof(float));
            for (int64_t block = 0; block < product.blocks; block++)
                for (int64_t p = 0; p < count; p++)
                    values[p] = multiply_block(product, kernel, panel + p, block, values[p], line, lines,
                                               acc + p * lines * PANEL);
            store(product.out, panel, count, line, lines, acc, lines * PANEL, PANEL);
        }
    }
    std::free(acc);
    return true;
}

bool multiply(const Product8& product, int32_t isa, int threads) {
    const int64_t pairs = (product.out.weight.panels + 1) / 2;
    if (threads > pairs) threads = static_cast<int>(pairs);
    bool done = true;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(&& : done) if (threads > 1)
    for (int share = 0; share < threads; share++) {
        int64_t first = 2 * (pairs * share / threads), last = 2 * (pairs * (share + 1) / threads);
        if (last > product.out.weight.panels) last = product.out.weight.panels;
        const bool mine =
            isa == AMX ? amx_panels8(product, first, last) : vector_panels8(product, *kernel8_of(isa), first, last);
        done = done && mine;
    }
    return done;
}

}  // namespace

const Kernel8* kernel8_of(int32_t isa) {
    return isa >= AVX512 && has_vnni() ? &avx512_kernel8 : isa >= AVX2 ? &avx2_kernel8 : &portable_kernel8;
}

const char* linear8(const Product& out, const void* x, Type x_type, const float* scale, int64_t groups, int32_t isa,
                    int threads) {
    const int64_t columns = out.weight.columns;
    if (!scale || groups < 1 || columns % groups) return "its scales do not fit";
    Product8 product;
    product.out = out;
    product.scale = scale;
    product.groups = groups;
    product.block = BLOCK_MOST;
    if (groups > 1) {
        product.block = columns / groups;
        if (product.block % 4 || product.block > BLOCK_MOST) return "its groups are no 4, 8, ... 512 columns";
    }
    if (isa == AMX && (!has_amx_int8() || product.block % 64)) isa = AVX512;
    const Format8 format = isa == AMX ? PLANES : kernel8_of(isa)->format;
    product.blocks = (columns + product.block - 1) / product.block;
    product.rows.stride = (columns + 63) / 64 * 64;
    const int64_t lines = isa == AMX && out.m > 16 ? (out.m + 15) / 16 * 16 : out.m;  // AMX reads 16 rows at a time
    int16_t* rows = static_cast<int16_t*>(std::aligned_alloc(64, lines * product.rows.stride * sizeof(int16_t)));
    float* scales = static_cast<float*>(std::malloc(out.m * product.blocks * sizeof(float)));
    const char* wrong = rows && scales ? nullptr : "no memory for the activations";
    if (!wrong) {
        (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && out.m * columns > 32768)
        for (int64_t line = 0; line < out.m; line++)
            quantize_row(x, x_type, line, columns, format, product.rows.stride, product.block,
                         rows + line * product.rows.stride, scales + line * product.blocks);
        std::memset(rows + out.m * product.rows.stride, 0,
                    (lines - out.m) * product.rows.stride * sizeof(int16_t));
        product.rows.data = rows;
        product.x_scale = scales;
        if (!multiply(product, isa, threads)) wrong = "no memory for the accumulators";
    }
    std::free(rows);
    std::free(scales);
    return wrong;
}

void expand8(const Weight& weight, int64_t panel, int32_t isa, void* out, Type out_type, int64_t stride) {
    const Kernel8& kernel = kernel8_of(isa) == &avx2_kernel8 ? portable_kernel8 : *kernel8_of(isa);  // to bytes
    const char* values = weight.values_of(panel);
    int8_t block[PANEL * BLOCK_MOST];
    for (int64_t first = 0; first < weight.columns; first += BLOCK_MOST) {
        const int64_t count = std::min(BLOCK_MOST, weight.columns - first);
        const uint32_t* masks = weight.masks_of(panel) + (weight.type == INT8 ? first / 2 : 0);
        values = kernel.spread[weight.type - INT8](masks, values, (count + 3) / 4, block);
        for (int64_t k = 0; k < count; k++)
            for (int n = 0; n < PANEL; n++) {
                const float value = block[k / 4 * QUAD + 4 * n + k % 4];
                const int64_t at = (first + k) * stride + n;
                if (out_type == BF16)
                    static_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(bits_of(value) >> 16);  // exact
                else
                    static_cast<float*>(out)[at] = value;
            }
    }
}

}  // namespace rac
