// 2:4 weights of four bits, with a scale per row and GROUP columns; compiled for each GROUP, 64 or 128, and type of scale. A unit is 16 rows and 128 columns: four products of 32.
//   bytes 16 l + 4 j: lane l's values of product j, eight nibbles. Nibble r + 4 b is value b of register r (sparse24_bf16.cu
//     says which weights these are), plus 8.
//   bytes 512 + 128 p + 4 l: lane l's metadata of products 2p and 2p + 1, as in sparse24_bf16.cu.
//   from byte 768 on, the scales of columns s GROUP to (s + 1) GROUP of the unit. With BF16_SCALES, bytes 768 + 32 s + 4 g: bf16, those of rows
//     g and g + 8. Otherwise bytes 768 + 64 s + 4 i: fp32, that of row i.
#include "wide.h"

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

#ifndef GROUP
#define GROUP 128
#endif
#ifdef BF16_SCALES
constexpr int SCALE_BYTES = 2;
#else
constexpr int SCALE_BYTES = 4;
#endif

struct Int4 {
  static constexpr int COLUMNS = 128, SCALES = COLUMNS / GROUP, BYTES = 768 + 16 * SCALE_BYTES * SCALES, PRODUCTS = 4;
  static constexpr int PRODUCTS_PER_SCALE = GROUP / 32;
  static constexpr float ROW_SCALES = 0.0f;
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
      const u32 at = unit + 768 + product / PRODUCTS_PER_SCALE * 16 * SCALE_BYTES + lane / 4 * 4;
      const u32 word = shared_load4(at);  // of rows g and g + 8, or of row g
      if (SCALE_BYTES == 2) add_scaled(sum, part, bf16_value(word), bf16_value(word >> 16));
      if (SCALE_BYTES == 4) add_scaled(sum, part, as_float(word), shared_load_float(at + 32));
    }
  }
};

// Dense rows, scaled and rounded to bf16, as rac_24_bf16_expand writes them.
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
      const u8* scales = from + 768 + j * 32 / GROUP * 16 * SCALE_BYTES;
      const float scale = SCALE_BYTES == 2 ? global_load_bf16(scales + g * 4 + r % 2 * 2) : global_load_float(scales + in_tile * 4);
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
// 128 rows: token tiles, units per chunk, stages.
WIDE_KERNEL(rac_24_int4_r8_t4, Int4, 4, 1, 5)
WIDE_KERNEL(rac_24_int4_r8_t8, Int4, 8, 1, 4)
