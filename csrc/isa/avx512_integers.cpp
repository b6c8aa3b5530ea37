// build: x86_64 -mavx512f -mavx512bw -mavx512vl -mavx512vbmi2 -mavx512vnni -mpopcnt
// AVX512 with VBMI2 and VNNI, integer weights: vpexpandb spreads a quad over a vector, vpdpbusd multiplies four columns at a time.
//
// One factor of vpdpbusd is unsigned. So 128 is added to every 8-bit weight, pruned ones included, and what this adds to the sums,
// 128 times the sum of x, is subtracted again. The other factor, x, can then be read from memory into every lane by the instruction.
// A code is unsigned: two codes per byte are widened to a byte each, and those of a quad are spread over the codes of zero. What the
// codes of zero add, each times the sum of x, is subtracted; pruned weights have just this code.
#include "isa/avx512.h"
#include "gemm/epilogue.h"
#include "gemm/narrow_codes.h"

namespace rac {
namespace {

template <int form>
RAC_INLINE __m512i expand_quad(const uint32_t* masks, const char*& values) {
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

// A few slots use two sets of sums, for every other quad, since each addition depends on the one before it.
template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Slots& x, int32_t* sums) {
    constexpr int SETS = M <= 4 ? 2 : 1;
    const __m512i plus = _mm512_set1_epi32(static_cast<int>(0x80808080));
    const char* numbers = x.data;
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
        for (q = 2; q + 2 <= quads; q += 2, numbers += 16 * M) {
            const __m512i third = next(q), fourth = next(q + 1);
            multiply(first, 0, numbers);
            multiply(second, SETS - 1, numbers + 8 * M);
            first = third;
            second = fourth;
        }
        multiply(first, 0, numbers);
        multiply(second, SETS - 1, numbers + 8 * M);
        numbers += 16 * M;
    }
    if (q < quads) multiply(next(q), 0, numbers);
    RAC_UNROLL for (int m = 0; m < M; m++) {
        __m512i high = acc[0][m][0], low = acc[0][m][1];
        if (SETS == 2) high = _mm512_add_epi32(high, acc[SETS - 1][m][0]), low = _mm512_add_epi32(low, acc[SETS - 1][m][1]);
        if (x.bytes) {
            _mm512_storeu_si512(sums + PANEL * 2 * m, high);
            _mm512_storeu_si512(sums + PANEL * (2 * m + 1), low);
        } else {
            _mm512_storeu_si512(sums + PANEL * m, _mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
        }
    }
    return values;
}

// Slots [FIRST, FIRST + SOME) of M times two panels. A number of x is loaded once for both: with one panel, loads are the limit.
template <int M, int FIRST, int SOME>
RAC_INLINE void multiply_pair(const char* expanded, int64_t quads, const Slots& x, const PairSums& to_sums) {
    const __m512i plus = _mm512_set1_epi32(static_cast<int>(0x80808080));
    const char* numbers = x.data + 8 * FIRST;
    __m512i sums[2][2 * SOME];
    RAC_UNROLL for (int i = 0; i < 2 * SOME; i++)
        sums[0][i] = sums[1][i] = _mm512_set1_epi32(static_cast<int>(-128u * x.sum_of(FIRST + i / 2, i % 2)));
    for (int64_t q = 0; q < quads; q++, expanded += QUAD, numbers += 8 * M) {
        const __m512i first = _mm512_xor_si512(_mm512_loadu_si512(expanded), plus);
        const __m512i second = _mm512_xor_si512(_mm512_loadu_si512(expanded + PANEL * BLOCK_MOST), plus);
        RAC_UNROLL for (int i = 0; i < 2 * SOME; i++) {
            const __m512i number = four_bytes(numbers + 4 * i);
            add_products(sums[0][i], first, number);
            add_products(sums[1][i], second, number);
        }
    }
    RAC_UNROLL for (int panel = 0; panel < 2; panel++) {
        const __m512 scale = _mm512_loadu_ps(to_sums.scale + PANEL * panel);
        const auto add = [&](int64_t token, __m512i sum) __attribute__((always_inline)) {
            float* to = to_sums.acc + to_sums.second * panel + PANEL * token;
            const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(to_sums.x_scale[token * x.sums_stride]));
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_mul_ps(scaled, scale)));
        };
        RAC_UNROLL for (int m = 0; m < SOME; m++) {
            const __m512i high = sums[panel][2 * m], low = sums[panel][2 * m + 1];
            const int64_t token = FIRST + m;
            if (x.bytes) {
                add(2 * token, high);
                if (2 * token + 1 < to_sums.tokens) add(2 * token + 1, low);
            } else {
                add(token, _mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
            }
        }
    }
}

// A DotPair.
template <int M>
void pair(const char* expanded, int64_t quads, const Slots& x, const PairSums& to) {
    constexpr int SOME = M < 4 ? M : 4;
    multiply_pair<M, 0, SOME>(expanded, quads, x, to);
    if constexpr (M > 4) multiply_pair<M, SOME, M - SOME>(expanded, quads, x, to);
}

// An ExpandQuads of INT8 or DENSE8.
template <int form>
const char* expand8(const uint32_t* masks, const char* values, const uint8_t*, int64_t quads, void* out) {
    for (int64_t q = 0; q < quads; q++)
        _mm512_storeu_si512(static_cast<char*>(out) + QUAD * q, expand_quad<form>(masks + 2 * q, values));
    return values;
}

// An AddScaled, a vector per token.
void add_scaled_vectors(const int32_t* sums, const float* x_scale, int64_t stride, const float* scale, int64_t tokens, float* acc) {
    const __m512 of_rows = _mm512_loadu_ps(scale);
    for (int64_t m = 0; m < tokens; m++, sums += PANEL, acc += PANEL) {
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), _mm512_set1_ps(x_scale[m * stride]));
        _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc), _mm512_mul_ps(sum, of_rows)));
    }
}

// Up to 64 codes, one per byte, of a quad of INT4 with this mask; the code of zero of `zeros` where nothing is stored.
RAC_INLINE __m512i spread_codes(uint64_t mask, const char* codes, __m512i zeros) {
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i halves = _mm512_set1_epi32(0x0f0f0f0f);
    // (words | words << 4) & 0x0f0f: the low half of a byte, then the high one
    const __m512i bytes = _mm512_ternarylogic_epi32(words, _mm512_slli_epi16(words, 4), halves, 0xa8);
    return _mm512_mask_expand_epi8(zeros, mask, bytes);
}

// The address after the codes of a quad. As assembly: the shift drops the bit of an odd number into the carry, and compilers zero the
// destination of popcnt first.
RAC_INLINE const char* after_codes(const char* codes, uint64_t mask) {
#if defined(RAC_EMULATE)
    return codes + code_bytes(static_cast<uint64_t>(__builtin_popcountll(mask)));
#else
    uint64_t count;
    asm("popcntq %2, %0\n\tshrq %0\n\tadcq %0, %1" : "=&r"(count), "+r"(codes) : "rm"(mask) : "cc");
    return codes;
#endif
}

// 16 codes of zero as 32-bit numbers, and each one in the four bytes of its row.
struct Zeros {
    __m512i numbers, bytes;
};
RAC_INLINE Zeros zeros_of_rows(const uint8_t* zeros) {
    if (!zeros) return {_mm512_set1_epi32(ZERO_CODE), _mm512_set1_epi32(0x01010101 * ZERO_CODE)};
    const __m512i numbers = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
    const __m512i twice = _mm512_or_si512(numbers, _mm512_slli_epi32(numbers, 8));
    return {numbers, _mm512_or_si512(twice, _mm512_slli_epi32(twice, 16))};
}

template <int M>
struct SumsOfQuads {
    static constexpr int SETS = M <= 4 ? 2 : 1;
    __m512i of[SETS][M][2];  // by the byte of x

    RAC_INLINE void multiply(int set, __m512i codes, const char* x) {
        RAC_UNROLL for (int i = 0; i < 2 * M; i++) add_products(of[set][i / 2][i % 2], codes, x + 4 * i);
    }
    RAC_INLINE __m512i byte_sum(int m, int byte) const {
        return SETS == 2 ? _mm512_add_epi32(of[0][m][byte], of[SETS - 1][m][byte]) : of[0][m][byte];
    }
    RAC_INLINE __m512i sum(int m) const { return _mm512_add_epi32(_mm512_slli_epi32(byte_sum(m, 0), 8), byte_sum(m, 1)); }
};

// The next lines of codes, as DENSE4 has them; of DENSE3 and DENSE2 with other bits where code_mask has none. Returns the address after
// them.
template <int form>
RAC_INLINE const char* load_lines(const char* codes, __m512i (&lines)[lines_widened(form)]) {
    constexpr int FROM = lines_stored(form);
    for (int i = 0; i < FROM; i++) lines[i] = _mm512_loadu_si512(codes + QUAD * i);
    if constexpr (form == DENSE2) lines[1] = _mm512_srli_epi32(lines[0], 2);
    if constexpr (form == DENSE3) {  // by tables, the first number where the third has a one, else the second
        const __m512i low = _mm512_set1_epi32(0x11111111), high = _mm512_set1_epi32(0x44444444);
        const __m512i two = _mm512_ternarylogic_epi32(_mm512_srli_epi32(lines[0], 3), _mm512_srli_epi32(lines[1], 2), low, 0xe4);
        lines[3] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(lines[2], 1), two, high, 0xe4);
    }
    return codes + QUAD * FROM;
}

// Fetch a line that is multiplied later. `far`: as is faster on a Xeon with AMX (results/log.md).
template <bool far>
RAC_INLINE void fetch(const char* codes) {
    if (far)
        _mm_prefetch(codes + 8192, _MM_HINT_T2);
    else
        _mm_prefetch(codes + 4096, _MM_HINT_T0);
}

// Quads of codes of a block, from `codes` on, times M slots.
template <int form, int M, bool far>
RAC_INLINE const char* multiply_quads(SumsOfQuads<M>& sums, const uint32_t* masks, const char* codes, __m512i zeros, int64_t quads,
                                  const char* x) {
    constexpr int SECOND = SumsOfQuads<M>::SETS - 1;
    if constexpr (is_dense(form)) {
        constexpr int LINES = lines_widened(form), FROM = lines_stored(form);
        const __m512i of_code = _mm512_set1_epi32(0x01010101 * code_mask(form));
        for (int64_t q = 0; q < quads; q += 2 * LINES) {
            for (int i = 0; i < FROM; i++) fetch<far>(codes + QUAD * i);
            __m512i lines[LINES];
            codes = load_lines<form>(codes, lines);
            RAC_UNROLL for (int i = 0; i < LINES; i++, x += 16 * M) {
                sums.multiply(0, _mm512_and_si512(lines[i], of_code), x);
                sums.multiply(SECOND, _mm512_and_si512(_mm512_srli_epi32(lines[i], 4), of_code), x + 8 * M);
            }
        }
        return codes;
    }
    const auto next = [&](int64_t q) __attribute__((always_inline)) {
        uint64_t mask;
        std::memcpy(&mask, masks + 2 * q, sizeof mask);
        const __m512i quad = spread_codes(mask, codes, zeros);
        codes = after_codes(codes, mask);
        return quad;
    };
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2, x += 16 * M) {
        // The codes of two quads are at most a cache line. Processors fetch ahead by themselves, but not into the next page.
        _mm_prefetch(codes + 4096, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(masks + 2 * q) + 2048, _MM_HINT_T0);
        const __m512i first = next(q), second = next(q + 1);
        sums.multiply(0, first, x);
        sums.multiply(SECOND, second, x + 8 * M);
    }
    if (q < quads) sums.multiply(0, next(q), x);
    return codes;
}

// A FewTokens.
template <int form, int M, bool far>
void few_tokens(const IntMatmul& matmul, int64_t panel, float* acc) {
    constexpr int SECOND = SumsOfQuads<M>::SETS - 1;
    const Weight& weight = matmul.out.weight;
    const char* codes = weight.values_of(panel);
    Zeros zeros = zeros_of_rows(weight.zeros_of(panel, 0));
    const int64_t tokens = matmul.out.m;  // at most 2 M
    __m512 scale = scale_of_rows(matmul, panel, 0);
    for (int64_t m = 0; m < tokens; m++) _mm512_storeu_ps(acc + PANEL * m, _mm512_setzero_ps());
    for (int64_t block = 0; block < matmul.blocks; block++) {
        const int64_t column = block * matmul.block;
        if (weight.zero_groups > 1) zeros = zeros_of_rows(weight.zeros_of(panel, block));
        if (matmul.groups > 1) scale = scale_of_rows(matmul, panel, block);
        const Slots x = {matmul.x + 2 * column * M, matmul.stride, matmul.x_sums + block, matmul.blocks, matmul.bytes};
        SumsOfQuads<M> sums;
        RAC_UNROLL for (int m = 0; m < M; m++) {
            // Wrap-around is harmless: the sum of all terms fits.
            RAC_UNROLL for (int byte = 0; byte < 2; byte++)
                sums.of[0][m][byte] =
                    byte || x.bytes ? _mm512_mullo_epi32(zeros.numbers, _mm512_set1_epi32(static_cast<int>(0u - x.sum_of(m, byte))))
                                    : _mm512_setzero_si512();
            if (SECOND) sums.of[SECOND][m][0] = sums.of[SECOND][m][1] = _mm512_setzero_si512();
        }
        codes = multiply_quads<form, M, far>(sums, weight.masks_from(panel, column), codes, zeros.bytes, matmul.quads_of(block),
                                        x.data);
        const auto add = [&](int64_t token, __m512i sum) __attribute__((always_inline)) {
            const __m512 x_scale = _mm512_set1_ps(matmul.x_scale[token * matmul.blocks + block]);
            const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), x_scale), scale);
            float* to = acc + PANEL * token;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), scaled));
        };
        RAC_UNROLL for (int m = 0; m < M; m++) {
            if (matmul.bytes) {
                add(2 * m, sums.byte_sum(m, 0));
                if (2 * m + 1 < tokens) add(2 * m + 1, sums.byte_sum(m, 1));
            } else {
                add(m, sums.sum(m));
            }
        }
    }
}

// An ExpandQuads of codes.
template <int form>
const char* expand_codes(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const __m512i zero = zeros_of_rows(zeros).bytes;
    char* to = static_cast<char*>(out);
    if constexpr (is_dense(form)) {  // whole lines: there is room for them
        constexpr int LINES = lines_widened(form);
        const __m512i of_code = _mm512_set1_epi32(0x01010101 * code_mask(form));
        for (int64_t q = 0; q < quads; q += 2 * LINES) {
            __m512i lines[LINES];
            codes = load_lines<form>(codes, lines);
            RAC_UNROLL for (int i = 0; i < LINES; i++, to += 2 * QUAD) {
                _mm512_storeu_si512(to, _mm512_sub_epi8(_mm512_and_si512(lines[i], of_code), zero));
                _mm512_storeu_si512(to + QUAD, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi32(lines[i], 4), of_code), zero));
            }
        }
        return codes;
    }
    for (int64_t q = 0; q < quads; q++) {
        const uint64_t mask = masks[2 * q] | static_cast<uint64_t>(masks[2 * q + 1]) << 32;
        _mm512_storeu_si512(to + QUAD * q, _mm512_sub_epi8(spread_codes(mask, codes, zero), zero));
        codes += code_bytes(RAC_COUNT(masks[2 * q]) + RAC_COUNT(masks[2 * q + 1]));
    }
    return codes;
}

template <int M, bool far>
constexpr void put_slots(Integers& integers) {
    integers.dot[0][M - 1] = dot<INT8, M>;
    integers.dot[1][M - 1] = dot<DENSE8, M>;
    integers.dot_expanded[M - 1] = dot<EXPANDED, M>;
    integers.pair[M - 1] = pair<M>;
    const FewTokens of_codes[CODE_TYPES] = {few_tokens<INT4, M, far>, few_tokens<DENSE4, M, far>, few_tokens<DENSE3, M, far>,
                                             few_tokens<DENSE2, M, far>};
    for (int type = 0; type < CODE_TYPES; type++) integers.few_tokens[type][M - 1] = of_codes[type];
    if constexpr (M > 1) put_slots<M - 1, far>(integers);
}

template <bool far>
constexpr Integers integers() {
    constexpr int DIRECT = 4 * MOST_SLOTS;  // spreading a weight four times takes less than writing it
    Integers integers = {
        .format = QUADS, .quantize = quantize, .add_scaled = add_scaled_vectors,
        .slots = MOST_SLOTS, .expanded_slots = MOST_SLOTS, .direct_slots = DIRECT, .signed_bytes = true, .pairs = true,
        .few_slots = {DIRECT, DIRECT, DIRECT, DIRECT}, .few_format = {QUADS, QUADS, QUADS, QUADS},
        .expand = {expand8<INT8>, expand8<DENSE8>, expand_codes<INT4>, expand_codes<DENSE4>, expand_codes<DENSE3>,
                   expand_codes<DENSE2>}};
    put_slots<MOST_SLOTS, far>(integers);
    return integers;
}

}  // namespace

extern const Integers avx512_integers = integers<false>(), amx_integers = integers<true>();

}  // namespace rac
