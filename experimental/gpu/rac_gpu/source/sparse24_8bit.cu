// 2:4 weights of 8 bits: int8, or fp8 where E4M3 is defined. Compiled with a scale per row, or with one per row and GROUP columns, 64 or 128. A unit is
// 16 rows and 128 columns: four products of 32 columns.
//   bytes 512 h + 16 l + 8 p + 4 q: four of lane l's values of product 2 h + p, bytes as bytes.h has them. Byte k is value k / 2 of register
//     2 q + k % 2 (sparse24_bf16.cu says which weights these are).
//   bytes 1024 + 128 p + 4 l: lane l's metadata of products 2 p and 2 p + 1, as in sparse24_bf16.cu.
//   bytes 1280 + 64 s + 4 i, with GROUP: the scale of row i and columns s GROUP to (s + 1) GROUP of the unit, fp32.
// Without GROUP, behind all units of all tiles, 4 bytes per row: its scale, fp32.
#include "bytes.h"
#include "wide.h"

#ifdef GROUP
constexpr int SCALES = 128 / GROUP, PRODUCTS_PER_SCALE = GROUP / 32;
#else
constexpr int SCALES = 0, PRODUCTS_PER_SCALE = 4;
#endif

struct Bytes {
  static constexpr int COLUMNS = 128, BYTES = 1280 + 64 * SCALES, PRODUCTS = 4;
  static constexpr float ROW_SCALES = SCALES ? 0.0f : Values8::SCALE;
  uint4 values[2];
  u32 metadata[2], unit, lane;

  DEVICE void load(int h) {
    values[h] = shared_load16(unit + 512 * h + lane * 16);
    metadata[h] = shared_load4(unit + 1024 + 128 * h + lane * 4);
  }

  DEVICE void open(u32 unit_, u32 lane_) {
    unit = unit_;
    lane = lane_;
    if (SCALES) return;  // sums of a scale need registers: half of the values at a time
    load(0);
    load(1);
  }

  // The products of a scale of columns are summed unscaled, then scaled and added in fp32.
  template <int TOKEN_TILES>
  DEVICE void multiply(int product, float (&sum)[TOKEN_TILES][4], float (&part)[TOKEN_TILES][4], const u32 (&b)[TOKEN_TILES][4]) {
    if (SCALES && product % 2 == 0) load(product / 2);
    const uint4 two = values[product / 2];
    uint4 a;
    Values8::four(product % 2 == 0 ? two.x : two.z, a.x, a.y);
    Values8::four(product % 2 == 0 ? two.y : two.w, a.z, a.w);
    float(&to)[TOKEN_TILES][4] = SCALES ? part : sum;
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++) {
      if (SCALES && product % PRODUCTS_PER_SCALE == 0) to[n][0] = to[n][1] = to[n][2] = to[n][3] = 0.0f;
      if (product % 2 == 0) mma_sparse<0>(to[n], a, b[n], metadata[product / 2]);
      if (product % 2 == 1) mma_sparse<1>(to[n], a, b[n], metadata[product / 2]);
    }
    if (SCALES && (product + 1) % PRODUCTS_PER_SCALE == 0) {
      const u32 at = unit + 1280 + product / PRODUCTS_PER_SCALE * 64 + lane / 4 * 4;
      add_scaled(sum, part, shared_load_float(at) * Values8::SCALE, shared_load_float(at + 32) * Values8::SCALE);
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
      const int in_tile = g + 8 * (r % 2), row = block_x() * 16 + in_tile, column = unit * 128 + j * 32 + r / 2 * 16 + t * 4;
      if (first_tile * 16 + row >= rows || column >= columns) continue;
      const u32 word = global_load4(from + j / 2 * 512 + lane * 16 + j % 2 * 8 + r / 2 * 4) >> (r % 2 * 8);
      const u32 metadata = global_load4(from + 1024 + j / 2 * 128 + (g * 4 + j % 2 * 2 + r / 2) * 4);
      const float scale = global_load_float(SCALES ? from + 1280 + j / PRODUCTS_PER_SCALE * 64 + in_tile * 4 : scales + row * 4);
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
LARGE_DECODE_KERNEL(rac_24_8bit_r1_t4, Bytes, 1, 4, 1, 4, 2)
DECODE_KERNEL(rac_24_8bit_r2_t4, Bytes, 2, 4, 1, 4, 2)
DECODE_KERNEL(rac_24_8bit_r4_t1, Bytes, 4, 1, 1, 3, 4)
DECODE_KERNEL(rac_24_8bit_r4_t2, Bytes, 4, 2, 1, 4, 2)
DECODE_KERNEL(rac_24_8bit_r4_t4, Bytes, 4, 4, 1, 3, 2)
// 128 rows: token tiles, units per chunk, stages.
WIDE_KERNEL(rac_24_8bit_r8_t4, Bytes, 4, 1, 4)
WIDE_KERNEL(rac_24_8bit_r8_t8, Bytes, 8, 1, 3)
