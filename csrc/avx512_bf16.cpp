// AVX512 with BF16: vdpbf16ps multiplies the weights of a mask word, spread by vpexpandw, by two neighbouring numbers of x.
#include "kernel.h"

#if defined(__x86_64__) || defined(RAC_EMULATE)
#include <cstring>
#if defined(RAC_EMULATE)
#include "emulated_intrinsics.h"
#elif defined(__clang__)
#include <immintrin.h>
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt"))), \
                             apply_to = function)
#else
#include <immintrin.h>
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,popcnt")
#endif

namespace rac {
namespace {

#include "expand_bytes.h"

constexpr int LINES = 8;  // at a time: with one set of sums per word of two, half of the registers

inline __m512i spread(uint32_t mask, const char* values) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}

inline __m512 add_products(__m512 sums, __m512i weights, const uint16_t* x) {
    uint32_t both;
    std::memcpy(&both, x, sizeof both);
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(static_cast<int>(both)));
}

// Two mask words at a time: this hides the latency of a multiplication, and the values of both are counted at once. The
// expanded words are also written to `block` if it is not null.
template <int form, int M>
inline const char* multiply(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x, int64_t stride,
                            float* out, uint16_t* block) {
    __m512 acc[M][2];
    RAC_UNROLL for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    for (int64_t word = 0; word < pairs; word += 2) {
        __m512i weights[2];
        if (form == DENSE) {
            weights[0] = _mm512_loadu_si512(values);
            weights[1] = _mm512_loadu_si512(values + 64);
            values += 128;
        } else {
            uint64_t both;
            std::memcpy(&both, masks + word, sizeof both);
            _mm_prefetch(values + 4096, _MM_HINT_T0);
            weights[0] = spread(static_cast<uint32_t>(both), values);
            weights[1] = spread(static_cast<uint32_t>(both >> 32), values + 2 * RAC_COUNT(both & 0xffffffff));
            values += 2 * static_cast<uint64_t>(__builtin_popcountll(both));
            if (block) {
                _mm512_storeu_si512(block + 32 * word, weights[0]);
                _mm512_storeu_si512(block + 32 * word + 32, weights[1]);
            }
        }
        RAC_UNROLL for (int m = 0; m < M; m++)
            RAC_UNROLL for (int k = 0; k < 2; k++)
                acc[m][k] = add_products(acc[m][k], weights[k], x + m * stride + 2 * (word + k));
    }
    RAC_UNROLL for (int m = 0; m < M; m++) {
        const __m512 sum = _mm512_add_ps(acc[m][0], acc[m][1]);
        _mm512_storeu_ps(out + 16 * m, _mm512_add_ps(_mm512_loadu_ps(out + 16 * m), sum));
    }
    return values;
}

#include "bf16_dots.h"

template <int M>
void dot_two_panels(const uint16_t* first, const uint16_t* second, int64_t pairs, const uint16_t* x, int64_t stride,
                    float* out, float* out_of_second) {
    __m512 acc[M][2];
    RAC_UNROLL for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    for (int64_t word = 0; word < pairs; word++) {
        const __m512i weights[2] = {_mm512_loadu_si512(first + 32 * word), _mm512_loadu_si512(second + 32 * word)};
        RAC_UNROLL for (int m = 0; m < M; m++)
            RAC_UNROLL for (int p = 0; p < 2; p++)
                acc[m][p] = add_products(acc[m][p], weights[p], x + m * stride + 2 * word);
    }
    RAC_UNROLL for (int m = 0; m < M; m++) {
        _mm512_storeu_ps(out + 16 * m, _mm512_add_ps(_mm512_loadu_ps(out + 16 * m), acc[m][0]));
        _mm512_storeu_ps(out_of_second + 16 * m, _mm512_add_ps(_mm512_loadu_ps(out_of_second + 16 * m), acc[m][1]));
    }
}

// Column k of a quad as the bits of fp32; a lane of the quad holds the four bytes of a row.
template <int k>
inline __m512i column(__m512i quad) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quad, 24 - 8 * k), 24)));
}

// Two columns of fp32 as the bf16 weights of one word; exact for integers of 8 bits.
inline __m512i bf16_word(__m512i first, __m512i second) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, upper));
}

// As expand_and_multiply, for integers of 8 bits: bf16 holds them exactly.
template <Type type>
const char* expand_and_multiply8(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x,
                                 int64_t stride, float* out, uint16_t* block) {
    for (int64_t word = 0; word < pairs; word += 2) {
        _mm_prefetch(values + 2048, _MM_HINT_T0);  // part of the panel's next block
        __m512i quad;
        if (type == INT8) {
            uint64_t mask;
            std::memcpy(&mask, masks + word, sizeof mask);
            quad = expand_bytes(mask, values);
            values += static_cast<uint64_t>(__builtin_popcountll(mask));
        } else {
            quad = _mm512_loadu_si512(values);
            values += QUAD;
        }
        _mm512_storeu_si512(block + 32 * word, bf16_word(column<0>(quad), column<1>(quad)));
        _mm512_storeu_si512(block + 32 * word + 32, bf16_word(column<2>(quad), column<3>(quad)));
    }
    multiply<DENSE, LINES>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out, nullptr);
    return values;
}

}  // namespace
}  // namespace rac
RAC_TARGET_END

namespace rac {

#define RAC_LINES(form)                                                                            \
    {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>,  dot<form, 5>,  dot<form, 6>, \
     dot<form, 7>, dot<form, 8>, dot<form, 9>, dot<form, 10>, dot<form, 11>, dot<form, 12>}
extern const Dots<uint16_t> avx512_bf16_dots = {
    12, LINES, {RAC_LINES(BF16), {}, RAC_LINES(DENSE)},
    {expand_and_multiply, nullptr, expand_and_multiply8<INT8>, expand_and_multiply8<DENSE8>},
    {dot_two_panels<1>, dot_two_panels<2>, dot_two_panels<3>, dot_two_panels<4>, dot_two_panels<5>, dot_two_panels<6>,
     dot_two_panels<7>, dot_two_panels<8>, dot_two_panels<9>, dot_two_panels<10>, dot_two_panels<11>,
     dot_two_panels<12>}};

bool has_avx512_bf16() {
#if defined(RAC_EMULATE)
    return true;
#else
    return has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
}

}  // namespace rac
#else
namespace rac {
extern const Dots<uint16_t> avx512_bf16_dots = {};
bool has_avx512_bf16() { return false; }
}  // namespace rac
#endif
