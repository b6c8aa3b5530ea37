// Weights of 4 or 8 bits of any pattern, for unstructured.h. A step has 64 columns. Of a lane's 64 weights, group n = 2 j + q of row tile i has four:
// number k is row 16 i + 8 (k % 2) + g, column 16 t + 4 j + 2 q + k / 2: value k / 2 of register 2 q + k % 2 of the A operand of
// product j of rows 16 i to 16 i + 15. It is bit n % 4 + 16 (n / 4) + 4 k of word i of the lane's masks, 8 bytes.
//
// A lane has one stream of values, VALUES::BITS each; value n is number n % (32 / BITS) of the lane's word of line n / (32 / BITS). Groups take theirs
// from a window of two words, so that a segment has room for a word behind the last value.
#pragma once

#include "unstructured.h"

template <class VALUES>
struct Windows {
  static constexpr int STEP = 64, AHEAD = 2, MASKS = 2, COUNTS_BYTES = 256, REPEATED = 1;  // a line: the second word of a window
  static constexpr int RING = VALUES::RING, ALIGNED = RING * LINE, BITS = VALUES::BITS;
  u32 line, bits, lane, ring;  // `line`, `bits`: 4 BITS and BITS times the number of the next value

  DEVICE void begin(u32 ring_, u32 lane_) {
    lane = lane_;
    ring = kept(ring_ + lane * 4);
    line = bits = 0;
  }

  // Registers 2 q and 2 q + 1 of a product. `stored`: bits 0, 4, 8 and 12.
  DEVICE void four(u32 stored, u32& first, u32& second) {
    const u32 at = line & (RING - 1) * LINE | ring;  // rings begin at multiples of their size
    const u32 window = VALUES::bytes(funnel_shift(shared_load4(at), shared_load4(at + LINE), bits));
    // Nibble k: the number of bits below bit 4 k where it is stored, 4 to 7 where it is not. 12 and the 4 are a carry of 1.
    const u32 chosen = choose_bytes(window, VALUES::NOTHING, stored * 0x110c + 0x4444);
    const u32 count = count_bits(stored);
    line += count * (4 * BITS);
    bits += count * BITS;
    VALUES::four(chosen, first, second);
  }

  // The x of a step: of token tile n, columns 0 to 7 and 8 to 15 of the lane's.
  template <int TOKEN_TILES>
  static DEVICE void load(u32 x, uint4 (&b)[TOKEN_TILES][2]) {
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++) {
      b[n][0] = shared_load16(x + n * 1024);
      b[n][1] = shared_load16(x + n * 1024 + 512);
    }
  }

  // The products of a row tile in a step; `mask`: its word of the lane's masks.
  template <int TOKEN_TILES>
  DEVICE void multiply_tile(u32 mask, const uint4 (&b)[TOKEN_TILES][2], float (&sum)[TOKEN_TILES][4]) {
    UNROLL
    for (int j = 0; j < 4; j++) {
      u32 a[4];
      UNROLL
      for (int q = 0; q < 2; q++) {
        const int n = 2 * j + q;
        four(mask >> (n % 4 + 16 * (n / 4)) & 0x1111, a[2 * q], a[2 * q + 1]);
      }
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) {
        const uint4 piece = b[n][j / 2];
        mma(sum[n], a, j % 2 == 0 ? piece.x : piece.z, j % 2 == 0 ? piece.y : piece.w);
      }
    }
  }
};

// With a scale per row and COLUMNS_PER_SCALE columns. Behind the masks of a segment, a line of scales per so many columns: word 4 g + h is the scale of
// row 8 h + g, fp32.
template <class VALUES, int COLUMNS_PER_SCALE>
struct GroupedWindows : Windows<VALUES> {
  using Base = Windows<VALUES>;
  static constexpr int STEP = Base::STEP;
  static constexpr float ROW_SCALES = 0.0f;
  static DEVICE int scale_lines(int steps) { return steps * STEP / COLUMNS_PER_SCALE; }
  static DEVICE float scale_in(const u8*, int, int, const Segment& segment, int step, int h, u32 g) {
    return global_load_float(segment.scales + step * STEP / COLUMNS_PER_SCALE * LINE + (g * 4 + h) * 4);
  }

  const u8* scales;  // of this lane's rows, in the step that comes next
  uint4 next;        // these, which were asked for a step ahead
  int step, steps;

  DEVICE void open(u32 ring, u32 lane, const Segment& segment) {
    Base::begin(ring, lane);
    step = 0;
    steps = segment.steps;
    scales = segment.scales + lane / 4 * 16;
    if (steps > 0) next = global_load16(scales);
  }

  // The products of a step are summed unscaled, then scaled and added in fp32.
  template <int TOKEN_TILES>
  DEVICE void multiply(u32 masks, u32 x, float (&sum)[2][TOKEN_TILES][4]) {
    const uint2 mask = shared_load8(masks + Base::lane * 8);
    const uint4 words = next;
    const float scale[4] = {as_float(words.x) * VALUES::SCALE, as_float(words.y) * VALUES::SCALE, as_float(words.z) * VALUES::SCALE,
                            as_float(words.w) * VALUES::SCALE};
    step++;
    if (step % (COLUMNS_PER_SCALE / STEP) == 0) scales += LINE;
    if (step < steps) next = global_load16(scales);
    uint4 b[TOKEN_TILES][2];
    Base::load(x, b);
    UNROLL
    for (int i = 0; i < 2; i++) {
      float part[TOKEN_TILES][4];
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0.0f;
      Base::multiply_tile(i == 0 ? mask.x : mask.y, b, part);
      add_scaled(sum[i], part, scale[2 * i], scale[2 * i + 1]);
    }
  }
};

// Dense rows, scaled and rounded to bf16, from row 16 first_tile on, a multiple of 512; a warp per segment.
template <class FORMAT, class VALUES>
DEVICE void expand_windows(const u8* weight, u8* out, int rows, int columns, int units, int first_tile) {
  constexpr int BITS = VALUES::BITS, PER_WORD = 32 / BITS, CODES = (1 << BITS) - 1;
  const u32 lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int tile = first_tile / 2 + block_x();
  const Segment segment = segment_of<FORMAT>(weight, rows, units, tile, warp_index());
  const u8* from = segment.values + lane * 4;
  const int values = segment.groups * GROUP_LINES * PER_WORD;
  int next = 0, in_part[4];
  rows_in_part(weight, tile, g, rows, first_tile, in_part);
  float scale[4];
  if (FORMAT::ROW_SCALES) {
    UNROLL
    for (int h = 0; h < 4; h++) scale[h] = FORMAT::scale_in(weight, rows, tile, segment, 0, h, g);
  }
  for (int step = 0; step < segment.steps; step++) {
    if (!FORMAT::ROW_SCALES) {
      UNROLL
      for (int h = 0; h < 4; h++) scale[h] = FORMAT::scale_in(weight, rows, tile, segment, step, h, g);
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
      const u32 mask = global_load4(segment.masks + step * 2 * LINE + lane * 8 + i * 4);
      UNROLL
      for (int piece = 0; piece < 2; piece++) {  // 8 columns
        u32 four[2][4];  // of rows g and g + 8
        UNROLL
        for (int p = 0; p < 4; p++) {  // group n, columns 2 p and 2 p + 1 of the piece
          const int n = 4 * piece + p;
          u32 bits[4];
          UNROLL
          for (int k = 0; k < 4; k++) {
            const bool stored = mask >> (n % 4 + 16 * (n / 4) + 4 * k) & 1 && next < values;
            u32 value = VALUES::NOTHING & CODES;
            if (stored) value = global_load4(from + next / PER_WORD * LINE) >> (next % PER_WORD * BITS) & CODES;
            next += stored;
            bits[k] = bf16_bits(scale[2 * i + k % 2] * VALUES::one(value));
          }
          four[0][p] = two_halves(bits[0], bits[2]);
          four[1][p] = two_halves(bits[1], bits[3]);
        }
        const int column = (segment.first_step + step) * 64 + t * 16 + piece * 8;
        store_eight(out, four, in_part + 2 * i, column, columns);
      }
    }
  }
}

#define EXPAND_WINDOWS_KERNEL(NAME, FORMAT, VALUES)                                                              \
  KERNEL(NAME, WARPS * 32)                                                                                       \
  (const u8* weight, const u8*, const u8*, u8* out, int rows, int columns, int, int units, int first_tile) {     \
    expand_windows<FORMAT, VALUES>(weight, out, rows, columns, units, first_tile);                               \
  }
