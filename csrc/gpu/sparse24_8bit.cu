// 2:4 weights of 8 bits with a scale per row: int8, or fp8 where E4M3 is defined. A unit is 16 rows and 128 columns, 1280 bytes: four products of 32
// columns.
//   bytes 512 h + 16 l + 8 p + 4 q: four of lane l's values of product 2 h + p, bytes as bytes.h has them. Byte k is value k / 2 of register
//     2 q + k % 2 (sparse24_bf16.cu says which weights these are).
//   bytes 1024 + 128 p + 4 l: lane l's metadata of products 2 p and 2 p + 1, as in sparse24_bf16.cu.
// Behind all units of all tiles, 4 bytes per row: its scale, fp32.
#include "bytes.h"
#include "decode.h"

struct Bytes {
  static constexpr int COLUMNS = 128, BYTES = 1280, PRODUCTS = 4;
  static constexpr float ROW_SCALES = Values8::SCALE;
  uint4 values[2];
  u32 metadata[2];

  DEVICE void open(u32 unit, u32 lane) {
    UNROLL
    for (int h = 0; h < 2; h++) {
      values[h] = shared_load16(unit + 512 * h + lane * 16);
      metadata[h] = shared_load4(unit + 1024 + 128 * h + lane * 4);
    }
  }

  template <int TOKEN_TILES>
  DEVICE void multiply(int product, float (&sum)[TOKEN_TILES][4], float (&)[TOKEN_TILES][4], const u32 (&b)[TOKEN_TILES][4]) {
    const uint4 two = values[product / 2];
    uint4 a;
    Values8::four(product % 2 == 0 ? two.x : two.z, a.x, a.y);
    Values8::four(product % 2 == 0 ? two.y : two.w, a.z, a.w);
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++) {
      if (product % 2 == 0) mma_sparse<0>(sum[n], a, b[n], metadata[product / 2]);
      if (product % 2 == 1) mma_sparse<1>(sum[n], a, b[n], metadata[product / 2]);
    }
  }
};

// Dense rows, scaled and rounded to bf16, as rac_24_bf16_expand writes them.
KERNEL(rac_24_8bit_expand, 128)
(const u8* weight, const u8*, const u8*, u8* out, int rows, int columns, int, int units, int first_tile) {
  const u32 lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int unit = block_y() * 4 + thread_index() / 32;
  if (unit >= units) return;
  const u8* from = weight + (static_cast<long long>(first_tile + block_x()) * units + unit) * Bytes::BYTES;
  const u8* scales = weight + static_cast<long long>((rows + 15) / 16) * units * Bytes::BYTES + first_tile * 64ll;
  UNROLL
  for (int j = 0; j < 4; j++) {
    UNROLL
    for (int r = 0; r < 4; r++) {
      const int row = block_x() * 16 + g + 8 * (r % 2), column = unit * 128 + j * 32 + r / 2 * 16 + t * 4;
      if (first_tile * 16 + row >= rows || column >= columns) continue;
      const u32 word = global_load4(from + j / 2 * 512 + lane * 16 + j % 2 * 8 + r / 2 * 4) >> (r % 2 * 8);
      const u32 metadata = global_load4(from + 1024 + j / 2 * 128 + (g * 4 + j % 2 * 2 + r / 2) * 4);
      const float scale = global_load_float(scales + row * 4);
      const u32 low = bf16_bits(scale * Values8::one(word & 0xff)), high = bf16_bits(scale * Values8::one(word >> 16 & 0xff));
      const u32 places = metadata >> (16 * (r % 2) + 4 * t) & 15;
      global_store8(out + (static_cast<long long>(row) * columns + column) * 2, four_columns(low | high << 16, places));
    }
  }
}

// Row tiles, token tiles, units per chunk, stages, warps; at most 99 KB of shared memory.
DECODE_KERNEL(rac_24_8bit_r1_t1, Bytes, 1, 1, 1, 4, 4)
DECODE_KERNEL(rac_24_8bit_r2_t1, Bytes, 2, 1, 1, 4, 4)
DECODE_KERNEL(rac_24_8bit_r1_t2, Bytes, 1, 2, 1, 4, 4)
DECODE_KERNEL(rac_24_8bit_r2_t2, Bytes, 2, 2, 1, 3, 4)
DECODE_KERNEL(rac_24_8bit_r1_t4, Bytes, 1, 4, 1, 4, 2)
DECODE_KERNEL(rac_24_8bit_r2_t4, Bytes, 2, 4, 1, 4, 2)
DECODE_KERNEL(rac_24_8bit_r4_t1, Bytes, 4, 1, 1, 3, 4)
DECODE_KERNEL(rac_24_8bit_r4_t2, Bytes, 4, 2, 1, 4, 2)
DECODE_KERNEL(rac_24_8bit_r4_t4, Bytes, 4, 4, 1, 3, 2)
