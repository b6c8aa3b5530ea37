// build: x86_64 -mamx-tile -mamx-bf16 -mavx512f -mavx512bw -mavx512vl -mavx512vbmi2 -mpopcnt
// AMX, bf16 times bf16: tdpbf16ps multiplies a tile of weights, 16 pairs x 16 rows x 2. For weights of bf16 vpexpandw spreads a
// mask word's weights into a row of the tile. Codes are multiplied by their scales and rounded to bf16.
//
// Two panels and up to 32 tokens at a time: tiles 0-3 hold the sums [half of the tokens][panel], 4-5 hold x, 6-7 the weights.
// Up to 32 tokens, the sums stay in their tiles over all columns, and each tile of weights is expanded just before it is
// multiplied. For more tokens, 512 columns of the two panels are expanded once and used by every block of 32 tokens of a chunk;
// 16 panels use these columns of x in turn, so that they are in the second-level cache.
#include "isa/amx.h"

namespace rac {
namespace {

constexpr int64_t AHEAD = 16;              // tiles expanded before they are multiplied, at most
constexpr int64_t TILE = TILE_WORDS * 32;  // bf16 values of a weight tile
constexpr int64_t BLOCK_TOKENS = 32;       // tokens, and rows of the weight, in a set of sums

// The tiles of x and of the sums have as many rows as there are tokens.
void configure(int64_t m) {
    const uint8_t first = static_cast<uint8_t>(m < 16 ? m : 16);
    const uint8_t second = static_cast<uint8_t>(m <= 16 ? 1 : m < BLOCK_TOKENS ? m - 16 : 16);
    configure_tiles({first, first, second, second, first, second, 16, 16});
}

// `two_halves`: there are more than 16 tokens here. `two_panels`: there is a second panel. The sums are [32][32] fp32.
template <bool two_halves, bool two_panels>
void load_sums(const float* acc, bool resume) {
    finish_stores(acc);
    if (!resume) {
        _tile_zero(0);
        if (two_panels) _tile_zero(1);
        if (two_halves) _tile_zero(2);
        if (two_halves && two_panels) _tile_zero(3);
        return;
    }
    _tile_loadd(0, acc, 128);
    if (two_panels) _tile_loadd(1, acc + 16, 128);
    if (two_halves) _tile_loadd(2, acc + 16 * BLOCK_TOKENS, 128);
    if (two_halves && two_panels) _tile_loadd(3, acc + 16 * BLOCK_TOKENS + 16, 128);
}

template <bool two_halves, bool two_panels>
void store_sums(float* acc) {
    _tile_stored(0, acc, 128);
    if (two_panels) _tile_stored(1, acc + 16, 128);
    if (two_halves) _tile_stored(2, acc + 16 * BLOCK_TOKENS, 128);
    if (two_halves && two_panels) _tile_stored(3, acc + 16 * BLOCK_TOKENS + 16, 128);
}

// `x`: a tile of 16 tokens; that of the next 16 is `half` after it.
template <bool two_halves, bool two_panels>
void multiply(const uint16_t* x, int64_t half, const uint16_t* weights) {
    finish_stores(weights);
    _tile_loadd(6, weights, 64);
    if (two_panels) _tile_loadd(7, weights + TILE, 64);
    _tile_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (two_panels) _tile_dpbf16ps(1, 4, 7);
    if (two_halves) {
        _tile_loadd(5, x + half, 64);
        _tile_dpbf16ps(2, 5, 6);
        if (two_panels) _tile_dpbf16ps(3, 5, 7);
    }
    finish_stores(weights);
}

struct Steps {
    void (*load_sums)(const float*, bool);
    void (*multiply)(const uint16_t*, int64_t, const uint16_t*);
    void (*store_sums)(float*);
};
template <bool two_halves, bool two_panels>
constexpr Steps steps_of = {load_sums<two_halves, two_panels>, multiply<two_halves, two_panels>,
                         store_sums<two_halves, two_panels>};

// The weight tiles of a weight of bf16.
struct FloatTiles {
    const Matmul& matmul;

    // Write tile number `at` of a panel. Returns the address after its values.
    const char* expand(int64_t panel, int64_t at, const char* values, uint16_t* tile) const {
        const uint32_t* masks = matmul.weight.masks_of(panel) + at * TILE_WORDS;
        for (int row = 0; row < TILE_WORDS; row++) {
            const uint32_t mask = masks[row];
            _mm_prefetch(values + 2048, _MM_HINT_T0);
            _mm512_store_si512(tile + 32 * row, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)));
            values += 2 * RAC_COUNT(mask);
        }
        return values;
    }
};

// The same of a weight of codes, whose groups of columns are whole tiles.
struct CodeTiles {
    const IntMatmul& ints;
    const Matmul& matmul = ints.out;

    const char* expand(int64_t panel, int64_t at, const char* values, uint16_t* tile) const {
        const Weight& weight = matmul.weight;
        const int64_t column = at * TILE_COLUMNS, quads = TILE_COLUMNS / 4;
        const int64_t block = static_cast<uint32_t>(column) / static_cast<uint32_t>(ints.block);  // a division of 64 bits is slow
        alignas(64) int8_t codes[TILE_COLUMNS * PANEL];
        for (int line = 0; line < 4; line++) _mm_prefetch(values + 2048 + 64 * line, _MM_HINT_T0);
        const char* end = avx512_integers.expand[weight.type - INT8](weight.masks_from(panel, column), values,
                                                                     weight.zeros_of(panel, block), quads, codes);
        // A code becomes the highest byte of a lane, so it is 2^24 times too large.
        const __m512 factor = _mm512_mul_ps(scale_of_rows(ints, panel, block), _mm512_set1_ps(1.0f / (1 << 24)));
        for (int64_t q = 0; q < quads; q++)
            for (int pair = 0; pair < 2; pair++) {
                const __m512i quad = _mm512_load_si512(codes + QUAD * q);
                const __m512i first = rounded(quad, 2 * pair, factor), second = rounded(quad, 2 * pair + 1, factor);
                const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
                _mm512_store_si512(tile + 64 * q + 32 * pair, both);
            }
        return end;
    }

private:
    // Column k of a quad times `factor`, as fp32 whose high halves are rounded to bf16.
    RAC_INLINE static __m512i rounded(__m512i quad, int k, __m512 factor) {
        const int lane = k << 24 | 0x00808080;  // byte k as the highest, which has the sign, and zeros
        const __m512i highest = _mm512_set4_epi32(lane + 0x0c000000, lane + 0x08000000, lane + 0x04000000, lane);
        const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(quad, highest)), factor);
        return _mm512_add_epi32(_mm512_castps_si512(product), _mm512_set1_epi32(0x8000));
    }
};

// Up to AHEAD tiles of columns of two panels: what is expanded and multiplied at a time.
struct Slice {
    int64_t at, end;  // tiles
    int64_t panel;    // the first one, counted from the group's first
    int panels;
    int64_t tiles() const { return (end - at) * panels; }
};

// The slices of a group of panels, one after the other: all panels of some columns, then of the next ones. It expands them.
template <class WeightTiles>
class Slices {
public:
    Slices(const WeightTiles& weight, int64_t tiles, int64_t first, int64_t count, int64_t ahead)
        : weight_(weight), first_(first), count_(count), ahead_(ahead), last_(tiles) {
        for (int64_t p = 0; p < count; p++) values_[p] = weight.matmul.weight.values_of(first + p);
        begin(0, 0);
    }
    const Slice& slice() const { return slice_; }
    bool ended() const { return slice_.at >= last_; }
    void next() {
        const bool same = slice_.panel + 2 < count_;
        begin(same ? slice_.at : slice_.at + ahead_, same ? slice_.panel + 2 : 0);
    }
    // Expand tiles until `tiles` of the slice are done.
    void expand(int64_t tiles, uint16_t* to) {
        for (; done_ < tiles; done_++) {
            const int64_t tile = slice_.at + done_ / slice_.panels, p = slice_.panel + done_ % slice_.panels;
            uint16_t* at = to + (2 * (done_ / slice_.panels) + done_ % slice_.panels) * TILE;
            values_[p] = weight_.expand(first_ + p, tile, values_[p], at);
        }
    }

private:
    void begin(int64_t at, int64_t panel) {
        slice_ = {at, smaller(at + ahead_, last_), panel, panel + 1 < count_ ? 2 : 1};
        done_ = 0;
    }
    const WeightTiles& weight_;
    int64_t first_, count_, ahead_, last_, done_ = 0;
    Slice slice_;
    const char* values_[AMX_PANELS];
};

// Tokens [token, token + m) times `count` panels from `first` on. `acc` holds m tokens, rounded up to blocks, of these panels.
// While a slice is multiplied, which takes the tile unit, the next slice is expanded, which takes the vector units.
template <class WeightTiles>
void multiply_tokens(const WeightTiles& weight, int64_t first, int64_t count, int64_t token, int64_t m, float* acc) {
    const Matmul& matmul = weight.matmul;
    const uint16_t* x = static_cast<const uint16_t*>(matmul.x) + token * matmul.stride;
    const int64_t tiles = matmul.stride / TILE_COLUMNS, blocks = (m + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    alignas(64) uint16_t expanded[2][AHEAD * 2 * TILE];
    Slices<WeightTiles> next(weight, tiles, first, count, blocks == 1 ? 1 : AHEAD);
    next.expand(next.slice().tiles(), expanded[0]);
    for (int turn = 0; !next.ended(); turn ^= 1) {
        const Slice slice = next.slice();
        next.next();
        const int64_t steps = blocks * (slice.end - slice.at), to_expand = next.ended() ? 0 : next.slice().tiles();
        for (int64_t block = 0, taken = 0; block < blocks; block++) {
            const bool two_halves = m - block * BLOCK_TOKENS > 16;
            const Steps& step = two_halves ? (slice.panels == 2 ? steps_of<true, true> : steps_of<true, false>)
                                         : (slice.panels == 2 ? steps_of<false, true> : steps_of<false, false>);
            float* sums = acc + (slice.panel / 2 * blocks + block) * BLOCK_TOKENS * BLOCK_TOKENS;
            if (slice.at == 0 || blocks > 1) step.load_sums(sums, slice.at > 0);
            for (int64_t tile = slice.at; tile < slice.end; tile++) {
                step.multiply(x + block * BLOCK_TOKENS * matmul.stride + 16 * tile * TILE_COLUMNS, 16 * matmul.stride,
                              expanded[turn] + 2 * (tile - slice.at) * TILE);
                next.expand(to_expand * ++taken / steps, expanded[turn ^ 1]);
            }
            if (slice.end == tiles || blocks > 1) step.store_sums(sums);
        }
    }
    matmul.store(matmul, first, count, token, m, {acc, blocks * BLOCK_TOKENS * BLOCK_TOKENS, PANEL, BLOCK_TOKENS});
}

template <class WeightTiles>
bool panels(const WeightTiles& weight, int64_t first, int64_t last) {
    const Matmul& matmul = weight.matmul;
    const int64_t group = matmul.m <= BLOCK_TOKENS ? 2 : AMX_PANELS;
    const int64_t blocks = (smaller(matmul.m, AMX_TOKENS) + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    float* acc = static_cast<float*>(std::aligned_alloc(64, group / 2 * blocks * BLOCK_TOKENS * BLOCK_TOKENS * sizeof(float)));
    if (!acc) return false;
    in_chunks(matmul.m, [&](int64_t token, int64_t tokens) {
        configure(tokens);
        for (int64_t panel = first; panel < last; panel += group)
            multiply_tokens(weight, panel, smaller(last - panel, group), token, tokens, acc);
    });
    _tile_release();
    std::free(acc);
    return true;
}

bool float_panels(const Matmul& matmul, int64_t first, int64_t last) { return panels(FloatTiles{matmul}, first, last); }
bool codes_as_bf16(const IntMatmul& matmul, int64_t first, int64_t last) { return panels(CodeTiles{matmul}, first, last); }

constexpr Tiles tiles = {.floats = float_panels, .integers = amx_int_panels, .codes = codes_as_bf16};

}  // namespace

extern const Kernel amx_kernel = {
    .name = "amx", .title = "AMX", .floats = &avx512_floats, .bf16 = &avx512_bf16, .integers = &amx_integers, .tiles = &tiles};

}  // namespace rac
