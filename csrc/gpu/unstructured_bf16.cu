// Few tokens times a weight of bf16 of any pattern, out [tokens, rows] = x [tokens, columns] W^T + bias.
//
// Rows are sorted by what they store, and cut into tiles of 32. A block has a tile, each of its four warps a segment of the columns; the
// packer cuts segments where they have about as many bytes. A step is a tile's next 32 columns. In it a lane has 32 weights: place
// p = 8 i + 4 j + r, b = 0 or 1 is row 16 i + 8 (r % 2) + g, column 8 t + 4 j + 2 (r / 2) + b: value b of register r of the A operand of
// product j of rows 16 i to 16 i + 15. So the eight columns of a lane are 16 bytes of a row of x, which are its B operands as they are.
//
// A lane has two streams of values, b = 0 and b = 1, and takes the next value of a stream where the mask says that it is stored. Value n of
// stream b is half b of word `lane` of line n, 128 bytes: a lane reads its own bank only. A ring in shared memory has 96 lines,
// which cp.async fills in groups of 8. Lanes advance differently; the packer says how many groups there is room for after each step, and
// stores zeros in the streams of lanes that would stay behind by more than the ring holds.
//
// The packed weight, in units of 128 bytes where not said otherwise; T tiles:
//   4 bytes i: the row of the weight that is sorted row i (32 T of them; any number >= rows where there is none).
//   16 bytes 4 k + w from 128 T on: tile k's segment w: where it begins in units; groups; first step | steps << 16; and the groups that
//     are copied before the first step, with what steps 0, 1 and 2 wait for, 8 bits each.
//   A segment: a byte per step (the groups to copy when it begins, after those before it are done), padded with zeros; 128 bytes per
//     step: each lane's mask, bit 2 p + b; the groups. Steps of a segment are a multiple of 4.
#include "decode.h"

constexpr int WARPS = 4, LINE = 128, GROUP_LINES = 8, GROUP_BYTES = GROUP_LINES * LINE, AHEAD = 3;
constexpr int RING_BYTES = 96 * LINE, COUNTS_BYTES = 512, MASKS_BYTES = 8 * LINE;
// A lane that begins half a step, 8 places, at the end of the ring reads on: the ring's first group is copied a second time.
constexpr int MASKS = RING_BYTES + GROUP_BYTES, COUNTS = MASKS + MASKS_BYTES, X = COUNTS + COUNTS_BYTES;

struct Segment {
  const u8 *counts, *masks, *values;
  int first_step, steps, groups;
  u32 before;
};

// Segment `warp` of a tile. One that does not fit into the weight's `units` has no steps: no bytes lead out of the weight.
DEVICE Segment segment_of(const u8* weight, int rows, int units, int tile, u32 warp) {
  const int tiles = (rows + 31) / 32;
  const uint4 entry = global_load16(weight + tiles * 128ll + (tile * 4ll + warp) * 16);
  Segment segment;
  segment.steps = entry.z >> 16;
  segment.first_step = entry.z & 0xffff;
  segment.groups = entry.y;
  segment.before = entry.w;
  const int counts = (segment.steps + LINE - 1) / LINE;
  const long long size = counts + segment.steps + static_cast<long long>(entry.y) * GROUP_LINES;
  if (segment.steps > COUNTS_BYTES || segment.steps % 4 != 0 || entry.x + size > units) segment.steps = segment.groups = 0;
  segment.counts = weight + entry.x * 128ll;
  segment.masks = segment.counts + counts * LINE;
  segment.values = segment.masks + segment.steps * LINE;
  return segment;
}

template <int TOKEN_TILES>
struct Unstructured {
  static constexpr int X_BYTES = TOKEN_TILES * 512, WARP_BYTES = X + (AHEAD + 1) * X_BYTES;
  static_assert(WARP_BYTES % 128 == 0 && ((AHEAD + 1) & AHEAD) == 0, "");

  Segment segment;
  const u8* x;  // this lane's piece of its first token, in the step that is fetched next
  u32 lane, ring, write;
  int columns, tokens, next_column, left;

  // Starts the copies of `step`: x, four masks if it is the first of four, and the next groups of values.
  DEVICE void fetch(int step, int groups) {
    if (step < segment.steps) {
      const u32 to = ring + X + step % (AHEAD + 1) * X_BYTES + lane * 16;
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) {
        const bool inside = next_column < columns && n * 8 + int(lane / 4) < tokens;
        cp_async(to + n * 512, x + static_cast<long long>(n) * 8 * columns * 2, inside ? 16 : 0);
      }
      x += 64;
      next_column += 32;
      if (step % 4 == 0) cp_async(ring + MASKS + step % 8 * LINE + lane * 16, segment.masks + step * LINE + lane * 16);
    }
    groups = groups < left ? groups : left;
    left -= groups;
    NO_UNROLL
    for (; groups > 0; groups--) {
      const u32 to = ring + write + lane * 16;
      cp_async(to, segment.values);
      cp_async(to + 512, segment.values + 512);
      if (write == 0) {
        cp_async(to + RING_BYTES, segment.values);
        cp_async(to + RING_BYTES + 512, segment.values + 512);
      }
      write = write + GROUP_BYTES == RING_BYTES ? 0 : write + GROUP_BYTES;
      segment.values += GROUP_BYTES;
    }
    cp_async_commit();
  }

  // The two values of place `p`: the next ones of the streams at `even` and `odd`, or zeros.
  static DEVICE u32 place(u32 mask, int p, u32& even, u32& odd) {
    u32 low = 0, high = 0;
    if (mask & 1u << 2 * p) {
      low = shared_load2(even);
      even += LINE;
    }
    if (mask & 2u << 2 * p) {
      high = shared_load2(odd);
      odd += LINE;
    }
    return two_halves(low, high);
  }

  static DEVICE void run(const u8* weight, const u8* x, const u8* bias, u8* out, int rows, int columns, int tokens, int units) {
    const u32 lane = thread_index() % 32, warp = warp_index();
    const int tile = block_x(), token0 = block_y() * TOKEN_TILES * 8;
    const int row = global_load4(weight + (tile * 32ll + lane) * 4);
    Unstructured self;
    self.segment = segment_of(weight, rows, units, tile, warp);
    self.lane = lane;
    self.ring = warp * WARP_BYTES;
    self.write = 0;
    self.columns = columns;
    self.tokens = tokens - token0;
    self.left = self.segment.groups;
    self.next_column = self.segment.first_step * 32 + lane % 4 * 8;
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
    u32 even = self.ring + lane * 4, odd = even + 2;
    for (int step = 0; step < steps; step++) {
      CP_ASYNC_WAIT(AHEAD - 1);
      SYNC_WARP();  // what this step needs is there for all lanes, and all have read what is overwritten now
      self.fetch(step + AHEAD, shared_load1(self.ring + COUNTS + step));
      const u32 mask = shared_load4(self.ring + MASKS + step % 8 * LINE + lane * 4);
      uint4 b[TOKEN_TILES];
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) b[n] = shared_load16(self.ring + X + step % (AHEAD + 1) * X_BYTES + n * 512 + lane * 16);
      UNROLL
      for (int i = 0; i < 2; i++) {
        UNROLL
        for (int j = 0; j < 2; j++) {
          u32 a[4];
          UNROLL
          for (int r = 0; r < 4; r++) a[r] = place(mask, 8 * i + 4 * j + r, even, odd);
          UNROLL
          for (int n = 0; n < TOKEN_TILES; n++) mma(sum[i][n], a, j == 0 ? b[n].x : b[n].z, j == 0 ? b[n].y : b[n].w);
        }
        if (even >= self.ring + RING_BYTES) even -= RING_BYTES;
        if (odd >= self.ring + RING_BYTES) odd -= RING_BYTES;
      }
    }
    add_warps<2, TOKEN_TILES, WARPS, WARP_BYTES>(sum, bias, out, row, rows, token0, tokens);
  }
};

#define UNSTRUCTURED_KERNEL(NAME, TOKEN_TILES)                                                                  \
  KERNEL(NAME, WARPS * 32)                                                                                      \
  (const u8* weight, const u8* x, const u8* bias, u8* out, int rows, int columns, int tokens, int units, int) { \
    Unstructured<TOKEN_TILES>::run(weight, x, bias, out, rows, columns, tokens, units);                         \
  }
UNSTRUCTURED_KERNEL(rac_unstructured_bf16_r2_t1, 1)
UNSTRUCTURED_KERNEL(rac_unstructured_bf16_r2_t2, 2)
UNSTRUCTURED_KERNEL(rac_unstructured_bf16_r2_t4, 4)

// Dense rows in the sorted order, from sorted row 16 first_tile on (first_tile is even); a warp per segment.
KERNEL(rac_unstructured_bf16_expand, WARPS * 32)
(const u8* weight, const u8*, const u8*, u8* out, int rows, int columns, int, int units, int first_tile) {
  const u32 lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int tile = first_tile / 2 + block_x();
  const Segment segment = segment_of(weight, rows, units, tile, warp_index());
  const u8* from = segment.values + lane * 4;
  const int lines = segment.groups * GROUP_LINES;
  int next[2] = {0, 0};
  for (int step = 0; step < segment.steps; step++) {
    const u32 mask = global_load4(segment.masks + step * LINE + lane * 4);
    const int column = (segment.first_step + step) * 32 + t * 8;
    UNROLL
    for (int i = 0; i < 2; i++) {
      u32 four[2][4];  // of rows g and g + 8
      UNROLL
      for (int p = 0; p < 8; p++) {
        u32 values[2] = {0, 0};
        UNROLL
        for (int b = 0; b < 2; b++) {
          const bool stored = mask >> (16 * i + 2 * p + b) & 1 && next[b] < lines;
          if (stored) values[b] = global_load2(from + next[b] * LINE + b * 2);
          next[b] += stored;
        }
        four[p % 2][p / 4 * 2 + p % 4 / 2] = two_halves(values[0], values[1]);
      }
      UNROLL
      for (int h = 0; h < 2; h++) {
        const int in_part = block_x() * 32 + 16 * i + 8 * h + g;
        if (first_tile * 16 + in_part < rows && column < columns) {
          uint4 eight;
          eight.x = four[h][0];
          eight.y = four[h][1];
          eight.z = four[h][2];
          eight.w = four[h][3];
          global_store16(out + (static_cast<long long>(in_part) * columns + column) * 2, eight);
        }
      }
    }
  }
}
