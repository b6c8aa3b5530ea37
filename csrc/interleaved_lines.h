// Included inside the anonymous namespace of sources that read QUADS and multiply fewer lines at a time than are interleaved, in the
// section that is compiled for their ISA.
//
// Such a source defines LINES, and dot_some<form, M, SOME> for SOME up to LINES: it multiplies SOME of M lines, from `line` on.

template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums) {
    constexpr int WHOLE = M / LINES * LINES;
    const char* end = values;
    for (int line = 0; line < WHOLE; line += LINES) end = dot_some<form, M, LINES>(masks, values, {}, quads, x, line, sums);
    if constexpr (M > WHOLE) end = dot_some<form, M, M - WHOLE>(masks, values, {}, quads, x, WHOLE, sums);
    return end;
}

template <int form, int M>
RAC_INLINE const char* multiply(const uint32_t* masks, const char* values, const Zeros& zeros, int64_t quads, const Lines8& x,
                                int32_t* sums) {
    return dot_some<form, M, M>(masks, values, zeros, quads, x, 0, sums);
}

constexpr Format8 FORMAT = QUADS;
#include "few_lines4.h"

#define RAC_LINES(form) \
    {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>, dot<form, 5>, dot<form, 6>, dot<form, 7>, dot<form, 8>}
