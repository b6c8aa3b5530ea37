// The matmul with float weights: which functions of a kernel multiply which panels and tokens.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "gemm/matmul.h"
#include "gemm/shares.h"
#include "processor.h"

namespace rac {
namespace {

// A copy of x as a kernel reads it: of type `to`, tokens padded with zeros to `stride`. Null if there is not enough memory.
void* copy_padded(const void* x, Type from, Type to, int64_t m, int64_t columns, int64_t stride) {
    const int64_t size = size_of(to);
    char* copy = static_cast<char*>(std::aligned_alloc(64, m * stride * size));
    if (!copy) return nullptr;
    for (int64_t token = 0; token < m; token++) {
        char* at = copy + token * stride * size;
        if (from == to) {
            std::memcpy(at, static_cast<const char*>(x) + token * columns * size, columns * size);
        } else {
            const uint16_t* source = static_cast<const uint16_t*>(x) + token * columns;
            for (int64_t column = 0; column < columns; column++)
                reinterpret_cast<float*>(at)[column] = from_bf16(source[column]);
        }
        std::memset(at + columns * size, 0, (stride - columns) * size);
    }
    return copy;
}

// A copy of x as AMX reads it: tiles of 16 tokens and TILE_COLUMNS columns one after the other, so that a tile is 1 KiB of
// memory in order, zeros after the last token and column. Null if there is not enough memory.
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
                const int64_t token = 16 * block + i, left = token < m ? columns - column : 0;
                const int64_t count = std::clamp<int64_t>(left, 0, TILE_COLUMNS);
                if (count == TILE_COLUMNS) {  // a constant length
                    std::memcpy(to, x + token * columns + column, TILE_COLUMNS * sizeof *x);
                    continue;
                }
                std::memcpy(to, x + (count ? token * columns + column : 0), count * sizeof *x);
                std::memset(to + count, 0, (TILE_COLUMNS - count) * sizeof *x);
            }
    return copy;
}

// Columns of a panel that are expanded at a time: 16 KiB of fp32, half a first-level cache, or two panels of bf16.
constexpr int64_t BLOCK_COLUMNS = 256;
// Tokens that several panels use in turn: with BLOCK_COLUMNS 240 KiB, half of a second-level cache of 512 KiB.
template <class X>
constexpr int64_t CHUNK = sizeof(X) == 2 ? 480 : 240;

// Tokens [token, token + tokens) times `count` panels from `first` on, into acc [count][tokens][PANEL]. For a few tokens the panel
// is multiplied as it is stored. For more it is expanded, a block of columns at a time.
template <class X>
void multiply_panels(const Matmul& matmul, const Dots<X>& dots, int64_t first, int64_t count, int64_t token,
                     int64_t tokens, float* acc) {
    const Weight& weight = matmul.weight;
    const X* x = static_cast<const X*>(matmul.x) + token * matmul.stride;
    if (tokens <= dots.tokens && weight.type < INT8) {
        for (int64_t p = 0; p < count; p++)
            dots.dot[weight.type][tokens - 1](weight.masks_of(first + p), weight.values_of(first + p), weight.pairs(), x,
                                             matmul.stride, acc + p * tokens * PANEL);
        return;
    }
    const int64_t size = size_of(matmul.out_type), token_bytes = weight.rows * size;
    const char* out = static_cast<const char*>(matmul.out) + token * token_bytes + first * PANEL * size;
    alignas(64) X block[2][BLOCK_COLUMNS * PANEL];
    const char* values[PANELS_PER_CHUNK];
    for (int64_t p = 0; p < count; p++) values[p] = weight.values_of(first + p);
    for (int64_t column = 0; column < weight.columns; column += BLOCK_COLUMNS) {
        const int64_t pairs = (std::min(weight.columns - column, BLOCK_COLUMNS) + 1) / 2;
        const X* from = x + column;
        for (int64_t p = 0; p < count;) {
            const int64_t panels = dots.two_panels && p + 1 < count ? 2 : 1;
            float* sums = acc + p * tokens * PANEL;
            for (int64_t i = 0; i < panels; i++, p++) {
                const uint32_t* masks = weight.masks_from(first + p, column);
                values[p] = dots.expand_and_multiply[weight.type](masks, values[p], pairs, from, matmul.stride,
                                                                  sums + i * tokens * PANEL, block[i]);
            }
            const int64_t most = panels == 2 ? MOST_TOKENS : dots.block_tokens;
            for (int64_t at = dots.block_tokens; at < tokens; at += most) {
                const int64_t some = std::min(tokens - at, most);
                const X* rest = from + at * matmul.stride;
                float* to = sums + at * PANEL;
                if (column + BLOCK_COLUMNS >= weight.columns)  // the results are written next, to addresses far apart
                    for (int64_t m = at; m < at + some; m++)
                        __builtin_prefetch(out + m * token_bytes + (p - panels) * PANEL * size, 1);
                if (panels == 2)
                    dots.dot_two_panels[some - 1](block[0], block[1], pairs, rest, matmul.stride, to,
                                                  to + tokens * PANEL);
                else
                    dots.dot[BLOCK][some - 1](nullptr, reinterpret_cast<const char*>(block[0]), pairs, rest,
                                              matmul.stride, to);
            }
        }
    }
}

template <class X>
bool panels(const Matmul& matmul, const Dots<X>& dots, int64_t first, int64_t last) {
    const int64_t step = matmul.m <= FEW_TOKENS ? 1 : PANELS_PER_CHUNK;
    const int64_t most = std::min(matmul.m, CHUNK<X>) * step * PANEL * static_cast<int64_t>(sizeof(float));
    float* acc = static_cast<float*>(std::malloc(most));
    if (!acc) return false;
    // The heights of chunks differ by a token at most: expand_and_multiply reads block_tokens tokens, however few a chunk has.
    const int64_t chunks = (matmul.m + CHUNK<X> - 1) / CHUNK<X>;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t token = matmul.m * chunk / chunks, tokens = matmul.m * (chunk + 1) / chunks - token;
        for (int64_t panel = first; panel < last; panel += step) {
            const int64_t count = std::min(last - panel, step);
            std::memset(acc, 0, count * tokens * PANEL * sizeof(float));
            multiply_panels(matmul, dots, panel, count, token, tokens, acc);
            matmul.store(matmul, panel, count, token, tokens, {acc, 2 * tokens * PANEL, tokens * PANEL, PANEL});
        }
    }
    std::free(acc);
    return true;
}

}  // namespace

Status linear(const Matmul& out, const void* x, const Scale& scale, const Kernel& kernel, int threads) {
    const int64_t m = out.m, columns = out.weight.columns;
    const bool integers = out.weight.type >= INT8, bf16_x = out.out_type == BF16, units = kernel.bf16 && has_avx512_bf16();
    if (integers) RAC_TRY(check_scale(out.weight, scale));
    Matmul matmul = out;
    matmul.store = kernel.floats->store;
    // A single token of a weight of bf16 is faster with vectors. Up to 64 tokens of codes are faster with bytes.
    const bool codes = has_codes(out.weight.type) && columns / scale.groups % TILE_COLUMNS == 0;
    const bool tiles = kernel.tiles && bf16_x && (codes ? m > 64 : out.weight.type == BF16 && m > 1);
    // Integers of 8 bits are exact in bf16. For more than a few tokens that is faster than two planes of bytes.
    const bool as_bf16 = integers && !has_codes(out.weight.type) && bf16_x && units && !kernel.tiles && m > FEW_TOKENS &&
                         scale.groups == 1 && !out.weight.byte_x;
    if (integers && !as_bf16 && !tiles) return int_linear(matmul, x, scale, kernel, threads);
    if (!integers && scale.data && scale.groups != 1)
        return fail(BAD_ARGUMENT, "scale: only weights of integers have scales in groups");
    if (!integers && scale.data && scale.type != FP32) return fail(BAD_ARGUMENT, "scale: only codes have one that is not fp32");
    if (!codes) matmul.scale = static_cast<const float*>(scale.data);
    const Type type = tiles || as_bf16 || (out.weight.type == BF16 && bf16_x && units) ? BF16 : FP32;
    matmul.stride = (columns + TILE_COLUMNS - 1) / TILE_COLUMNS * TILE_COLUMNS;
    void* copy = nullptr;
    matmul.x = x;
    if (tiles || out.out_type != type || matmul.stride != columns) {
        copy = tiles ? copy_in_tiles(static_cast<const uint16_t*>(x), m, columns, matmul.stride, threads)
                     : copy_padded(x, out.out_type, type, m, columns, matmul.stride);
        if (!copy) return fail(NO_MEMORY, "no memory for the activations");
        matmul.x = copy;
    }
    const IntMatmul of_codes = codes ? in_blocks(matmul, scale) : IntMatmul{};
    const bool done = in_shares(out.weight.panels, threads, m <= FEW_TOKENS ? 1 : SHARE_PAIRS, [&](int64_t first, int64_t last) {
        if (tiles) return codes ? kernel.tiles->codes(of_codes, first, last) : kernel.tiles->floats(matmul, first, last);
        return type == BF16 ? panels(matmul, *kernel.bf16, first, last) : panels(matmul, kernel.floats->dots, first, last);
    });
    std::free(copy);
    return done ? OK : fail(NO_MEMORY, "no memory for the accumulators");
}

Status expand(const Weight& weight, int64_t first, int64_t last, float* out, const Kernel& kernel, int threads) {
    const int64_t stride = PANEL * (last - first);
    (void)threads;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t panel = first; panel < last; panel++) {
        float* to = out + (panel - first) * PANEL;
        if (weight.type >= INT8)
            int_expand(weight, panel, kernel, to, stride);
        else
            kernel.floats->expand[weight.type](weight.masks_of(panel), weight.values_of(panel), weight.columns, to, stride);
    }
    return OK;
}

}  // namespace rac
