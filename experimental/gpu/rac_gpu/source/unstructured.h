// Few tokens times a weight of any pattern, out [tokens, rows] = x [tokens, columns] W^T + bias.
//
// The rows of each 512 are sorted by what they store, and cut into tiles of 32. A block has a tile, each of its four warps a segment of the columns; the
// packer cuts segments where they have about as many bytes. A step is a tile's next FORMAT::STEP columns, of which a lane has STEP
// weights, in rows g, g + 8, g + 16 and g + 24, in the STEP / 4 columns that begin at t STEP / 4: these are pieces of 16 bytes of a row of x, which are
// its B operands as they are. FORMAT says which bit of the lane's mask stands for which weight.
// ROW_SCALES: 0, or what sums are multiplied by, times the scale of their row.
//
// A lane has streams of values of its own, and takes the next value of a stream where the mask says that it is stored. A line is 128
// bytes; in each line a lane has the word whose number is its own: it reads its own bank only. A ring in shared memory has FORMAT::RING lines,
// which cp.async fills in groups of 8. Lanes advance differently; the packer says how many groups there is room for after each step, and
// stores zeros in the streams of lanes that would stay behind by more than the ring holds.
//
// The packed weight, in units of 128 bytes where not said otherwise; T tiles:
//   4 bytes i: the row of the weight that is sorted row i, of the same 512 (32 T of them; any number >= rows where there is none).
//   16 bytes 4 k + w from 128 T on: tile k's segment w: where it begins in units; groups; first step | steps << 16; and the groups that
//     are copied before the first step, with what steps 0 to AHEAD - 1 wait for, 8 bits each.
//   4 bytes i from 192 T on, of FORMATs with a scale per row: the scale of sorted row i, fp32.
//   A segment: a byte per step (the groups to copy when it begins, after those before it are done), padded with zeros; 128 MASKS bytes
//     per step: each lane's masks; lines of scales, of FORMATs that have one per row and group of columns; the groups. Steps of a segment are a multiple of 128 / STEP.
#pragma once

#include "decode.h"

constexpr int SORTED = 512;  // rows
constexpr int WARPS = 4, LINE = 128, GROUP_LINES = 8, GROUP_BYTES = GROUP_LINES * LINE, MASKS_BYTES = 8 * LINE;

struct Segment {
  const u8 *counts, *masks, *scales, *values;
  int first_step, steps, groups;
  u32 before;
};

// Segment `warp` of a tile. One that does not fit into the weight's `units` has no steps: no bytes lead out of the weight.
template <class FORMAT>
DEVICE Segment segment_of(const u8* weight, int rows, int units, int tile, u32 warp) {
  const int tiles = (rows + 31) / 32;
  const uint4 entry = global_load16(weight + tiles * 128ll + (tile * 4ll + warp) * 16);
  Segment segment;
  segment.steps = entry.z >> 16;
  segment.first_step = entry.z & 0xffff;
  segment.groups = entry.y;
  segment.before = entry.w;
  const int counts = (segment.steps + LINE - 1) / LINE, scales = FORMAT::scale_lines(segment.steps);
  const long long size = counts + segment.steps * FORMAT::MASKS + scales + static_cast<long long>(entry.y) * GROUP_LINES;
  if (segment.steps > FORMAT::COUNTS_BYTES || segment.steps % (128 / FORMAT::STEP) != 0 || entry.x + size > units) {
    segment.steps = segment.groups = 0;
  }
  segment.counts = weight + entry.x * 128ll;
  segment.masks = segment.counts + counts * LINE;
  segment.scales = segment.masks + segment.steps * FORMAT::MASKS * LINE;
  segment.values = segment.scales + scales * LINE;
  return segment;
}

// Where the scale of a sorted row is.
DEVICE const u8* scale_of(const u8* weight, int rows, int sorted_row) { return weight + (rows + 31) / 32 * 192ll + sorted_row * 4ll; }

template <class FORMAT, int TOKEN_TILES>
struct Unstructured {
  static constexpr int STEP = FORMAT::STEP, AHEAD = FORMAT::AHEAD, PIECES = STEP / 32;  // of x, per lane and token tile
  static constexpr int RING_BYTES = FORMAT::RING * LINE, X_BYTES = TOKEN_TILES * PIECES * 512;
  static constexpr int MASKS = RING_BYTES + FORMAT::REPEATED * LINE, COUNTS = MASKS + MASKS_BYTES, X = COUNTS + FORMAT::COUNTS_BYTES;
  static constexpr int WARP_BYTES = (X + (AHEAD + 1) * X_BYTES + FORMAT::ALIGNED - 1) / FORMAT::ALIGNED * FORMAT::ALIGNED;

  Segment segment;
  const u8* x;  // this lane's pieces of its first token, in the step that is fetched next
  u32 lane, ring, write, turn;
  int columns, tokens, next_column, left;

  // x has AHEAD + 1 stages. Where that is no power of two, `turn` goes through them, since a remainder costs more.
  static DEVICE u32 stage(int step, u32 turn) { return ((AHEAD + 1) & AHEAD) == 0 ? (step & AHEAD) * X_BYTES : turn; }
  static DEVICE u32 next_turn(u32 turn) { return turn == AHEAD * X_BYTES ? 0 : turn + X_BYTES; }

  // Starts the copies of `step`: x, 512 bytes of masks if it is the first step that they are for, and the next groups of values.
  DEVICE void fetch(int step, int groups) {
    if (step < segment.steps) {
      const u32 to = ring + X + stage(step, turn) + lane * 16;
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++)
        UNROLL
        for (int piece = 0; piece < PIECES; piece++) {
          const bool inside = next_column + piece * 8 < columns && n * 8 + int(lane / 4) < tokens;
          cp_async(to + (n * PIECES + piece) * 512, x + static_cast<long long>(n) * 8 * columns * 2 + piece * 16, inside ? 16 : 0);
        }
      turn = next_turn(turn);
      x += STEP * 2;
      next_column += STEP;
      if (step % (4 / FORMAT::MASKS) == 0) {
        const int at = step * FORMAT::MASKS;
        cp_async(ring + MASKS + at % 8 * LINE + lane * 16, segment.masks + at * LINE + lane * 16);
      }
    }
    groups = groups < left ? groups : left;
    left -= groups;
    NO_UNROLL
    for (; groups > 0; groups--) {
      const u32 to = ring + write + lane * 16;
      cp_async(to, segment.values);
      cp_async(to + 512, segment.values + 512);
      // A lane that begins to read at the end of the ring reads on: the ring's first lines are copied a second time.
      if (write == 0 && (FORMAT::REPEATED % 4 == 0 || lane < FORMAT::REPEATED * 8)) {
        UNROLL
        for (int i = 0; i < FORMAT::REPEATED; i += 4) cp_async(to + RING_BYTES + i * LINE, segment.values + i * LINE);
      }
      write = write + GROUP_BYTES == RING_BYTES ? 0 : write + GROUP_BYTES;
      segment.values += GROUP_BYTES;
    }
    cp_async_commit();
  }

  static DEVICE void run(const u8* weight, const u8* x, const u8* bias, u8* out, int rows, int columns, int tokens, int units) {
    const u32 lane = thread_index() % 32, warp = warp_index();
    const int tile = block_y(), token0 = block_x() * TOKEN_TILES * 8;  // as in decode.h
    const int row = global_load4(weight + (tile * 32ll + lane) * 4);
    float scale = 1.0f;
    if (FORMAT::ROW_SCALES) scale = global_load_float(scale_of(weight, rows, tile * 32 + lane)) * FORMAT::ROW_SCALES;
    Unstructured self;
    self.segment = segment_of<FORMAT>(weight, rows, units, tile, warp);
    self.lane = lane;
    self.ring = warp * WARP_BYTES;
    self.write = self.turn = 0;
    self.columns = columns;
    self.tokens = tokens - token0;
    self.left = self.segment.groups;
    self.next_column = self.segment.first_step * STEP + lane % 4 * (STEP / 4);
    self.x = x + (static_cast<long long>(token0 + lane / 4) * columns + self.next_column) * 2;
    self.segment.values += lane * 16;
    const int steps = self.segment.steps;

    float sum[2][TOKEN_TILES][4];
    UNROLL
    for (int i = 0; i < 2; i++)
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) sum[i][n][0] = sum[i][n][1] = sum[i][n][2] = sum[i][n][3] = 0.0f;

    if (int(lane) * 16 < steps) cp_async(self.ring + COUNTS + lane * 16, self.segment.counts + lane * 16);
    UNROLL
    for (int step = 0; step < AHEAD; step++) self.fetch(step, self.segment.before >> 8 * step & 0xff);
    FORMAT streams;
    streams.open(self.ring, lane, self.segment);
    u32 turn = 0;
    for (int step = 0; step < steps; step++) {
      CP_ASYNC_WAIT(AHEAD - 1);
      SYNC_WARP();  // what this step needs is there for all lanes, and all have read what is overwritten now
      self.fetch(step + AHEAD, shared_load1(self.ring + COUNTS + step));
      const u32 masks = self.ring + MASKS + step % (8 / FORMAT::MASKS) * FORMAT::MASKS * LINE;
      streams.multiply(masks, self.ring + X + stage(step, turn) + lane * 16, sum);
      turn = next_turn(turn);
    }
    add_warps<2, TOKEN_TILES, WARPS, WARP_BYTES>(sum, bias, out, row, rows, token0, tokens, scale);
  }
};

// Where sorted rows g, g + 8, g + 16 and g + 24 of a tile are in a part of the weight that is expanded; -1 where there is none, also of a damaged order.
DEVICE void rows_in_part(const u8* weight, int tile, u32 g, int rows, int first_tile, int (&in_part)[4]) {
  UNROLL
  for (int h = 0; h < 4; h++) {
    const u32 sorted = tile * 32 + 8 * h + g, row = global_load4(weight + sorted * 4ll);
    in_part[h] = row < u32(rows) && row / SORTED == sorted / SORTED ? int(row) - first_tile * 16 : -1;
  }
}

// Stores eight columns of two rows of a part that is expanded, where they are inside.
DEVICE void store_eight(u8* out, const u32 (&four)[2][4], const int* in_part, int column, int columns) {
  UNROLL
  for (int h = 0; h < 2; h++) {
    if (in_part[h] >= 0 && column < columns) {
      uint4 eight;
      eight.x = four[h][0];
      eight.y = four[h][1];
      eight.z = four[h][2];
      eight.w = four[h][3];
      global_store16(out + (static_cast<long long>(in_part[h]) * columns + column) * 2, eight);
    }
  }
}

#define UNSTRUCTURED_KERNEL(NAME, FORMAT, TOKEN_TILES)                                                          \
  KERNEL(NAME, WARPS * 32)                                                                                      \
  (const u8* weight, const u8* x, const u8* bias, u8* out, int rows, int columns, int tokens, int units, int) { \
    Unstructured<FORMAT, TOKEN_TILES>::run(weight, x, bias, out, rows, columns, tokens, units);                 \
  }
