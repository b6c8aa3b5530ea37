// build: x86_64 -mavx512f -mavx512bw -mavx512vl -mavx512vbmi2 -mavx512vnni -mavx512bf16 -mpopcnt
// AVX512 with VBMI2, float weights: vpexpandw and vpexpandd spread the stored values of a mask word over their lanes, one instruction
// per vector. Where the processor has AVX512-BF16, vdpbf16ps multiplies bf16 weights by two neighbouring numbers of bf16 x.
#include "isa/avx512.h"
#include "gemm/float_loops.h"

namespace rac {
namespace {

struct FloatIsa {
    static constexpr int TOKENS = 8;
    using Rows = __m512;
    struct Columns {
        __m512 w[2];
    };

    template <int form>
    RAC_INLINE static Columns columns(uint32_t mask, const char*& values) {
        Columns two;
        const char* from = values;
        if (form == BF16) {
            const __m512i spread = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(from));
            two.w[0] = _mm512_castsi512_ps(_mm512_slli_epi32(spread, 16));
            two.w[1] = _mm512_castsi512_ps(_mm512_and_si512(spread, _mm512_set1_epi32(int(0xffff0000))));
            values += 2 * RAC_COUNT(mask);
        } else if (form == FP32) {
            const char* second = from + 4 * RAC_COUNT(mask & 0xffff);
            two.w[0] = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask), _mm512_loadu_ps(from));
            two.w[1] = _mm512_maskz_expand_ps(static_cast<__mmask16>(mask >> 16), _mm512_loadu_ps(second));
            values += 4 * RAC_COUNT(mask);
        } else {
            two.w[0] = _mm512_loadu_ps(from);
            two.w[1] = _mm512_loadu_ps(from + 64);
            values += 128;
        }
        return two;
    }
    RAC_INLINE static Rows zero() { return _mm512_setzero_ps(); }
    RAC_INLINE static Rows load(const float* from) { return _mm512_loadu_ps(from); }
    RAC_INLINE static void store(float* to, Rows rows) { _mm512_storeu_ps(to, rows); }
    RAC_INLINE static Rows add(Rows a, Rows b) { return _mm512_add_ps(a, b); }
    RAC_INLINE static Rows multiply_add(Rows w, float x, Rows sums) { return _mm512_fmadd_ps(w, _mm512_set1_ps(x), sums); }

    template <int form, int M>
    using Sums = SumsByColumn<FloatIsa, form, M, 2>;
};

// ---- bf16 times bf16 ----

constexpr int BF16_TOKENS = 8;  // at a time: with a set of sums per word of two, half of the registers

RAC_INLINE __m512i spread(uint32_t mask, const char* values) {
    return _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values));
}

RAC_INLINE __m512 add_products(__m512 sums, __m512i weights, const uint16_t* x) {
    uint32_t both;
    std::memcpy(&both, x, sizeof both);
    return _mm512_dpbf16_ps(sums, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(static_cast<int>(both)));
}

// Two mask words at a time: this hides the latency of a multiplication, and the values of both are counted at once. The
// expanded words are also written to `block` if it is not null.
template <int form, int M>
RAC_INLINE const char* multiply_bf16(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x, int64_t stride,
                            float* out, uint16_t* block) {
    __m512 acc[M][2];
    RAC_UNROLL for (int m = 0; m < M; m++) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
    for (int64_t word = 0; word < pairs; word += 2) {
        __m512i weights[2];
        if (form == BLOCK) {
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

template <int form, int M>
const char* dot_bf16(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x, int64_t stride, float* out) {
    return multiply_bf16<form, M>(masks, values, pairs, x, stride, out, nullptr);
}

const char* expand_and_multiply_bf16(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x,
                                     int64_t stride, float* out, uint16_t* block) {
    return multiply_bf16<BF16, BF16_TOKENS>(masks, values, pairs, x, stride, out, block);
}

template <int M>
void dot_two_panels(const uint16_t* first, const uint16_t* second, int64_t pairs, const uint16_t* x, int64_t stride,
                    float* out, float* second_out) {
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
        _mm512_storeu_ps(second_out + 16 * m, _mm512_add_ps(_mm512_loadu_ps(second_out + 16 * m), acc[m][1]));
    }
}

// Column k of a quad as the bits of fp32; a lane of the quad holds the four bytes of a row.
template <int k>
RAC_INLINE __m512i column(__m512i quad) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(quad, 24 - 8 * k), 24)));
}

// Two columns of fp32 as the bf16 weights of one word; exact for integers of 8 bits.
RAC_INLINE __m512i bf16_word(__m512i first, __m512i second) {
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
    multiply_bf16<BLOCK, BF16_TOKENS>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out, nullptr);
    return values;
}

template <int M>
constexpr void put_bf16_dots(Dots<uint16_t>& dots) {
    dots.dot[BF16][M - 1] = dot_bf16<BF16, M>;
    dots.dot[BLOCK][M - 1] = dot_bf16<BLOCK, M>;
    dots.dot_two_panels[M - 1] = dot_two_panels<M>;
    if constexpr (M > 1) put_bf16_dots<M - 1>(dots);
}

constexpr Dots<uint16_t> bf16_dots() {
    Dots<uint16_t> dots = {.tokens = MOST_TOKENS, .block_tokens = BF16_TOKENS, .two_panels = true};
    dots.expand_and_multiply[BF16] = expand_and_multiply_bf16;
    dots.expand_and_multiply[INT8] = expand_and_multiply8<INT8>;
    dots.expand_and_multiply[DENSE8] = expand_and_multiply8<DENSE8>;
    put_bf16_dots<MOST_TOKENS>(dots);
    return dots;
}

}  // namespace

extern const Floats avx512_floats = floats_of<FloatIsa>();
extern const Dots<uint16_t> avx512_bf16 = bf16_dots();
extern const Kernel avx512_kernel = {
    .name = "avx512", .title = "AVX512", .floats = &avx512_floats, .bf16 = &avx512_bf16, .integers = &avx512_integers};

}  // namespace rac
