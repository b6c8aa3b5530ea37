// Included inside the anonymous namespace of sources, in the section that is compiled for AVX512.

// The scales of the 16 rows of a panel in one block of columns.
inline __m512 scale_of_rows(const Product8& product, int64_t panel, int64_t block) {
    const int64_t at = product.scale_at(panel, block);
    if (product.scale_type == FP32) return _mm512_loadu_ps(static_cast<const float*>(product.scale) + at);
    const uint16_t* bf16 = static_cast<const uint16_t*>(product.scale) + at;
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
