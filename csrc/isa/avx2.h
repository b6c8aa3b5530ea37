// What AVX2 and AVX-VNNI share for integer weights: spreading quads by byte shuffles, and few tokens times lines of codes.
#pragma once
#include <immintrin.h>

#include "gemm/int_loops.h"
#include "isa/shuffles.h"

namespace rac {
namespace {

// 8 bytes from each of two addresses.
RAC_INLINE __m128i two(const void* low, const void* high) {
    const __m128i half = _mm_loadl_epi64(static_cast<const __m128i*>(low));
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(half), static_cast<const __m64*>(high)));
}

// As assembly: compilers zero the destination first, which helps old processors only and is one in ten instructions here.
RAC_INLINE uint64_t count(uint64_t mask) {
    uint64_t bits;
    __asm__("popcntq %1, %0" : "=r"(bits) : "r"(mask));
    return bits;
}

// What the IntIsa of both has next to its FORMAT, SLOTS, Quad, load, store, less, Sums and Parts.
struct Avx2Quads {
    static constexpr bool SIGNED_BYTES = false, MULTIPLIES_LINES = false;
    struct Zeros {
        __m128i of[4];  // four columns of each row
    };

    RAC_INLINE static Zeros zeros_of_rows(const uint8_t* zeros) {
        alignas(16) char columns[QUAD];
        for (int i = 0; i < QUAD; i++) columns[i] = static_cast<char>(zeros ? zeros[i / 4] : ZERO_CODE);
        Zeros of;
        for (int i = 0; i < 4; i++) of.of[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(columns) + i);
        return of;
    }
    // The codes of some quads of INT4, of at most BLOCK_MOST columns, a byte per code; those of a quad start at an even address.
    static const char* widen_codes(const uint32_t* masks, const char* codes, int64_t quads, char* bytes) {
        const __m128i halves = _mm_set1_epi8(15);
        uint64_t size = 0;
        for (int64_t q = 0; q < quads; q++) size += code_bytes(count(masks[2 * q]) + count(masks[2 * q + 1]));
        for (uint64_t at = 0; at < size; at += 16) {  // the codes have 64 bytes of padding
            _mm_prefetch(codes + at + 1024, _MM_HINT_T0);
            const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at));
            const __m128i low = _mm_and_si128(both, halves), high = _mm_and_si128(_mm_srli_epi16(both, 4), halves);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * at), _mm_unpacklo_epi8(low, high));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 2 * at + 16), _mm_unpackhi_epi8(low, high));
        }
        return codes + size;
    }
};

// The 16 weights of the lowest 16 bits of the mask; where no code is stored, `zeros`.
template <int form>
RAC_INLINE __m128i spread16(uint64_t mask, const char* values, __m128i zeros) {
    const uint64_t low = mask & 0xff, high = mask >> 8 & 0xff;
    const __m128i stored = two(values, values + count(low)), order = two(shuffles.low[low], shuffles.high[high]);
    const __m128i bytes = _mm_shuffle_epi8(stored, order);
    return form == CODES ? _mm_blendv_epi8(bytes, zeros, order) : bytes;
}

// A quad by its masks: of[i] holds rows 4i to 4i + 3. Moves `values` on.
template <int form>
RAC_INLINE void spread_quad(const uint32_t* masks, const char*& values, const Avx2Quads::Zeros& zeros, __m128i (&of)[4]) {
    const uint64_t first = masks[0], second = masks[1], of_first = count(first), stored = of_first + count(second);
    const char* middle = values + of_first;
    of[0] = spread16<form>(first, values, zeros.of[0]);
    of[1] = spread16<form>(first >> 16, values + count(first & 0xffff), zeros.of[1]);
    of[2] = spread16<form>(second, middle, zeros.of[2]);
    of[3] = spread16<form>(second >> 16, middle + count(second & 0xffff), zeros.of[3]);
    values += form == CODES ? 2 * code_bytes(stored) : stored;
}

// ---- Up to 4 slots of QUADS times codes without masks ----
//
// A code is multiplied as it is. What the codes of zero add, each times the sum of x, is subtracted at the end of a block.
//
// A `part` is 8 rows x 4 columns of codes, a byte each. `Parts<M>` of an ISA holds the sums of eight parts, which are added two at a
// time; into() adds them to sums of 32 bits, one per row.

template <int M>
struct LineSums {
    __m256i of[2][M][2] = {};  // by the half of the rows, slot, byte of x
};

RAC_INLINE __m256i load_half(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// The 8 codes of zero of a half.
RAC_INLINE __m256i zeros_of_half(const uint8_t* zeros, int half) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * half)));
}

// What the ends of the blocks of a panel need, in turn.
template <int M>
struct BlockEnds {
    const char* scale;
    const uint8_t* zeros;  // of the block that ends next
    const float* x_scale;
    const int32_t* x_sums;
    float* acc;  // [tokens][16]
    int64_t scale_step, zeros_step, blocks, tokens;  // tokens: at most 2 M
    bool bf16, bytes;
    uint8_t same[PANEL];

    BlockEnds(const IntMatmul& matmul, int64_t panel, float* sums)
        : x_scale(matmul.x_scale), x_sums(matmul.x_sums), acc(sums), blocks(matmul.blocks), tokens(matmul.out.m),
          bytes(matmul.bytes) {
        bf16 = matmul.scale_type == BF16;
        const int64_t size = bf16 ? 2 : 4;
        scale = static_cast<const char*>(matmul.scale) + matmul.scale_at(panel, 0) * size;
        scale_step = matmul.groups > 1 ? PANEL * size : 0;
        std::memset(same, ZERO_CODE, sizeof same);
        zeros = matmul.out.weight.zeros_of(panel, 0);
        if (!zeros) zeros = same;
        zeros_step = matmul.out.weight.zero_groups > 1 ? PANEL : 0;
        std::memset(acc, 0, tokens * PANEL * sizeof *acc);
    }
    RAC_INLINE __m256 scale_of_half(int half) const {
        if (!bf16) return _mm256_loadu_ps(reinterpret_cast<const float*>(scale) + 8 * half);
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale) + half);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
    // acc += the sums, less what the codes of zero added, times both scales.
    RAC_INLINE void add(const LineSums<M>& sums) {
        RAC_UNROLL for (int half = 0; half < 2; half++) {
            const __m256i zero = zeros_of_half(zeros, half);
            const __m256 of_rows = scale_of_half(half);
            const auto add_token = [&](int64_t token, __m256i sum) __attribute__((always_inline)) {
                sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, _mm256_set1_epi32(x_sums[token * blocks])));
                const __m256 of_token = _mm256_set1_ps(x_scale[token * blocks]);
                const __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), of_token), of_rows);
                float* to = acc + PANEL * token + 8 * half;
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), scaled));
            };
            RAC_UNROLL for (int m = 0; m < M; m++) {
                const __m256i first = sums.of[half][m][0], second = sums.of[half][m][1];
                if (bytes) {
                    add_token(2 * m, first);
                    if (2 * m + 1 < tokens) add_token(2 * m + 1, second);
                } else {
                    add_token(m, _mm256_add_epi32(_mm256_slli_epi32(first, 8), second));
                }
            }
        }
        scale += scale_step, zeros += zeros_step, x_scale++, x_sums++;
    }
};

// The low codes of each byte, and the high ones, times two quads of x, `quad_step` bytes apart. MASK: of a code in half a byte.
template <int M, bool FIRST, int MASK, class Parts>
RAC_INLINE void add_both(Parts& parts, __m256i both, const char* x, int64_t quad_step) {
    const __m256i halves = _mm256_set1_epi8(MASK), low = _mm256_and_si256(both, halves);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), halves);
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int byte = 0; byte < 2; byte++) {
            int32_t four[2];
            std::memcpy(four, x + 8 * m + 4 * byte, sizeof *four);
            std::memcpy(four + 1, x + quad_step + 8 * m + 4 * byte, sizeof *four);
            parts.template add<FIRST>(m, byte, low, _mm256_set1_epi32(four[0]), high, _mm256_set1_epi32(four[1]));
        }
}

// Four lines of DENSE4 of half of the rows, 32 columns, from the lines of DENSE3 or DENSE2; with other bits where code_mask has none.
template <int form>
RAC_INLINE void load_lines(const char* codes, __m256i (&lines)[4]) {
    if constexpr (form == DENSE2) {
        for (int i = 0; i < 2; i++) {
            lines[2 * i] = load_half(codes + QUAD * i);
            lines[2 * i + 1] = _mm256_srli_epi16(lines[2 * i], 2);
        }
    } else if constexpr (form == DENSE3) {
        for (int i = 0; i < 3; i++) lines[i] = load_half(codes + QUAD * i);
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(lines[0], 3), _mm256_set1_epi8(0x11));
        const __m256i middle = _mm256_and_si256(_mm256_srli_epi16(lines[1], 2), _mm256_set1_epi8(0x22));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(lines[2], 1), _mm256_set1_epi8(0x44));
        lines[3] = _mm256_or_si256(_mm256_or_si256(low, middle), high);
    }
}

// Four lines of half of the rows times SOME of M slots from `slot` on.
template <class Isa, int form, int M, int SOME>
RAC_INLINE void multiply_half(const __m256i (&lines)[4], const char* x, int slot, __m256i (*sums)[2]) {
    x += 8 * slot;
    typename Isa::template Parts<SOME> parts;
    add_both<SOME, true, code_mask(form)>(parts, lines[0], x, 8 * M);
    RAC_UNROLL for (int i = 1; i < 4; i++) add_both<SOME, false, code_mask(form)>(parts, lines[i], x + 16 * M * i, 8 * M);
    parts.into(sums + slot);
}

// `count` lines of DENSE4, at most 4, times SOME of M slots from `slot` on. Each number of x is loaded once for both halves.
template <class Isa, int M, int SOME>
RAC_INLINE void multiply_dense4(const char* codes, int64_t count, const char* x, int slot, LineSums<M>& sums) {
    x += 8 * slot;
    typename Isa::template Parts<SOME> parts[2];
    RAC_UNROLL for (int half = 0; half < 2; half++) add_both<SOME, true, 15>(parts[half], load_half(codes + 32 * half), x, 8 * M);
    RAC_UNROLL for (int64_t i = 1; i < count; i++)
        RAC_UNROLL for (int half = 0; half < 2; half++)
            add_both<SOME, false, 15>(parts[half], load_half(codes + QUAD * i + 32 * half), x + 16 * M * i, 8 * M);
    RAC_UNROLL for (int half = 0; half < 2; half++) parts[half].into(sums.of[half] + slot);
}

// Up to four lines of whole rows. More than two slots at a time need more registers than there are.
template <class Isa, int form, int M>
RAC_INLINE void multiply_tile(const char* codes, int64_t count, const char* x, LineSums<M>& sums) {
    constexpr int SOME = M <= 2 ? M : 2;
    if constexpr (form == DENSE4) {
        multiply_dense4<Isa, M, SOME>(codes, count, x, 0, sums);
        if constexpr (M > 2) multiply_dense4<Isa, M, M - SOME>(codes, count, x, SOME, sums);
        return;
    }
    RAC_UNROLL for (int half = 0; half < 2; half++) {
        __m256i lines[4];
        load_lines<form>(codes + 32 * half, lines);
        multiply_half<Isa, form, M, SOME>(lines, x, 0, sums.of[half]);
        if constexpr (M > 2) multiply_half<Isa, form, M, M - SOME>(lines, x, SOME, sums.of[half]);
    }
}

// A FewTokens of codes without masks.
template <class Isa, int form, int M>
void line_tokens(const IntMatmul& matmul, int64_t panel, float* acc) {
    constexpr int LINES = 4 * lines_stored(form) / lines_widened(form);  // of 32 columns
    const char* codes = matmul.out.weight.values_of(panel);
    BlockEnds<M> ends(matmul, panel, acc);
    for (int64_t block = 0; block < matmul.blocks; block++) {
        const char* x = matmul.x + 2 * block * matmul.block * M;
        // The last block ends with zeros of x.
        int64_t lines = (matmul.columns_of(block) + PAIR_OF_QUADS - 1) / PAIR_OF_QUADS;
        if (is_narrow(form)) lines = (lines + 3) / 4 * 4;  // whole tiles are stored
        LineSums<M> sums;
        for (; lines >= 4; lines -= 4, codes += LINES * QUAD, x += 2 * TILE_COLUMNS * M) {
            for (int line = 0; line < LINES; line++) _mm_prefetch(codes + 1024 + QUAD * line, _MM_HINT_T0);
            multiply_tile<Isa, form, M>(codes, 4, x, sums);
        }
        if constexpr (form == DENSE4)
            for (; lines > 0; lines--, codes += QUAD, x += 2 * PAIR_OF_QUADS * M) multiply_tile<Isa, form, M>(codes, 1, x, sums);
        ends.add(sums);
    }
}

// An ExpandQuads of DENSE3 or DENSE2, of whole tiles of 32 columns: there is room for them.
template <class Isa, int form>
const char* expand_lines(const uint32_t*, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const __m256i of_code = _mm256_set1_epi8(code_mask(form));
    for (int64_t quad = 0; quad < quads; quad += 8, codes += 4 * lines_stored(form) / lines_widened(form) * QUAD)
        RAC_UNROLL for (int half = 0; half < 2; half++) {
            const __m256i of_rows = _mm256_mullo_epi32(zeros_of_half(zeros, half), _mm256_set1_epi32(0x01010101));
            __m256i lines[4];
            load_lines<form>(codes + 32 * half, lines);
            RAC_UNROLL for (int i = 0; i < 4; i++) {
                const __m256i low = _mm256_and_si256(lines[i], of_code);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(lines[i], 4), of_code);
                Isa::store_half(out, quad + 2 * i, half, _mm256_sub_epi8(low, of_rows));
                Isa::store_half(out, quad + 2 * i + 1, half, _mm256_sub_epi8(high, of_rows));
            }
        }
    return codes;
}

template <class Isa, int form, int M>
constexpr void put_line_tokens(Integers& integers) {
    integers.few_tokens[form - INT4][M - 1] = line_tokens<Isa, form, M>;
    integers.few_format[form - INT4] = QUADS;
    if constexpr (M > 1) put_line_tokens<Isa, form, M - 1>(integers);
    integers.few_slots[form - INT4] = M;
}

template <class Isa>
constexpr Integers avx2_integers_of() {
    Integers integers = integers_of<Isa>();
    put_line_tokens<Isa, DENSE4, 4>(integers);
    put_line_tokens<Isa, DENSE3, 4>(integers);
    put_line_tokens<Isa, DENSE2, 4>(integers);
    integers.expand[DENSE3 - INT8] = expand_lines<Isa, DENSE3>;
    integers.expand[DENSE2 - INT8] = expand_lines<Isa, DENSE2>;
    return integers;
}

}  // namespace
}  // namespace rac
