// What the processor and the operating system run. Compiled without an instruction set of its own.
#pragma once

namespace rac {

bool has_avx2();      // with FMA and POPCNT
bool has_avx_vnni();  // and AVX2
bool has_avx512();    // with VBMI2 and VNNI
bool has_avx512_bf16();
bool has_amx();  // tiles, bf16 and int8, and AVX512-BF16; asks the operating system for permission, once per process
bool has_i8mm();

// Whether some cores are slower than others: performance and efficiency cores of a processor.
bool cores_differ();

}  // namespace rac
