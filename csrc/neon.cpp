// NEON, which every 64-bit ARM processor has: a byte or half a byte of the mask selects a shuffle that spreads stored values over
// the lanes of a vector of 16 bytes.
#include "neon.h"

#if defined(RAC_NEON)

namespace rac {
namespace {

#include "neon_words.h"

// 16 fp32 numbers.
struct Rows {
    float32x4_t of[4];
};

template <class Operation>
RAC_INLINE Rows rows_of(Operation operation) {
    return {{operation(0), operation(1), operation(2), operation(3)}};
}
inline Rows no_rows() {
    return rows_of([](int) { return vdupq_n_f32(0); });
}
inline Rows load_rows(const float* from) {
    return rows_of([=](int i) { return vld1q_f32(from + 4 * i); });
}
inline void store_rows(float* to, const Rows& rows) {
    for (int i = 0; i < 4; i++) vst1q_f32(to + 4 * i, rows.of[i]);
}
inline Rows add_rows(const Rows& a, const Rows& b) {
    return rows_of([&](int i) { return vaddq_f32(a.of[i], b.of[i]); });
}
RAC_INLINE Rows multiply_add(const Rows& w, float x, const Rows& sums) {
    return rows_of([&](int i) { return vfmaq_n_f32(sums.of[i], w.of[i], x); });
}

// The weights of a mask word: w[k] holds column k.
struct Columns {
    Rows w[2];
};

// Returns the address of the next word's values.
template <int form>
RAC_INLINE const char* expand_word(uint32_t mask, const char* values, Columns& two) {
    if (form == BF16) {
        Pairs<1> rows;
        values = spread_bf16(mask, values, rows);
        two.w[0] = rows_of([&](int j) { return vreinterpretq_f32_u32(vshlq_n_u32(rows.of[j], 16)); });
        two.w[1] = rows_of(
            [&](int j) { return vreinterpretq_f32_u32(vandq_u32(rows.of[j], vdupq_n_u32(0xffff0000))); });
        return values;
    }
    for (int k = 0; k < 2; k++) {
        if (form == DENSE) {
            two.w[k] = load_rows(reinterpret_cast<const float*>(values) + PANEL * k);
            continue;
        }
        for (int j = 0; j < 4; j++) {
            const uint32_t half = mask >> (16 * k + 4 * j) & 15;
            two.w[k].of[j] = vreinterpretq_f32_u8(shuffled(values, tables.fp32[half]));
            values += tables.bytes[half];
        }
    }
    return form == DENSE ? values + 2 * PANEL * sizeof(float) : values;
}

constexpr int LINES = 4;  // at a time: 16 of the 32 registers hold sums
constexpr int sets_of_sums(int lines) { return lines <= 2 ? 2 : 1; }

#include "by_column.h"

const char* expand_bf16(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2) {
        Pairs<1> rows;
        values = spread_bf16(masks[column / 2], values, rows);
        uint16_t* to = static_cast<uint16_t*>(out) + column * stride;
        for (int j = 0; j < 4; j++) vst1_u16(to + 4 * j, vmovn_u32(rows.of[j]));
        if (column + 1 < columns)
            for (int j = 0; j < 4; j++) vst1_u16(to + stride + 4 * j, vshrn_n_u32(rows.of[j], 16));
    }
    return values;
}

}  // namespace

#define RAC_LINES(form) {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>}
extern const Kernel neon_kernel = {
    {LINES,
     LINES,
     {RAC_LINES(BF16), RAC_LINES(FP32), RAC_LINES(DENSE)},
     {expand_and_multiply<BF16>, expand_and_multiply<FP32>}},
    {expand<BF16>, expand<FP32>},
    expand_bf16,
    store,
};

}  // namespace rac
#else
namespace rac {
extern const Kernel neon_kernel = {};
}  // namespace rac
#endif
