#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#include "cuda/launch.h"

extern "C" {
__global__ void ff_stages_bf16(const __grid_constant__ ffkernels::cuda::Params);
__global__ void ff_stages_fp16(const __grid_constant__ ffkernels::cuda::Params);
__global__ void ff_stages_f32(const __grid_constant__ ffkernels::cuda::Params);
__global__ void ff_stages_tf32(const __grid_constant__ ffkernels::cuda::Params);
__global__ void ff_stages_f32_bf16(const __grid_constant__ ffkernels::cuda::Params);
}

namespace ffkernels::cuda {
namespace {

const void* kernel_of(Math math) {
  static const void* const kernels[kMathKinds] = {
      reinterpret_cast<const void*>(ff_stages_bf16), reinterpret_cast<const void*>(ff_stages_fp16),
      reinterpret_cast<const void*>(ff_stages_f32), reinterpret_cast<const void*>(ff_stages_tf32),
      reinterpret_cast<const void*>(ff_stages_f32_bf16)};
  return kernels[static_cast<int>(math)];
}

[[noreturn]] void fail(cudaError_t error, const std::string& what) {
  cudaGetLastError();  // so that the next call does not report it again
  throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(error, what);
}

// While it lives, this thread may allocate and load kernels although another thread is capturing a graph. Otherwise
// such a call fails, and breaks that thread's capture: torch captures in the mode that forbids it to all threads.
class BesideCaptures {
 public:
  BesideCaptures() { exchange(); }
  ~BesideCaptures() { exchange(); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  void exchange() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

int attribute(cudaDeviceAttr which, int32_t index) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

Device look_up(int32_t index) {
  Device device;
  device.capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  if (device.capability < 80) return device;  // the plan refuses it; no kernel here is compiled for it
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  device.cooperative = attribute(cudaDevAttrCooperativeLaunch, index) != 0;
  const int shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  const BesideCaptures loads;
  for (int i = 0; i < kMathKinds; ++i) {
    const auto math = static_cast<Math>(i);
    if (shared < shared_bytes(math)) continue;
    const void* kernel = kernel_of(math);
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(math));
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&device.resident[i], kernel, kThreads, shared_bytes(math));
    }
    if (error != cudaSuccess) fail(error, std::string("kernel ") + kernel_name(math) + " on this GPU");
  }
  return device;
}

}  // namespace

const Device& device_of(int32_t index) {
  static std::mutex mutex;
  static std::map<int32_t, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  return found != known.end() ? found->second : known[index] = look_up(index);
}

void* current_stream(int32_t index) {
  // The function is libtorch_cuda's, which a CPU-only torch lacks. A weak symbol would stay null even where there is
  // one: this library does not depend on it, and Python loads it out of sight.
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    void* symbol = torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  if (function == nullptr || function(index, &stream) != 0) {
    throw std::runtime_error("torch's current CUDA stream is out of reach: torch is not a CUDA build, or not loaded");
  }
  return stream;
}

uint32_t* words_of_stream(int32_t index, void* stream, int64_t count) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(cuda_stream, &capture), "cudaStreamIsCapturing");
  if (capture != cudaStreamCaptureStatusNone || cuda_stream == cudaStreamPerThread) return nullptr;
  struct Words {
    uint32_t* data = nullptr;
    int64_t count = 0;
  };
  static std::mutex mutex;
  static std::map<std::pair<int32_t, void*>, Words> known;  // never freed: the driver may be gone at exit
  const std::lock_guard<std::mutex> lock(mutex);
  Words& words = known[{index, stream}];
  if (words.count < count) {
    // Not torch's memory: what lives on from call to call must not come from the pool of a graph that is being warmed
    // up. It grows by doubling, so there are few of these, and the smaller ones stay: another thread may be about to
    // launch with one.
    const int64_t larger = std::max({count, 2 * words.count, int64_t{1} << 14});
    const BesideCaptures allocates;
    uint32_t* data = nullptr;
    check(cudaMalloc(&data, larger * sizeof(uint32_t)), "cudaMalloc of a workspace");
    set_to_zero(data, larger * sizeof(uint32_t), stream);
    words = {data, larger};
  }
  return words.data;
}

void set_to_zero(void* data, int64_t bytes, void* stream) {
  check(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync of a workspace");
}

void run(const std::vector<Launch>& launches, const Problem& problem, void* stream) {
  for (const Launch& launch : launches) {
    cudaLaunchAttribute cooperative{};
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(launch.grid));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes(launch.math);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cooperative;
    config.numAttrs = launch.cooperative ? 1 : 0;
    void* arguments[] = {const_cast<Params*>(&launch.params)};
    const cudaError_t error = cudaLaunchKernelExC(&config, kernel_of(launch.math), arguments);
    if (error != cudaSuccess) {
      fail(error, describe(problem) + ": launch of " + kernel_name(launch.math) + " on " + std::to_string(launch.grid) +
                      " blocks of " + std::to_string(kThreads) + " threads");
    }
  }
}

}  // namespace ffkernels::cuda
