// Included inside the anonymous namespace of sources that multiply bf16 by bf16.
//
// Such a source defines LINES, at a time, and multiply<form, M>, which also writes the expanded weights to a block that is not null.

template <int form, int M>
void dot(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x, int64_t stride, float* out) {
    multiply<form, M>(masks, values, pairs, x, stride, out, nullptr);
}

const char* expand_and_multiply(const uint32_t* masks, const char* values, int64_t pairs, const uint16_t* x,
                                int64_t stride, float* out, uint16_t* block) {
    return multiply<BF16, LINES>(masks, values, pairs, x, stride, out, block);
}
