// Included inside a namespace of each vector length, in the section that is compiled for SVE: bf16 weights times fp32.
//
// Such a namespace includes sve_masks.h and defines LINES, at a time: 2 * CHUNKS * LINES of the 32 registers hold sums, or 4 * LINES of
// one chunk. Two mask words are 2 * CHUNKS vectors of ROWS rows, both columns of a row in a lane; vectors below CHUNKS are of the first
// word. A type of SVE has no arrays, so the sums of vector j and line m have a name, sum<j><m>. Where a word is one vector, its second
// column has sums of its own, 2 and 3, so that successive products do not depend on each other.
//
// x is loaded into every lane. The products with one lane of a register would need fewer loads, but take two steps on the A64FX.

constexpr int ROWS = PANEL / CHUNKS, BITS = CHUNK / 2;  // of a vector; bits of its mask

// Vector j, of the values at `values`, which becomes the address after them. `places`: of its chunk of the mask.
template <int j>
RAC_INLINE svuint32_t spread(svbool_t all, const uint32_t* masks, const char*& values, svuint8_t places) {
    const svbool_t mask = svunpklo_b(bits_of<BITS>(masks, j));
    const svuint16_t place = svunpklo_u16(j % 2 ? svext_u8(places, places, BITS) : places);
    const svuint16_t stored = svld1_u16(all, reinterpret_cast<const uint16_t*>(values));
    values += 2 * svcntp_b16(all, mask);
    return svreinterpret_u32_u16(svsel_u16(mask, svtbl_u16(stored, place), svdup_n_u16(0)));
}
RAC_INLINE svfloat32_t even(svuint32_t both) { return svreinterpret_f32_u32(svlsl_n_u32_x(svptrue_b32(), both, 16)); }
RAC_INLINE svfloat32_t odd(svuint32_t both) { return svreinterpret_f32_u32(svand_n_u32_x(svptrue_b32(), both, 0xffff0000)); }

// RAC_OF_VECTORS(DO): of the vectors of two words, DO(j, o) with the weights as `w`; sum<o> is of the second columns where CHUNKS is 1.
// `masks`: the address of the words.
#define RAC_OF_TWO(DO, v, j, o, next_j, next_o)                                              \
    if constexpr (v < CHUNKS) {                                                              \
        const svuint8_t place = places<BITS>(all, bits_of<CHUNK>(masks, v), starts, own##v); \
        {                                                                                    \
            const svuint32_t w = spread<j>(all, masks, values, place);                       \
            DO(j, o)                                                                         \
        }                                                                                    \
        {                                                                                    \
            const svuint32_t w = spread<next_j>(all, masks, values, place);                  \
            DO(next_j, next_o)                                                               \
        }                                                                                    \
    }
#define RAC_OF_VECTORS(DO)                                          \
    {                                                               \
        const svuint8_t starts = starts_of_bytes<BITS>(all, masks); \
        __builtin_prefetch(values + 1024);                          \
        RAC_OF_TWO(DO, 0, 0, 2, 1, 3)                               \
        RAC_OF_TWO(DO, 1, 2, 2, 3, 3)                               \
        RAC_OF_TWO(DO, 2, 4, 4, 5, 5)                               \
        RAC_OF_TWO(DO, 3, 6, 6, 7, 7)                               \
    }
#define RAC_OWN_BYTES                                                                             \
    const svuint8_t own0 = own_bytes(all, 0), own1 = own_bytes(all, 1), own2 = own_bytes(all, 2), \
                    own3 = own_bytes(all, 3);
#define RAC_EACH_LINE(DO, j, o) DO(j, o, 0) DO(j, o, 1) DO(j, o, 2) DO(j, o, 3)
#define RAC_EACH_SUM(DO)                                                                            \
    RAC_EACH_LINE(DO, 0, 0) RAC_EACH_LINE(DO, 1, 1) RAC_EACH_LINE(DO, 2, 2) RAC_EACH_LINE(DO, 3, 3) \
    RAC_EACH_LINE(DO, 4, 4) RAC_EACH_LINE(DO, 5, 5) RAC_EACH_LINE(DO, 6, 6) RAC_EACH_LINE(DO, 7, 7)
#define RAC_NO_SUM(j, o, m) svfloat32_t sum##j##m = svdup_n_f32(0);
// sum<j><m> += w * column `k` of these of line m.
#define RAC_ADD(j, m, w, k) sum##j##m = svmla_n_f32_x(rows, sum##j##m, w, x[m * stride + k]);
#define RAC_ADD_WORD(j, o, m)                                                \
    if constexpr (m < SOME) {                                                \
        RAC_ADD(j, m, first, j / CHUNKS * 2)                                 \
        if constexpr (CHUNKS == 1) RAC_ADD(o, m, second, j / CHUNKS * 2 + 1) \
        if constexpr (CHUNKS > 1) RAC_ADD(j, m, second, j / CHUNKS * 2 + 1)  \
    }
#define RAC_MULTIPLY(j, o)                              \
    const svfloat32_t first = even(w), second = odd(w); \
    RAC_EACH_LINE(RAC_ADD_WORD, j, o)
#define RAC_ADD_DENSE(j, o, m) \
    if constexpr (m < SOME) RAC_ADD(j, m, w, j / CHUNKS)
#define RAC_DENSE(j, end)                                        \
    if constexpr (j < end) {                                     \
        const svfloat32_t w = svld1_f32(rows, block + ROWS * j); \
        RAC_EACH_LINE(RAC_ADD_DENSE, j, j)                       \
    }
#define RAC_ADD_SUM(j, o, m)                                                    \
    if constexpr (j < SUMS && m < SOME) {                                       \
        float* to = out + PANEL * m + j % CHUNKS * ROWS;                        \
        svst1_f32(rows, to, svadd_f32_x(rows, svld1_f32(rows, to), sum##j##m)); \
    }
constexpr int SUMS = CHUNKS == 1 ? 4 : 2 * CHUNKS;  // of a line

template <int SOME>
RAC_INLINE void dot_spread(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    const svbool_t all = whole(), rows = whole_words();
    RAC_OWN_BYTES
    RAC_EACH_SUM(RAC_NO_SUM)
    for (int64_t word = 0; word < pairs; word += 2, masks += 2, x += 4) RAC_OF_VECTORS(RAC_MULTIPLY)
    RAC_EACH_SUM(RAC_ADD_SUM)
}

template <int SOME>
RAC_INLINE void dot_dense(const float* block, int64_t pairs, const float* x, int64_t stride, float* out) {
    constexpr int COLUMNS = SUMS / CHUNKS;
    const svbool_t rows = whole_words();
    RAC_EACH_SUM(RAC_NO_SUM)
    int64_t column = 0;
    for (; column + COLUMNS <= 2 * pairs; column += COLUMNS, x += COLUMNS, block += COLUMNS * PANEL) {
        RAC_DENSE(0, SUMS)
        RAC_DENSE(1, SUMS)
        RAC_DENSE(2, SUMS)
        RAC_DENSE(3, SUMS)
        RAC_DENSE(4, SUMS)
        RAC_DENSE(5, SUMS)
        RAC_DENSE(6, SUMS)
        RAC_DENSE(7, SUMS)
    }
    if (CHUNKS == 1 && column < 2 * pairs) {  // one more pair
        RAC_DENSE(0, 2)
        RAC_DENSE(1, 2)
    }
    RAC_EACH_SUM(RAC_ADD_SUM)
}

template <int form, int SOME>
RAC_INLINE void dot_some(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    if constexpr (form == DENSE)
        dot_dense<SOME>(reinterpret_cast<const float*>(values), pairs, x, stride, out);
    else
        dot_spread<SOME>(masks, values, pairs, x, stride, out);
}

template <int form, int M>
void dot(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    constexpr int WHOLE = M / LINES * LINES;
    for (int line = 0; line < WHOLE; line += LINES)
        dot_some<form, LINES>(masks, values, pairs, x + line * stride, stride, out + PANEL * line);
    if constexpr (M > WHOLE) dot_some<form, M - WHOLE>(masks, values, pairs, x + WHOLE * stride, stride, out + PANEL * WHOLE);
}

#define RAC_PUT_FP32(j, o)                                                     \
    if (const int64_t k = column + j / CHUNKS * 2; k < columns) {              \
        float* to = static_cast<float*>(out) + k * stride + j % CHUNKS * ROWS; \
        svst1_f32(rows, to, even(w));                                          \
        if (k + 1 < columns) svst1_f32(rows, to + stride, odd(w));             \
    }
#define RAC_PUT_BF16(j, o)                                                              \
    if (const int64_t k = column + j / CHUNKS * 2; k < columns) {                       \
        uint16_t* to = static_cast<uint16_t*>(out) + k * stride + j % CHUNKS * ROWS;    \
        svst1h_u32(rows, to, w);                                                        \
        if (k + 1 < columns) svst1h_u32(rows, to + stride, svlsr_n_u32_x(rows, w, 16)); \
    }

const char* to_fp32(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    const svbool_t all = whole(), rows = whole_words();
    RAC_OWN_BYTES
    for (int64_t column = 0; column < columns; column += 4, masks += 2) RAC_OF_VECTORS(RAC_PUT_FP32)
    return values;
}

const char* to_bf16(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    const svbool_t all = whole(), rows = whole_words();
    RAC_OWN_BYTES
    for (int64_t column = 0; column < columns; column += 4, masks += 2) RAC_OF_VECTORS(RAC_PUT_BF16)
    return values;
}

const char* expand_and_multiply(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride,
                                float* out, float* block) {
    values = to_fp32(masks, values, 2 * pairs, block, PANEL);
    dot<DENSE, 4>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out);
    return values;
}

// The kernel of NEON, with other functions for bf16 weights. Both multiply four lines at a time and have the same blocks.
Kernel with_bf16(Kernel kernel) {
    Dots<float>& dots = kernel.dots;
    const Dot<float> stored[] = {dot<BF16, 1>, dot<BF16, 2>, dot<BF16, 3>, dot<BF16, 4>};
    const Dot<float> dense[] = {dot<DENSE, 1>, dot<DENSE, 2>, dot<DENSE, 3>, dot<DENSE, 4>};
    for (int m = 0; m < 4; m++) {
        dots.dot[BF16][m] = stored[m];
        dots.dot[DENSE][m] = dense[m];
    }
    dots.lines = dots.dense_lines = 4;
    dots.expand_and_multiply[BF16] = expand_and_multiply;
    kernel.to_fp32[BF16] = to_fp32;
    kernel.bf16_to_bf16 = to_bf16;
    return kernel;
}
