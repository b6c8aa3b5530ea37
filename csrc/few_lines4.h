// Included inside the anonymous namespace of sources, in the section that is compiled for their ISA: a few lines times a weight of few
// bits, without writing the expanded weight.
//
// A code is multiplied as it is, and a pruned weight as its code of zero. What the codes of zero add, each one times the sum of x, is
// subtracted at the end of a block.
//
// Such a source includes few_bits.h and defines FORMAT, which is that of its Kernel8; Zeros and zeros_of_rows; widen, which makes a
// byte of each code of a block; and multiply<form, M>, a Dot8 that also gets the codes of zero, for the forms CODES (what widen wrote) and DENSE4.

template <int form, int M>
const char* dot_codes(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, const Lines8& x,
                      int32_t* sums) {
    const Zeros zero = zeros_of_rows(zeros);
    if (form == DENSE4) return multiply<DENSE4, M>(masks, codes, zero, quads, x, sums);
    if constexpr (is_narrow(form)) {
        alignas(64) char lines[CODE_LINES];
        const char* after = widen_codes<form>(codes, quads, lines);
        multiply<DENSE4, M>(masks, lines, zero, quads, x, sums);
        return after;
    }
    char bytes[WIDENED];
    const char* end = widen(masks, codes, quads, bytes);
    multiply<CODES, M>(masks, bytes, zero, quads, x, sums);
    return end;
}

template <int form, int M, AddScaled add>
void few_lines(const Product8& product, int64_t panel, float* acc) {
    const Weight& weight = product.out.weight;
    const char* codes = weight.values_of(panel);
    const int lines = static_cast<int>(product.out.m);  // at most 2 M
    for (int i = 0; i < lines * PANEL; i++) acc[i] = 0;
    for (int64_t block = 0; block < product.blocks; block++) {
        const int64_t column = block * product.block, left = weight.columns - column;
        const int64_t quads = ((left < product.block ? left : product.block) + 3) / 4;
        const uint32_t* masks = form == INT4 ? weight.masks_of(panel) + column / 2 : nullptr;
        const uint8_t* zeros = product.zeros_of(panel, block);
        const Lines8 x = {product.x + 2 * column * (FORMAT == QUADS ? M : 1), product.stride, product.x_sums + block,
                          product.blocks, product.bytes};
        int32_t sums[2 * M * PANEL] = {};
        codes = dot_codes<form, M>(masks, codes, zeros, quads, x, sums);
        for (int m = 0; m < lines; m++)
            for (int n = 0; n < PANEL; n++)
                sums[m * PANEL + n] -= (zeros ? zeros[n] : ZERO_CODE) * x.sums[m * x.sums_stride];
        add_block(product, add, panel, block, 0, lines, sums, acc);
    }
}

#define RAC_FEW_LINES(type, add) {few_lines<type, 1, add>, few_lines<type, 2, add>}
