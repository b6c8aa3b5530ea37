// The loops of an instruction set over the quads of integer weights. Included by isa/ISA.cpp alone.
//
// Its struct IntIsa has
//     FORMAT of x; SLOTS, that are multiplied at a time; SIGNED_BYTES, as in Integers; MULTIPLIES_LINES, whether FewTokens takes
//         codes without masks too
//     Quad, a quad in registers, and Zeros, the 16 codes of zero, with zeros_of_rows(zeros)
//     load<form>(masks, values, zeros, quad): the next quad; where no code is stored, its code of zero. Moves `values` on
//     store(out, q, quad): into the dense form that load<EXPANDED> reads; less(quad, zeros): codes less their codes of zero
//     Sums<form, SOME>(x, slot), of some slots from `slot` on: add(quad, x, step) adds a quad times the quad of x of each slot, `step`
//         bytes apart; store(x, slot, sums) writes int32 sums
//     multiply_two<first, second>(masks, values, zeros, x, next_x, step, sums): two quads of these forms
#pragma once
#include "gemm/epilogue.h"
#include "gemm/narrow_codes.h"

namespace rac {
namespace {

constexpr int first_of(int form) { return form == DENSE4 ? LOW : form; }
constexpr int second_of(int form) { return form == DENSE4 ? HIGH : form; }

constexpr int64_t WIDENED = PANEL * BLOCK_MOST + 64;  // bytes that Isa::widen_codes may write for a block of INT4

// Slots [slot, slot + SOME) of M, times some quads: an IntDot, which takes codes of zero too.
template <class Isa, int form, int M, int SOME>
RAC_INLINE const char* multiply_some(const uint32_t* masks, const char* values, const typename Isa::Zeros& zeros,
                                     int64_t quads, const Slots& slots, int slot, int32_t* sums) {
    const int64_t step = Isa::FORMAT == QUADS ? 8 : 2 * slots.stride, quad_step = Isa::FORMAT == QUADS ? 8 * M : 8;
    const char* x = slots.data + slot * step;
    typename Isa::template Sums<form, SOME> acc(slots, slot);
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2, x += 2 * quad_step) {
        if (form != EXPANDED && form != CODES) __builtin_prefetch(values + 1024);
        if (form == INT8 || form == DENSE8) __builtin_prefetch(values + 1024 + QUAD);
        Isa::template multiply_two<first_of(form), second_of(form)>(masks + 2 * q, values, zeros, x, x + quad_step, step, acc);
    }
    if (q < quads) {
        typename Isa::Quad quad;
        Isa::template load<first_of(form)>(masks + 2 * q, values, zeros, quad);
        acc.add(quad, x, step);
    }
    acc.store(slots, slot, sums);
    return values;
}

// The base of an IntIsa that multiplies quads one by one: fewer registers hold weights.
template <class Isa>
struct SingleQuads {
    template <int first, int second, class Zeros, class Sums>
    RAC_INLINE static void multiply_two(const uint32_t* masks, const char*& values, const Zeros& zeros, const char* x,
                                        const char* next_x, int64_t step, Sums& sums) {
        typename Isa::Quad quad;
        Isa::template load<first>(masks, values, zeros, quad);
        sums.add(quad, x, step);
        Isa::template load<second>(masks + 2, values, zeros, quad);
        sums.add(quad, next_x, step);
    }
};

// An IntDot.
template <class Isa, int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Slots& x, int32_t* sums) {
    constexpr int WHOLE = M / Isa::SLOTS * Isa::SLOTS;
    const char* end = values;
    for (int slot = 0; slot < WHOLE; slot += Isa::SLOTS)
        end = multiply_some<Isa, form, M, Isa::SLOTS>(masks, values, {}, quads, x, slot, sums);
    if constexpr (M > WHOLE) end = multiply_some<Isa, form, M, M - WHOLE>(masks, values, {}, quads, x, WHOLE, sums);
    return end;
}

// An ExpandQuads of INT8 or DENSE8.
template <class Isa, int form>
const char* expand8(const uint32_t* masks, const char* values, const uint8_t*, int64_t quads, void* out) {
    for (int64_t q = 0; q < quads; q++) {
        typename Isa::Quad quad;
        __builtin_prefetch(values + 1024);
        Isa::template load<form>(masks + 2 * q, values, {}, quad);
        Isa::store(out, q, quad);
    }
    return values;
}

template <class Isa, int form>
RAC_INLINE void expand_codes(const uint32_t* masks, const char*& codes, const typename Isa::Zeros& zeros, int64_t q, void* out) {
    typename Isa::Quad quad;
    Isa::template load<form>(masks, codes, zeros, quad);
    Isa::store(out, q, Isa::less(quad, zeros));
}

// An ExpandQuads of DENSE4.
template <class Isa>
const char* expand_dense4(const uint32_t*, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const auto zero = Isa::zeros_of_rows(zeros);
    for (int64_t q = 0; q < quads; q += 2) {
        expand_codes<Isa, LOW>(nullptr, codes, zero, q, out);
        if (q + 1 < quads) expand_codes<Isa, HIGH>(nullptr, codes, zero, q + 1, out);
    }
    return codes;
}

// An ExpandQuads of INT4: each code becomes a byte, and these are spread as 8-bit weights are.
template <class Isa>
const char* expand_int4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const auto zero = Isa::zeros_of_rows(zeros);
    char bytes[WIDENED];
    const char *end = Isa::widen_codes(masks, codes, quads, bytes), *values = bytes;
    for (int64_t q = 0; q < quads; q++) expand_codes<Isa, CODES>(masks + 2 * q, values, zero, q, out);
    return end;
}

// Sums of a block of codes, without writing the expanded weight. A code is multiplied as it is, and a pruned weight as its code of
// zero; few_tokens subtracts what these add.
template <class Isa, int form, int M>
RAC_INLINE const char* dot_codes(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, const Slots& x,
                                 int32_t* sums) {
    const auto zero = Isa::zeros_of_rows(zeros);
    if constexpr (form == DENSE4) return multiply_some<Isa, DENSE4, M, M>(masks, codes, zero, quads, x, 0, sums);
    alignas(64) char bytes[form == INT4 ? WIDENED : CODE_LINES];
    const char* end;
    if constexpr (is_narrow(form)) {
        end = widen_lines<form>(codes, quads, bytes);
        multiply_some<Isa, DENSE4, M, M>(masks, bytes, zero, quads, x, 0, sums);
    } else {
        end = Isa::widen_codes(masks, codes, quads, bytes);
        multiply_some<Isa, CODES, M, M>(masks, bytes, zero, quads, x, 0, sums);
    }
    return end;
}

// A FewTokens.
template <class Isa, int form, int M>
void few_tokens(const IntMatmul& matmul, int64_t panel, float* acc) {
    const Weight& weight = matmul.out.weight;
    const char* codes = weight.values_of(panel);
    const int tokens = static_cast<int>(matmul.out.m);  // at most 2 M
    for (int i = 0; i < tokens * PANEL; i++) acc[i] = 0;
    for (int64_t block = 0; block < matmul.blocks; block++) {
        const int64_t column = block * matmul.block;
        const uint8_t* zeros = weight.zeros_of(panel, block);
        const Slots x = {matmul.x + 2 * column * (Isa::FORMAT == QUADS ? M : 1), matmul.stride, matmul.x_sums + block,
                         matmul.blocks, matmul.bytes};
        int32_t sums[2 * M * PANEL] = {};
        codes = dot_codes<Isa, form, M>(weight.masks_from(panel, column), codes, zeros, matmul.quads_of(block), x, sums);
        for (int m = 0; m < tokens; m++)
            for (int n = 0; n < PANEL; n++)
                sums[m * PANEL + n] -= (zeros ? zeros[n] : ZERO_CODE) * x.sums[m * x.sums_stride];
        float scale[PANEL];
        matmul.read_scale(panel, block, scale);
        add_scaled(sums, matmul.x_scale + block, matmul.blocks, scale, tokens, acc);
    }
}

template <class Isa, int form, int M>
constexpr void put_dots(IntDot (&dots)[MOST_SLOTS]) {
    dots[M - 1] = dot<Isa, form, M>;
    if constexpr (M > 1) put_dots<Isa, form, M - 1>(dots);
}

template <class Isa, int form>
constexpr void put_few_tokens(Integers& integers) {
    integers.few_tokens[form - INT4][0] = few_tokens<Isa, form, 1>;
    integers.few_tokens[form - INT4][1] = few_tokens<Isa, form, 2>;
    integers.few_slots[form - INT4] = 2;
    integers.few_format[form - INT4] = Isa::FORMAT;
}

template <class Isa>
constexpr Integers integers_of() {
    constexpr int EXPANDED_SLOTS = Isa::FORMAT == QUADS ? MOST_SLOTS : Isa::SLOTS;
    constexpr ExpandQuads dense4 = expand_dense4<Isa>;
    Integers integers = {
        .format = Isa::FORMAT, .quantize = quantize, .add_scaled = add_scaled,
        .slots = Isa::SLOTS, .expanded_slots = EXPANDED_SLOTS, .direct_slots = Isa::SLOTS, .signed_bytes = Isa::SIGNED_BYTES,
        .expand = {expand8<Isa, INT8>, expand8<Isa, DENSE8>, expand_int4<Isa>, dense4, expand_narrow<DENSE3, dense4>,
                   expand_narrow<DENSE2, dense4>}};
    put_dots<Isa, INT8, Isa::SLOTS>(integers.dot[0]);
    put_dots<Isa, DENSE8, Isa::SLOTS>(integers.dot[1]);
    put_dots<Isa, EXPANDED, EXPANDED_SLOTS>(integers.dot_expanded);
    put_few_tokens<Isa, INT4>(integers);
    if constexpr (Isa::MULTIPLIES_LINES) {
        put_few_tokens<Isa, DENSE4>(integers);
        put_few_tokens<Isa, DENSE3>(integers);
        put_few_tokens<Isa, DENSE2>(integers);
    }
    return integers;
}

}  // namespace
}  // namespace rac
