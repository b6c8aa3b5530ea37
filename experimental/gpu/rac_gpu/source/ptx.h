// What the kernels need of the hardware, one function per instruction. Kernels touch memory through these alone, so that
// the same source runs on a CPU: with RAC_EMULATE the functions come from tests/emulator.h, which checks
// each access. Shared memory is addressed by byte offsets into the block's dynamic shared memory.
#pragma once

#ifdef RAC_EMULATE
#include "emulator.h"
#else

typedef unsigned char u8;
typedef unsigned int u32;

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#define KERNEL(NAME, THREADS) extern "C" __global__ void __launch_bounds__(THREADS) NAME
// With all registers that leave room for two blocks: some kernels are spilled otherwise, though there are registers.
#define LARGE_KERNEL(NAME, THREADS) extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME
#define SYNC_THREADS() __syncthreads()
#define SYNC_WARP() __syncwarp()
// Waits until at most COUNT groups of this thread's copies are unfinished.
#define CP_ASYNC_WAIT(COUNT) asm volatile("cp.async.wait_group %0;" ::"n"(COUNT) : "memory")

extern __shared__ __align__(128) u8 rac_shared[];

DEVICE u32 thread_index() { return threadIdx.x; }
DEVICE u32 warp_index() { return __shfl_sync(0xffffffff, threadIdx.x / 32, 0); }  // the compiler sees that it is one per warp
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }

// Copies 16 bytes without waiting, or writes 16 zeros where `bytes` is 0; `global` is not read then and may be anywhere.
DEVICE void cp_async(u32 shared, const u8* global, int bytes) {
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(rac_shared)) + shared;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

DEVICE void cp_async(u32 shared, const u8* global) {
  const u32 to = static_cast<u32>(__cvta_generic_to_shared(rac_shared)) + shared;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

DEVICE uint4 shared_load16(u32 at) { return *reinterpret_cast<const uint4*>(rac_shared + at); }
DEVICE u32 shared_load4(u32 at) { return *reinterpret_cast<const u32*>(rac_shared + at); }
DEVICE uint2 shared_load8(u32 at) { return *reinterpret_cast<const uint2*>(rac_shared + at); }
DEVICE float shared_load_float(u32 at) { return *reinterpret_cast<const float*>(rac_shared + at); }
DEVICE void shared_store_float(u32 at, float value) { *reinterpret_cast<float*>(rac_shared + at) = value; }

// The B operand of a product: four 8x8 matrices of bf16. `at` is the row that this lane names, 16 bytes.
DEVICE void ldmatrix(u32 (&b)[4], u32 at) {
  const u32 from = static_cast<u32>(__cvta_generic_to_shared(rac_shared)) + at;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(from)
               : "memory");
}

// d += A B for A [16, 32] with two of four stored, B [32, 8], bf16, summed in fp32. SELECTOR: which pair of the lanes of
// each four has the metadata.
template <int SELECTOR>
DEVICE void mma_sparse(float (&d)[4], uint4 a, const u32 (&b)[4], u32 metadata) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata), "n"(SELECTOR));
}

// (a & b) | c. nvcc makes two instructions of it where b and c are constants.
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// a * b + c for two bf16 each, rounded once; numbers below 2^-126 too.
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

DEVICE u32 global_load2(const u8* at) { return *reinterpret_cast<const unsigned short*>(at); }
DEVICE u32 global_load4(const u8* at) { return *reinterpret_cast<const u32*>(at); }
DEVICE float bf16_value(u32 bits) { return __uint_as_float(bits << 16); }
// Rounded to nearest even.
DEVICE u32 bf16_bits(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
DEVICE float global_load_bf16(const u8* at) { return bf16_value(global_load2(at)); }
DEVICE void global_store_bf16(u8* at, float value) { *reinterpret_cast<unsigned short*>(at) = bf16_bits(value); }
DEVICE void global_store8(u8* at, uint2 value) { *reinterpret_cast<uint2*>(at) = value; }

#endif
