// Included inside the anonymous namespace of sources that multiply bytes by AVX2 or AVX-VNNI, in the section that is compiled for their
// ISA: a few lines, as QUADS, times a weight of few bits but INT4, without writing the expanded weight.
//
// A code is multiplied as it is, and a pruned weight as its code of zero. What the codes of zero add, each one times the sum of x, is
// subtracted at the end of a block.
//
// A `part` is 8 rows x 4 columns of codes, one per byte. Such a source defines Parts<M>: the sums of eight parts, which are added two at
// a time, and which into() adds to sums of 32 bits, one per row.

template <int M>
struct Sums4 {
    __m256i of[2][M][2] = {};  // by the half of the rows, double line, byte of x
};

inline __m256i load_half(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// 8 codes of zero of a half.
inline __m256i zeros_of_half(const uint8_t* zeros, int half) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + 8 * half)));
}

// What the ends of the blocks of a panel need, in turn.
template <int M>
struct Ends {
    const char* scale;
    const uint8_t* zeros;  // of the block that ends next
    const float* x_scale;
    const int32_t* x_sums;
    float* acc;  // [lines][16]
    int64_t scale_step, zeros_step, blocks, lines;  // lines: at most 2 M
    bool bf16, bytes;
    uint8_t same[PANEL];

    Ends(const Product8& product, int64_t panel, float* sums)
        : x_scale(product.x_scale), x_sums(product.x_sums), acc(sums), blocks(product.blocks), lines(product.out.m), bytes(product.bytes) {
        bf16 = product.scale_type == BF16;
        const int64_t size = bf16 ? 2 : 4;
        scale = static_cast<const char*>(product.scale) + product.scale_at(panel, 0) * size;
        scale_step = product.groups > 1 ? PANEL * size : 0;
        std::memset(same, ZERO_CODE, sizeof same);
        zeros = product.zeros_of(panel, 0);
        if (!zeros) zeros = same;
        zeros_step = product.out.weight.zero_groups > 1 ? PANEL : 0;
        std::memset(acc, 0, lines * PANEL * sizeof *acc);
    }
    inline __m256 scale_of_half(int half) const {
        if (!bf16) return _mm256_loadu_ps(reinterpret_cast<const float*>(scale) + 8 * half);
        const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale) + half);
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    }
    // acc += the sums, less what the codes of zero added, times both scales.
    RAC_INLINE void add(const Sums4<M>& sums) {
        RAC_UNROLL for (int half = 0; half < 2; half++) {
            const __m256i zero = zeros_of_half(zeros, half);
            const __m256 of_rows = scale_of_half(half);
            const auto add_line = [&](int64_t line, __m256i sum) __attribute__((always_inline)) {
                sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, _mm256_set1_epi32(x_sums[line * blocks])));
                const __m256 of_line = _mm256_set1_ps(x_scale[line * blocks]);
                const __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(sum), of_line), of_rows);
                float* to = acc + PANEL * line + 8 * half;
                _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), scaled));
            };
            RAC_UNROLL for (int m = 0; m < M; m++) {
                const __m256i first = sums.of[half][m][0], second = sums.of[half][m][1];
                if (bytes) {
                    add_line(2 * m, first);
                    if (2 * m + 1 < lines) add_line(2 * m + 1, second);
                } else {
                    add_line(m, _mm256_add_epi32(_mm256_slli_epi32(first, 8), second));
                }
            }
        }
        scale += scale_step, zeros += zeros_step, x_scale++, x_sums++;
    }
};

// Two parts times two quads of x.
template <int M, bool FIRST>
RAC_INLINE void add_two(Parts<M>& parts, __m256i low, const char* x_low, __m256i high, const char* x_high) {
    RAC_UNROLL for (int m = 0; m < M; m++)
        RAC_UNROLL for (int byte = 0; byte < 2; byte++) {
            int32_t four[2];
            std::memcpy(four, x_low + 8 * m + 4 * byte, sizeof *four);
            std::memcpy(four + 1, x_high + 8 * m + 4 * byte, sizeof *four);
            parts.template add<FIRST>(m, byte, low, _mm256_set1_epi32(four[0]), high, _mm256_set1_epi32(four[1]));
        }
}

// The low codes of each byte, and the high ones, times two quads of x. MASK: of the bits of a code in half a byte.
template <int M, bool FIRST, int MASK = 15>
RAC_INLINE void add_both(Parts<M>& parts, __m256i both, const char* x_low, const char* x_high) {
    const __m256i halves = _mm256_set1_epi8(MASK);
    add_two<M, FIRST>(parts, _mm256_and_si256(both, halves), x_low, _mm256_and_si256(_mm256_srli_epi16(both, 4), halves), x_high);
}

// `pairs` pairs of quads of DENSE4, at most 4, times SOME of M lines, from `line` on.
template <int M, int SOME>
RAC_INLINE void multiply_some(const char* codes, int64_t pairs, const char* x, int line, Sums4<M>& sums) {
    x += 8 * line;
    Parts<SOME> parts[2];
    RAC_UNROLL for (int half = 0; half < 2; half++) add_both<SOME, true>(parts[half], load_half(codes + 32 * half), x, x + 8 * M);
    RAC_UNROLL for (int64_t pair = 1; pair < pairs; pair++)
        RAC_UNROLL for (int half = 0; half < 2; half++) {
            const char* x_here = x + 16 * M * pair;
            add_both<SOME, false>(parts[half], load_half(codes + QUAD * pair + 32 * half), x_here, x_here + 8 * M);
        }
    RAC_UNROLL for (int half = 0; half < 2; half++) parts[half].into(sums.of[half] + line);
}

// More than two lines at a time need more registers than there are.
template <int M>
RAC_INLINE void multiply_pairs(const char* codes, int64_t pairs, const char* x, Sums4<M>& sums) {
    multiply_some<M, M <= 2 ? M : 2>(codes, pairs, x, 0, sums);
    if constexpr (M > 2) multiply_some<M, M - 2>(codes, pairs, x, 2, sums);
}

template <int M>
void dense_lines(const Product8& product, int64_t panel, float* acc) {
    const Weight& weight = product.out.weight;
    const char* codes = weight.values_of(panel);
    Ends<M> ends(product, panel, acc);
    for (int64_t column = 0, block = product.block; column < weight.columns; column += block) {
        const int64_t left = weight.columns - column;
        // The last block ends with zeros of x.
        int64_t pairs = ((left < block ? left : block) + PAIR_OF_QUADS - 1) / PAIR_OF_QUADS;
        const char* x = product.x + 2 * column * M;
        Sums4<M> sums;
        for (; pairs >= 4; pairs -= 4, codes += 4 * QUAD, x += 64 * M) {
            for (int line = 0; line < 4; line++) _mm_prefetch(codes + 1024 + 64 * line, _MM_HINT_T0);
            multiply_pairs<M>(codes, 4, x, sums);
        }
        if (pairs) multiply_pairs<M>(codes, pairs, x, sums);
        codes += QUAD * pairs;
        ends.add(sums);
    }
}

// 32 columns of half of the rows of DENSE3 or DENSE2, from `codes` on, as lines of DENSE4; with other bits where code_mask has none.
template <int form>
RAC_INLINE void load_lines(const char* codes, __m256i (&lines)[4]) {
    if constexpr (form == DENSE2) {
        for (int i = 0; i < 2; i++) {
            lines[2 * i] = load_half(codes + QUAD * i);
            lines[2 * i + 1] = _mm256_srli_epi16(lines[2 * i], 2);
        }
    } else {
        for (int i = 0; i < 3; i++) lines[i] = load_half(codes + QUAD * i);
        const __m256i low = _mm256_and_si256(_mm256_srli_epi16(lines[0], 3), _mm256_set1_epi8(0x11));
        const __m256i middle = _mm256_and_si256(_mm256_srli_epi16(lines[1], 2), _mm256_set1_epi8(0x22));
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(lines[2], 1), _mm256_set1_epi8(0x44));
        lines[3] = _mm256_or_si256(_mm256_or_si256(low, middle), high);
    }
}

// Such lines times SOME of M lines of x, from `line` on.
template <int form, int M, int SOME>
RAC_INLINE void multiply_lines(const __m256i (&lines)[4], const char* x, int line, __m256i (*sums)[2]) {
    x += 8 * line;
    Parts<SOME> parts;
    add_both<SOME, true, code_mask(form)>(parts, lines[0], x, x + 8 * M);
    RAC_UNROLL for (int i = 1; i < 4; i++)
        add_both<SOME, false, code_mask(form)>(parts, lines[i], x + 16 * M * i, x + 16 * M * i + 8 * M);
    parts.into(sums + line);
}

// DENSE3 and DENSE2.
template <int form, int M>
void narrow_lines(const Product8& product, int64_t panel, float* acc) {
    const Weight& weight = product.out.weight;
    const char* codes = weight.values_of(panel);
    constexpr int LINES = 4 * lines_stored(form) / lines_widened(form);  // of 32 columns
    Ends<M> ends(product, panel, acc);
    for (int64_t column = 0, block = product.block; column < weight.columns; column += block) {
        const int64_t left = weight.columns - column;
        const int64_t tiles = ((left < block ? left : block) + TILE_COLUMNS - 1) / TILE_COLUMNS;
        const char* x = product.x + 2 * column * M;
        Sums4<M> sums;
        for (int64_t tile = 0; tile < tiles; tile++, codes += LINES * QUAD, x += 2 * TILE_COLUMNS * M) {
            for (int line = 0; line < LINES; line++) _mm_prefetch(codes + 1024 + QUAD * line, _MM_HINT_T0);
            RAC_UNROLL for (int half = 0; half < 2; half++) {
                __m256i lines[4];
                load_lines<form>(codes + 32 * half, lines);
                multiply_lines<form, M, M <= 2 ? M : 2>(lines, x, 0, sums.of[half]);
                if constexpr (M > 2) multiply_lines<form, M, M - 2>(lines, x, 2, sums.of[half]);
            }
        }
        ends.add(sums);
    }
}

// An Expand4 of DENSE3 or DENSE2, of whole tiles of 32 columns: there is room for them. `store` as in expand_planes.
template <int form, void (*store)(void*, int64_t, int, __m256i)>
const char* expand_lines(const uint32_t*, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    const __m256i of_code = _mm256_set1_epi8(code_mask(form));
    for (int64_t quad = 0; quad < quads; quad += 8, codes += 8 / lines_widened(form) / 2 * lines_stored(form) * QUAD)
        RAC_UNROLL for (int half = 0; half < 2; half++) {
            const __m256i zero = _mm256_mullo_epi32(zeros_of_half(zeros, half), _mm256_set1_epi32(0x01010101));
            __m256i lines[4];
            load_lines<form>(codes + 32 * half, lines);
            RAC_UNROLL for (int i = 0; i < 4; i++) {
                const __m256i low = _mm256_and_si256(lines[i], of_code), high = _mm256_and_si256(_mm256_srli_epi16(lines[i], 4), of_code);
                store(out, quad + 2 * i, half, _mm256_sub_epi8(low, zero));
                store(out, quad + 2 * i + 1, half, _mm256_sub_epi8(high, zero));
            }
        }
    return codes;
}

// PLANES4: the bits 0 to 3 of a `unit`, the codes of 8 rows x 32 columns: byte 4r + o of a plane has those of row r and columns 4t + o.
struct Planes {
    alignas(32) uint64_t of[4][4];
};

// As assembly: this ISA need not have the instruction, only processors on which PLANES4 runs do.
inline uint64_t spread_bits(uint64_t bits, uint64_t mask) {
    uint64_t spread;
    __asm__("pdepq %2, %1, %0" : "=r"(spread) : "r"(bits), "r"(mask));
    return spread;
}

// Returns the address after the codes of the unit.
inline const char* spread_unit(const uint32_t* masks, const char* codes, Planes& to) {
    RAC_UNROLL for (int rows = 0; rows < 4; rows++) {
        uint64_t mask, bits[4];
        std::memcpy(&mask, masks + 2 * rows, sizeof mask);
        const uint64_t bytes = (count(mask) + 7) / 8;
        uint64_t thrice = 3 * bytes;
        __asm__("" : "+r"(thrice));  // compilers would take one more addition for each address
        std::memcpy(bits, codes, sizeof *bits);
        std::memcpy(bits + 1, codes + bytes, sizeof *bits);
        std::memcpy(bits + 2, codes + 2 * bytes, sizeof *bits);
        std::memcpy(bits + 3, codes + thrice, sizeof *bits);
        RAC_UNROLL for (int plane = 0; plane < 4; plane++) to.of[plane][rows] = spread_bits(bits[plane], mask);
        codes += 4 * bytes;
    }
    return codes;
}

// The units of a panel, in turn. They are spread some units before they are read: a processor cannot pass four stores on to one load,
// so this would wait for the cache; and integer and vector instructions of different units run at once.
struct Units {
    static constexpr uint64_t AHEAD = 4, KEPT = 8;
    const uint32_t *masks, *end;
    const char* codes;
    uint64_t at = 0;  // the unit that is read next
    Planes kept[KEPT];

    Units(const uint32_t* first_masks, const char* first_codes, int64_t units)
        : masks(first_masks), end(first_masks + 8 * units), codes(first_codes) {
        for (uint64_t i = 0; i < AHEAD; i++) spread(i);
    }
    inline void spread(uint64_t unit) {
        if (masks == end) return;
        codes = spread_unit(masks, codes, kept[unit % KEPT]);
        masks += 8;
    }
    inline const Planes& read() {
        spread(at + AHEAD);
        return kept[at++ % KEPT];
    }
};

// The code of zero of each row, as planes: all bits of a byte are alike.
struct PlaneZeros {
    __m256i of[2][4];
    explicit PlaneZeros(const uint8_t* zeros) {
        for (int half = 0; half < 2; half++)
            for (int plane = 0; plane < 4; plane++) {
                const __m256i bit = _mm256_and_si256(_mm256_srli_epi32(zeros_of_half(zeros, half), plane), _mm256_set1_epi32(1));
                of[half][plane] = _mm256_sub_epi32(_mm256_setzero_si256(), bit);
            }
    }
};

// Swap the bits of a << shift and b where the mask has ones, `shift` lower.
inline void swap_bits(__m256i& a, __m256i& b, int shift, __m256i mask) {
    const __m256i differ = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi16(a, shift), b), mask);
    b = _mm256_xor_si256(b, differ);
    a = _mm256_xor_si256(a, _mm256_slli_epi16(differ, shift));
}

// The parts of a unit, two per vector: codes[i] has part i in the low halves of its bytes and part i + 4 in the high ones. Part t is
// columns 4t to 4t + 3.
RAC_INLINE void codes_of(const Planes& planes, const __m256i (&zeros)[4], __m256i (&codes)[4]) {
    __m256i bits[4];
    RAC_UNROLL for (int plane = 0; plane < 4; plane++) bits[plane] = _mm256_xor_si256(load_half(planes.of[plane]), zeros[plane]);
    const __m256i ones = _mm256_set1_epi8(0x55), twos = _mm256_set1_epi8(0x33);
    swap_bits(bits[0], bits[1], 1, ones);
    swap_bits(bits[2], bits[3], 1, ones);
    swap_bits(bits[0], bits[2], 2, twos);
    swap_bits(bits[1], bits[3], 2, twos);
    RAC_UNROLL for (int i = 0; i < 4; i++) codes[i] = bits[i];
}

// The parts of a unit times SOME of M lines, from `line` on.
template <int M, int SOME>
RAC_INLINE void multiply_unit(const __m256i (&codes)[4], const char* x, int line, __m256i (*sums)[2]) {
    x += 8 * line;
    Parts<SOME> parts;
    add_both<SOME, true>(parts, codes[0], x, x + 32 * M);
    RAC_UNROLL for (int i = 1; i < 4; i++) add_both<SOME, false>(parts, codes[i], x + 8 * M * i, x + 8 * M * (i + 4));
    parts.into(sums + line);
}

template <int M>
void planes_lines(const Product8& product, int64_t panel, float* acc) {
    const Weight& weight = product.out.weight;
    Units units(weight.masks_of(panel), weight.values_of(panel), weight.words / 8);
    Ends<M> ends(product, panel, acc);
    PlaneZeros zeros(ends.zeros);
    for (int64_t column = 0, block = product.block; column < weight.columns; column += block) {
        if (ends.zeros_step) zeros = PlaneZeros(ends.zeros);
        const int64_t left = weight.columns - column;
        const int64_t tiles = ((left < block ? left : block) + TILE_COLUMNS - 1) / TILE_COLUMNS;
        const char* x = product.x + 2 * column * M;
        Sums4<M> sums;
        for (int64_t tile = 0; tile < tiles; tile++, x += 2 * TILE_COLUMNS * M) {
            _mm_prefetch(units.codes + 1024, _MM_HINT_T0);
            _mm_prefetch(units.codes + 1024 + 64, _MM_HINT_T0);
            RAC_UNROLL for (int half = 0; half < 2; half++) {
                __m256i codes[4];
                codes_of(units.read(), zeros.of[half], codes);
                multiply_unit<M, M <= 2 ? M : 2>(codes, x, 0, sums.of[half]);
                if constexpr (M > 2) multiply_unit<M, M - 2>(codes, x, 2, sums.of[half]);
            }
        }
        ends.add(sums);
    }
}

// An Expand4 of PLANES4. `store`(out, quad, half, codes less their codes of zero) writes a part.
template <void (*store)(void*, int64_t, int, __m256i)>
const char* expand_planes(const uint32_t* masks, const char* codes, const uint8_t* zeros, int64_t quads, void* out) {
    uint8_t same[PANEL];
    std::memset(same, ZERO_CODE, sizeof same);
    if (!zeros) zeros = same;
    const PlaneZeros of_planes(zeros);
    const int64_t tiles = (quads + 7) / 8;
    Units units(masks, codes, 2 * tiles);
    const __m256i halves = _mm256_set1_epi8(15);
    for (int64_t tile = 0; tile < tiles; tile++) {
        _mm_prefetch(units.codes + 1024, _MM_HINT_T0);
        RAC_UNROLL for (int half = 0; half < 2; half++) {
            const __m256i zero = _mm256_mullo_epi32(zeros_of_half(zeros, half), _mm256_set1_epi32(0x01010101));
            __m256i both[4];
            codes_of(units.read(), of_planes.of[half], both);
            RAC_UNROLL for (int i = 0; i < 4; i++) {
                const __m256i low = _mm256_and_si256(both[i], halves), high = _mm256_and_si256(_mm256_srli_epi16(both[i], 4), halves);
                store(out, 8 * tile + i, half, _mm256_sub_epi8(low, zero));
                store(out, 8 * tile + i + 4, half, _mm256_sub_epi8(high, zero));
            }
        }
    }
    return units.codes;
}

#define RAC_NARROW(form) {narrow_lines<form, 1>, narrow_lines<form, 2>, narrow_lines<form, 3>, narrow_lines<form, 4>}
#define RAC_FEW_LINES4                                                                                       \
    {dense_lines<1>, dense_lines<2>, dense_lines<3>, dense_lines<4>},                                        \
        {planes_lines<1>, planes_lines<2>, planes_lines<3>, planes_lines<4>}, RAC_NARROW(DENSE3), RAC_NARROW(DENSE2)
