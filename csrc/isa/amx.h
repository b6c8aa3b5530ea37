// What both sources for AMX share.
#pragma once
#include <cstdlib>

#include "gemm/kernel.h"
#include "isa/avx512.h"

namespace rac {
namespace {

// Tokens that several panels use in turn, and these panels. With 512 columns of x they take 640 KiB of a second-level cache of 2 MiB,
// and with the sums another 384.
constexpr int64_t AMX_TOKENS = 384, AMX_PANELS = 16;

RAC_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Call work(token, tokens) for each chunk of m tokens. Chunks are whole blocks of 32 tokens, but for the last block; their heights
// differ by a block at most.
template <class Work>
RAC_INLINE void in_chunks(int64_t m, const Work& work) {
    const int64_t blocks = (m + 31) / 32, chunks = (m + AMX_TOKENS - 1) / AMX_TOKENS;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t token = blocks * chunk / chunks * 32, end = blocks * (chunk + 1) / chunks * 32;
        work(token, smaller(m, end) - token);
    }
}

// GCC does not know which memory its tile intrinsics read. Without this it may drop or move the stores before them.
RAC_INLINE void finish_stores(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "the operand of ldtilecfg");

// Every tile has rows of 64 bytes; `heights`: their rows.
RAC_INLINE void configure_tiles(const uint8_t (&heights)[8]) {
    TileConfig config;
    for (int tile = 0; tile < 8; tile++) {
        config.row_bytes[tile] = 64;
        config.rows[tile] = heights[tile];
    }
    finish_stores(&config);
    _tile_loadconfig(&config);
}

}  // namespace
}  // namespace rac
