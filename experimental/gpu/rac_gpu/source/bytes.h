// Values of 8 bits as bf16, exactly: int8, or fp8 (e4m3) where E4M3 is defined. Sources are compiled once for each.
//
// NOTHING: a word of four zeros. SCALE: what sums of the values are multiplied by. `four`: the values of bytes 0 and 2 of a word as
// `even`, and of bytes 1 and 3 as `odd`. `one`: the number that a byte stands for.
#pragma once

#include "ptx.h"

// A byte v + 128. A bf16 whose bits are a byte u is u 2^-133, below and above 128 alike: there the exponent becomes 1, which stands for
// the same power of two. So u 2^-133 2^127 - 2 is v / 64.
struct Int8Values {
  static constexpr u32 NOTHING = 0x80808080;
  static constexpr float SCALE = 64.0f;
  static DEVICE u32 two(u32 bytes) { return fma_bf16x2(bytes, 0x7f007f00, 0xc000c000); }
  static DEVICE void four(u32 word, u32& even, u32& odd) {
    even = two(word & 0x00ff00ff);
    odd = two(choose_bytes(word, 0, 0x4341));
  }
  static DEVICE float one(u32 byte) { return static_cast<float>(static_cast<int>(byte) - 128); }
};

// A byte as the checkpoint has it: sign, 4 bits of exponent, 3 of mantissa, v = 2^(exponent - 7) (1 + mantissa / 8), or
// 2^-6 (mantissa / 8) where the exponent is 0. The same bits in the places of a bf16 are v 2^-120, below 2^-126 too. There is no
// infinity; the two codes of NaN are refused when a weight is packed.
struct E4M3Values {
  static constexpr u32 NOTHING = 0;
  static constexpr float SCALE = 1.0f;
  // `bytes`: in each half the byte, and above and below it what the shift fills up with: of the lower half's sign above it.
  static DEVICE u32 two(u32 bytes) {
    const u32 bits = static_cast<u32>(static_cast<int>(bytes) >> 4) & 0x87f087f0;
    return fma_bf16x2(bits, 0x7b807b80, 0x80008000);  // times 2^120, minus 0
  }
  static DEVICE void four(u32 word, u32& even, u32& odd) {
    even = two(choose_bytes(word, 0, 0x2804));
    odd = two(choose_bytes(word, 0, 0x3914));
  }
  static DEVICE float one(u32 byte) { return as_float((byte & 0x80) << 24 | (byte & 0x7f) << 20) * as_float(0x7b800000); }
};

#ifdef E4M3
using Values8 = E4M3Values;
#else
using Values8 = Int8Values;
#endif
