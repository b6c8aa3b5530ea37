// Included inside the anonymous namespace of sources, in the section that is compiled for AVX512 with VBMI2.

// The bytes from `values` on, spread to where the mask has ones, with zeros elsewhere. Written as assembly on a zeroed register:
// on a Zen 5 the instruction depends on its destination although it keeps nothing of it, and compilers choose a register that
// was used shortly before.
inline __m512i expand_bytes(uint64_t mask, const char* values) {
#if defined(RAC_EMULATE)
    return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(values));
#else
    __m512i bytes = _mm512_setzero_si512();
    asm("vpexpandb %2, %0%{%1%}%{z%}"
        : "+v"(bytes)
        : "Yk"(static_cast<__mmask64>(mask)), "m"(*reinterpret_cast<const char(*)[64]>(values)));
    return bytes;
#endif
}
