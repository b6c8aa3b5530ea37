// Included inside the anonymous namespace of sources for ARM, in the section that is compiled for their ISA.

#include "quad_tables.h"

// Forms, beside those of a Type. EXPANDED: 8-bit quads, in the first-level cache. CODES: what widen wrote. LOW and HIGH: the two
// quads of 64 bytes of DENSE4.
constexpr int EXPANDED = TYPES, CODES = TYPES + 1, LOW = TYPES + 2, HIGH = TYPES + 3;
constexpr int first_of(int form) { return form == DENSE4 ? LOW : form; }
constexpr int second_of(int form) { return form == DENSE4 ? HIGH : form; }

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

// The 16 codes of zero, each one in the four columns of its row.
using Zeros = Quad;
inline Zeros zeros_of_rows(const uint8_t* zeros) {
    int8_t columns[QUAD];
    for (int i = 0; i < QUAD; i++) columns[i] = static_cast<int8_t>(zeros ? zeros[i / 4] : ZERO_CODE);
    return load_quad(reinterpret_cast<const char*>(columns));
}

// Four rows' sums of the first and of the second bytes of double line `m`, to its place from `sums` on.
RAC_INLINE void store_sums(const Lines8& lines, int m, const int32x4_t& first, const int32x4_t& second, int32_t* sums) {
    sums += PANEL * lines.per_double() * m;
    if (lines.bytes) {
        vst1q_s32(sums, first);
        vst1q_s32(sums + PANEL, second);
    } else {
        vst1q_s32(sums, vaddq_s32(vshlq_n_s32(first, 8), second));
    }
}

// Returns the address after the values of this quad. Where no code is stored, `zeros` is put.
template <int form>
RAC_INLINE const char* expand_quad(const uint32_t* masks, const char* values, Quad& quad, const Zeros& zeros = {}) {
    if (form != EXPANDED && form != CODES) __builtin_prefetch(values + 1024);
    if (form != INT8 && form != CODES) {
        quad = load_quad(values);
        for (int8x16_t& w : quad.w) {
            if (form == LOW) w = vandq_s8(w, vdupq_n_s8(15));
            if (form == HIGH) w = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 4));
        }
        return form == LOW ? values : values + QUAD;
    }
    const uint64_t mask = mask_of_quad(masks), ends = ends_of_bytes(mask), starts = ends << 8;
    for (int i = 0; i < 4; i++) {
        const uint64_t low = mask >> 16 * i & 0xff, high = mask >> (16 * i + 8) & 0xff;
        const int8x16_t stored = two(values + (starts >> 16 * i & 0xff), values + (starts >> (16 * i + 8) & 0xff));
        const uint8x16_t order = vreinterpretq_u8_s8(two(tables.low[low], tables.high[high]));
        quad.w[i] = form == CODES ? vqtbx1q_s8(zeros.w[i], stored, order) : vqtbl1q_s8(stored, order);
    }
    return values + (form == CODES ? 2 * code_bytes(ends >> 56) : ends >> 56);
}
