// Weights of 8 to 2 bits on ARM processors with SDOT (ARMv8.2 with dot products): four columns at a time, signed bytes times
// signed bytes. x is two bytes, so there are two sums per row of the weight and line of x.
#include "neon.h"

#if defined(RAC_NEON)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

namespace rac {
namespace {

#include "few_bits.h"
#include "neon_quads.h"

constexpr int LINES = 3;  // at a time: 24 of the 32 registers hold sums

template <int SOME>
RAC_INLINE void add_quad(int32x4_t (&acc)[SOME][2][4], const Quad& quad, const int8_t* x) {
    RAC_UNROLL for (int m = 0; m < SOME; m++) {
        const int8x8_t both = vld1_s8(x + 8 * m);
        RAC_UNROLL for (int i = 0; i < 4; i++) {
            acc[m][0][i] = vdotq_lane_s32(acc[m][0][i], quad.w[i], both, 0);
            acc[m][1][i] = vdotq_lane_s32(acc[m][1][i], quad.w[i], both, 1);
        }
    }
}

template <int form, int M, int SOME>
RAC_INLINE const char* dot_some(const uint32_t* masks, const char* values, const Zeros& zeros, int64_t quads,
                                const Lines8& lines, int line, int32_t* sums) {
    const int8_t* x = static_cast<const int8_t*>(lines.data) + 8 * line;
    int32x4_t acc[SOME][2][4];
    RAC_UNROLL for (auto& line : acc)
        RAC_UNROLL for (auto& of_byte : line)
            RAC_UNROLL for (int32x4_t& rows : of_byte) rows = vdupq_n_s32(0);
    Quad quad;
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2, x += 16 * M) {
        values = expand_quad<first_of(form)>(masks + 2 * q, values, quad, zeros);
        add_quad<SOME>(acc, quad, x);
        values = expand_quad<second_of(form)>(masks + 2 * q + 2, values, quad, zeros);
        add_quad<SOME>(acc, quad, x + 8 * M);
    }
    if (q < quads) {
        values = expand_quad<first_of(form)>(masks + 2 * q, values, quad, zeros);
        add_quad<SOME>(acc, quad, x);
    }
    RAC_UNROLL for (int m = 0; m < SOME; m++)
        RAC_UNROLL for (int i = 0; i < 4; i++) store_sums(lines, line + m, acc[m][0][i], acc[m][1][i], sums + 4 * i);
    return values;
}

#include "interleaved_lines.h"

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

extern const Kernel8 dotprod_kernel8 = {
    QUADS,
    neon_quantize,
    neon_add,
    LINES,
    LINES_TOGETHER,
    {{dot<INT8, 1>, dot<INT8, 2>, dot<INT8, 3>}, {dot<DENSE8, 1>, dot<DENSE8, 2>, dot<DENSE8, 3>}},
    {neon_expand_int8, neon_expand_dense8},
    RAC_LINES(EXPANDED),
};

extern const Kernel4 dotprod_kernel4 = {RAC_EXPAND4, RAC_DOT4, RAC_FORMAT4};

}  // namespace rac
#else
namespace rac {
extern const Kernel8 dotprod_kernel8 = {};
extern const Kernel4 dotprod_kernel4 = {};
}  // namespace rac
#endif
