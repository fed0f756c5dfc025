#pragma once

#include <string>

namespace ffkernels::cuda {

// What the CUDA runtime says of this machine, as JSON; never throws, whether or not there is a driver or a device.
std::string devices();

}  // namespace ffkernels::cuda
