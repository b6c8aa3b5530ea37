// build: aarch64
// NEON, which every 64-bit ARM processor has: a byte or half a byte of the mask selects a shuffle that spreads stored values over
// the lanes of a vector of 16 bytes. Integers are widened to 16 bits and multiplied by columns, exactly.
#include "isa/neon.h"

#include "gemm/float_loops.h"

namespace rac {
namespace {

// The bytes that each lane receives: of bf16 for each mask byte, of fp32 for each half of one. 0x80 gives a zero.
struct Orders {
    alignas(64) uint8_t bf16[256][16];
    alignas(64) uint8_t fp32[16][16];
    uint8_t bytes[16];  // of the fp32 values that half a mask byte stores
    constexpr Orders() : bf16(), fp32(), bytes() {
        for (int mask = 0; mask < 256; mask++) fill(bf16[mask], mask, 2);
        for (int mask = 0; mask < 16; mask++) bytes[mask] = static_cast<uint8_t>(4 * fill(fp32[mask], mask, 4));
    }
    static constexpr int fill(uint8_t* order, int mask, int size) {
        int stored = 0;
        for (int lane = 0; lane < 16 / size; lane++) {
            const bool set = mask >> lane & 1;
            for (int i = 0; i < size; i++) order[size * lane + i] = static_cast<uint8_t>(set ? size * stored + i : 0x80);
            stored += set;
        }
        return stored;
    }
};
constexpr Orders orders;

RAC_INLINE uint8x16_t shuffled(const char* values, const uint8_t* order) {
    return vqtbl1q_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(values)), vld1q_u8(order));
}

struct FloatIsa {
    static constexpr int TOKENS = 4;  // 16 of the 32 registers hold sums
    struct Rows {
        float32x4_t of[4];
    };
    struct Columns {
        Rows w[2];
    };

    template <class Operation>
    RAC_INLINE static Rows rows_of(Operation operation) {
        return {{operation(0), operation(1), operation(2), operation(3)}};
    }
    RAC_INLINE static Rows zero() {
        return rows_of([](int) { return vdupq_n_f32(0); });
    }
    RAC_INLINE static Rows load(const float* from) {
        return rows_of([=](int i) { return vld1q_f32(from + 4 * i); });
    }
    RAC_INLINE static void store(float* to, const Rows& rows) {
        for (int i = 0; i < 4; i++) vst1q_f32(to + 4 * i, rows.of[i]);
    }
    RAC_INLINE static Rows add(const Rows& a, const Rows& b) {
        return rows_of([&](int i) { return vaddq_f32(a.of[i], b.of[i]); });
    }
    RAC_INLINE static Rows multiply_add(const Rows& w, float x, const Rows& sums) {
        return rows_of([&](int i) { return vfmaq_n_f32(sums.of[i], w.of[i], x); });
    }

    template <int form>
    RAC_INLINE static Columns columns(uint32_t mask, const char*& values) {
        Columns two;
        if (form == BF16) {
            const uint64_t ends = ends_of_bytes(mask), starts = ends << 8;
            for (int j = 0; j < 4; j++) {
                const char* from = values + 2 * (starts >> 8 * j & 0xff);
                const uint32x4_t both = vreinterpretq_u32_u8(shuffled(from, orders.bf16[mask >> 8 * j & 0xff]));
                two.w[0].of[j] = vreinterpretq_f32_u32(vshlq_n_u32(both, 16));
                two.w[1].of[j] = vreinterpretq_f32_u32(vandq_u32(both, vdupq_n_u32(0xffff0000)));
            }
            values += 2 * (ends >> 24 & 0xff);
            return two;
        }
        for (int k = 0; k < 2; k++) {
            if (form == BLOCK) {
                two.w[k] = load(reinterpret_cast<const float*>(values) + PANEL * k);
                continue;
            }
            for (int j = 0; j < 4; j++) {
                const uint32_t half = mask >> (16 * k + 4 * j) & 15;
                two.w[k].of[j] = vreinterpretq_f32_u8(shuffled(values, orders.fp32[half]));
                values += orders.bytes[half];
            }
        }
        if (form == BLOCK) values += 2 * PANEL * sizeof(float);
        return two;
    }

    template <int form, int M>
    using Sums = SumsByColumn<FloatIsa, form, M, M <= 2 ? 2 : 1>;
};

// sums[i] += rows 4i to 4i + 3 of column k times x[k].
template <int k>
RAC_INLINE void add_column(const int8x16_t& column, const int16x4_t& x, int32x4_t (&sums)[4]) {
    const int16x8_t low = vmovl_s8(vget_low_s8(column)), high = vmovl_high_s8(column);
    sums[0] = vmlal_lane_s16(sums[0], vget_low_s16(low), x, k);
    sums[1] = vmlal_high_lane_s16(sums[1], low, x, k);
    sums[2] = vmlal_lane_s16(sums[2], vget_low_s16(high), x, k);
    sums[3] = vmlal_high_lane_s16(sums[3], high, x, k);
}

struct IntIsa : NeonQuads, SingleQuads<IntIsa> {
    static constexpr XFormat FORMAT = INTEGERS;
    static constexpr int SLOTS = 4;

    template <int form, int SOME>
    struct Sums {
        int32x4_t acc[SOME][4];

        RAC_INLINE Sums(const Slots&, int) {
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                RAC_UNROLL for (int i = 0; i < 4; i++) acc[m][i] = vdupq_n_s32(0);
        }
        RAC_INLINE void add(const Quad& quad, const char* x, int64_t step) {
            const int8x16_t even = vuzp1q_s8(quad.w[0], quad.w[1]), even_after = vuzp1q_s8(quad.w[2], quad.w[3]);
            const int8x16_t odd = vuzp2q_s8(quad.w[0], quad.w[1]), odd_after = vuzp2q_s8(quad.w[2], quad.w[3]);
            RAC_UNROLL for (int m = 0; m < SOME; m++) {
                const int16x4_t four = vld1_s16(reinterpret_cast<const int16_t*>(x + m * step));
                add_column<0>(vuzp1q_s8(even, even_after), four, acc[m]);
                add_column<1>(vuzp1q_s8(odd, odd_after), four, acc[m]);
                add_column<2>(vuzp2q_s8(even, even_after), four, acc[m]);
                add_column<3>(vuzp2q_s8(odd, odd_after), four, acc[m]);
            }
        }
        RAC_INLINE void store(const Slots&, int slot, int32_t* sums) const {
            RAC_UNROLL for (int m = 0; m < SOME; m++)
                RAC_UNROLL for (int i = 0; i < 4; i++) vst1q_s32(sums + PANEL * (slot + m) + 4 * i, acc[m][i]);
        }
    };
};

constexpr Integers integers = integers_of<IntIsa>();

}  // namespace

extern const Floats neon_floats = floats_of<FloatIsa>();
extern const Kernel neon_kernel = {
    .name = "neon", .title = "NEON", .floats = &neon_floats, .integers = &integers, .crossover = {.int8 = 512, .int4 = 512}};

}  // namespace rac
