// For any processor, in plain C++: expand the weights of a mask word into 32 floats, then multiply them.
#include "kernel.h"

namespace rac {
namespace {

template <Type type>
inline int64_t expand_word(uint32_t mask, const char* values, int64_t at, float (&weights)[2][16]) {
    for (auto& column : weights)
        for (float& weight : column) weight = 0;
    for (; mask; mask &= mask - 1) {
        const int bit = __builtin_ctz(mask);
        weights[column_of(type, 0, bit)][row_of(type, 0, bit)] = read(values, type, at++);
    }
    return at;
}

constexpr int LINES = 4;  // at a time

template <int form, int M>
void dot(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    float acc[M][16] = {}, expanded[2][16];
    const float(*weights)[16] = expanded;
    int64_t at = 0;
    for (int64_t word = 0; word < pairs; word++) {
        if (form == DENSE)
            weights = reinterpret_cast<const float(*)[16]>(values) + 2 * word;
        else
            at = expand_word<static_cast<Type>(form)>(masks[word], values, at, expanded);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < 16; n++)
                acc[m][n] += weights[0][n] * x[m * stride + 2 * word] + weights[1][n] * x[m * stride + 2 * word + 1];
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < 16; n++) out[m * 16 + n] += acc[m][n];
}

template <Type type, Type out_type>
const char* expand(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    float weights[2][16];
    int64_t at = 0;
    for (int64_t column = 0; column < columns; column++) {
        if (column % 2 == 0) at = expand_word<type>(masks[column / 2], values, at, weights);
        for (int n = 0; n < 16; n++) {
            if (out_type == BF16)
                static_cast<uint16_t*>(out)[column * stride + n] = bits_of(weights[column % 2][n]) >> 16;  // exact
            else
                static_cast<float*>(out)[column * stride + n] = weights[column % 2][n];
        }
    }
    return values + at * (type == BF16 ? 2 : 4);
}

template <Type type>
const char* expand_and_multiply(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride,
                                float* out, float* block) {
    values = expand<type, FP32>(masks, values, 2 * pairs, block, PANEL);
    dot<DENSE, LINES>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out);
    return values;
}

void store(const Product& product, int64_t panel, int64_t count, int64_t first, int64_t lines, const Sums& sums) {
    store_lines(product, panel, count, first, lines, sums);
}

}  // namespace

#define RAC_LINES(form) {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>}
extern const Kernel portable_kernel = {
    {LINES,
     LINES,
     {RAC_LINES(BF16), RAC_LINES(FP32), RAC_LINES(DENSE)},
     {expand_and_multiply<BF16>, expand_and_multiply<FP32>}},
    {expand<BF16, FP32>, expand<FP32, FP32>},
    expand<BF16, BF16>,
    store,
};

}  // namespace rac
