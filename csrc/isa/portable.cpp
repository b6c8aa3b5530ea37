// build: any
// Any processor, in plain C++: expand the weights of a mask word or of a quad, then multiply them.
#include "gemm/float_loops.h"
#include "gemm/int_loops.h"

namespace rac {
namespace {

struct FloatIsa {
    static constexpr int TOKENS = 4;
    struct Columns {
        float w[2][PANEL];
    };

    template <int form>
    static Columns columns(uint32_t mask, const char*& values) {
        Columns two = {};
        if (form == BLOCK) {
            std::memcpy(two.w, values, sizeof two.w);
            values += sizeof two.w;
            return two;
        }
        const Type type = static_cast<Type>(form);
        for (; mask; mask &= mask - 1, values += size_of(type)) {
            const int bit = __builtin_ctz(mask);
            two.w[column_of(type, 0, bit)][row_of(type, 0, bit)] = read(values, type, 0);
        }
        return two;
    }
    static void store(float* to, const float (&column)[PANEL]) { std::memcpy(to, column, sizeof column); }

    template <int form, int M>
    struct Sums {
        float acc[M][PANEL] = {};

        template <bool keep>
        void add(uint32_t mask, const char*& values, const float* x, int64_t stride, float*) {
            const Columns two = columns<form>(mask, values);
            for (int m = 0; m < M; m++)
                for (int n = 0; n < PANEL; n++)
                    acc[m][n] += two.w[0][n] * x[m * stride] + two.w[1][n] * x[m * stride + 1];
        }
        void add_to(float* out) const {
            for (int m = 0; m < M; m++)
                for (int n = 0; n < PANEL; n++) out[m * PANEL + n] += acc[m][n];
        }
    };
};

struct IntIsa : SingleQuads<IntIsa> {
    static constexpr XFormat FORMAT = INTEGERS;
    static constexpr int SLOTS = 4;
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

    template <int form, int SOME>
    struct Sums {
        int32_t of[SOME][PANEL] = {};

        Sums(const Slots&, int) {}
        void add(const Quad& quad, const char* x, int64_t step) {
            for (int m = 0; m < SOME; m++) {
                int16_t four[4];
                std::memcpy(four, x + m * step, sizeof four);
                for (int n = 0; n < PANEL; n++)
                    for (int k = 0; k < 4; k++) of[m][n] += quad.w[4 * n + k] * four[k];
            }
        }
        void store(const Slots&, int slot, int32_t* sums) const { std::memcpy(sums + PANEL * slot, of, sizeof of); }
    };
};

}  // namespace

extern const Floats portable_floats = floats_of<FloatIsa>();
extern const Integers portable_integers = integers_of<IntIsa>();
extern const Kernel portable_kernel = {"portable", "portable", &portable_floats, nullptr, &portable_integers, nullptr, {8, 8, 8}};

}  // namespace rac
