// 2:4 weights of four bits, with a scale per row and GROUP columns, 64 or 128; compiled for each GROUP. A unit is 16 rows and 128
// columns: four products of 32. Lane l of a warp: g = l / 4, t = l % 4.
//   bytes 16 l + 4 j: lane l's values of product j, eight nibbles. Nibble r + 4 b is value b of register r, plus 8: one of the two that
//     are stored of columns 4 t to 4 t + 3 (r < 2) or 16 + 4 t to 16 + 4 t + 3 of row g + 8 (r % 2).
//   bytes 512 + 128 p + 4 l: lane l's metadata of products 2 p and 2 p + 1. The lanes with t < 2 serve the first one, the others the
//     second; with t even columns 0 to 15, with t odd 16 to 31. Bits 16 h + 4 k: i0 | i1 << 2 of columns 4 k to 4 k + 3, of row g + 8 h.
//   bytes 768 + 32 s + 4 g: bf16, the scales of rows g and g + 8 of columns s GROUP to (s + 1) GROUP.
#include "decode.h"

// Values b = 0 and b = 1 of register r, as bf16: 0x4300 is 128, whose last mantissa bit is worth 1, so 0x4300 | n is 128 + n.
// Subtracting 136 is exact.
DEVICE u32 two_values(u32 word, int r) { return fma_bf16x2(and_or(word >> (4 * r), 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308); }
DEVICE uint4 eight_values(u32 word) {
  uint4 a;
  a.x = two_values(word, 0);
  a.y = two_values(word, 1);
  a.z = two_values(word, 2);
  a.w = two_values(word, 3);
  return a;
}

struct Int4 {
  static constexpr int COLUMNS = 128, SCALES = COLUMNS / GROUP, BYTES = 768 + 32 * SCALES, PRODUCTS = 4;
  static constexpr int PRODUCTS_PER_SCALE = GROUP / 32;
  u32 unit, lane, words[4], metadata[2];

  DEVICE void open(u32 unit_, u32 lane_) {
    unit = unit_;
    lane = lane_;
    if (GROUP == 64) return;  // more sums of scales need registers: half of the values at a time
    const uint4 four = shared_load16(unit + lane * 16);
    words[0] = four.x;
    words[1] = four.y;
    words[2] = four.z;
    words[3] = four.w;
    metadata[0] = shared_load4(unit + 512 + lane * 4);
    metadata[1] = shared_load4(unit + 640 + lane * 4);
  }

  // The products of a scale are summed unscaled, then scaled and added in fp32.
  template <int TOKEN_TILES>
  DEVICE void multiply(int product, float (&sum)[TOKEN_TILES][4], float (&part)[TOKEN_TILES][4], const u32 (&b)[TOKEN_TILES][4]) {
    if (GROUP == 64 && product % 2 == 0) {
      const uint2 two = shared_load8(unit + lane * 16 + product * 4);
      words[product] = two.x;
      words[product + 1] = two.y;
      metadata[product / 2] = shared_load4(unit + 512 + product * 64 + lane * 4);
    }
    const uint4 a = eight_values(words[product]);
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++) {
      if (product % PRODUCTS_PER_SCALE == 0) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0.0f;
      if (product % 2 == 0) mma_sparse<0>(part[n], a, b[n], metadata[product / 2]);
      if (product % 2 == 1) mma_sparse<1>(part[n], a, b[n], metadata[product / 2]);
    }
    if ((product + 1) % PRODUCTS_PER_SCALE == 0) {
      const u32 word = shared_load4(unit + 768 + product / PRODUCTS_PER_SCALE * 32 + lane / 4 * 4);  // of rows g and g + 8
      add_scaled(sum, part, bf16_value(word), bf16_value(word >> 16));
    }
  }
};

// Dense rows, scaled and rounded to bf16.
KERNEL(rac_24_int4_expand, 128)
(const u8* weight, const u8*, const u8*, u8* out, int rows, int columns, int, int units, int first_tile) {
  const u32 lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int unit = block_y() * 4 + thread_index() / 32;
  if (unit >= units) return;
  const u8* from = weight + (static_cast<long long>(first_tile + block_x()) * units + unit) * Int4::BYTES;
  UNROLL
  for (int j = 0; j < 4; j++) {
    const u32 word = global_load4(from + lane * 16 + j * 4);
    UNROLL
    for (int r = 0; r < 4; r++) {
      const int in_tile = g + 8 * (r % 2), row = block_x() * 16 + in_tile, column = unit * 128 + j * 32 + r / 2 * 16 + t * 4;
      const u32 metadata = global_load4(from + 512 + j / 2 * 128 + (g * 4 + j % 2 * 2 + r / 2) * 4);
      const u32 places = metadata >> (16 * (r % 2) + 4 * t) & 15;
      const float scale = global_load_bf16(from + 768 + j * 32 / GROUP * 32 + g * 4 + r % 2 * 2);
      const u32 values = two_values(word, r);
      const u32 low = bf16_bits(scale * bf16_value(values & 0xffff)), high = bf16_bits(scale * bf16_value(values >> 16));
      if (first_tile * 16 + row < rows && column < columns) {
        global_store8(out + (static_cast<long long>(row) * columns + column) * 2, four_columns(low | high << 16, places));
      }
    }
  }
}

// Row tiles, token tiles, units per chunk, stages, warps; at most 99 KB of shared memory.
DECODE_KERNEL(rac_24_int4_r1_t1, Int4, 1, 1, 2, 3, 4)
DECODE_KERNEL(rac_24_int4_r2_t1, Int4, 2, 1, 2, 3, 4)
DECODE_KERNEL(rac_24_int4_r1_t2, Int4, 1, 2, 1, 4, 4)
DECODE_KERNEL(rac_24_int4_r2_t2, Int4, 2, 2, 1, 4, 4)
LARGE_DECODE_KERNEL(rac_24_int4_r1_t4, Int4, 1, 4, 1, 4, 2)
DECODE_KERNEL(rac_24_int4_r2_t4, Int4, 2, 4, 1, 4, 2)
DECODE_KERNEL(rac_24_int4_r4_t1, Int4, 4, 1, 1, 4, 4)
DECODE_KERNEL(rac_24_int4_r4_t2, Int4, 4, 2, 1, 3, 4)
DECODE_KERNEL(rac_24_int4_r4_t4, Int4, 4, 4, 1, 3, 2)
