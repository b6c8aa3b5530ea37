// Quads of integer weights in plain C++.
#pragma once
#include "gemm/int_loops.h"

namespace rac {
namespace {

// What an IntIsa has next to its FORMAT, SLOTS, Sums and multiply_two.
struct PlainQuads {
    static constexpr bool SIGNED_BYTES = true, MULTIPLIES_LINES = true;
    struct Quad {
        int8_t w[QUAD];  // [16 rows][4 columns]
    };
    struct Zeros {
        int8_t of[PANEL];
    };

    static Zeros zeros_of_rows(const uint8_t* zeros) {
        Zeros of;
        for (int n = 0; n < PANEL; n++) of.of[n] = static_cast<int8_t>(zeros ? zeros[n] : ZERO_CODE);
        return of;
    }
    template <int form>
    static void load(const uint32_t* masks, const char*& values, const Zeros& zeros, Quad& quad) {
        if (form == INT8 || form == CODES) {
            for (int i = 0; i < QUAD; i++) quad.w[i] = form == CODES ? zeros.of[i / 4] : int8_t{0};
            const char* from = values;
            for (int half = 0; half < 2; half++)
                for (uint32_t left = masks[half]; left; left &= left - 1)
                    quad.w[32 * half + __builtin_ctz(left)] = static_cast<int8_t>(*from++);
            values = form == CODES ? values + 2 * code_bytes(static_cast<uint64_t>(from - values)) : from;
            return;
        }
        for (int i = 0; i < QUAD; i++) {
            const uint8_t both = static_cast<uint8_t>(values[i]);
            quad.w[i] = static_cast<int8_t>(form == LOW ? both & 15 : form == HIGH ? both >> 4 : both);
        }
        if (form != LOW) values += QUAD;
    }
    // The codes of some quads of INT4, a byte per code; those of a quad start at an even address.
    static const char* widen_codes(const uint32_t* masks, const char* codes, int64_t quads, char* bytes) {
        for (int64_t q = 0; q < quads; q++)
            for (uint64_t left = code_bytes(RAC_COUNT(masks[2 * q]) + RAC_COUNT(masks[2 * q + 1])); left; left--, codes++) {
                *bytes++ = static_cast<char>(*codes & 15);
                *bytes++ = static_cast<char>(static_cast<uint8_t>(*codes) >> 4);
            }
        return codes;
    }
    static void store(void* out, int64_t q, const Quad& quad) { std::memcpy(static_cast<char*>(out) + QUAD * q, quad.w, QUAD); }
    static Quad less(Quad quad, const Zeros& zeros) {
        for (int i = 0; i < QUAD; i++) quad.w[i] = static_cast<int8_t>(quad.w[i] - zeros.of[i / 4]);
        return quad;
    }
};

}  // namespace
}  // namespace rac
