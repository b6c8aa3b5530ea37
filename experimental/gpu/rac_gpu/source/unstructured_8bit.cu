// Weights of 8 bits of any pattern: int8, or fp8 where E4M3 is defined. Compiled with a scale per row, or with one per row and GROUP columns, 64 or 128.
// Steps, groups of four weights, masks and windows are those of windows.h, and scales of groups too; a value is a byte as bytes.h has it.
#include "bytes.h"
#include "windows.h"

struct Bytes : Values8 {
  static constexpr int BITS = 8, RING = 64;
  static DEVICE u32 bytes(u32 window) { return window; }
};

#ifdef GROUP
using ByteStream = GroupedWindows<Bytes, GROUP>;
#else
struct ByteStream : Windows<Bytes> {
  static constexpr float ROW_SCALES = Values8::SCALE;
  static DEVICE int scale_lines(int) { return 0; }
  static DEVICE float scale_in(const u8* weight, int rows, int tile, const Segment&, int, int h, u32 g) {
    return global_load_float(scale_of(weight, rows, tile * 32 + h * 8 + g));
  }

  DEVICE void open(u32 ring, u32 lane, const Segment&) { begin(ring, lane); }

  template <int TOKEN_TILES>
  DEVICE void multiply(u32 masks, u32 x, float (&sum)[2][TOKEN_TILES][4]) {
    const uint2 mask = shared_load8(masks + lane * 8);
    uint4 b[TOKEN_TILES][2];
    load(x, b);
    multiply_tile(mask.x, b, sum[0]);
    multiply_tile(mask.y, b, sum[1]);
  }
};
#endif

UNSTRUCTURED_KERNEL(rac_unstructured_8bit_r2_t1, ByteStream, 1)
UNSTRUCTURED_KERNEL(rac_unstructured_8bit_r2_t2, ByteStream, 2)
UNSTRUCTURED_KERNEL(rac_unstructured_8bit_r2_t4, ByteStream, 4)

EXPAND_WINDOWS_KERNEL(rac_unstructured_8bit_expand, ByteStream, Bytes)
