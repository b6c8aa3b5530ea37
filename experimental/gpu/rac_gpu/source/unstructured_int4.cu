// Weights of int4 of any pattern with a scale per row and GROUP columns; compiled for each GROUP, 64 or 128. Steps, groups of four weights, masks
// windows and scales are those of windows.h; a value is its number plus 8.
#include "windows.h"

#ifndef GROUP
#define GROUP 128
#endif

struct Nibbles {
  static constexpr int BITS = 4, RING = 32;
  static constexpr u32 NOTHING = 0x08080808;
  static constexpr float SCALE = 1.0f;
  static DEVICE u32 bytes(u32 window) { return choose_bytes(window, window >> 4, 0x5140); }  // value k in the low half of byte k
  // As bf16: 0x4300 is 128, whose last mantissa bit is worth 1, so 0x4300 | n is 128 + n. Subtracting 136 is exact.
  static DEVICE void four(u32 word, u32& even, u32& odd) {
    even = fma_bf16x2(and_or(word, 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308);
    odd = fma_bf16x2(and_or(word >> 8, 0x000f000f, 0x43004300), 0x3f803f80, 0xc308c308);
  }
  static DEVICE float one(u32 nibble) { return static_cast<float>(static_cast<int>(nibble) - 8); }
};

using NibbleStream = GroupedWindows<Nibbles, GROUP>;

UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t1, NibbleStream, 1)
UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t2, NibbleStream, 2)
UNSTRUCTURED_KERNEL(rac_unstructured_int4_r2_t4, NibbleStream, 4)

EXPAND_WINDOWS_KERNEL(rac_unstructured_int4_expand, NibbleStream, Nibbles)
