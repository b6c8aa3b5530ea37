// What the SVE kernels share. They are written for vectors of 128, 256 and 512 bits, in which a quad is four, two and one vectors; longer
// vectors are used as far as 512 bits.
#pragma once
#include "neon.h"

// Clang before 16 has the types only where all of a source is compiled for SVE.
#if defined(RAC_NEON) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && __GNUC__ >= 10))
#define RAC_SVE 1
#include <arm_sve.h>

namespace rac {

// Inlined into each ISA's translation unit, so each gets its own copy.
namespace {

// The mask of as many lanes of bytes as a vector has, from memory.
typedef svbool_t MaskOfBytes __attribute__((may_alias));

constexpr struct Eighths {
    uint8_t of[QUAD];
    constexpr Eighths() : of() {
        for (int i = 0; i < QUAD; i++) of[i] = static_cast<uint8_t>(i / 8);
    }
} eighths;

}  // namespace
}  // namespace rac

#if defined(__clang__)
#define RAC_SVE_TARGET _Pragma("clang attribute push(__attribute__((target(\"sve\"))), apply_to = function)")
#else
#define RAC_SVE_TARGET _Pragma("GCC push_options") _Pragma("GCC target(\"arch=armv8.2-a+sve\")")
#endif
#endif
