// AMX: vpexpandw spreads a mask word's weights into a row of a weight tile (16 pairs x 16 rows x 2, bf16), and tdpbf16ps
// multiplies the tile.
//
// Two panels and up to 32 lines at a time: tiles 0-3 hold the sums [half of the lines][panel], 4-5 hold x, 6-7 the weights.
// Up to 32 lines, the sums stay in their tiles over all columns, and each tile of weights is expanded just before it is
// multiplied. For more lines, 512 columns of the two panels are expanded once and used by every block of 32 lines of a chunk;
// 16 panels use these columns of x in turn, so that they are in the second-level cache.
#include "kernel.h"

#if (defined(__x86_64__) && defined(__linux__) && \
     (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)) || defined(RAC_EMULATE)
#include <algorithm>
#include <cstdlib>
#if defined(RAC_EMULATE)
#include "emulated_intrinsics.h"
#else
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt")
#endif
#endif

namespace rac {
namespace {

constexpr int64_t AHEAD = 16;                 // tiles expanded before they are multiplied, at most
constexpr int64_t TILE = TILE_WORDS * 32;     // bf16 values of a weight tile
constexpr int64_t BLOCK = 32;                 // lines, and rows of the weight, in one set of sums

// GCC does not know which memory its tile intrinsics read. Without this it may drop or move the stores before them.
inline void finish_stores(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the operand of ldtilecfg");

// Every tile has rows of 64 bytes. The tiles of x and of the sums have as many rows as there are lines.
void configure(int64_t m) {
    const uint8_t first = static_cast<uint8_t>(m < 16 ? m : 16);
    const uint8_t second = static_cast<uint8_t>(m <= 16 ? 1 : m < BLOCK ? m - 16 : 16);
    const uint8_t heights[8] = {first, first, second, second, first, second, 16, 16};
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = heights[tile];
    }
    finish_stores(&config);
    _tile_loadconfig(&config);
}

// `two_halves`: there are more than 16 lines here. `two_panels`: there is a second panel. The sums are [32][32] fp32.
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
    if (two_halves) _tile_loadd(2, acc + 16 * BLOCK, 128);
    if (two_halves && two_panels) _tile_loadd(3, acc + 16 * BLOCK + 16, 128);
}

template <bool two_halves, bool two_panels>
void store_sums(float* acc) {
    _tile_stored(0, acc, 128);
    if (two_panels) _tile_stored(1, acc + 16, 128);
    if (two_halves) _tile_stored(2, acc + 16 * BLOCK, 128);
    if (two_halves && two_panels) _tile_stored(3, acc + 16 * BLOCK + 16, 128);
}

// `x`: a tile of 16 lines; that of the next 16 is `half` after it.
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

const char* expand_tile(const uint32_t* masks, const char* values, uint16_t* tile) {
    for (int row = 0; row < TILE_WORDS; row++) {
        const uint32_t mask = masks[row];
        _mm_prefetch(values + 2048, _MM_HINT_T0);
        _mm512_store_si512(tile + 32 * row, _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(values)));
        values += 2 * RAC_COUNT(mask);
    }
    return values;
}

// Up to AHEAD tiles of columns of two panels: what is expanded and multiplied at a time.
struct Slice {
    int64_t at, end;  // tiles
    int64_t panel;    // the first one, counted from the group's first
    int panels;
    int64_t tiles() const { return (end - at) * panels; }
};

// The slices of a group of panels, one after the other: all panels of some columns, then of the next ones. It expands them.
class Slices {
public:
    Slices(const Weight& weight, int64_t first, int64_t count, int64_t ahead)
        : weight_(weight), first_(first), count_(count), ahead_(ahead), last_(weight.words / TILE_WORDS) {
        for (int64_t p = 0; p < count; p++) values_[p] = weight.values_of(first + p);
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
            values_[p] = expand_tile(weight_.masks_of(first_ + p) + tile * TILE_WORDS, values_[p],
                                     to + (2 * (done_ / slice_.panels) + done_ % slice_.panels) * TILE);
        }
    }

private:
    void begin(int64_t at, int64_t panel) {
        slice_ = {at, std::min(at + ahead_, last_), panel, panel + 1 < count_ ? 2 : 1};
        done_ = 0;
    }
    const Weight& weight_;
    int64_t first_, count_, ahead_, last_, done_ = 0;
    Slice slice_;
    const char* values_[AMX_PANELS];
};

// Lines [line, line + m) times `count` panels from `first` on. `acc` holds m lines, rounded up to blocks, of these panels.
// While a slice is multiplied, which takes the tile unit, the next one is expanded, which takes the vector units.
void multiply_lines(const Product& product, int64_t first, int64_t count, int64_t line, int64_t m, float* acc) {
    const uint16_t* x = static_cast<const uint16_t*>(product.x) + line * product.stride;
    const int64_t tiles = product.weight.words / TILE_WORDS, blocks = (m + BLOCK - 1) / BLOCK;
    alignas(64) uint16_t expanded[2][AHEAD * 2 * TILE];
    Slices next(product.weight, first, count, blocks == 1 ? 1 : AHEAD);
    next.expand(next.slice().tiles(), expanded[0]);
    for (int turn = 0; !next.ended(); turn ^= 1) {
        const Slice slice = next.slice();
        next.next();
        const int64_t steps = blocks * (slice.end - slice.at), to_expand = next.ended() ? 0 : next.slice().tiles();
        for (int64_t block = 0, taken = 0; block < blocks; block++) {
            const bool two_halves = m - block * BLOCK > 16;
            const Steps& step = two_halves ? (slice.panels == 2 ? steps_of<true, true> : steps_of<true, false>)
                                         : (slice.panels == 2 ? steps_of<false, true> : steps_of<false, false>);
            float* sums = acc + (slice.panel / 2 * blocks + block) * BLOCK * BLOCK;
            if (slice.at == 0 || blocks > 1) step.load_sums(sums, slice.at > 0);
            for (int64_t tile = slice.at; tile < slice.end; tile++) {
                step.multiply(x + block * BLOCK * product.stride + 16 * tile * TILE_COLUMNS, 16 * product.stride,
                              expanded[turn] + 2 * (tile - slice.at) * TILE);
                next.expand(to_expand * ++taken / steps, expanded[turn ^ 1]);
            }
            if (slice.end == tiles || blocks > 1) step.store_sums(sums);
        }
    }
    product.store(product, first, count, line, m, {acc, blocks * BLOCK * BLOCK, PANEL, BLOCK});
}

}  // namespace

bool amx_panels(const Product& product, int64_t first, int64_t last) {
    const int64_t chunk = amx_lines(product.m), group = product.m <= BLOCK ? 2 : AMX_PANELS;
    const int64_t blocks = (std::min(product.m, chunk) + BLOCK - 1) / BLOCK;
    float* acc = static_cast<float*>(std::aligned_alloc(64, group / 2 * blocks * BLOCK * BLOCK * sizeof(float)));
    if (!acc) return false;
    for (int64_t line = 0; line < product.m; line += chunk) {
        const int64_t lines = std::min(product.m - line, chunk);
        configure(lines);
        for (int64_t panel = first; panel < last; panel += group)
            multiply_lines(product, panel, std::min(last - panel, group), line, lines, acc);
    }
    _tile_release();
    std::free(acc);
    return true;
}

}  // namespace rac
RAC_TARGET_END

namespace rac {

#if defined(RAC_EMULATE)
bool has_amx() { return true; }
#else
static bool ask_for_amx() {
    unsigned a, b, c, d;
    if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;          // amx-bf16, amx-tile
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;             // ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA
}

bool has_amx() {
    static const bool granted = ask_for_amx();
    return granted;
}
#endif

}  // namespace rac
#else
namespace rac {
bool amx_panels(const Product&, int64_t, int64_t) { return false; }
bool has_amx() { return false; }
}  // namespace rac
#endif
