// Weights of bf16 of any pattern. A step has 32 columns. Of a lane's 32 weights, place
// p = 8 i + 4 j + r, b = 0 or 1 is row 16 i + 8 (r % 2) + g, column 8 t + 4 j + 2 (r / 2) + b: value b of register r of the A operand of
// product j of rows 16 i to 16 i + 15. It is bit 2 p + b of the lane's mask.
//
// A lane has two streams of values, b = 0 and b = 1. Value n of stream b is half b of the lane's word of line n.
#include "unstructured.h"

struct Bf16Streams {
  static constexpr int STEP = 32, AHEAD = 3, RING = 96, MASKS = 1, COUNTS_BYTES = 512, ALIGNED = 128;
  static constexpr int REPEATED = 8;  // lines: half a step, 8 places, is read without a look at the ring's end
  static constexpr float ROW_SCALES = 0.0f;
  static DEVICE int scale_lines(int) { return 0; }

  u32 even, odd, end, lane;

  DEVICE void open(u32 ring, u32 lane_, const Segment&) {
    lane = lane_;
    even = ring + lane * 4;
    odd = even + 2;
    end = ring + RING * LINE;
  }

  // The two values of place `p`: the next ones of the streams, or zeros.
  DEVICE u32 place(u32 mask, int p) {
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

  template <int TOKEN_TILES>
  DEVICE void multiply(u32 masks, u32 x, float (&sum)[2][TOKEN_TILES][4]) {
    const u32 mask = shared_load4(masks + lane * 4);
    uint4 b[TOKEN_TILES];
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++) b[n] = shared_load16(x + n * 512);
    UNROLL
    for (int i = 0; i < 2; i++) {
      UNROLL
      for (int j = 0; j < 2; j++) {
        u32 a[4];
        UNROLL
        for (int r = 0; r < 4; r++) a[r] = place(mask, 8 * i + 4 * j + r);
        UNROLL
        for (int n = 0; n < TOKEN_TILES; n++) mma(sum[i][n], a, j == 0 ? b[n].x : b[n].z, j == 0 ? b[n].y : b[n].w);
      }
      if (even >= end) even -= RING * LINE;
      if (odd >= end) odd -= RING * LINE;
    }
  }
};

UNSTRUCTURED_KERNEL(rac_unstructured_bf16_r2_t1, Bf16Streams, 1)
UNSTRUCTURED_KERNEL(rac_unstructured_bf16_r2_t2, Bf16Streams, 2)
UNSTRUCTURED_KERNEL(rac_unstructured_bf16_r2_t4, Bf16Streams, 4)

// Dense rows, from row 16 first_tile on, a multiple of 512; a warp per segment.
KERNEL(rac_unstructured_bf16_expand, WARPS * 32)
(const u8* weight, const u8*, const u8*, u8* out, int rows, int columns, int, int units, int first_tile) {
  const u32 lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int tile = first_tile / 2 + block_x();
  const Segment segment = segment_of<Bf16Streams>(weight, rows, units, tile, warp_index());
  const u8* from = segment.values + lane * 4;
  const int lines = segment.groups * GROUP_LINES;
  int in_part[4];
  rows_in_part(weight, tile, g, rows, first_tile, in_part);
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
      store_eight(out, four, in_part + 2 * i, column, columns);
    }
  }
}
