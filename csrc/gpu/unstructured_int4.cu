// Weights of int4 of any pattern with a scale per row and GROUP columns; compiled for each GROUP, 64 or 128. Steps, groups of four weights, masks
// and windows are those of unstructured_int8.cu.
//
// A lane has one stream of values, each plus 8 in four bits. Value n is bits 4 (n % 8) to 4 (n % 8) + 3 of the lane's word of line n / 8.
// Behind the masks of a segment, a line of scales per GROUP columns: word 4 g + h is the scale of row 8 h + g, fp32.
#include "unstructured.h"

#ifndef GROUP
#define GROUP 128
#endif

struct Int4Stream {
  static constexpr int STEP = 64, AHEAD = 2, RING = 32, MASKS = 2, COUNTS_BYTES = 256, ALIGNED = RING * LINE;
  static constexpr int REPEATED = 1;  // line: the second word of a window
  static constexpr bool SCALED = false;
  static DEVICE int scale_lines(int steps) { return steps * STEP / GROUP; }
  static DEVICE float of_scale(float scale) { return scale; }
  static DEVICE float scale_in(const u8*, int, int, const Segment& segment, int step, int h, u32 g) {
    return global_load_float(segment.scales + step * STEP / GROUP * LINE + (g * 4 + h) * 4);
  }

  const u8* scales;      // of this lane's rows, in the step that comes next
  uint4 next;            // these, which were asked for a step ahead
  u32 line, bits, lane, ring;  // `line`, `bits`: 16 and 4 times the number of the next value
  int step, steps;

  DEVICE void open(u32 ring_, u32 lane_, const Segment& segment) {
    lane = lane_;
    ring = kept(ring_ + lane * 4);
    line = bits = 0;
    step = 0;
    steps = segment.steps;
    scales = segment.scales + lane / 4 * 16;
    if (steps > 0) next = global_load16(scales);
  }

  // Registers 2 q and 2 q + 1 of a product. `stored`: bits 0, 4, 8 and 12.
  DEVICE void four(u32 stored, u32& first, u32& second) {
    const u32 at = line & (RING - 1) * LINE | ring;  // rings begin at multiples of their size
    const u32 window = funnel_shift(shared_load4(at), shared_load4(at + LINE), bits);
    const u32 each = choose_bytes(window, window >> 4, 0x5140);  // value k in the low half of byte k
    // Nibble k: the number of bits below bit 4 k where it is stored, 4 to 7 where it is not. 12 and the 4 are a carry of 1.
    const u32 chosen = choose_bytes(each, 0x08080808, stored * 0x110c + 0x4444);
    const u32 count = count_bits(stored);
    line += count * 16;
    bits += count * 4;
    // As bf16: 0x4300 is 128, whose last mantissa bit is worth 1, so 0x4300 | n is 128 + n. Subtracting 136 is exact.
    first = fma_bf16x2(and_or(chosen, 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308);
    second = fma_bf16x2(and_or(chosen >> 8, 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308);
  }

  // The products of a step are summed unscaled, then scaled and added in fp32.
  template <int TOKEN_TILES>
  DEVICE void multiply(u32 masks, u32 x, float (&sum)[2][TOKEN_TILES][4]) {
    const uint2 mask = shared_load8(masks + lane * 8);
    const uint4 words = next;
    const float scale[4] = {as_float(words.x), as_float(words.y), as_float(words.z), as_float(words.w)};
    step++;
    if (step % (GROUP / STEP) == 0) scales += LINE;
    if (step < steps) next = global_load16(scales);
    uint4 b[TOKEN_TILES][2];
    UNROLL
    for (int n = 0; n < TOKEN_TILES; n++) {
      b[n][0] = shared_load16(x + n * 1024);
      b[n][1] = shared_load16(x + n * 1024 + 512);
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
      float part[TOKEN_TILES][4];
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0.0f;
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
          mma(part[n], a, j % 2 == 0 ? piece.x : piece.z, j % 2 == 0 ? piece.y : piece.w);
        }
      }
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) {
        sum[i][n][0] += scale[2 * i] * part[n][0];
        sum[i][n][1] += scale[2 * i] * part[n][1];
        sum[i][n][2] += scale[2 * i + 1] * part[n][2];
        sum[i][n][3] += scale[2 * i + 1] * part[n][3];
      }
    }
  }
};

UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t1, Int4Stream, 1)
UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t2, Int4Stream, 2)
UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t4, Int4Stream, 4)

EXPAND_INTEGERS_KERNEL(rac_unstructured_int4_expand, Int4Stream, 4)
