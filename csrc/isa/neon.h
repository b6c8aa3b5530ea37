// What the kernels of 64-bit ARM processors share for integer weights. The memory order must be little-endian.
#pragma once
#include <arm_neon.h>

#include "gemm/int_loops.h"
#include "isa/shuffles.h"

namespace rac {
namespace {

// Byte i of the result: the number of bits that are set in bytes 0 to i of the mask.
RAC_INLINE uint64_t ends_of_bytes(uint64_t mask) {
    return vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0) * 0x0101010101010101;
}

// 8 bytes from each of two addresses.
RAC_INLINE int8x16_t two(const void* low, const void* high) {
    return vcombine_s8(vld1_s8(static_cast<const int8_t*>(low)), vld1_s8(static_cast<const int8_t*>(high)));
}

RAC_INLINE uint64_t mask_of_quad(const uint32_t* masks) {
    uint64_t mask;
    std::memcpy(&mask, masks, sizeof mask);
    return mask;
}

// What an IntIsa has next to its FORMAT, SLOTS, Sums and multiply_two.
struct NeonQuads {
    static constexpr bool SIGNED_BYTES = true, MULTIPLIES_LINES = true;
    struct Quad {
        int8x16_t w[4];  // w[i] holds rows 4i to 4i + 3, four columns each
    };
    using Zeros = Quad;

    RAC_INLINE static Quad load_quad(const void* from) {
        Quad quad;
        for (int i = 0; i < 4; i++) quad.w[i] = vld1q_s8(static_cast<const int8_t*>(from) + 16 * i);
        return quad;
    }
    RAC_INLINE static Zeros zeros_of_rows(const uint8_t* zeros) {
        int8_t columns[QUAD];
        for (int i = 0; i < QUAD; i++) columns[i] = static_cast<int8_t>(zeros ? zeros[i / 4] : ZERO_CODE);
        return load_quad(columns);
    }
    template <int form>
    RAC_INLINE static void load(const uint32_t* masks, const char*& values, const Zeros& zeros, Quad& quad) {
        if (form != INT8 && form != CODES) {
            quad = load_quad(values);
            for (int8x16_t& w : quad.w) {
                if (form == LOW) w = vandq_s8(w, vdupq_n_s8(15));
                if (form == HIGH) w = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 4));
            }
            values += form == LOW ? 0 : QUAD;
            return;
        }
        const uint64_t mask = mask_of_quad(masks), ends = ends_of_bytes(mask), starts = ends << 8;
        for (int i = 0; i < 4; i++) {
            const uint64_t low = mask >> 16 * i & 0xff, high = mask >> (16 * i + 8) & 0xff;
            const int8x16_t stored = two(values + (starts >> 16 * i & 0xff), values + (starts >> (16 * i + 8) & 0xff));
            const uint8x16_t order = vreinterpretq_u8_s8(two(shuffles.low[low], shuffles.high[high]));
            quad.w[i] = form == CODES ? vqtbx1q_s8(zeros.w[i], stored, order) : vqtbl1q_s8(stored, order);
        }
        values += form == CODES ? 2 * code_bytes(ends >> 56) : ends >> 56;
    }
    // The codes of some quads of INT4, of at most BLOCK_MOST columns, a byte per code; those of a quad start at an even address.
    static const char* widen_codes(const uint32_t* masks, const char* codes, int64_t quads, char* bytes) {
        uint64_t size = 0;
        for (int64_t q = 0; q < quads; q++) size += code_bytes(ends_of_bytes(mask_of_quad(masks + 2 * q)) >> 56);
        for (uint64_t at = 0; at < size; at += 16) {  // the codes have 64 bytes of padding
            __builtin_prefetch(codes + at + 1024);
            const uint8x16_t both = vld1q_u8(reinterpret_cast<const uint8_t*>(codes) + at);
            const uint8x16_t low = vandq_u8(both, vdupq_n_u8(15)), high = vshrq_n_u8(both, 4);
            vst1q_u8(reinterpret_cast<uint8_t*>(bytes) + 2 * at, vzip1q_u8(low, high));
            vst1q_u8(reinterpret_cast<uint8_t*>(bytes) + 2 * at + 16, vzip2q_u8(low, high));
        }
        return codes + size;
    }
    RAC_INLINE static void store(void* out, int64_t q, const Quad& quad) {
        for (int i = 0; i < 4; i++) vst1q_s8(static_cast<int8_t*>(out) + QUAD * q + 16 * i, quad.w[i]);
    }
    RAC_INLINE static Quad less(Quad quad, const Zeros& zeros) {
        for (int i = 0; i < 4; i++) quad.w[i] = vsubq_s8(quad.w[i], zeros.w[i]);
        return quad;
    }
};

}  // namespace
}  // namespace rac
