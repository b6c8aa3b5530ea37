// The functions around the loops, which the compiler vectorizes for each instruction set. Included by isa/ISA.cpp alone.
#pragma once
#include <cstring>

#include "gemm/kernel.h"

namespace rac {
namespace {

// Vectors, since GCC unrolls a loop over the rows of a panel and then rounds them one by one.
typedef uint32_t Words __attribute__((vector_size(4 * PANEL)));
typedef uint16_t Halves __attribute__((vector_size(2 * PANEL)));
constexpr int64_t STORED_PANELS = 16;  // that a Store writes at a time, at most

// A Store. Token after token, so that whole cache lines are written.
[[maybe_unused]] void store(const Matmul& matmul, int64_t panel, int64_t count, int64_t first, int64_t tokens, const Sums& sums) {
    const int64_t rows = matmul.weight.rows;
    float bias[STORED_PANELS][PANEL];
    if (matmul.bias)
        for (int64_t p = 0; p < count; p++)
            for (int64_t n = 0, row = (panel + p) * PANEL; n < PANEL; n++, row++)
                bias[p][n] = row < rows ? read(matmul.bias, matmul.bias_type, row) : 0;
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t p = 0; p < count; p++) {
            const int64_t row = (panel + p) * PANEL, left = rows - row < PANEL ? rows - row : PANEL;
            const int64_t at = (first + token) * rows + row;
            float values[PANEL];
            std::memcpy(values, sums.data + p / 2 * sums.pair + p % 2 * sums.second + token * sums.token, sizeof values);
            if (matmul.scale)
                for (int64_t n = 0; n < PANEL; n++) values[n] *= matmul.scale[row + n];
            if (matmul.bias)
                for (int64_t n = 0; n < PANEL; n++) values[n] += bias[p][n];
            if (matmul.out_type == BF16) {
                Words bits;
                std::memcpy(&bits, values, sizeof bits);
                const Words even = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
                const Words is_nan = static_cast<Words>((bits & 0x7fffffff) > 0x7f800000);
                const Halves rounded = __builtin_convertvector((is_nan & nan) | (~is_nan & even), Halves);
                uint16_t* out = static_cast<uint16_t*>(matmul.out) + at;
                if (left == PANEL)  // a constant length, which is a store and not a call
                    std::memcpy(out, &rounded, sizeof rounded);
                else
                    std::memcpy(out, &rounded, left * sizeof *out);
            } else {
                std::memcpy(static_cast<float*>(matmul.out) + at, values, left * sizeof *values);
            }
        }
}

template <class Read>
RAC_INLINE float quantize_as(Read read, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    float numbers[BLOCK_MOST];
    uint32_t most = 0;
    for (int64_t k = 0; k < columns; k++) {
        numbers[k] = read(k);
        const uint32_t bits = bits_of(numbers[k]) & 0x7fffffff;
        most = bits > most ? bits : most;
    }
    const float largest = from_bits(most);
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

// A Quantize.
[[maybe_unused]] float quantize(const void* x, Type type, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    if (type == BF16) {
        const uint16_t* from = static_cast<const uint16_t*>(x);
        return quantize_as([=](int64_t k) { return from_bf16(from[k]); }, columns, levels, integers, bytes);
    }
    const float* from = static_cast<const float*>(x);
    return quantize_as([=](int64_t k) { return from[k]; }, columns, levels, integers, bytes);
}

// An AddScaled.
[[maybe_unused]] __attribute__((noinline)) void add_scaled(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t tokens, float* acc) {
    for (int64_t m = 0; m < tokens; m++, sums += PANEL, acc += PANEL) {
        float added[PANEL];
        for (int n = 0; n < PANEL; n++) added[n] = static_cast<float>(sums[n]) * x_scale[m * stride] * scale[n];
        for (int n = 0; n < PANEL; n++) acc[n] += added[n];
    }
}

}  // namespace
}  // namespace rac
