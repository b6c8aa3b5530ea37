// The codes of DENSE3 and DENSE2 as lines of DENSE4. Included by isa/ISA.cpp alone.
#pragma once
#include <cstring>

#include "gemm/kernel.h"

namespace rac {
namespace {

constexpr int64_t CODE_LINES = BLOCK_MOST / PAIR_OF_QUADS * QUAD;  // bytes of the lines of a block

// A few lines of a form, and the lines of DENSE4 that they become: 3 and 4, 1 and 2, or DENSE4's own.
constexpr int lines_stored(int form) { return form == DENSE3 ? 3 : 1; }
constexpr int lines_widened(int form) { return form == DENSE3 ? 4 : form == DENSE2 ? 2 : 1; }
// What leaves the code in each half of a byte of these lines.
constexpr int code_mask(int form) { return (1 << value_bits(form)) - 1; }

// `quads` of at most BLOCK_MOST columns, in `lines` [CODE_LINES]. Returns the address after these codes.
template <int form>
RAC_INLINE const char* widen_lines(const char* codes, int64_t quads, char* lines) {
    typedef uint32_t Part __attribute__((vector_size(16)));
    constexpr uint32_t all = 0x11111111;
    const auto load = [&](int line, int at) {
        Part part;
        std::memcpy(&part, codes + QUAD * line + at, sizeof part);
        return part;
    };
    const auto store = [&](int line, int at, Part part) { std::memcpy(lines + QUAD * line + at, &part, sizeof part); };
    for (int64_t q = 0; q < quads; q += 2 * lines_widened(form)) {
        for (int line = 0; line < lines_stored(form); line++) __builtin_prefetch(codes + 1024 + QUAD * line);
        RAC_UNROLL for (int at = 0; at < QUAD; at += sizeof(Part)) {
            const Part first = load(0, at);
            if (form == DENSE2) {
                store(0, at, first & 3 * all);
                store(1, at, first >> 2 & 3 * all);
                continue;
            }
            const Part second = load(1, at), third = load(2, at);
            store(0, at, first & 7 * all);
            store(1, at, second & 7 * all);
            store(2, at, third & 7 * all);
            store(3, at, (first >> 3 & all) | (second >> 2 & 2 * all) | (third >> 1 & 4 * all));
        }
        codes += lines_stored(form) * QUAD;
        lines += lines_widened(form) * QUAD;
    }
    return codes;
}

// The ExpandQuads of DENSE3 or DENSE2, by that of DENSE4.
template <int form, ExpandQuads expand_dense4>
const char* expand_narrow(const uint32_t*, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    alignas(64) char lines[CODE_LINES];
    codes = widen_lines<form>(codes, quads, lines);
    expand_dense4(nullptr, lines, zeros, quads, out);
    return codes;
}

}  // namespace
}  // namespace rac
