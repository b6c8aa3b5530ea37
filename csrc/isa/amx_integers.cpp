// build: x86_64 -mamx-tile -mamx-int8 -mavx512f -mavx512bw -mavx512vl -mavx512vbmi2 -mpopcnt
// AMX, integer weights: tdpbssd multiplies both bytes of x with a tile of 16 quads x 16 rows x 4 columns.
//
// Two panels at a time. A block of columns is expanded once (DENSE8 needs no expansion) and used by all tokens, 16 slots at a time.
// Tiles 0-3 hold the sums [byte][panel], 4-5 the bytes of x, 6-7 the weights. With x of bytes, the two bytes are 16 tokens each.
#include <cstring>

#include "isa/amx.h"

namespace rac {
namespace {

constexpr int64_t TILE = 16 * QUAD;      // bytes of a weight tile: 64 columns
constexpr int64_t MOST_TILES = BLOCK_MOST / 64;

void configure(int64_t m) {
    const uint8_t rows = static_cast<uint8_t>(smaller(m, 16));
    configure_tiles({rows, rows, rows, rows, rows, rows, 16, 16});
}

// Up to 16 quads as a whole tile.
const char* expand_tile(const uint32_t* masks, const char* values, int64_t quads, int8_t* tile) {
    for (int64_t q = 0; q < quads; q++) {
        const uint64_t mask = masks[2 * q] | static_cast<uint64_t>(masks[2 * q + 1]) << 32;
        _mm_prefetch(values + 2048, _MM_HINT_T0);
        _mm512_storeu_si512(tile + QUAD * q, expand_bytes(mask, values));
        values += RAC_COUNT(masks[2 * q]) + RAC_COUNT(masks[2 * q + 1]);
    }
    std::memset(tile + QUAD * quads, 0, TILE - QUAD * quads);
    return values;
}

// sums [panel][byte][16][16]. `weights`: the tiles of each panel, one after the other. x is [tiles][2][16][64].
template <bool two_panels>
void multiply(const int8_t* x, const int8_t* const* weights, int64_t tiles, int32_t* sums) {
    _tile_zero(0);
    if (two_panels) _tile_zero(1);
    _tile_zero(2);
    if (two_panels) _tile_zero(3);
    finish_stores(weights[0]);
    for (int64_t tile = 0; tile < tiles; tile++) {
        _tile_loadd(6, weights[0] + TILE * tile, 64);
        if (two_panels) _tile_loadd(7, weights[1] + TILE * tile, 64);
        _tile_loadd(4, x + 2 * TILE * tile, 64);
        _tile_dpbssd(0, 4, 6);
        if (two_panels) _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, x + 2 * TILE * tile + TILE, 64);
        _tile_dpbssd(2, 5, 6);
        if (two_panels) _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 256, 64);
    if (two_panels) _tile_stored(1, sums + 512, 64);
    if (two_panels) _tile_stored(3, sums + 768, 64);
    finish_stores(sums);
}

// acc[token][16] += sum * x_scale * scale: the integer sums of a panel and some tokens, [byte][16][16]. `bytes`: both bytes
// belong to two tokens, otherwise to a single token.
inline void add_scaled(const int32_t* sums, bool bytes, const float* x_scale, int64_t stride, __m512 scale, int64_t tokens,
                       float* acc) {
    for (int64_t i = 0; i < tokens; i++, sums += PANEL, acc += PANEL) {
        const __m512i first = _mm512_loadu_si512(sums);
        const __m512 sum = _mm512_cvtepi32_ps(
            bytes ? first : _mm512_add_epi32(_mm512_slli_epi32(first, 8), _mm512_loadu_si512(sums + 256)));
        const __m512 scaled = _mm512_mul_ps(_mm512_mul_ps(sum, _mm512_set1_ps(x_scale[i * stride])), scale);
        _mm512_storeu_ps(acc, _mm512_add_ps(_mm512_loadu_ps(acc), scaled));
    }
}

struct Buffers {
    float* acc;        // [panels][tokens][16]
    int8_t* expanded;  // two panels of a block
};

// Columns of a block of a panel as tiles; `values` moves on to the next block's.
const int8_t* tiles_of(const IntMatmul& matmul, int64_t panel, int64_t block, int64_t columns, int8_t* to, const char*& values) {
    const Weight& weight = matmul.out.weight;
    const int64_t column = block * matmul.block, tiles = (columns + 63) / 64;
    if (weight.type == DENSE8) return reinterpret_cast<const int8_t*>(values) + column * PANEL;
    const uint32_t* masks = weight.masks_from(panel, column);
    if (has_codes(weight.type)) {
        const int64_t quads = (columns + 3) / 4;
        values = avx512_integers.expand[weight.type - INT8](masks, values, weight.zeros_of(panel, block), quads, to);
        std::memset(to + QUAD * quads, 0, TILE * tiles - QUAD * quads);
        return to;
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t quads = smaller((columns - 64 * tile + 3) / 4, 16);
        values = expand_tile(masks + 32 * tile, values, quads, to + TILE * tile);
    }
    return to;
}

// Tokens [token, token + m) times `count` panels from `first` on.
void multiply_tokens(const IntMatmul& matmul, int64_t first, int64_t count, int64_t token, int64_t m, Buffers to) {
    const Weight& weight = matmul.out.weight;
    alignas(64) int32_t sums[2 * 2 * 256];
    const char* values[AMX_PANELS];
    for (int64_t p = 0; p < count; p++) values[p] = weight.values_of(first + p);
    std::memset(to.acc, 0, count * m * PANEL * sizeof(float));
    for (int64_t block = 0; block < matmul.blocks; block++) {
        const int64_t column = block * matmul.block, columns = matmul.columns_of(block), tiles = (columns + 63) / 64;
        for (int64_t panel = 0; panel < count; panel += 2) {
            const int panels = panel + 1 < count ? 2 : 1;
            const int8_t* weights[2] = {};
            __m512 scales[2] = {};
            for (int p = 0; p < panels; p++) {
                scales[p] = scale_of_rows(matmul, first + panel + p, block);
                weights[p] = tiles_of(matmul, first + panel + p, block, columns, to.expanded + p * MOST_TILES * TILE,
                                      values[panel + p]);
            }
            const int64_t per_slot = matmul.per_slot();
            const int8_t* x =
                reinterpret_cast<const int8_t*>(matmul.x) + 2 * (token / per_slot * matmul.stride + 16 * column);
            for (int64_t at = 0; at < m; at += 16 * per_slot) {
                (panels == 2 ? multiply<true> : multiply<false>)(x + 2 * (at / per_slot) * matmul.stride, weights, tiles, sums);
                for (int p = 0; p < panels; p++)
                    for (int64_t i = at; i < smaller(m, at + 16 * per_slot); i += 16)
                        add_scaled(sums + 512 * p + 256 * ((i - at) / 16), matmul.bytes,
                                   matmul.x_scale + (token + i) * matmul.blocks + block, matmul.blocks, scales[p],
                                   smaller(m - i, 16), to.acc + ((panel + p) * m + i) * PANEL);
            }
        }
    }
    matmul.out.store(matmul.out, first, count, token, m, {to.acc, 2 * m * PANEL, m * PANEL, PANEL});
}

}  // namespace

bool amx_int_panels(const IntMatmul& matmul, int64_t first, int64_t last) {
    const int64_t m = matmul.out.m, group = m <= 32 ? 2 : AMX_PANELS;
    Buffers buffers;
    buffers.acc = static_cast<float*>(std::malloc(group * smaller(m, AMX_TOKENS) * PANEL * sizeof(float)));
    buffers.expanded = static_cast<int8_t*>(std::aligned_alloc(64, 2 * MOST_TILES * TILE));
    const bool memory = buffers.acc && buffers.expanded;
    if (memory) {
        in_chunks(m, [&](int64_t token, int64_t tokens) {
            configure(tokens);
            for (int64_t panel = first; panel < last; panel += group)
                multiply_tokens(matmul, panel, smaller(last - panel, group), token, tokens, buffers);
        });
        _tile_release();
    }
    std::free(buffers.acc);
    std::free(buffers.expanded);
    return memory;
}

}  // namespace rac
