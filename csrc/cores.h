// What the cores of this machine have in common.
#pragma once

namespace rac {

// Whether some cores are slower than others: performance and efficiency cores of one processor.
bool cores_differ();

}  // namespace rac
