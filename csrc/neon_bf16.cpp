// ARM processors with bf16 products (ARMv8.6): the weights of two mask words, spread by shuffles, times four neighbouring columns of
// x, by BFDOT for one line and by BFMMLA for more.
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

// Two rows of the weight times two lines, four columns of each (BFMMLA): twice the products of a BFDOT. A block holds the weights of
// two words in this order, of[i] being rows 2i and 2i + 1.
RAC_INLINE Pairs<2> by_two_rows(const Pairs<2>& words) {
    Pairs<2> rows;
    RAC_UNROLL for (int j = 0; j < 4; j++) {
        rows.of[2 * j] = vzip1q_u32(words.of[j], words.of[4 + j]);
        rows.of[2 * j + 1] = vzip2q_u32(words.of[j], words.of[4 + j]);
    }
    return rows;
}

RAC_INLINE const char* next_words(const uint32_t* masks, const char* values, Pairs<2>& words) {
    uint64_t both;
    std::memcpy(&both, masks, sizeof both);
    __builtin_prefetch(values + 1024);
    return spread_bf16<2>(both, values, words);
}

RAC_INLINE void add_to(float* sums, float32x4_t more) { vst1q_f32(sums, vaddq_f32(vld1q_f32(sums), more)); }

// The weights of one line are multiplied as they are spread: there is no second line that the other order would pay for.
RAC_INLINE const char* multiply_one(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x, float* out) {
    float32x4_t acc[2][4];  // one set per word hides the latency of a multiplication
    RAC_UNROLL for (auto& set : acc)
        RAC_UNROLL for (float32x4_t& rows : set) rows = vdupq_n_f32(0);
    for (int64_t word = 0; word < pairs; word += 2) {
        Pairs<2> words;
        values = next_words(masks + word, values, words);
        const bfloat16x4_t four = vreinterpret_bf16_u16(vld1_u16(x + 2 * word));
        RAC_UNROLL for (int j = 0; j < 4; j++) {
            acc[0][j] = vbfdotq_lane_f32(acc[0][j], vreinterpretq_bf16_u32(words.of[j]), four, 0);
            acc[1][j] = vbfdotq_lane_f32(acc[1][j], vreinterpretq_bf16_u32(words.of[4 + j]), four, 1);
        }
    }
    RAC_UNROLL for (int j = 0; j < 4; j++) add_to(out + 4 * j, vaddq_f32(acc[0][j], acc[1][j]));
    return values;
}

// The expanded words are also written to `block` if it is not null.
template <int form, int M>
RAC_INLINE const char* multiply(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x, int64_t stride,
                                float* out, uint16_t* block) {
    if (form != DENSE && M == 1) return multiply_one(masks, values, pairs, x, out);
    constexpr int DOUBLES = (M + 1) / 2;
    float32x4_t acc[DOUBLES][8];  // of rows 2i and 2i + 1, two lines of each
    RAC_UNROLL for (auto& lines : acc)
        RAC_UNROLL for (float32x4_t& rows : lines) rows = vdupq_n_f32(0);
    for (int64_t word = 0; word < pairs; word += 2) {
        Pairs<2> weights;
        if (form == DENSE) {
            RAC_UNROLL for (int i = 0; i < 8; i++)
                weights.of[i] = vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(values) + 16 * i));
            values += 128;
        } else {
            Pairs<2> words;
            values = next_words(masks + word, values, words);
            weights = by_two_rows(words);
            if (block)
                RAC_UNROLL for (int i = 0; i < 8; i++) vst1q_u16(block + 32 * word + 8 * i, vreinterpretq_u16_u32(weights.of[i]));
        }
        RAC_UNROLL for (int d = 0; d < DOUBLES; d++) {
            const uint16_t *first = x + 2 * d * stride + 2 * word, *second = 2 * d + 1 < M ? first + stride : first;
            const bfloat16x8_t lines = vreinterpretq_bf16_u16(vcombine_u16(vld1_u16(first), vld1_u16(second)));
            RAC_UNROLL for (int i = 0; i < 8; i++)
                acc[d][i] = vbfmmlaq_f32(acc[d][i], vreinterpretq_bf16_u32(weights.of[i]), lines);
        }
    }
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int j = 0; j < 4; j++) {
            const float32x4_t &two = acc[m / 2][2 * j], &more = acc[m / 2][2 * j + 1];
            add_to(out + PANEL * m + 4 * j, m % 2 ? vuzp2q_f32(two, more) : vuzp1q_f32(two, more));
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
