// build: any
// Any processor, in plain C++: expand the weights of a mask word or of a quad, then multiply them.
#include "gemm/float_loops.h"
#include "isa/portable.h"

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

struct IntIsa : PlainQuads, SingleQuads<IntIsa> {
    static constexpr XFormat FORMAT = INTEGERS;
    static constexpr int SLOTS = 4;

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
extern const Kernel portable_kernel = {
    .name = "portable", .title = "portable", .floats = &portable_floats, .integers = &portable_integers, .crossover = {8, 8, 8}};

}  // namespace rac
