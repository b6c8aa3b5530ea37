// Tens of tokens times a 2:4 weight, out [tokens, rows] = x [tokens, columns] W^T + bias, bound by what the multiprocessors read from L2.
//
// A block has 128 rows and all columns. Its four warps have two row tiles each and go through the chunks of columns together, with one ring for all:
// x is copied once for 128 rows, where the blocks of decode.h, whose warps share the columns, copy it once for 16 to 64.
// FORMAT is that of decode.h, and so are the sums of a lane.
#pragma once

#include "decode.h"

template <class FORMAT, int TOKEN_TILES, int UNITS, int STAGES>
struct Wide {
  using Part = Decode<FORMAT, 2, TOKEN_TILES, UNITS, STAGES, 1>;  // what a warp does
  static constexpr int WARPS = 4, TOKENS = TOKEN_TILES * 8, COPIED_TOKENS = TOKENS / WARPS;
  static constexpr int STAGE_BYTES = Part::X_BYTES + WARPS * Part::WEIGHT_BYTES, RING_BYTES = STAGES * STAGE_BYTES;
  static_assert(COPIED_TOKENS % 8 == 0, "the order of pieces repeats after 8 tokens");

  static DEVICE void run(const u8* weight, const u8* x, const u8* bias, u8* out, int rows, int columns, int tokens, int units) {
    const u32 lane = thread_index() % 32, warp = warp_index();
    const int tile = (block_y() * WARPS + warp) * 2, last_tile = (rows - 1) / 16, token0 = block_x() * TOKENS;
    Part part;  // a warp without rows reads the last tile and stores nothing
    part.begin(weight, x, rows, columns, tokens, units, tile < last_tile ? tile : last_tile, token0 + warp * COPIED_TOKENS, 0);
    const u32 own_weights = Part::X_BYTES + warp * Part::WEIGHT_BYTES, own_x = warp * COPIED_TOKENS * Part::PIECES * 16;

    float sum[2][TOKEN_TILES][4];
    UNROLL
    for (int r = 0; r < 2; r++)
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) sum[r][n][0] = sum[r][n][1] = sum[r][n][2] = sum[r][n][3] = 0.0f;

    const int count = units / UNITS;
    UNROLL
    for (int s = 0; s < STAGES - 1; s++) {
      if (s < count) {
        part.load_weights(s * STAGE_BYTES + own_weights);
        part.template load_x<COPIED_TOKENS>(s * STAGE_BYTES + own_x);
      }
      cp_async_commit();
    }
    u32 read = 0, write = (STAGES - 1) * STAGE_BYTES;
    for (int i = 0; i < count; i++) {
      CP_ASYNC_WAIT(STAGES - 2);
      SYNC_THREADS();  // this chunk is there for all warps, and all have read the one that is overwritten now
      if (i + STAGES - 1 < count) {
        part.load_weights(write + own_weights);
        part.template load_x<COPIED_TOKENS>(write + own_x);
      }
      cp_async_commit();
      part.multiply(read + own_weights, read, sum);
      read = read + STAGE_BYTES == RING_BYTES ? 0 : read + STAGE_BYTES;
      write = write + STAGE_BYTES == RING_BYTES ? 0 : write + STAGE_BYTES;
    }

    const int first_token = token0 + int(lane % 4) * 2, left = tokens - first_token;
    const long long token_bytes = 2ll * rows;
    UNROLL
    for (int h = 0; h < 4; h++) {
      const int row = tile * 16 + h * 8 + int(lane / 4);
      if (row >= rows) continue;
      const float scale = FORMAT::ROW_SCALES ? global_load_float(row_scale<FORMAT>(weight, rows, units, row)) * FORMAT::ROW_SCALES : 1.0f;
      const float added = bias != nullptr ? global_load_bf16(bias + row * 2) : 0.0f;
      u8* to = out + first_token * token_bytes + row * 2;
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) {
        UNROLL
        for (int i = 0; i < 2; i++)
          if (n * 8 + i < left) global_store_bf16(to + i * token_bytes, sum[h / 2][n][h % 2 * 2 + i] * scale + added);
        to += 8 * token_bytes;
      }
    }
  }
};

#define WIDE_KERNEL(NAME, ...)                                                                                        \
  LARGE_KERNEL(NAME, (Wide<__VA_ARGS__>::WARPS * 32))                                                                 \
  (const u8* weight, const u8* x, const u8* bias, u8* out, int rows, int columns, int tokens, int units, int) {       \
    Wide<__VA_ARGS__>::run(weight, x, bias, out, rows, columns, tokens, units);                                       \
  }
