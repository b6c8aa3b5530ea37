// Weights of 8 to 2 bits on ARM processors with SMMLA (ARMv8.6): two rows of the weight, eight columns of each, times two lines of
// eight signed bytes. These two are both bytes of a line of x, so that a line needs no other one.
#include "neon.h"

#if defined(RAC_NEON)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=armv8.2-a+dotprod+i8mm"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#endif

namespace rac {
namespace {

#include "few_bits.h"
#include "neon_quads.h"

// Lanes 0 and 1 of both, in turn.
inline int8x16_t low_lanes(const int8x16_t& a, const int8x16_t& b) {
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
inline int8x16_t high_lanes(const int8x16_t& a, const int8x16_t& b) {
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

// The first byte and the second byte of the line, four columns of a quad each.
inline int8x16_t bytes_of_line(const int8_t* x) { return vcombine_s8(vld1_s8(x), vdup_n_s8(0)); }

constexpr int LINES = 2;  // at a time: 16 of the 32 registers hold sums, and 8 the weights of two quads

// acc[m][i]: rows 2i and 2i + 1 of line m, the sums of the first bytes and of the second ones. `x`: the line's numbers of the first
// quad, `after`: of the second.
template <int SOME>
RAC_INLINE void add_two_quads(int32x4_t (&acc)[SOME][8], const Quad& first, const Quad& second, const int8_t* x,
                              const int8_t* after) {
    int8x16_t line[SOME];
    RAC_UNROLL for (int m = 0; m < SOME; m++) line[m] = low_lanes(bytes_of_line(x + 8 * m), bytes_of_line(after + 8 * m));
    RAC_UNROLL for (int i = 0; i < 8; i++) {
        const int8x16_t& a = first.w[i / 2], &b = second.w[i / 2];
        const int8x16_t rows = i % 2 ? high_lanes(a, b) : low_lanes(a, b);
        RAC_UNROLL for (int m = 0; m < SOME; m++) acc[m][i] = vmmlaq_s32(acc[m][i], rows, line[m]);
    }
}

template <int form, int M, int SOME>
RAC_INLINE const char* dot_some(const uint32_t* masks, const char* values, const Zeros& zeros, int64_t quads,
                                const Lines8& lines, int line, int32_t* sums) {
    const int8_t* x = static_cast<const int8_t*>(lines.data) + 8 * line;
    int32x4_t acc[SOME][8];
    RAC_UNROLL for (auto& line : acc)
        RAC_UNROLL for (int32x4_t& rows : line) rows = vdupq_n_s32(0);
    Quad first, second;
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2, x += 16 * M) {
        values = expand_quad<first_of(form)>(masks + 2 * q, values, first, zeros);
        values = expand_quad<second_of(form)>(masks + 2 * q + 2, values, second, zeros);
        add_two_quads<SOME>(acc, first, second, x, x + 8 * M);
    }
    if (q < quads) {
        values = expand_quad<first_of(form)>(masks + 2 * q, values, first, zeros);
        RAC_UNROLL for (int8x16_t& rows : second.w) rows = vdupq_n_s8(0);
        add_two_quads<SOME>(acc, first, second, x, x);
    }
    RAC_UNROLL for (int m = 0; m < SOME; m++)
        RAC_UNROLL for (int i = 0; i < 4; i++) {
            const int32x4_t &a = acc[m][2 * i], &b = acc[m][2 * i + 1];
            store_sums(lines, line + m, vuzp1q_s32(a, b), vuzp2q_s32(a, b), sums + 4 * i);
        }
    return values;
}

#include "interleaved_lines.h"

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

extern const Kernel8 i8mm_kernel8 = {
    QUADS,
    neon_quantize,
    neon_add,
    LINES,
    LINES_TOGETHER,
    {{dot<INT8, 1>, dot<INT8, 2>}, {dot<DENSE8, 1>, dot<DENSE8, 2>}},
    {neon_expand_int8, neon_expand_dense8},
    RAC_LINES(EXPANDED),
};

extern const Kernel4 i8mm_kernel4 = {RAC_EXPAND4, RAC_DOT4, RAC_FORMAT4};

}  // namespace rac
#else
namespace rac {
extern const Kernel8 i8mm_kernel8 = {};
extern const Kernel4 i8mm_kernel4 = {};
}  // namespace rac
#endif
