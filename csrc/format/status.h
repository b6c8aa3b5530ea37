// How the C interface reports that a call failed.
#pragma once
#include <cstdint>

namespace rac {

// What a call returns; Python chooses the next step that it names by it (kernels/cpu/library.py).
enum Status : int32_t {
    OK = 0,
    DAMAGED = 1,        // packed data, or a bitmask, that contradicts itself
    BAD_ARGUMENT = 2,   // a size, type or address that does not fit the others
    NO_SUCH_ISA = 3,    // this processor lacks the instruction set
    NO_MEMORY = 4,
};

// Keep the text for last_error() of the calling thread; returns `status`.
Status fail(Status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// The text of the calling thread's latest failure.
const char* last_error();

#define RAC_TRY(call) \
    if (const ::rac::Status rac_status = (call)) return rac_status

}  // namespace rac
