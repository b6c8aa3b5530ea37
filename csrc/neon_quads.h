// Included inside the anonymous namespace of sources for ARM, in the section that is compiled for their ISA.

#include "quad_tables.h"

constexpr int EXPANDED = 4;  // a form: 8-bit quads, in the first-level cache

inline uint64_t mask_of_quad(const uint32_t* masks) {
    uint64_t mask;
    std::memcpy(&mask, masks, sizeof mask);
    return mask;
}

inline Quad load_quad(const char* from) {
    Quad quad;
    for (int i = 0; i < 4; i++) quad.w[i] = vld1q_s8(reinterpret_cast<const int8_t*>(from) + 16 * i);
    return quad;
}

inline void store_quad(int8_t* to, const Quad& quad) {
    for (int i = 0; i < 4; i++) vst1q_s8(to + 16 * i, quad.w[i]);
}

// 8 bytes from each of two addresses.
RAC_INLINE int8x16_t two(const void* low, const void* high) {
    return vcombine_s8(vld1_s8(static_cast<const int8_t*>(low)), vld1_s8(static_cast<const int8_t*>(high)));
}

// Returns the address after the values of this quad.
template <int form>
RAC_INLINE const char* expand_quad(const uint32_t* masks, const char* values, Quad& quad) {
    if (form != EXPANDED) __builtin_prefetch(values + 1024);
    if (form != INT8) {
        quad = load_quad(values);
        return values + QUAD;
    }
    const uint64_t mask = mask_of_quad(masks), ends = ends_of_bytes(mask), starts = ends << 8;
    for (int i = 0; i < 4; i++) {
        const uint64_t low = mask >> 16 * i & 0xff, high = mask >> (16 * i + 8) & 0xff;
        const int8x16_t stored = two(values + (starts >> 16 * i & 0xff), values + (starts >> (16 * i + 8) & 0xff));
        quad.w[i] = vqtbl1q_s8(stored, vreinterpretq_u8_s8(two(tables.low[low], tables.high[high])));
    }
    return values + (ends >> 56);
}
