// Included inside a namespace of each vector length, in the section that is compiled for SVE: weights of 8 to 2 bits times bytes of x.
//
// Such a namespace includes sve_masks.h and defines LINES, at a time: 2 * CHUNKS * LINES of the 32 registers hold sums, or 4 * LINES of
// one chunk. A type of SVE has no arrays, so the sums of chunk v and line m have names: first<v><m>, of the first bytes of x, and
// second<v><m>. Where a quad is one chunk, every second quad has sums of its own, named as those of chunk 1, so
// that successive products do not depend on each other.
//
// x is loaded into every lane. The products with one lane of a register would need fewer loads, but take two steps on the A64FX.

RAC_INLINE svint8_t four_bytes(const char* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return svreinterpret_s8_s32(svdup_n_s32(four));
}

constexpr bool has_masks(int form) { return form == INT8 || form == CODES; }

template <int form>
RAC_INLINE svint8_t zeros_of_chunk(svbool_t all, const Zeros& zeros, int chunk) {
    if constexpr (form == CODES)
        return svld1_s8(all, reinterpret_cast<const int8_t*>(&zeros) + CHUNK * (chunk % CHUNKS));
    else
        return svdup_n_s8(0);
}

// The weights of a chunk. With masks: of the values at `at`, which becomes the address after them; `zeros` where nothing is stored.
// `values`: the address of the quad.
template <int form>
RAC_INLINE svint8_t chunk_of(svbool_t all, const uint32_t* masks, const char* values, const char*& at, svuint8_t starts,
                             svuint8_t own, svint8_t zeros, int chunk) {
    if constexpr (has_masks(form)) {
        const svbool_t mask = bits_of<CHUNK>(masks, chunk);
        const svint8_t stored = svld1_s8(all, reinterpret_cast<const int8_t*>(at));
        at += svcntp_b8(all, mask);
        return svsel_s8(mask, svtbl_s8(stored, places<CHUNK>(all, mask, starts, own)), zeros);
    } else {
        const svint8_t weights = svld1_s8(all, reinterpret_cast<const int8_t*>(values) + CHUNK * chunk);
        if constexpr (form == LOW) return svand_n_s8_x(all, weights, 15);
        if constexpr (form == HIGH) return svreinterpret_s8_u8(svlsr_n_u8_x(all, svreinterpret_u8_s8(weights), 4));
        return weights;
    }
}

template <int form>
RAC_INLINE svuint8_t starts_of(svbool_t all, const uint32_t* masks) {
    if constexpr (has_masks(form)) return starts_of_bytes<CHUNK>(all, masks);
    return svdup_n_u8(0);
}

// The address of the next quad. `at`: the address after the stored values of this one.
template <int form>
RAC_INLINE const char* next_quad(const char* values, const char* at) {
    if (form == INT8) return at;
    if (form == CODES) return values + 2 * code_bytes(static_cast<uint64_t>(at - values));
    return form == LOW ? values : values + QUAD;
}

#define RAC_OF_LINES(DO, v) DO(v, 0) DO(v, 1) DO(v, 2) DO(v, 3)
#define RAC_OF_ALL(DO) RAC_OF_LINES(DO, 0) RAC_OF_LINES(DO, 1) RAC_OF_LINES(DO, 2) RAC_OF_LINES(DO, 3)
#define RAC_NO_SUMS(v, m) svint32_t first##v##m = svdup_n_s32(0), second##v##m = svdup_n_s32(0);
#define RAC_CONSTANTS(form, v)                  \
    const svuint8_t own##v = own_bytes(all, v); \
    const svint8_t zeros##v = zeros_of_chunk<form>(all, zeros, v);
#define RAC_ADD_TO(v, m)                                     \
    {                                                        \
        first##v##m = svdot_s32(first##v##m, w, x##m);       \
        second##v##m = svdot_s32(second##v##m, w, after##m); \
    }
#define RAC_ADD(v, m)                                               \
    if constexpr (m < SOME && CHUNKS == 1 && next) RAC_ADD_TO(1, m) \
    if constexpr (m < SOME && !(CHUNKS == 1 && next)) RAC_ADD_TO(v, m)
#define RAC_CHUNK(form, v)                                                                      \
    if constexpr (v < CHUNKS) {                                                                 \
        const svint8_t w = chunk_of<form>(all, words, values, at, starts, own##v, zeros##v, v); \
        RAC_OF_LINES(RAC_ADD, v)                                                                \
    }
#define RAC_X(m)                                                  \
    const svint8_t x##m = four_bytes(x + 8 * (m < SOME ? m : 0)), \
                   after##m = four_bytes(x + 8 * (m < SOME ? m : 0) + 4);
#define RAC_QUAD(form, is_next, q)                                                \
    {                                                                             \
        constexpr bool next = is_next;                                            \
        const uint32_t* words = masks + 2 * (q);                                  \
        if (form != EXPANDED && form != CODES) __builtin_prefetch(values + 1024); \
        const svuint8_t starts = starts_of<form>(all, words);                     \
        RAC_X(0) RAC_X(1) RAC_X(2) RAC_X(3)                                       \
        const char* at = values;                                                  \
        RAC_CHUNK(form, 0)                                                        \
        RAC_CHUNK(form, 1)                                                        \
        RAC_CHUNK(form, 2)                                                        \
        RAC_CHUNK(form, 3)                                                        \
        values = next_quad<form>(values, at);                                     \
        x += 8 * M;                                                               \
    }
#define RAC_BOTH_SETS(v, m)                                    \
    if constexpr (v == 0 && CHUNKS == 1) {                     \
        first0##m = svadd_s32_x(all, first0##m, first1##m);    \
        second0##m = svadd_s32_x(all, second0##m, second1##m); \
    }
#define RAC_STORE(v, m) \
    if constexpr (v < CHUNKS && m < SOME) store_chunk(lines, line + m, v, first##v##m, second##v##m, sums);

RAC_INLINE void store_chunk(const Lines8& lines, int m, int chunk, svint32_t first, svint32_t second, int32_t* sums) {
    const svbool_t rows = whole_words();
    sums += PANEL * lines.per_double() * m + CHUNK / 4 * chunk;
    if (lines.bytes) {
        svst1_s32(rows, sums, first);
        svst1_s32(rows, sums + PANEL, second);
    } else {
        svst1_s32(rows, sums, svadd_s32_x(rows, svlsl_n_s32_x(rows, first, 8), second));
    }
}

// What interleaved_lines.h needs.
template <int form, int M, int SOME>
RAC_INLINE const char* dot_some(const uint32_t* masks, const char* values, const Zeros& zeros, int64_t quads, const Lines8& lines,
                                int line, int32_t* sums) {
    const svbool_t all = whole();
    const char* x = static_cast<const char*>(lines.data) + 8 * line;
    RAC_OF_ALL(RAC_NO_SUMS)
    RAC_CONSTANTS(form, 0)
    RAC_CONSTANTS(form, 1)
    RAC_CONSTANTS(form, 2)
    RAC_CONSTANTS(form, 3)
    int64_t q = 0;
    for (; q + 2 <= quads; q += 2) {
        RAC_QUAD(first_of(form), false, q)
        RAC_QUAD(second_of(form), true, q + 1)
    }
    if (q < quads) RAC_QUAD(first_of(form), false, q)
    RAC_OF_ALL(RAC_BOTH_SETS)
    RAC_OF_ALL(RAC_STORE)
    return values;
}

// As that of NEON, but it may also write less.
inline const char* widen(const uint32_t* masks, const char* codes, int64_t quads, char* bytes) {
    svuint64_t total = svdup_n_u64(0);
    for (int64_t q = 0; q < quads; q += static_cast<int64_t>(svcntd())) {
        const svbool_t some = svwhilelt_b64_s64(q, quads);
        const svuint64_t mask = svld1_u64(some, reinterpret_cast<const uint64_t*>(masks + 2 * q));
        total = svadd_u64_m(some, total, svlsr_n_u64_x(some, svadd_n_u64_x(some, svcnt_u64_x(some, mask), 1), 1));
    }
    const int64_t size = static_cast<int64_t>(svaddv_u64(svptrue_b64(), total)), step = static_cast<int64_t>(svcntb());
    uint8_t* to = reinterpret_cast<uint8_t*>(bytes);
    for (int64_t at = 0; at < size; at += step, to += 2 * step) {
        const svbool_t some = svwhilelt_b8_s64(at, size);
        __builtin_prefetch(codes + at + 1024);
        const svuint8_t both = svld1_u8(some, reinterpret_cast<const uint8_t*>(codes) + at);
        const svuint8_t low = svand_n_u8_x(some, both, 15), high = svlsr_n_u8_x(some, both, 4);
        svst1_u8(svwhilelt_b8_s64(2 * at, 2 * size), to, svzip1_u8(low, high));
        svst1_u8(svwhilelt_b8_s64(2 * at + step, 2 * size), to + step, svzip2_u8(low, high));
    }
    return codes + size;
}

#include "interleaved_lines.h"

#define RAC_EXPAND(form, v)                                                                             \
    if constexpr (v < CHUNKS) {                                                                         \
        const svint8_t w = chunk_of<form>(all, masks + 2 * q, values, at, starts, own##v, zeros##v, v); \
        if constexpr (form == CODES)                                                                    \
            svst1_s8(all, to + CHUNK * v, svsub_s8_x(all, w, zeros##v));                                \
        else                                                                                            \
            svst1_s8(all, to + CHUNK * v, w);                                                           \
    }

// `quads` of INT8, or of what widen wrote, as bytes: less the codes of zero.
template <int form>
const char* expand_quads(const uint32_t* masks, const char* values, const Zeros& zeros, int64_t quads, void* out) {
    const svbool_t all = whole();
    RAC_CONSTANTS(form, 0)
    RAC_CONSTANTS(form, 1)
    RAC_CONSTANTS(form, 2)
    RAC_CONSTANTS(form, 3)
    int8_t* to = static_cast<int8_t*>(out);
    for (int64_t q = 0; q < quads; q++, to += QUAD) {
        if (form != CODES) __builtin_prefetch(values + 1024);
        const svuint8_t starts = starts_of<form>(all, masks + 2 * q);
        const char* at = values;
        RAC_EXPAND(form, 0)
        RAC_EXPAND(form, 1)
        RAC_EXPAND(form, 2)
        RAC_EXPAND(form, 3)
        values = next_quad<form>(values, at);
    }
    return values;
}

const char* expand_int8(const uint32_t* masks, const char* values, int64_t quads, void* out) {
    return expand_quads<INT8>(masks, values, {}, quads, out);
}

// An Expand4 of INT4.
const char* expand_int4(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    char bytes[WIDENED];
    const char* end = widen(masks, codes, quads, bytes);
    expand_quads<CODES>(masks, bytes, zeros_of_rows(zeros), quads, out);
    return end;
}

#define RAC_FOUR_LINES(form) {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>}
const Kernel8 kernel8 = {
    QUADS,
    neon_quantize,
    neon_add,
    4,
    LINES_TOGETHER,
    {RAC_FOUR_LINES(INT8), RAC_FOUR_LINES(DENSE8)},
    {expand_int8, neon_expand_dense8},
    RAC_LINES(EXPANDED),
};
const Kernel4 kernel4 = {
    {expand_int4, neon_expand_dense4, nullptr, neon_expand_dense3, neon_expand_dense2}, RAC_DOT4, RAC_FORMAT4};
