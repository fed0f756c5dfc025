#include <cuda_runtime.h>

#include <sstream>

#include "cuda/device.h"

namespace ffkernels::cuda {
namespace {

// 12080 as "12.8"
std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + "\"";
}

__global__ void probe() {}

// "null", or why the kernels of this library do not run on the current device: none was compiled for it, say.
std::string kernel_error() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  return error == cudaSuccess ? "null" : quoted(cudaGetErrorString(error));
}

}  // namespace

std::string devices() {
  int driver = 0, runtime = 0, count = 0;
  cudaDriverGetVersion(&driver);  // 0 where there is no driver
  cudaRuntimeGetVersion(&runtime);
  const cudaError_t error = cudaGetDeviceCount(&count);
  const bool usable = error == cudaSuccess && count > 0;
  std::ostringstream json;
  json << "{\"driver\": " << (driver ? quoted(version_text(driver)) : "null")
       << ", \"runtime\": " << quoted(version_text(runtime))
       << ", \"error\": " << (error == cudaSuccess ? "null" : quoted(cudaGetErrorString(error)))
       << ", \"kernel_error\": " << (usable ? kernel_error() : "null") << ", \"devices\": [";
  for (int i = 0; usable && i < count; ++i) {
    cudaDeviceProp device;
    if (cudaGetDeviceProperties(&device, i) != cudaSuccess) continue;
    json << (i ? ", " : "") << "{\"name\": " << quoted(device.name) << ", \"capability\": \"" << device.major << "."
         << device.minor << "\", \"multiprocessors\": " << device.multiProcessorCount
         << ", \"memory_bytes\": " << device.totalGlobalMem << "}";
  }
  json << "]}";
  return json.str();
}

}  // namespace ffkernels::cuda
