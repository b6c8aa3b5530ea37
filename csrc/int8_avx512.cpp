// 8-bit weights on AVX512 with VNNI: vpexpandb spreads a quad over a vector, vpdpbusd multiplies four columns at a time.
//
// One factor of vpdpbusd is unsigned. So 128 is added to every weight, pruned ones included, and what this adds to the product, 128
// times the sum of x, is subtracted again. The other factor, x, can then be read from memory into every lane by the instruction.
#include "int8.h"

#if defined(__x86_64__) || defined(RAC_EMULATE)
#include <cstring>
#if defined(RAC_EMULATE)
#include "emulated_intrinsics.h"
#elif defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt"))), \
                             apply_to = function)
#else
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512vnni,popcnt")
#endif

namespace rac {
namespace {

#include "add_products.h"
#include "expand_bytes.h"

constexpr int EXPANDED = 4;  // a form: expanded quads, in the first-level cache

template <int form>
inline __m512i expand_quad(const uint32_t* masks, const char*& values) {
    if (form != INT8) {
        const __m512i quad = _mm512_loadu_si512(values);
        values += QUAD;
        return quad;
    }
    uint64_t mask;
    std::memcpy(&mask, masks, sizeof mask);
    const __m512i quad = expand_bytes(mask, values);
    values += static_cast<uint64_t>(__builtin_popcountll(mask));
    return quad;
}

// A few lines use two sets of sums, for every other quad, since each addition depends on the one before it.
template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums) {
    constexpr int SETS = M <= 4 ? 2 : 1;
    const __m512i plus = _mm512_set1_epi32(static_cast<int>(0x80808080));
    const char* lines = static_cast<const char*>(x.data);
    __m512i acc[SETS][M][2];
    RAC_UNROLL for (int m = 0; m < M; m++) {
        // Wrap-around is harmless: the sum of both terms fits.
        acc[0][m][0] = _mm512_set1_epi32(static_cast<int>(-128u * x.sum_of(m, 0)));
        acc[0][m][1] = _mm512_set1_epi32(static_cast<int>(-128u * x.sum_of(m, 1)));
        if (SETS == 2) acc[SETS - 1][m][0] = acc[SETS - 1][m][1] = _mm512_setzero_si512();
    }
    // Two quads are spread while the two before them are multiplied.
    const auto next = [&](int64_t q) {
        if (form != EXPANDED) _mm_prefetch(values + 4096, _MM_HINT_T0);
        return _mm512_xor_si512(expand_quad<form>(masks + 2 * q, values), plus);
    };
    const auto multiply = [&](const __m512i& w, int set, const char* from) __attribute__((always_inline)) {
        RAC_UNROLL for (int i = 0; i < 2 * M; i++) add_products(acc[set][i / 2][i % 2], w, from + 4 * i);
    };
    int64_t q = 0;
    if (quads >= 2) {
        __m512i first = next(0), second = next(1);
        for (q = 2; q + 2 <= quads; q += 2, lines += 16 * M) {
            const __m512i third = next(q), fourth = next(q + 1);
            multiply(first, 0, lines);
            multiply(second, SETS - 1, lines + 8 * M);
            first = third;
            second = fourth;
        }
        multiply(first, 0, lines);
        multiply(second, SETS - 1, lines + 8 * M);
        lines += 16 * M;
    }
    if (q < quads) multiply(next(q), 0, lines);
    RAC_UNROLL for (int m = 0; m < M; m++) {
        __m512i high = acc[0][m][0], low = acc[0][m][1];
        if (SETS == 2) {
            high = _mm512_add_epi32(high, acc[SETS - 1][m][0]);
            low = _mm512_add_epi32(low, acc[SETS - 1][m][1]);
        }
        if (x.bytes) {
            _mm512_storeu_si512(sums + PANEL * 2 * m, high);
            _mm512_storeu_si512(sums + PANEL * (2 * m + 1), low);
        } else {
            _mm512_storeu_si512(sums + PANEL * m, _mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
        }
    }
    return values;
}

// Double lines [FIRST, FIRST + SOME) of M times two panels. A number of x is loaded once for both: with one panel, loads are the limit.
template <int M, int FIRST, int SOME>
inline void multiply_pair(const char* expanded, int64_t quads, const Lines8& x, const Sums8& to_sums) {
    const __m512i plus = _mm512_set1_epi32(static_cast<int>(0x80808080));
    const char* lines = static_cast<const char*>(x.data) + 8 * FIRST;
    __m512i sums[2][2 * SOME];
    RAC_UNROLL for (int i = 0; i < 2 * SOME; i++)
        sums[0][i] = sums[1][i] = _mm512_set1_epi32(static_cast<int>(-128u * x.sum_of(FIRST + i / 2, i % 2)));
    for (int64_t q = 0; q < quads; q++, expanded += QUAD, lines += 8 * M) {
        const __m512i first = _mm512_xor_si512(_mm512_loadu_si512(expanded), plus);
        const __m512i second = _mm512_xor_si512(_mm512_loadu_si512(expanded + PANEL * BLOCK_MOST), plus);
        RAC_UNROLL for (int i = 0; i < 2 * SOME; i++) {
            const __m512i number = four_bytes(lines + 4 * i);
            add_products(sums[0][i], first, number);
            add_products(sums[1][i], second, number);
        }
    }
    RAC_UNROLL for (int panel = 0; panel < 2; panel++) {
        const __m512 scale = _mm512_loadu_ps(to_sums.scale + PANEL * panel);
        const auto add = [&](int64_t line, __m512i sum) __attribute__((always_inline)) {
            float* to = to_sums.acc + to_sums.second * panel + PANEL * line;
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(to_sums.x_scale[line * x.sums_stride]));
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_mul_ps(scaled, scale)));
        };
        RAC_UNROLL for (int m = 0; m < SOME; m++) {
            const __m512i high = sums[panel][2 * m], low = sums[panel][2 * m + 1];
            const int64_t line = FIRST + m;
            if (x.bytes) {
                add(2 * line, high);
                if (2 * line + 1 < to_sums.lines) add(2 * line + 1, low);
            } else {
                add(line, _mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
            }
        }
    }
}

// A Pair8.
template <int M>
void pair(const char* expanded, int64_t quads, const Lines8& x, const Sums8& to) {
    constexpr int SOME = M < 4 ? M : 4;
    multiply_pair<M, 0, SOME>(expanded, quads, x, to);
    if constexpr (M > 4) multiply_pair<M, SOME, M - SOME>(expanded, quads, x, to);
}

template <int form>
const char* expand(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    for (int64_t q = 0; q < quads; q++)
        _mm512_storeu_si512(static_cast<char*>(out) + QUAD * q, expand_quad<form>(masks + 2 * q, values));
    return values;
}

float quantize(const void* x, Type type, int64_t columns, int levels, int16_t* integers, int8_t (*bytes)[BLOCK_ROOM]) {
    return quantize_block(x, type, columns, levels, integers, bytes);
}

// As add_scaled_sums, one vector per line.
void add(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t lines, float* acc) {
    const __m512 of_rows = _mm512_loadu_ps(scale);
    for (int64_t m = 0; m < lines; m++, sums += PANEL, acc += PANEL) {
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), _mm512_set1_ps(x_scale[m * stride]));
        _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc), _mm512_mul_ps(sum, of_rows)));
    }
}

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

#define RAC_LINES(form) \
    {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>, dot<form, 5>, dot<form, 6>, dot<form, 7>, dot<form, 8>}
extern const Kernel8 avx512_kernel8 = {
    QUADS,
    quantize,
    add,
    LINES_TOGETHER,
    LINES_TOGETHER,
    {RAC_LINES(INT8), RAC_LINES(DENSE8)},
    {expand<INT8>, expand<DENSE8>},
    RAC_LINES(EXPANDED),
    {pair<1>, pair<2>, pair<3>, pair<4>, pair<5>, pair<6>, pair<7>, pair<8>},
};

bool has_vnni() {
#if defined(RAC_EMULATE)
    return true;
#else
    return has_avx512() && __builtin_cpu_supports("avx512vnni");
#endif
}

}  // namespace rac
#else
namespace rac {
extern const Kernel8 avx512_kernel8 = {};
bool has_vnni() { return false; }
}  // namespace rac
#endif
