// Byte shuffles that spread stored 8-bit values. Included by isa/ISA.cpp alone.
#pragma once
#include <cstdint>

namespace rac {
namespace {

// For each mask byte and each of 8 bytes: the number of the stored byte that is put there, 0x80 for a zero. `high` is for the upper
// half of a vector, whose values are loaded at byte 8.
struct Shuffles {
    alignas(64) uint8_t low[256][8];
    alignas(64) uint8_t high[256][8];
    constexpr Shuffles() : low(), high() {
        for (int mask = 0; mask < 256; mask++)
            for (int lane = 0, stored = 0; lane < 8; lane++) {
                const bool set = mask >> lane & 1;
                low[mask][lane] = static_cast<uint8_t>(set ? stored : 0x80);
                high[mask][lane] = static_cast<uint8_t>(set ? 8 + stored : 0x80);
                stored += set;
            }
    }
};
constexpr Shuffles shuffles;

}  // namespace
}  // namespace rac
