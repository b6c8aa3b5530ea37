// The loops of an instruction set over the mask words of float weights. Included by isa/ISA.cpp alone.
//
// Its struct FloatIsa has
//     TOKENS, that are multiplied at a time
//     Sums<form, M>, set to zero, of M tokens: add<keep>(mask, values, x, stride, block) adds the weights of a mask word times
//         x[m * stride] and x[m * stride + 1], and with `keep` writes the weights to `block`; add_to(out) adds the sums to out[m][16]
//     columns<type>(mask, values): the two columns of a mask word, w[0] and w[1]; moves `values` on
//     store(to, column): a column as 16 fp32 numbers
#pragma once
#include "gemm/epilogue.h"

namespace rac {
namespace {

template <class Isa, int form, int M, bool keep>
RAC_INLINE const char* multiply(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride,
                                float* out, float* block) {
    typename Isa::template Sums<form, M> sums;
    for (int64_t word = 0; word < pairs; word++) {
        if (form != BLOCK) __builtin_prefetch(values + 1024);
        sums.template add<keep>(form == BLOCK ? 0 : masks[word], values, x + 2 * word, stride, keep ? block + 32 * word : nullptr);
    }
    sums.add_to(out);
    return values;
}

// A Dot.
template <class Isa, int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    return multiply<Isa, form, M, false>(masks, values, pairs, x, stride, out, nullptr);
}

// An ExpandColumns.
template <class Isa, Type type>
const char* expand(const uint32_t* masks, const char* values, int64_t columns, float* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2, out += 2 * stride) {
        const auto two = Isa::template columns<type>(masks[column / 2], values);
        Isa::store(out, two.w[0]);
        if (column + 1 < columns) Isa::store(out + stride, two.w[1]);
    }
    return values;
}

// An ExpandAndMultiply.
template <class Isa, Type type>
const char* expand_and_multiply(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride,
                                float* out, float* block) {
    values = expand<Isa, type>(masks, values, 2 * pairs, block, PANEL);
    dot<Isa, BLOCK, Isa::TOKENS>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out);
    return values;
}

template <class Isa, int M>
constexpr void put_dots(Dots<float>& dots) {
    dots.dot[BF16][M - 1] = dot<Isa, BF16, M>;
    dots.dot[FP32][M - 1] = dot<Isa, FP32, M>;
    dots.dot[BLOCK][M - 1] = dot<Isa, BLOCK, M>;
    if constexpr (M > 1) put_dots<Isa, M - 1>(dots);
}

template <class Isa>
constexpr Floats floats_of() {
    Floats floats = {
        .dots = {.tokens = Isa::TOKENS, .block_tokens = Isa::TOKENS,
                 .expand_and_multiply = {expand_and_multiply<Isa, BF16>, expand_and_multiply<Isa, FP32>}},
        .expand = {expand<Isa, BF16>, expand<Isa, FP32>}, .store = store};
    put_dots<Isa, Isa::TOKENS>(floats.dots);
    return floats;
}

// Sums of tokens by the columns of a word, for instruction sets that have Isa::Rows (16 fp32 numbers) with zero(), add(Rows, Rows),
// load(float*), store(float*, Rows) and multiply_add(Rows w, float x, Rows sums). SETS of sums: 2, a set per column of a pair, hides
// the latency of a multiplication; 1 saves registers.
template <class Isa, int form, int M, int SETS>
struct SumsByColumn {
    typename Isa::Rows acc[M][SETS];

    RAC_INLINE SumsByColumn() {
        RAC_UNROLL for (int m = 0; m < M; m++)
            RAC_UNROLL for (int k = 0; k < SETS; k++) acc[m][k] = Isa::zero();
    }
    template <bool keep>
    RAC_INLINE void add(uint32_t mask, const char*& values, const float* x, int64_t stride, float*) {
        const auto two = Isa::template columns<form>(mask, values);
        RAC_UNROLL for (int m = 0; m < M; m++)
            RAC_UNROLL for (int k = 0; k < 2; k++)
                acc[m][k % SETS] = Isa::multiply_add(two.w[k], x[m * stride + k], acc[m][k % SETS]);
    }
    RAC_INLINE void add_to(float* out) const {
        RAC_UNROLL for (int m = 0; m < M; m++) {
            const auto sum = SETS == 2 ? Isa::add(acc[m][0], acc[m][SETS - 1]) : acc[m][0];
            Isa::store(out + PANEL * m, Isa::add(Isa::load(out + PANEL * m), sum));
        }
    }
};

}  // namespace
}  // namespace rac
