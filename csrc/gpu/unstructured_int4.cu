// Weights of int4 of any pattern with a scale per row and GROUP columns; compiled for each GROUP, 64 or 128. Steps, groups of four weights, masks
// and windows are those of windows.h; a value is its number plus 8.
//
// Behind the masks of a segment, a line of scales per GROUP columns: word 4 g + h is the scale of row 8 h + g, fp32.
#include "windows.h"

#ifndef GROUP
#define GROUP 128
#endif

struct Nibbles {
  static constexpr int BITS = 4, RING = 32;
  static constexpr u32 NOTHING = 0x08080808;
  static DEVICE u32 bytes(u32 window) { return choose_bytes(window, window >> 4, 0x5140); }  // value k in the low half of byte k
  // As bf16: 0x4300 is 128, whose last mantissa bit is worth 1, so 0x4300 | n is 128 + n. Subtracting 136 is exact.
  static DEVICE void four(u32 word, u32& even, u32& odd) {
    even = fma_bf16x2(and_or(word, 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308);
    odd = fma_bf16x2(and_or(word >> 8, 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308);
  }
  static DEVICE float one(u32 nibble) { return static_cast<float>(static_cast<int>(nibble) - 8); }
};

struct NibbleStream : Windows<Nibbles> {
  static constexpr float ROW_SCALES = 0.0f;
  static DEVICE int scale_lines(int steps) { return steps * STEP / GROUP; }
  static DEVICE float scale_in(const u8*, int, int, const Segment& segment, int step, int h, u32 g) {
    return global_load_float(segment.scales + step * STEP / GROUP * LINE + (g * 4 + h) * 4);
  }

  const u8* scales;  // of this lane's rows, in the step that comes next
  uint4 next;        // these, which were asked for a step ahead
  int step, steps;

  DEVICE void open(u32 ring, u32 lane, const Segment& segment) {
    begin(ring, lane);
    step = 0;
    steps = segment.steps;
    scales = segment.scales + lane / 4 * 16;
    if (steps > 0) next = global_load16(scales);
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
    load(x, b);
    UNROLL
    for (int i = 0; i < 2; i++) {
      float part[TOKEN_TILES][4];
      UNROLL
      for (int n = 0; n < TOKEN_TILES; n++) part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0.0f;
      multiply_tile(i == 0 ? mask.x : mask.y, b, part);
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

UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t1, NibbleStream, 1)
UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t2, NibbleStream, 2)
UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t4, NibbleStream, 4)

EXPAND_WINDOWS_KERNEL(rac_unstructured_int4_expand, NibbleStream, Nibbles)
