// Weights of 8 to 2 bits on NEON: a quad is spread by bytes of its mask, widened to 16 bits and multiplied by columns, exactly.
#include "neon.h"

#if defined(RAC_NEON)

namespace rac {
namespace {

#include "few_bits.h"
#include "neon_quads.h"

// sums[i] += rows 4i to 4i + 3 of column k times x[k].
template <int k>
inline void add_column(const int8x16_t& column, const int16x4_t& x, int32x4_t (&sums)[4]) {
    const int16x8_t low = vmovl_s8(vget_low_s8(column)), high = vmovl_high_s8(column);
    sums[0] = vmlal_lane_s16(sums[0], vget_low_s16(low), x, k);
    sums[1] = vmlal_high_lane_s16(sums[1], low, x, k);
    sums[2] = vmlal_lane_s16(sums[2], vget_low_s16(high), x, k);
    sums[3] = vmlal_high_lane_s16(sums[3], high, x, k);
}

template <int M>
RAC_INLINE void add_quad(int32x4_t (&acc)[M][4], const Quad& quad, const int16_t* x, int64_t stride) {
    const int8x16_t even = vuzp1q_s8(quad.w[0], quad.w[1]), even_after = vuzp1q_s8(quad.w[2], quad.w[3]);
    const int8x16_t odd = vuzp2q_s8(quad.w[0], quad.w[1]), odd_after = vuzp2q_s8(quad.w[2], quad.w[3]);
    RAC_UNROLL for (int m = 0; m < M; m++) {
        const int16x4_t four = vld1_s16(x + m * stride);
        add_column<0>(vuzp1q_s8(even, even_after), four, acc[m]);
        add_column<1>(vuzp1q_s8(odd, odd_after), four, acc[m]);
        add_column<2>(vuzp2q_s8(even, even_after), four, acc[m]);
        add_column<3>(vuzp2q_s8(odd, odd_after), four, acc[m]);
    }
}

// A Dot8, which takes codes of zero too.
template <int form, int M>
RAC_INLINE const char* multiply(const uint32_t* masks, const char* values, const Zeros& zeros, int64_t quads, const Lines8& x,
                                int32_t* sums) {
    const int16_t* lines = static_cast<const int16_t*>(x.data);
    int32x4_t acc[M][4];
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int i = 0; i < 4; i++) acc[m][i] = vdupq_n_s32(0);
    Quad quad;
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2) {
        values = expand_quad<first_of(form)>(masks + 2 * q, values, quad, zeros);
        add_quad<M>(acc, quad, lines + 4 * q, x.stride);
        values = expand_quad<second_of(form)>(masks + 2 * q + 2, values, quad, zeros);
        add_quad<M>(acc, quad, lines + 4 * q + 4, x.stride);
    }
    if (q < quads) {
        values = expand_quad<first_of(form)>(masks + 2 * q, values, quad, zeros);
        add_quad<M>(acc, quad, lines + 4 * q, x.stride);
    }
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int i = 0; i < 4; i++) vst1q_s32(sums + PANEL * m + 4 * i, acc[m][i]);
    return values;
}

template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums) {
    return multiply<form, M>(masks, values, {}, quads, x, sums);
}

constexpr Format8 FORMAT = INTEGERS;
#include "few_lines4.h"

template <int form>
inline const char* expand(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    for (int64_t q = 0; q < quads; q++) {
        Quad quad;
        values = expand_quad<form>(masks + 2 * q, values, quad);
        store_quad(static_cast<int8_t*>(out) + QUAD * q, quad);
    }
    return values;
}

// The next quad of a 4-bit weight as 8-bit values.
template <int form>
RAC_INLINE const char* expand_codes(const uint32_t* masks, const char* codes, const Zeros& zeros, int8_t* out) {
    Quad quad;
    codes = expand_quad<form>(masks, codes, quad, zeros);
    for (int i = 0; i < 4; i++) quad.w[i] = vsubq_s8(quad.w[i], zeros.w[i]);
    store_quad(out, quad);
    return codes;
}

}  // namespace

const char* neon_expand_int8(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    return expand<INT8>(masks, values, quads, out);
}

const char* neon_expand_dense8(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    return expand<DENSE8>(masks, values, quads, out);
}

const char* widen(const uint32_t* masks, const char* codes, int64_t quads, char* bytes) {
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

// An Expand4 of INT4: first each code becomes a byte, then these are spread as 8-bit weights are.
const char* neon_expand_int4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const Zeros zero = zeros_of_rows(zeros);
    char bytes[WIDENED];
    const char *end = widen(masks, codes, quads, bytes), *values = bytes;
    for (int64_t q = 0; q < quads; q++)
        values = expand_codes<CODES>(masks + 2 * q, values, zero, static_cast<int8_t*>(out) + QUAD * q);
    return end;
}

// An Expand4 of DENSE4.
const char* neon_expand_dense4(const uint32_t*, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const Zeros zero = zeros_of_rows(zeros);
    int8_t* to = static_cast<int8_t*>(out);
    for (int64_t q = 0; q < quads; q += 2, to += 2 * QUAD) {
        codes = expand_codes<LOW>(nullptr, codes, zero, to);
        if (q + 1 < quads) codes = expand_codes<HIGH>(nullptr, codes, zero, to + QUAD);
    }
    return codes;
}

const char* neon_expand_dense3(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    return expand_narrow<DENSE3, neon_expand_dense4>(masks, codes, zeros, quads, out);
}

const char* neon_expand_dense2(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    return expand_narrow<DENSE2, neon_expand_dense4>(masks, codes, zeros, quads, out);
}

float neon_quantize(const void* x, Type type, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    return quantize_block(x, type, columns, levels, integers, bytes);
}

void neon_add(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines, float* acc) {
    add_scaled_sums(sums, x_scale, stride, scale, lines, acc);
}

#define RAC_LINES(form) {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>}
extern const Kernel8 neon_kernel8 = {
    INTEGERS,
    neon_quantize,
    neon_add,
    4,
    4,
    {RAC_LINES(INT8), RAC_LINES(DENSE8)},
    {neon_expand_int8, neon_expand_dense8},
    RAC_LINES(EXPANDED),
};

extern const Kernel4 neon_kernel4 = {RAC_EXPAND4, RAC_DOT4, RAC_FORMAT4};

}  // namespace rac
#else
namespace rac {
extern const Kernel8 neon_kernel8 = {};
extern const Kernel4 neon_kernel4 = {};
}  // namespace rac
#endif
