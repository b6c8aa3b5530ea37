// 8-bit and 4-bit weights on ARM processors with SDOT (ARMv8.2 with dot products): four columns at a time, signed bytes times
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

#include "neon_quads.h"

constexpr int LINES = 3;  // at a time: 24 of the 32 registers hold sums

template <int form, int M, int SOME>
RAC_INLINE const char* dot_some(const uint32_t* masks, const char* values, int64_t quads, const int8_t* x, int32_t* sums) {
    int32x4_t acc[SOME][2][4];
    RAC_UNROLL for (auto& line : acc)
        RAC_UNROLL for (auto& of_byte : line)
            RAC_UNROLL for (int32x4_t& rows : of_byte) rows = vdupq_n_s32(0);
    for (int64_t q = 0; q < quads; q++, x += 8 * M) {
        Quad quad;
        values = expand_quad<form>(masks + 2 * q, values, quad);
        RAC_UNROLL for (int m = 0; m < SOME; m++) {
            const int8x8_t both = vld1_s8(x + 8 * m);
            RAC_UNROLL for (int i = 0; i < 4; i++) {
                acc[m][0][i] = vdotq_lane_s32(acc[m][0][i], quad.w[i], both, 0);
                acc[m][1][i] = vdotq_lane_s32(acc[m][1][i], quad.w[i], both, 1);
            }
        }
    }
    RAC_UNROLL for (int m = 0; m < SOME; m++)
        RAC_UNROLL for (int i = 0; i < 4; i++)
            vst1q_s32(sums + PANEL * m + 4 * i, vaddq_s32(vshlq_n_s32(acc[m][0][i], 8), acc[m][1][i]));
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

}  // namespace rac
#else
namespace rac {
extern const Kernel8 dotprod_kernel8 = {};
}  // namespace rac
#endif
