// Included inside the anonymous namespace of sources, in the section that is compiled for AVX512 with VNNI.

// Add four products, of unsigned bytes of w and signed bytes of x, to each sum. As assembly: with the intrinsic, GCC uses two
// registers per sum and copies or spills them at every step.
inline void add_products(__m512i& sums, __m512i w, const char* x) {
#if defined(RAC_EMULATE)
    int32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    sums = _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(bytes));
#else
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(w), "m"(*reinterpret_cast<const char(*)[4]>(x)));
#endif
}

// Four bytes in every lane. As assembly: compilers would load them again for each use.
inline __m512i four_bytes(const char* x) {
#if defined(RAC_EMULATE)
    int32_t bytes;
    std::memcpy(&bytes, x, sizeof bytes);
    return _mm512_set1_epi32(bytes);
#else
    __m512i all;
    asm("vpbroadcastd %1, %0" : "=v"(all) : "m"(*reinterpret_cast<const char(*)[4]>(x)));
    return all;
#endif
}

inline void add_products(__m512i& sums, __m512i w, __m512i x) {
#if defined(RAC_EMULATE)
    sums = _mm512_dpbusd_epi32(sums, w, x);
#else
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w), "v"(x));
#endif
}
