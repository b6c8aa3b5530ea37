// ARM processors with BFDOT (ARMv8.6): the weights of two mask words, spread by shuffles, times two neighbouring numbers of x.
#include "neon.h"

#if defined(RAC_NEON)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
#endif

namespace rac {
namespace {

#include "neon_words.h"

constexpr int LINES = 4;  // at a time: 16 of the 32 registers hold sums, and 8 the weights of two words

// The expanded words are also written to `block` if it is not null.
template <int form, int M>
RAC_INLINE const char* multiply(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x, int64_t stride,
                                float* out, uint16_t* block) {
    constexpr int SETS = M <= 2 ? 2 : 1;  // one per word hides the latency of a multiplication
    float32x4_t acc[M][SETS][4];
    RAC_UNROLL for (auto& line : acc)
        RAC_UNROLL for (auto& set : line)
            RAC_UNROLL for (float32x4_t& rows : set) rows = vdupq_n_f32(0);
    for (int64_t word = 0; word < pairs; word += 2) {
        Pairs<2> weights;
        if (form == DENSE) {
            RAC_UNROLL for (int j = 0; j < 8; j++)
                weights.of[j] = vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(values) + 16 * j));
            values += 128;
        } else {
            uint64_t both;
            std::memcpy(&both, masks + word, sizeof both);
            __builtin_prefetch(values + 1024);
            values = spread_bf16<2>(both, values, weights);
            if (block)
                RAC_UNROLL for (int j = 0; j < 8; j++) vst1q_u16(block + 32 * word + 8 * j, vreinterpretq_u16_u32(weights.of[j]));
        }
        RAC_UNROLL for (int m = 0; m < M; m++) {
            const bfloat16x4_t four = vreinterpret_bf16_u16(vld1_u16(x + m * stride + 2 * word));
            RAC_UNROLL for (int j = 0; j < 4; j++) {
                float32x4_t &first = acc[m][0][j], &second = acc[m][SETS - 1][j];
                first = vbfdotq_lane_f32(first, vreinterpretq_bf16_u32(weights.of[j]), four, 0);
                second = vbfdotq_lane_f32(second, vreinterpretq_bf16_u32(weights.of[4 + j]), four, 1);
            }
        }
    }
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int j = 0; j < 4; j++) {
            float* to = out + PANEL * m + 4 * j;
            const float32x4_t sum = SETS == 2 ? vaddq_f32(acc[m][0][j], acc[m][SETS - 1][j]) : acc[m][0][j];
            vst1q_f32(to, vaddq_f32(vld1q_f32(to), sum));
        }
    return values;
}

#include "bf16_dots.h"

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

#define RAC_LINES(form) {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>}
extern const Dots<uint16_t> arm_bf16_dots = {
    LINES, LINES, {RAC_LINES(BF16), {}, RAC_LINES(DENSE)}, {expand_and_multiply}};

}  // namespace rac
#else
namespace rac {
extern const Dots<uint16_t> arm_bf16_dots = {};
}  // namespace rac
#endif
