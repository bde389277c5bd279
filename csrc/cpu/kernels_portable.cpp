// The kernels in plain C++.
#include "cpu/includes.h"
#include "cpu/lanes_portable.h"
//
#include "cpu/table.h"

namespace wandapp {
const Kernels portable_kernels = table_of<Portable>();
}
