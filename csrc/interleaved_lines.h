// Included inside the anonymous namespace of sources for ARM that read QUADS, in the section that is compiled for their ISA.
//
// Such a source defines LINES, and dot_some<form, M, SOME> for SOME up to LINES: it multiplies the first SOME of M lines that are
// interleaved.

template <int form, int M>
const char* dot(const uint32_t* masks, const char* values, int64_t quads, const Lines8& x, int32_t* sums) {
    const int8_t* lines = static_cast<const int8_t*>(x.data);
    constexpr int WHOLE = M / LINES * LINES;
    const char* end = values;
    for (int m = 0; m < WHOLE; m += LINES)
        end = dot_some<form, M, LINES>(masks, values, quads, lines + 8 * m, sums + PANEL * m);
    if constexpr (M > WHOLE)
        end = dot_some<form, M, M - WHOLE>(masks, values, quads, lines + 8 * WHOLE, sums + PANEL * WHOLE);
    return end;
}

#define RAC_LINES(form) \
    {dot<form, 1>, dot<form, 2>, dot<form, 3>, dot<form, 4>, dot<form, 5>, dot<form, 6>, dot<form, 7>, dot<form, 8>}
