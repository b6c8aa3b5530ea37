// build: aarch64 -march=armv8.2-a+dotprod+i8mm
// ARM processors with SMMLA (ARMv8.6), integer weights: two rows of the weight, eight columns of each, times two rows of eight signed
// bytes of x. These two are both bytes of a slot, so that a token needs no other token.
#include "isa/neon.h"

namespace rac {
namespace {

// Lanes 0 and 1 of both, in turn.
RAC_INLINE int8x16_t low_lanes(const int8x16_t& a, const int8x16_t& b) {
    return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
RAC_INLINE int8x16_t high_lanes(const int8x16_t& a, const int8x16_t& b) {
    return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

// The first byte and the second byte of a slot, four columns of a quad each.
RAC_INLINE int8x16_t bytes_of_slot(const char* x) {
    return vcombine_s8(vld1_s8(reinterpret_cast<const int8_t*>(x)), vdup_n_s8(0));
}

struct IntIsa : NeonQuads {
    static constexpr XFormat FORMAT = QUADS;
    static constexpr int SLOTS = 2;  // 16 of the 32 registers hold sums, and 8 the weights of two quads

    // acc[m][i]: rows 2i and 2i + 1 of slot m, the sums of the first bytes and of the second ones.
    template <int form, int SOME>
    struct Sums {
        int32x4_t acc[SOME][8];

        RAC_INLINE Sums(const Slots&, int) {
            RAC_UNROLL for (auto& slot : acc)
                RAC_UNROLL for (int32x4_t& rows : slot) rows = vdupq_n_s32(0);
        }
        RAC_INLINE void add_two(const Quad& first, const Quad& second, const char* x, const char* next_x, int64_t step) {
            int8x16_t slot[SOME];
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                slot[m] = low_lanes(bytes_of_slot(x + m * step), bytes_of_slot(next_x + m * step));
            RAC_UNROLL for (int i = 0; i < 8; i++) {
                const int8x16_t &a = first.w[i / 2], &b = second.w[i / 2];
                const int8x16_t rows = i % 2 ? high_lanes(a, b) : low_lanes(a, b);
                RAC_UNROLL for (int m = 0; m < SOME; m++) acc[m][i] = vmmlaq_s32(acc[m][i], rows, slot[m]);
            }
        }
        RAC_INLINE void add(const Quad& quad, const char* x, int64_t step) {
            Quad zero;
            RAC_UNROLL for (int8x16_t& rows : zero.w) rows = vdupq_n_s8(0);
            add_two(quad, zero, x, x, step);
        }
        RAC_INLINE void store(const Slots& x, int slot, int32_t* sums) const {
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                RAC_UNROLL for (int i = 0; i < 4; i++) {
                    const int32x4_t &a = acc[m][2 * i], &b = acc[m][2 * i + 1];
                    const int32x4_t first = vuzp1q_s32(a, b), second = vuzp2q_s32(a, b);
                    int32_t* to = sums + PANEL * x.per_slot() * (slot + m) + 4 * i;
                    if (x.bytes) {
                        vst1q_s32(to, first);
                        vst1q_s32(to + PANEL, second);
                    } else {
                        vst1q_s32(to, vaddq_s32(vshlq_n_s32(first, 8), second));
                    }
                }
        }
    };
    template <int first, int second, class Sums>
    RAC_INLINE static void multiply_two(const uint32_t* masks, const char*& values, const Zeros& zeros, const char* x,
                                        const char* next_x, int64_t step, Sums& sums) {
        Quad a, b;
        load<first>(masks, values, zeros, a);
        load<second>(masks + 2, values, zeros, b);
        sums.add_two(a, b, x, next_x, step);
    }
};

constexpr Integers integers = integers_of<IntIsa>();

}  // namespace

extern const Kernel i8mm_kernel = {
    .name = "i8mm", .title = "SMMLA", .floats = &neon_floats, .integers = &integers, .crossover = {.int8 = 512, .int4 = 512}};

}  // namespace rac
