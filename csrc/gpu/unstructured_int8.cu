// Weights of int8 of any pattern with a scale per row. A step has 64 columns. Of a lane's 64 weights, group n = 2 j + q of row tile i has four:
// number k is row 16 i + 8 (k % 2) + g, column 16 t + 4 j + 2 q + k / 2: value k / 2 of register 2 q + k % 2 of the A operand of
// product j of rows 16 i to 16 i + 15. It is bit n % 4 + 16 (n / 4) + 4 k of word i of the lane's masks, 8 bytes.
//
// A lane has one stream of values, each plus 128 in a byte. Value n is byte n % 4 of the lane's word of line n / 4. Groups take theirs from a window of
// two words, so that a segment has room for a word behind the last value.
#include "unstructured.h"

struct Int8Stream {
  static constexpr int STEP = 64, AHEAD = 2, RING = 64, MASKS = 2, COUNTS_BYTES = 256, ALIGNED = RING * LINE;
  static constexpr int REPEATED = 1;  // line: the second word of a window
  static constexpr bool SCALED = true;
  static DEVICE int scale_lines(int) { return 0; }
  static DEVICE float of_scale(float scale) { return scale * INTEGER_SCALE; }
  static DEVICE float scale_in(const u8* weight, int rows, int tile, const Segment&, int, int h, u32 g) {
    return global_load_float(scale_of(weight, rows, tile * 32 + h * 8 + g));
  }

  u32 line, bits, lane, ring;  // `line`, `bits`: 32 and 8 times the number of the next value

  DEVICE void open(u32 ring_, u32 lane_, const Segment&) {
    lane = lane_;
    ring = kept(ring_ + lane * 4);
    line = bits = 0;
  }

  // Registers 2 q and 2 q + 1 of a product. `stored`: bits 0, 4, 8 and 12.
  DEVICE void four(u32 stored, u32& first, u32& second) {
    const u32 at = line & (RING - 1) * LINE | ring;  // rings begin at multiples of their size
    const u32 window = funnel_shift(shared_load4(at), shared_load4(at + LINE), bits);
    // Nibble k: the number of bits below bit 4 k where it is stored, 4 to 7 where it is not. 12 and the 4 are a carry of 1.
    const u32 chosen = choose_bytes(window, 0x80808080, stored * 0x110c + 0x4444);
    const u32 count = count_bits(stored);
    line += count * 32;
    bits += count * 8;
    four_integers(chosen, first, second);
  }

  template <int TOKEN_TILES>
  DEVICE void multiply(u32 masks, u32 x, float (&sum)[2][TOKEN_TILES][4]) {
    const uint2 mask = shared_load8(masks + lane * 8);
    uint4 b[TOKEN_TILES][2];
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++) {
      b[n][0] = shared_load16(x + n * 1024);
      b[n][1] = shared_load16(x + n * 1024 + 512);
    }
    UNROLL
    for (int i = 0; i < 2; i++)
      UNROLL
      for (int j = 0; j < 4; j++) {
        u32 a[4];
        UNROLL
        for (int q = 0; q < 2; q++) {
          const int n = 2 * j + q;
          four((i == 0 ? mask.x : mask.y) >> (n % 4 + 16 * (n / 4)) & 0x1111, a[2 * q], a[2 * q + 1]);
        }
        UNROLL
        for (int n = 0; n < TOKEN_TILES; n++) {
          const uint4 piece = b[n][j / 2];
          mma(sum[i][n], a, j % 2 == 0 ? piece.x : piece.z, j % 2 == 0 ? piece.y : piece.w);
        }
      }
  }
};

UNSTRUCTURED_KERNEL(rac_unstructured_int8_r2_t1, Int8Stream, 1)
UNSTRUCTURED_KERNEL(rac_unstructured_int8_r2_t2, Int8Stream, 2)
UNSTRUCTURED_KERNEL(rac_unstructured_int8_r2_t4, Int8Stream, 4)

EXPAND_INTEGERS_KERNEL(rac_unstructured_int8_expand, Int8Stream, 8)
