// 2:4 weights of bf16. A unit is 16 rows and 64 columns, 1152 bytes: two products of 32 columns.
//   bytes 512 j + 16 l: lane l's A operand of product j, 4 registers. Register r has the stored values of row g + 8 (r % 2) for
//     its four columns 32 j + 16 (r / 2) + 4 t ...: two values, in the order of their columns.
//   bytes 1024 + 4 l: lane l's metadata. Lanes with t / 2 = j serve product j; t % 2 = 0 has its columns 0 to 15, 1 has 16 to 31.
//     Bits 0-15 are row g, bits 16-31 row g + 8: per four columns i0 | i1 << 2, where the two values are; i0 < i1 always.
#include "wide.h"

struct Bf16 {
  static constexpr int COLUMNS = 64, BYTES = 1152, PRODUCTS = 2;
  static constexpr float ROW_SCALES = 0.0f;
  u32 at, metadata;

  DEVICE void open(u32 unit, u32 lane) {
    at = unit + lane * 16;
    metadata = shared_load4(unit + 1024 + lane * 4);
  }

  template <int TOKEN_TILES>
  DEVICE void multiply(int product, float (&sum)[TOKEN_TILES][4], float (&)[TOKEN_TILES][4], const u32 (&b)[TOKEN_TILES][4]) {
    const uint4 a = shared_load16(at + product * 512);
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++) {
      if (product == 0) mma_sparse<0>(sum[n], a, b[n], metadata);
      if (product == 1) mma_sparse<1>(sum[n], a, b[n], metadata);
    }
  }
};

// Row tiles, token tiles, units per chunk, stages, warps. At most 99 KB of shared memory: sm_86, sm_89 and sm_120 have no more.
DECODE_KERNEL(rac_24_bf16_r1_t1, Bf16, 1, 1, 2, 4, 4)
DECODE_KERNEL(rac_24_bf16_r2_t1, Bf16, 2, 1, 2, 3, 4)
DECODE_KERNEL(rac_24_bf16_r1_t2, Bf16, 1, 2, 1, 4, 4)
DECODE_KERNEL(rac_24_bf16_r2_t2, Bf16, 2, 2, 1, 4, 4)
DECODE_KERNEL(rac_24_bf16_r1_t4, Bf16, 1, 4, 1, 3, 4)
DECODE_KERNEL(rac_24_bf16_r2_t4, Bf16, 2, 4, 1, 3, 4)
DECODE_KERNEL(rac_24_bf16_r4_t1, Bf16, 4, 1, 1, 4, 4)
DECODE_KERNEL(rac_24_bf16_r4_t2, Bf16, 4, 2, 1, 3, 4)
DECODE_KERNEL(rac_24_bf16_r4_t4, Bf16, 4, 4, 1, 4, 2)
// 128 rows: token tiles, units per chunk, stages.
WIDE_KERNEL(rac_24_bf16_r8_t4, Bf16, 4, 1, 5)
WIDE_KERNEL(rac_24_bf16_r8_t8, Bf16, 8, 1, 5)

// Dense rows of tiles first_tile + block_x, bf16 [rows, columns] from row 16 first_tile on; a warp per unit.
KERNEL(rac_24_bf16_expand, 128)
(const u8* weight, const u8*, const u8*, u8* out, int rows, int columns, int, int units, int first_tile) {
  const u32 lane = thread_index() % 32, g = lane / 4, t = lane % 4;
  const int unit = block_y() * 4 + thread_index() / 32;
  if (unit >= units) return;
  const u8* from = weight + (static_cast<long long>(first_tile + block_x()) * units + unit) * Bf16::BYTES;
  UNROLL
  for (int j = 0; j < 2; j++) {
    const uint4 a = global_load16(from + j * 512 + lane * 16);
    UNROLL
    for (int r = 0; r < 4; r++) {
      const int row = block_x() * 16 + g + 8 * (r % 2), column = unit * 64 + j * 32 + r / 2 * 16 + t * 4;
      const u32 metadata = global_load4(from + 1024 + (g * 4 + j * 2 + r / 2) * 4);
      const u32 places = metadata >> (16 * (r % 2) + 4 * t) & 15;
      const u32 values = r == 0 ? a.x : r == 1 ? a.y : r == 2 ? a.z : a.w;
      if (first_tile * 16 + row < rows && column < columns) {
        global_store8(out + (static_cast<long long>(row) * columns + column) * 2, four_columns(values, places));
      }
    }
  }
}
