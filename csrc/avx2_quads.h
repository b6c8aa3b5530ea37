// Included inside the anonymous namespace of sources that spread 8-bit and 4-bit weights by AVX2's shuffles, in the section that is
// compiled for their ISA.

// Forms, beside those of a Type. EXPANDED: what the source's own expand functions write. CODES: what widen wrote. LOW and HIGH: the two
// quads of 64 bytes of DENSE4.
constexpr int EXPANDED = TYPES, CODES = TYPES + 1, LOW = TYPES + 2, HIGH = TYPES + 3;
constexpr int first_of(int form) { return form == DENSE4 ? LOW : form; }
constexpr int second_of(int form) { return form == DENSE4 ? HIGH : form; }

// 8 bytes from each of two addresses.
inline __m128i two(const void* low, const void* high) {
    const __m128i half = _mm_loadl_epi64(static_cast<const __m128i*>(low));
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(half), static_cast<const __m64*>(high)));
}

// As assembly: compilers zero the destination first, which helps old processors only and is one in ten instructions here.
inline uint64_t count(uint64_t mask) {
    uint64_t bits;
    __asm__("popcntq %1, %0" : "=r"(bits) : "r"(mask));
    return bits;
}

// The codes of zero of the rows of a quad, four columns each.
struct Zeros {
    __m128i of[4];
};
inline Zeros zeros_of_rows(const uint8_t* zeros) {
    alignas(16) char columns[QUAD];
    for (int i = 0; i < QUAD; i++) columns[i] = static_cast<char>(zeros ? zeros[i / 4] : ZERO_CODE);
    Zeros of;
    for (int i = 0; i < 4; i++) of.of[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(columns) + i);
    return of;
}

constexpr int64_t WIDENED = PANEL * BLOCK_MOST + 64;  // bytes that widen may write

// The codes of some quads of INT4, of at most BLOCK_MOST columns: each one becomes a byte of `bytes`, where those of a quad start at an
// even address. Returns the address after these codes.
const char* widen(const uint32_t* masks, const char* codes, int64_t quads, char* bytes) {
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

// The 16 weights of the lowest 16 bits of the mask; where no code is stored, `zeros`.
template <int form>
inline __m128i spread16(uint64_t mask, const char* values, __m128i zeros) {
    const uint64_t low = mask & 0xff, high = mask >> 8 & 0xff;
    const __m128i stored = two(values, values + count(low)), order = two(tables.low[low], tables.high[high]);
    const __m128i bytes = _mm_shuffle_epi8(stored, order);
    return form == CODES ? _mm_blendv_epi8(bytes, zeros, order) : bytes;
}

// A quad by its masks: of[i] holds rows 4i to 4i + 3. Returns the address after its values.
template <int form>
inline const char* spread_quad(const uint32_t* masks, const char* values, const Zeros& zeros, __m128i (&of)[4]) {
    const uint64_t first = masks[0], second = masks[1], of_first = count(first), stored = of_first + count(second);
    const char* middle = values + of_first;
    of[0] = spread16<form>(first, values, zeros.of[0]);
    of[1] = spread16<form>(first >> 16, values + count(first & 0xffff), zeros.of[1]);
    of[2] = spread16<form>(second, middle, zeros.of[2]);
    of[3] = spread16<form>(second >> 16, middle + count(second & 0xffff), zeros.of[3]);
    return values + (form == CODES ? 2 * code_bytes(stored) : stored);
}
