// 8-bit and 4-bit weights on NEON: a quad is spread by bytes of its mask, widened to 16 bits and multiplied by columns, exactly.
#include "neon.h"

#if defined(RAC_NEON)

namespace rac {
namespace {

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

template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums) {
    const int16_t* lines = static_cast<const int16_t*>(x.data);
    int32x4_t acc[M][4];
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int i = 0; i < 4; i++) acc[m][i] = vdupq_n_s32(0);
    for (int64_t q = 0; q < quads; q++) {
        Quad quad;
        values = expand_quad<form>(masks + 2 * q, values, quad);
        const int8x16_t even = vuzp1q_s8(quad.w[0], quad.w[1]), even_after = vuzp1q_s8(quad.w[2], quad.w[3]);
        const int8x16_t odd = vuzp2q_s8(quad.w[0], quad.w[1]), odd_after = vuzp2q_s8(quad.w[2], quad.w[3]);
        RAC_UNROLL for (int m = 0; m < M; m++) {
            const int16x4_t four = vld1_s16(lines + m * x.stride + 4 * q);
            add_column<0>(vuzp1q_s8(even, even_after), four, acc[m]);
            add_column<1>(vuzp1q_s8(odd, odd_after), four, acc[m]);
            add_column<2>(vuzp2q_s8(even, even_after), four, acc[m]);
            add_column<3>(vuzp2q_s8(odd, odd_after), four, acc[m]);
        }
    }
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int i = 0; i < 4; i++) vst1q_s32(sums + PANEL * m + 4 * i, acc[m][i]);
    return values;
}

template <int form>
inline const char* expand(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    for (int64_t q = 0; q < quads; q++) {
        Quad quad;
        values = expand_quad<form>(masks + 2 * q, values, quad);
        store_quad(static_cast<int8_t*>(out) + QUAD * q, quad);
    }
    return values;
}

// The 16 codes of zero, plus `more`, each one in the four columns of its row.
inline Quad zeros_of_rows(const uint8_t* zeros, int more) {
    int8_t columns[QUAD];
    for (int i = 0; i < QUAD; i++) columns[i] = static_cast<int8_t>(more + (zeros ? zeros[i / 4] : ZERO_CODE));
    return load_quad(reinterpret_cast<const char*>(columns));
}

// An Expand4 of DENSE4.
const char* expand_dense4(const uint32_t*, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const Quad zero = zeros_of_rows(zeros, 0);
    int8_t* to = static_cast<int8_t*>(out);
    for (int64_t q = 0; q < quads; q += 2, codes += QUAD, to += 2 * QUAD) {
        __builtin_prefetch(codes + 1024);
        const Quad both = load_quad(codes);
        for (int i = 0; i < 4; i++) {
            const uint8x16_t pair = vreinterpretq_u8_s8(both.w[i]);
            const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(pair, vdupq_n_u8(15)));
            vst1q_s8(to + 16 * i, vsubq_s8(low, zero.w[i]));
            if (q + 1 < quads)
                vst1q_s8(to + QUAD + 16 * i, vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(pair, 4)), zero.w[i]));
        }
    }
    return codes;
}

// An Expand4 of INT4, at most BLOCK_MOST columns: first each code becomes a byte, then these are spread as 8-bit weights are.
const char* expand_int4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    constexpr int PLUS = 16;  // so that a stored code is not 0
    const Quad zero = zeros_of_rows(zeros, PLUS);
    uint64_t size = 0;
    for (int64_t q = 0; q < quads; q++) size += code_bytes(ends_of_bytes(mask_of_quad(masks + 2 * q)) >> 56);
    char bytes[PANEL * BLOCK_MOST + 64];
    for (uint64_t at = 0; at < size; at += 16) {  // the codes have 64 bytes of padding
        __builtin_prefetch(codes + at + 1024);
        const uint8x16_t both = vld1q_u8(reinterpret_cast<const uint8_t*>(codes) + at), plus = vdupq_n_u8(PLUS);
        const uint8x16_t low = vorrq_u8(vandq_u8(both, vdupq_n_u8(15)), plus), high = vorrq_u8(vshrq_n_u8(both, 4), plus);
        vst1q_u8(reinterpret_cast<uint8_t*>(bytes) + 2 * at, vzip1q_u8(low, high));
        vst1q_u8(reinterpret_cast<uint8_t*>(bytes) + 2 * at + 16, vzip2q_u8(low, high));
    }
    const char* values = bytes;
    for (int64_t q = 0; q < quads; q++) {
        Quad quad;
        const char* end = expand_quad<INT8>(masks + 2 * q, values, quad);
        for (int8x16_t& w : quad.w) {
            const int8x16_t stored = vreinterpretq_s8_u8(vtstq_s8(w, w));
            w = vandq_s8(vsubq_s8(w, zero.w[&w - quad.w]), stored);
        }
        store_quad(static_cast<int8_t*>(out) + QUAD * q, quad);
        values += 2 * code_bytes(static_cast<uint64_t>(end - values));
    }
    return codes + size;
}

}  // namespace

const char* neon_expand_int8(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    return expand<INT8>(masks, values, quads, out);
}

const char* neon_expand_dense8(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    return expand<DENSE8>(masks, values, quads, out);
}

float neon_quantize(const void* x, Type type, int64_t columns, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    return quantize_block(x, type, columns, integers, bytes);
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

extern const Kernel4 neon_kernel4 = {{expand_int4, expand_dense4}, 0, {}};

}  // namespace rac
#else
namespace rac {
extern const Kernel8 neon_kernel8 = {};
extern const Kernel4 neon_kernel4 = {};
}  // namespace rac
#endif
