// Included inside the anonymous namespace of sources whose kernels keep the 16 rows of a panel side by side, in the section that is
// compiled for their ISA: the loops over mask words.
//
// Such a source defines Rows (16 fp32 numbers) with no_rows, load_rows, store_rows, add_rows and multiply_add; Columns (the weights
// of a mask word, w[k] is column k) with expand_word<form>; LINES, at a time; and sets_of_sums(M): 2 hides the latency of
// a multiplication, by one set per column of a pair; 1 saves registers.

template <int form, int M>
void dot(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride, float* out) {
    constexpr int SETS = sets_of_sums(M);
    Rows acc[M][SETS];
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int k = 0; k < SETS; k++) acc[m][k] = no_rows();
    for (int64_t word = 0; word < pairs; word++) {
        Columns two;
        if (form != DENSE) __builtin_prefetch(values + 1024);
        values = expand_word<form>(form == DENSE ? 0 : masks[word], values, two);
        RAC_UNROLL for (int m = 0; m < M; m++)
            RAC_UNROLL for (int k = 0; k < 2; k++)
                acc[m][k % SETS] = multiply_add(two.w[k], x[m * stride + 2 * word + k], acc[m][k % SETS]);
    }
    RAC_UNROLL for (int m = 0; m < M; m++) {
        const Rows sum = SETS == 2 ? add_rows(acc[m][0], acc[m][SETS - 1]) : acc[m][0];
        store_rows(out + PANEL * m, add_rows(load_rows(out + PANEL * m), sum));
    }
}

template <Type type>
const char* expand(const uint32_t* masks, const char* values, int64_t columns, void* out, int64_t stride) {
    for (int64_t column = 0; column < columns; column += 2) {
        Columns two;
        values = expand_word<type>(masks[column / 2], values, two);
        for (int k = 0; k < 2 && column + k < columns; k++) store_rows(static_cast<float*>(out) + (column + k) * stride, two.w[k]);
    }
    return values;
}

template <Type type>
const char* expand_and_multiply(const uint32_t* masks, const char* values, int64_t pairs, const float* x, int64_t stride,
                                float* out, float* block) {
    values = expand<type>(masks, values, 2 * pairs, block, PANEL);
    dot<DENSE, LINES>(nullptr, reinterpret_cast<const char*>(block), pairs, x, stride, out);
    return values;
}

void store(const Product& product, int64_t panel, int64_t count, int64_t first, int64_t lines, const Sums& sums) {
    store_lines(product, panel, count, first, lines, sums);
}
