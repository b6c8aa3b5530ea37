// Runs a kernel's own source on a CPU: the host twin of rac_gpu/source/ptx.h.
//
// Each thread of a block is a fibre. Instructions of a warp (mma, mma.sp, ldmatrix, __syncwarp) and barriers wait until all lanes
// have come to the same one; what cannot come is reported. Semantics are those of the PTX manual, written down here and not
// taken from the kernels.
//
// Memory is checked at each access: range, alignment, and order. Orders are vector clocks: `clock[i][j]` is how far thread i
// knows thread j. Barriers join clocks; mma and ldmatrix do not order memory. A copy of cp.async is in flight from its issue
// until its thread waits for it: the bytes are NaN meanwhile, and any access to them is a race.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <set>
#include <string>
#include <vector>

typedef uint8_t u8;
typedef uint32_t u32;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };

#define DEVICE inline
#define UNROLL
#define NO_UNROLL
#define KERNEL(NAME, THREADS) extern "C" const int NAME##_threads = THREADS; extern "C" void NAME
#define LARGE_KERNEL KERNEL
#define SYNC_THREADS() emulator::sync(emulator::site(__FILE__, __LINE__), emulator::block)
#define SYNC_WARP() emulator::sync(emulator::site(__FILE__, __LINE__), emulator::warp())
#define CP_ASYNC_WAIT(COUNT) emulator::wait_group(emulator::site(__FILE__, __LINE__), COUNT)

namespace emulator {

struct Range { const u8* start; int64_t size; bool writable; std::vector<bool> written; };
struct Copy { u32 to; u8 bytes[16]; };
struct Granule { int writer = -1; u32 when = 0; bool in_flight = false; };  // of 4 bytes
struct Meeting { std::string what; int arrived = 0; uint64_t generation = 0; std::vector<int> lanes; };
struct Fibre {
    ucontext_t context;  // of its start
    jmp_buf place;       // where it waits
    std::vector<char> stack;
    bool started = false, done = false;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};
struct Operands { uint4 a; u32 b[4], metadata, address; float* d; u32* out; };

inline std::vector<Range> ranges;
inline std::vector<u8> shared;
inline std::vector<Granule> granules;
inline std::vector<u32> reads;                 // [granule][thread]: when it was last read
inline std::vector<std::vector<u32>> clock;    // [thread][thread]
inline std::vector<Fibre> fibres;
inline std::vector<Meeting> warps;
inline Meeting block;
inline std::vector<Operands> operands;
inline jmp_buf scheduler;
inline int self, block_number[2];
inline uint64_t progress;
inline std::string error, skipped;             // `skipped`: the barrier or wait that is left out, "file:line"
inline std::set<std::string> sites;

// Switches are jumps: swapcontext would also change the signal mask, which is two system calls.
[[gnu::noinline]] inline void resume(Fibre& fibre) {
    if (_setjmp(scheduler)) return;
    if (fibre.started) _longjmp(fibre.place, 1);
    fibre.started = true;
    setcontext(&fibre.context);
}

[[gnu::noinline]] inline void yield() {
    if (!_setjmp(fibres[self].place)) _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const std::string& text) {
    if (error.empty()) error = text + " (thread " + std::to_string(self) + ", block " + std::to_string(block_number[0]) + ")";
    while (true) yield();
}

inline std::string site(const char* file, int line) {
    std::string name(file);
    name = name.substr(name.rfind('/') + 1) + ":" + std::to_string(line);
    sites.insert(name);
    return name;
}

inline Meeting& warp() { return warps[self / 32]; }

// Waits until all threads of a meeting have come; the last one runs `act`.
template <class ACT>
void meet(Meeting& meeting, const std::string& what, ACT act) {
    if (meeting.arrived && meeting.what != what) fail("divergence: " + what + " meets " + meeting.what);
    meeting.what = what;
    const uint64_t generation = meeting.generation;
    if (++meeting.arrived == int(meeting.lanes.size())) {
        act();
        meeting.arrived = 0;
        meeting.generation++;
        progress++;
        return;
    }
    while (meeting.generation == generation) yield();
}

inline void sync(const std::string& where, Meeting& meeting) {
    if (where == skipped) return;
    meet(meeting, "barrier " + where, [&] {
        std::vector<u32> joined(fibres.size(), 0);
        for (int i : meeting.lanes)
            for (size_t j = 0; j < joined.size(); j++) joined[j] = std::max(joined[j], clock[i][j]);
        for (int i : meeting.lanes) {
            clock[i] = joined;
            clock[i][i]++;
        }
    });
}

inline void check_shared(u32 at, u32 size) {
    if (at % size) fail("misaligned access of " + std::to_string(size) + " bytes to shared memory at " + std::to_string(at));
    if (at + size > shared.size()) fail("access outside of shared memory at " + std::to_string(at));
}

inline void before_write(u32 at, u32 size) {
    check_shared(at, size);
    for (u32 n = at / 4; n < (at + size) / 4; n++) {
        const Granule& granule = granules[n];
        if (granule.in_flight) fail("race: write to a copy in flight at " + std::to_string(4 * n));
        if (granule.writer >= 0 && granule.when > clock[self][granule.writer]) fail("race: write after write at " + std::to_string(4 * n));
        for (size_t i = 0; i < fibres.size(); i++)
            if (reads[n * fibres.size() + i] > clock[self][i]) fail("race: write after read at " + std::to_string(4 * n));
    }
}

inline void after_write(u32 at, u32 size) {
    for (u32 n = at / 4; n < (at + size) / 4; n++) granules[n] = {self, clock[self][self], false};
}

inline const u8* shared_read(u32 at, u32 size) {
    check_shared(at, size);
    for (u32 n = at / 4; n < (at + size) / 4; n++) {
        const Granule& granule = granules[n];
        if (granule.in_flight) fail("race: read of a copy in flight at " + std::to_string(4 * n));
        if (granule.writer < 0) fail("read of shared memory that nobody wrote at " + std::to_string(4 * n));
        if (granule.when > clock[self][granule.writer]) fail("race: read after write at " + std::to_string(4 * n));
        reads[n * fibres.size() + self] = clock[self][self];
    }
    return &shared[at];
}

inline Range& global(const u8* at, int64_t size) {
    if (reinterpret_cast<uintptr_t>(at) % size) fail("misaligned access of " + std::to_string(size) + " bytes to global memory");
    for (Range& range : ranges)
        if (at >= range.start && at + size <= range.start + range.size) return range;
    fail("access outside of global memory");
}

inline const u8* global_read(const u8* at, int64_t size) {
    if (global(at, size).writable) fail("read of the output");
    return at;
}

inline void global_write(u8* at, const void* value, int64_t size) {
    Range& range = global(at, size);
    if (!range.writable) fail("write to an input");
    for (int64_t i = 0; i < size; i++) {
        if (range.written[at - range.start + i]) fail("an output is written twice");
        range.written[at - range.start + i] = true;
    }
    memcpy(at, value, size);
}

inline void wait_group(const std::string& where, int count) {
    if (where == skipped) return;
    Fibre& fibre = fibres[self];
    while (int(fibre.groups.size()) > count) {
        for (const Copy& copy : fibre.groups.front()) {
            memcpy(&shared[copy.to], copy.bytes, 16);
            after_write(copy.to, 16);
        }
        fibre.groups.pop_front();
    }
}

inline float bf16(u32 bits) {
    bits <<= 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline u32 to_bf16(float value) {
    u32 bits;
    memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// mma.sp::ordered_metadata.m16n8k32 for bf16, PTX ISA "Matrix fragments for sparse mma.m16n8k32".
inline void mma_sparse_of_warp(int first, int selector) {
    float a[16][32] = {}, b[32][8];
    for (int lane = 0; lane < 32; lane++) {
        const Operands& own = operands[first + lane];
        const int g = lane / 4, t = lane % 4;
        const u32 registers[4] = {own.a.x, own.a.y, own.a.z, own.a.w};
        for (int r = 0; r < 4; r++) {
            const int row = g + 8 * (r % 2), four = t + 4 * (r / 2);  // of eight fours of columns
            const u32 metadata = operands[first + 4 * g + 2 * selector + four / 4].metadata;
            const u32 nibble = metadata >> (16 * (r % 2) + 4 * (four % 4)) & 15;
            const int i0 = nibble & 3, i1 = nibble >> 2;
            if (i0 >= i1) fail("metadata that is not ordered");
            a[row][4 * four + i0] = bf16(registers[r] & 0xffff);
            a[row][4 * four + i1] = bf16(registers[r] >> 16);
            for (int half = 0; half < 2; half++) b[8 * r + 2 * t + half][g] = bf16(own.b[r] >> (16 * half) & 0xffff);
        }
    }
    bool stored[16][32] = {};
    for (int row = 0; row < 16; row++)
        for (int four = 0; four < 8; four++) {
            const u32 nibble = operands[first + 4 * (row % 8) + 2 * selector + four / 4].metadata >> (16 * (row / 8) + 4 * (four % 4));
            stored[row][4 * four + (nibble & 3)] = stored[row][4 * four + (nibble >> 2 & 3)] = true;
        }
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = operands[first + lane].d[i];
            for (int k = 0; k < 32; k++)
                if (stored[row][k]) sum += double(a[row][k]) * b[k][column];
            operands[first + lane].d[i] = float(sum);
        }
}

}  // namespace emulator

inline u32 thread_index() { return emulator::self; }
inline u32 warp_index() { return emulator::self / 32; }
inline int block_x() { return emulator::block_number[0]; }
inline int block_y() { return emulator::block_number[1]; }

inline void cp_async(u32 to, const u8* from, int bytes) {
    using namespace emulator;
    if (bytes != 0 && bytes != 16) fail("cp.async of " + std::to_string(bytes) + " bytes");
    before_write(to, 16);
    Copy copy = {to, {}};
    if (bytes) memcpy(copy.bytes, global_read(from, 16), 16);
    memset(&shared[to], 0xff, 16);
    for (u32 n = to / 4; n < to / 4 + 4; n++) granules[n].in_flight = true;
    fibres[self].open.push_back(copy);
}

inline void cp_async(u32 to, const u8* from) { cp_async(to, from, 16); }

inline void cp_async_commit() {
    emulator::Fibre& fibre = emulator::fibres[emulator::self];
    fibre.groups.push_back(fibre.open);
    fibre.open.clear();
}

inline uint4 shared_load16(u32 at) { uint4 v; memcpy(&v, emulator::shared_read(at, 16), 16); return v; }
inline u32 shared_load4(u32 at) { u32 v; memcpy(&v, emulator::shared_read(at, 4), 4); return v; }
inline uint2 shared_load8(u32 at) { uint2 v; memcpy(&v, emulator::shared_read(at, 8), 8); return v; }
inline float shared_load_float(u32 at) { float v; memcpy(&v, emulator::shared_read(at, 4), 4); return v; }
inline void shared_store_float(u32 at, float value) {
    emulator::before_write(at, 4);
    memcpy(&emulator::shared[at], &value, 4);
    emulator::after_write(at, 4);
}

// Lane l names row l % 8 of matrix l / 8; it gets elements 2 (l % 4) and + 1 of row l / 4 of each matrix.
inline void ldmatrix(u32 (&b)[4], u32 at) {
    using namespace emulator;
    const int first = self / 32 * 32;
    shared_read(at, 16);  // the lane that names a row is the one that must be allowed to read it
    operands[self].address = at;
    operands[self].out = b;
    meet(warp(), "ldmatrix", [&] {
        for (int lane = 0; lane < 32; lane++)
            for (int matrix = 0; matrix < 4; matrix++)
                memcpy(&operands[first + lane].out[matrix],
                       &shared[operands[first + 8 * matrix + lane / 4].address + 4 * (lane % 4)], 4);
    });
}

template <int SELECTOR>
void mma_sparse(float (&d)[4], uint4 a, const u32 (&b)[4], u32 metadata) {
    using namespace emulator;
    Operands& own = operands[self];
    own.a = a;
    own.metadata = metadata;
    own.d = d;
    memcpy(own.b, b, 16);
    meet(warp(), "mma.sp" + std::to_string(SELECTOR), [&] { mma_sparse_of_warp(self / 32 * 32, SELECTOR); });
}

inline u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }

inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    using namespace emulator;
    u32 d = 0;
    for (int half = 0; half < 32; half += 16)
        d |= to_bf16(float(double(bf16(a >> half & 0xffff)) * bf16(b >> half & 0xffff) + bf16(c >> half & 0xffff))) << half;
    return d;
}

inline u32 global_load2(const u8* at) { uint16_t v; memcpy(&v, emulator::global_read(at, 2), 2); return v; }
inline u32 global_load4(const u8* at) { u32 v; memcpy(&v, emulator::global_read(at, 4), 4); return v; }
inline float bf16_value(u32 bits) { return emulator::bf16(bits); }
inline u32 bf16_bits(float value) { return emulator::to_bf16(value); }
inline float global_load_bf16(const u8* at) { return emulator::bf16(global_load2(at)); }
inline void global_store_bf16(u8* at, float value) { const uint16_t v = emulator::to_bf16(value); emulator::global_write(at, &v, 2); }
inline void global_store8(u8* at, uint2 value) { emulator::global_write(at, &value, 8); }
