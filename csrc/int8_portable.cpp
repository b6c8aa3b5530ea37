// Weights of 8 to 2 bits on any processor, in plain C++.
#include <cstring>

#include "int4.h"

namespace rac {
namespace {

#include "few_bits.h"

// The 64 weights of a quad, [16][4].
template <int form>
inline const char* expand_quad(const uint32_t* masks, const char* values, int8_t* quad) {
    if (form == DENSE8) {
        std::memcpy(quad, values, QUAD);
        return values + QUAD;
    }
    std::memset(quad, 0, QUAD);
    for (int half = 0; half < 2; half++)
        for (uint32_t left = masks[half]; left; left &= left - 1)
            quad[32 * half + __builtin_ctz(left)] = static_cast<int8_t>(*values++);
    return values;
}

template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums) {
    const int16_t* lines = static_cast<const int16_t*>(x.data);
    int8_t quad[QUAD];
    std::memset(sums, 0, M * PANEL * sizeof *sums);
    for (int64_t q = 0; q < quads; q++) {
        values = expand_quad<form>(masks + 2 * q, values, quad);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < PANEL; n++)
                for (int k = 0; k < 4; k++) sums[m * PANEL + n] += quad[4 * n + k] * lines[m * x.stride + 4 * q + k];
    }
    return values;
}

template <int form>
const char* expand(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    for (int64_t q = 0; q < quads; q++)
        values = expand_quad<form>(masks + 2 * q, values, static_cast<int8_t*>(out) + QUAD * q);
    return values;
}

// An Expand4.
template <int form>
const char* expand4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    int8_t* quad = static_cast<int8_t*>(out);
    const auto value = [=](int code, int n) { return static_cast<int8_t>(code - (zeros ? zeros[n] : ZERO_CODE)); };
    for (int64_t q = 0; q < quads; q++, quad += QUAD) {
        if (form == DENSE4) {
            const char* from = codes + q / 2 * QUAD;
            for (int i = 0; i < QUAD; i++) quad[i] = value(static_cast<uint8_t>(from[i]) >> (q % 2 ? 4 : 0) & 15, i / 4);
            continue;
        }
        std::memset(quad, 0, QUAD);
        uint64_t count = 0;
        for (int half = 0; half < 2; half++)
            for (uint32_t left = masks[2 * q + half]; left; left &= left - 1, count++) {
                const int at = 32 * half + __builtin_ctz(left);
                quad[at] = value(static_cast<uint8_t>(codes[count / 2]) >> (count % 2 ? 4 : 0) & 15, at / 4);
            }
        codes += code_bytes(count);
    }
    return form == DENSE4 ? codes + (quads + 1) / 2 * QUAD : codes;
}

// An Expand4 of PLANES4.
const char* expand_planes(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    int8_t* to = static_cast<int8_t*>(out);
    std::memset(to, 0, QUAD * quads);
    for (int64_t word = 0; word < (quads + 7) / 8 * TILE_WORDS; word += 2) {
        const uint64_t count = RAC_COUNT(masks[word]) + RAC_COUNT(masks[word + 1]), bytes = bytes_of_codes(PLANES4, count) / 4;
        uint64_t at = 0;
        for (int64_t half = word; half < word + 2; half++)
            for (uint32_t left = masks[half]; left; left &= left - 1, at++) {
                const int bit = __builtin_ctz(left), row = row_of(PLANES4, half, bit);
                const int64_t column = column_of(PLANES4, half, bit);
                int code = 0;
                for (int plane = 0; plane < 4; plane++)
                    code |= (static_cast<uint8_t>(codes[bytes * plane + at / 8]) >> at % 8 & 1) << plane;
                const int zero = zeros ? zeros[row] : ZERO_CODE;
                to[column / 4 * QUAD + 4 * row + column % 4] = static_cast<int8_t>((code ^ zero) - zero);
            }
        codes += 4 * bytes;
    }
    return codes;
}

float quantize(const void* x, Type type, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    return quantize_block(x, type, columns, levels, integers, bytes);
}

void add(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines, float* acc) {
    add_scaled_sums(sums, x_scale, stride, scale, lines, acc);
}

}  // namespace

#define RAC_LINES(form) {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>}
extern const Kernel8 portable_kernel8 = {
    INTEGERS, quantize, add, 4, 4, {RAC_LINES(INT8), RAC_LINES(DENSE8)}, {expand<INT8>, expand<DENSE8>}, RAC_LINES(DENSE8),
};

extern const Kernel4 portable_kernel4 = {
    {expand4<INT4>, expand4<DENSE4>, expand_planes, expand_narrow<DENSE3, expand4<DENSE4>>, expand_narrow<DENSE2, expand4<DENSE4>>}, {}, {},
};

}  // namespace rac
