// Few tokens times a 2:4 weight, out [tokens, rows] = x [tokens, columns] W^T + bias, bound by reading W.
//
// A block has ROW_TILES tiles of 16 rows and all columns. Its warps take turns at chunks of UNITS units of columns; each has a
// ring of STAGES chunks in shared memory that cp.async fills ahead, so that loads are under way however the compiler orders the
// products. At the end the warps' sums are added in a fixed order: the same input gives the same bits.
//
// FORMAT says what a unit is: the weights of 16 rows and FORMAT::COLUMNS columns, FORMAT::BYTES, in the order that lanes read.
// Lane l of a warp: g = l / 4, t = l % 4. Sums d[0], d[1] are row g, tokens 2t, 2t + 1; d[2], d[3] are row g + 8.
#pragma once

#include "ptx.h"

// The end of a kernel: adds the sums of all warps in their order, and the bias, and stores the result. Warp w has WARP_BYTES of shared
// memory from w WARP_BYTES on, in which a lane writes words whose number is its own plus a multiple of 32: no other lane may still read
// them. `row`: number thread_index() % (16 ROW_TILES) of the block's rows, where it is in the result.
template <int ROW_TILES, int TOKEN_TILES, int WARPS, int WARP_BYTES>
DEVICE void add_warps(const float (&sum)[ROW_TILES][TOKEN_TILES][4], const u8* bias, u8* out, int row, int rows, int token0, int tokens) {
  static_assert(WARPS * 32 % (ROW_TILES * 16) == 0, "a thread's outputs are of one row");
  const u32 lane = thread_index() % 32, own = warp_index() * WARP_BYTES;
  UNROLL
  for (int r = 0; r < ROW_TILES; r++)
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++)
      UNROLL
      for (int i = 0; i < 4; i++) shared_store_float(own + (((r * TOKEN_TILES + n) * 4 + i) * 32 + lane) * 4, sum[r][n][i]);
  SYNC_THREADS();
  for (u32 o = thread_index(); o < ROW_TILES * 16 * TOKEN_TILES * 8; o += WARPS * 32) {
    const u32 r = o % (ROW_TILES * 16), n = o / (ROW_TILES * 16);
    const int token = token0 + n;
    const u32 i = r % 16 / 8 * 2 + n % 2, from = r % 8 * 4 + n % 8 / 2;
    const u32 at = (((r / 16 * TOKEN_TILES + n / 8) * 4 + i) * 32 + from) * 4;
    float total = shared_load_float(at);
    UNROLL
    for (int w = 1; w < WARPS; w++) total += shared_load_float(w * WARP_BYTES + at);
    if (u32(row) < u32(rows) && token < tokens) {
      if (bias != nullptr) total += global_load_bf16(bias + row * 2);
      global_store_bf16(out + (static_cast<long long>(token) * rows + row) * 2, total);
    }
  }
}

template <class FORMAT_, int ROW_TILES_, int TOKEN_TILES_, int UNITS_, int STAGES_, int WARPS_>
struct Decode {
  using FORMAT = FORMAT_;
  static constexpr int ROW_TILES = ROW_TILES_, TOKEN_TILES = TOKEN_TILES_, UNITS = UNITS_, STAGES = STAGES_, WARPS = WARPS_;
  static constexpr int COLUMNS = UNITS * FORMAT::COLUMNS;       // of a chunk
  static constexpr int TILE_BYTES = UNITS * FORMAT::BYTES;      // of a chunk of one row tile
  static constexpr int WEIGHT_BYTES = ROW_TILES * TILE_BYTES;
  static constexpr int PIECES = COLUMNS / 8;                    // of 16 bytes, in a chunk of a row of x
  static constexpr int X_BYTES = TOKEN_TILES * 8 * PIECES * 16;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
  static constexpr int RING_BYTES = STAGES * STAGE_BYTES;
  static constexpr int TOKENS_AT_ONCE = 32 / PIECES;            // rows of x that a warp copies with one instruction
  static constexpr int AT_ONCE = ROW_TILES * TOKEN_TILES >= 8 ? 2 : ROW_TILES;  // row tiles whose products take turns, within the registers
  static_assert(PIECES <= 32 && PIECES >= 8 && TILE_BYTES % 16 == 0 && STAGES >= 3, "");

  // Of the 16-byte pieces of a chunk of one row tile, those of whole instructions of 32 lanes, and the others: these are
  // copied together for all row tiles.
  static constexpr int WHOLE = TILE_BYTES / 16 / 32, OTHERS = TILE_BYTES / 16 % 32;
  static constexpr int ALL_OTHERS = ROW_TILES * OTHERS, OTHER_COPIES = (ALL_OTHERS + 31) / 32;

  const u8* weight;  // this lane's first piece of the first row tile, in this warp's next chunk
  const u8* x;       // this lane's piece of its first token, in this warp's next chunk
  int tile_from[ROW_TILES];   // from `weight`
  int other_from[OTHER_COPIES ? OTHER_COPIES : 1];  // from `weight`
  u32 other_to[OTHER_COPIES ? OTHER_COPIES : 1];          // from the stage
  u32 lane, x_to;
  int columns, tokens, next_column;

  // Starts the copies of this warp's next chunk to a stage: the weights, and rows of x.
  DEVICE void load(u32 to) {
    UNROLL
    for (int r = 0; r < ROW_TILES; r++)
      UNROLL
      for (int i = 0; i < WHOLE; i++) cp_async(to + lane * 16 + r * TILE_BYTES + i * 512, weight + tile_from[r] + i * 512);
    UNROLL
    for (int i = 0; i < OTHER_COPIES; i++)
      if (32 * i + 32 <= ALL_OTHERS || 32 * i + lane < ALL_OTHERS) cp_async(to + other_to[i], weight + other_from[i]);
    weight += WARPS * TILE_BYTES;
    const bool inside = next_column < columns;
    UNROLL
    for (int i = 0; i < TOKEN_TILES * 8; i += TOKENS_AT_ONCE) {
      const u32 row = to + WEIGHT_BYTES + (x_to ^ (i % 8 * 16)) + i * PIECES * 16;
      cp_async(row, x + static_cast<long long>(i) * columns * 2, inside && i + int(lane / PIECES) < tokens ? 16 : 0);
    }
    x += WARPS * COLUMNS * 2;
    next_column += WARPS * COLUMNS;
  }

  DEVICE void multiply(u32 weights_at, u32 x_at, float (&sum)[ROW_TILES][TOKEN_TILES][4]) {
    const u32 row = x_at + (lane % 8) * PIECES * 16;
    const u32 swizzled = ((lane / 8) ^ (lane % 8)) * 16;
    UNROLL
    for (int unit = 0; unit < UNITS; unit++)
      UNROLL
      for (int first = 0; first < ROW_TILES; first += AT_ONCE) {
        FORMAT weights[AT_ONCE];
        float part[AT_ONCE][TOKEN_TILES][4];  // for formats with scales
        UNROLL
        for (int r = 0; r < AT_ONCE; r++) weights[r].open(weights_at + (first + r) * TILE_BYTES + unit * FORMAT::BYTES, lane);
        UNROLL
        for (int product = 0; product < FORMAT::PRODUCTS; product++) {
          u32 b[TOKEN_TILES][4];
          const int j = unit * FORMAT::PRODUCTS + product;
          UNROLL
          for (int n = 0; n < TOKEN_TILES; n++) ldmatrix(b[n], row + n * 8 * PIECES * 16 + (swizzled ^ (j * 64)));
          UNROLL
          for (int r = 0; r < AT_ONCE; r++) weights[r].multiply(product, sum[first + r], part[r], b);
        }
      }
  }

  // Gets ready for the row tiles from `tile` on, which is one of the weight's, the tokens from `token0` on, and chunk `chunk` first.
  DEVICE void begin(const u8* weight_, const u8* x_, int rows, int columns_, int all_tokens, int units, int tile, int token0, int chunk) {
    const long long stride = static_cast<long long>(units) * FORMAT::BYTES;
    lane = thread_index() % 32;
    columns = columns_;
    tokens = all_tokens - token0;
    weight = weight_ + tile * stride + chunk * TILE_BYTES + lane * 16;
    const int behind = (rows - 1) / 16 - tile;  // whole tiles behind the first; beyond them, the last one is read again
    UNROLL
    for (int r = 0; r < ROW_TILES; r++) tile_from[r] = r == 0 ? 0 : int((r < behind ? r : behind) * stride);
    UNROLL
    for (int i = 0; i < OTHER_COPIES; i++) {
      const int r = (32 * i + lane) / OTHERS, piece = WHOLE * 32 + (32 * i + lane) % OTHERS;
      other_from[i] = int((r < behind ? r : behind) * stride) + (piece - int(lane)) * 16;
      other_to[i] = r * TILE_BYTES + piece * 16;
    }
    const u32 token = lane / PIECES, piece = lane % PIECES;
    next_column = chunk * COLUMNS + piece * 8;
    x = x_ + (static_cast<long long>(token0 + token) * columns + next_column) * 2;
    // Rows of 8 tokens would start in the same bank: each token's pieces are permuted by its number.
    x_to = (token * PIECES + (piece ^ token % 8)) * 16;
  }

  // The whole kernel. `units` is the number of units of a row tile in memory, a multiple of UNITS. Blocks of the same rows are neighbours, so that
  // they read the weights at about the same time: once from memory, and then from L2.
  static DEVICE void run(const u8* weight, const u8* x, const u8* bias, u8* out, int rows, int columns, int tokens, int units) {
    const u32 warp = warp_index();
    const int tile = block_y() * ROW_TILES, token0 = block_x() * TOKEN_TILES * 8;
    const int chunks = units / UNITS;
    const int count = (chunks + WARPS - 1 - int(warp)) / WARPS;
    Decode self;
    self.begin(weight, x, rows, columns, tokens, units, tile, token0, warp);

    float sum[ROW_TILES][TOKEN_TILES][4];
    UNROLL
    for (int r = 0; r < ROW_TILES; r++)
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++)
        UNROLL
        for (int i = 0; i < 4; i++) sum[r][n][i] = 0.0f;

    const u32 ring = warp * RING_BYTES, end = ring + RING_BYTES;
    UNROLL
    for (int s = 0; s < STAGES - 1; s++) {
      if (s < count) self.load(ring + s * STAGE_BYTES);
      cp_async_commit();
    }
    u32 read = ring, write = ring + (STAGES - 1) * STAGE_BYTES;
    for (int i = 0; i < count; i++) {
      CP_ASYNC_WAIT(STAGES - 2);
      SYNC_WARP();  // this chunk is there for all lanes, and all have read the one that is overwritten now
      if (i + STAGES - 1 < count) self.load(write);
      cp_async_commit();
      self.multiply(read, read + WEIGHT_BYTES, sum);
      read = read + STAGE_BYTES == end ? ring : read + STAGE_BYTES;
      write = write + STAGE_BYTES == end ? ring : write + STAGE_BYTES;
    }

    SYNC_WARP();
    const int row = tile * 16 + thread_index() % (ROW_TILES * 16);
    add_warps<ROW_TILES, TOKEN_TILES, WARPS, RING_BYTES>(sum, bias, out, row, rows, token0, tokens);
  }
};

// Adds the sums of a group of columns, times the scales of rows g and g + 8.
template <int TOKEN_TILES>
DEVICE void add_scaled(float (&sum)[TOKEN_TILES][4], const float (&part)[TOKEN_TILES][4], float low, float high) {
  UNROLL
  for (int n = 0; n < TOKEN_TILES; n++) {
    sum[n][0] += low * part[n][0];
    sum[n][1] += low * part[n][1];
    sum[n][2] += high * part[n][2];
    sum[n][3] += high * part[n][3];
  }
}

// Where two values stand in four columns: those of columns 0 and 1, and of 2 and 3. `places` is a nibble of metadata.
DEVICE uint2 four_columns(u32 values, u32 places) {
  const u32 first = places & 3, second = places >> 2;
  uint2 four;
  four.x = (first == 0 ? values & 0xffff : first == 1 ? values << 16 : 0) | (second == 1 ? values & 0xffff0000 : 0);
  four.y = (first == 2 ? values & 0xffff : 0) | (second == 2 ? values >> 16 : second == 3 ? values & 0xffff0000 : 0);
  return four;
}

// All kernels have the same parameters. `bias` may be null; `first_tile` is used by those that expand.
#define DECODE_KERNEL_AS(KERNEL, NAME, ...)                                                                           \
  KERNEL(NAME, (Decode<__VA_ARGS__>::WARPS * 32))                                                                     \
  (const u8* weight, const u8* x, const u8* bias, u8* out, int rows, int columns, int tokens, int units, int) {       \
    Decode<__VA_ARGS__>::run(weight, x, bias, out, rows, columns, tokens, units);                                     \
  }
#define DECODE_KERNEL(NAME, ...) DECODE_KERNEL_AS(KERNEL, NAME, __VA_ARGS__)
#define LARGE_DECODE_KERNEL(NAME, ...) DECODE_KERNEL_AS(LARGE_KERNEL, NAME, __VA_ARGS__)
