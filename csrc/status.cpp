#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace rac {

static thread_local char text[256] = "";

Status fail(Status status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    return status;
}

const char* last_error() { return text; }

}  // namespace rac
