// Any processor: expand a word into 32 floats, then multiply, in plain C++.
#include "kernel.h"

namespace rac {
namespace {

template <Type type>
inline int64_t expand_word(uint32_t mask, const char* values, int64_t at, float (&pair)[2][16]) {
    for (auto& column : pair)
        for (float& weight : column) weight = 0;
    for (; mask; mask &= mask - 1) {
        const int bit = __builtin_ctz(mask);
        pair[column_of(type, 0, bit)][row_of(type, 0, bit)] = read(values, type, at++);
    }
    return at;
}

constexpr int ROWS = 4;  // of x at a time

template <int form, int M>
void dot(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    float acc[M][16] = {}, pair[2][16];
    const float(*weights)[16] = pair;
    int64_t at = 0;
    for (int64_t word = 0; word < pairs; word++) {
        if (form == DENSE)
            weights = reinterpret_cast<const float(*)[16]>(values) + 2 * word;
        else
            at = expand_word<static_cast<Type>(form)>(masks[word], values, at, pair);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < 16; n++)
                acc[m][n] += weights[0][n] * x[m * stride + 2 * word] + weights[1][n] * x[m * stride + 2 * word + 1];
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < 16; n++) out[m * 16 + n] += acc[m][n];
}

template <Type type, Type out_type>
const char* expand(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    float pair[2][16];
    int64_t at = 0;
    for (int64_t column = 0; column < columns; column++) {
        if (column % 2 == 0) at = expand_word<type>(masks[column / 2], values, at, pair);
        for (int n = 0; n < 16; n++) {
            if (out_type == BF16)
                static_cast<uint16_t*>(out)[column * stride + n] = bits_of(pair[column % 2][n]) >> 16;  // exact
            else
                static_cast<float*>(out)[column * stride + n] = pair[column % 2][n];
        }
    }
    return values + at * (type == BF16 ? 2 : 4);
}

template <Type type>
const char* begin(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out,
                  float* block) {
    values = expand<type, FP32>(masks, values, 2 * pairs, block, PANEL);
    dot<DENSE, ROWS>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out);
    return values;
}

void halve(const float* values, int64_t count, uint16_t* out) { round_all(values, count, out); }

}  // namespace

#define RAC_ROWS(form) {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>}
extern const Kernel portable_kernel = {
    {ROWS, ROWS, {RAC_ROWS(BF16), RAC_ROWS(FP32), RAC_ROWS(DENSE)}, {begin<BF16>, begin<FP32>}},
    {expand<BF16, FP32>, expand<FP32, FP32>},
    expand<BF16, BF16>,
    halve,
};

}  // namespace rac
