// A CUDA runtime that only writes down what it is asked for, and what test_launch.py calls through ctypes.
#include <cstdlib>
#include <map>
#include <sstream>
#include <stdexcept>

#include "cuda/launch.h"
#include "cuda_runtime.h"

using namespace ffkernels::cuda;

namespace {

std::ostringstream calls;  // of the runtime, a line each
std::string failing;       // the call that fails from now on
cudaError_t failure = cudaSuccess, last = cudaSuccess;
std::map<int, int> attributes;
cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;  // of this thread
bool other_captures = false;                               // another thread captures, in the global mode
cudaStream_t capturing = reinterpret_cast<cudaStream_t>(-1);

cudaError_t called(const std::string& name, const std::string& how, bool unsafe = false) {
  calls << name << " " << how << "\n";
  if (unsafe && other_captures && mode != cudaStreamCaptureModeRelaxed) last = cudaErrorStreamCaptureUnsupported;
  if (name == failing) last = failure;
  return (unsafe && other_captures && mode != cudaStreamCaptureModeRelaxed) ? cudaErrorStreamCaptureUnsupported
         : name == failing                                                  ? failure
                                                                            : cudaSuccess;
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts << " "), ...);
  return out.str();
}

std::string error;
std::vector<uint64_t> addresses;

template <typename F>
const char* message_of(const F& f) {
  error.clear();
  try {
    f();
  } catch (const std::exception& e) {
    error = e.what();
  }
  return error.c_str();
}

}  // namespace

extern "C" {
void ff_stages_bf16(Params) {}
void ff_stages_fp16(Params) {}
void ff_stages_f32(Params) {}
void ff_stages_tf32(Params) {}
void ff_stages_f32_bf16(Params) {}
}

namespace {
const char* name_of(const void* kernel) {
  const std::map<const void*, const char*> names = {{reinterpret_cast<const void*>(ff_stages_bf16), "bf16"},
                                                    {reinterpret_cast<const void*>(ff_stages_fp16), "fp16"},
                                                    {reinterpret_cast<const void*>(ff_stages_f32), "f32"},
                                                    {reinterpret_cast<const void*>(ff_stages_tf32), "tf32"},
                                                    {reinterpret_cast<const void*>(ff_stages_f32_bf16), "f32_bf16"}};
  return names.at(kernel);
}
}  // namespace

cudaError_t cudaGetLastError() {
  const cudaError_t now = last;
  last = cudaSuccess;
  return now;
}
const char* cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : "cudaErrorName"; }
const char* cudaGetErrorString(cudaError_t) { return "what it means"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  *value = attributes[which];
  return called("attribute", text(device));
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  return called("allow", text(name_of(kernel), value), true);
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t shared) {
  *blocks = 3;
  return called("occupancy", text(name_of(kernel), threads, shared), true);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = stream == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* given) {
  std::swap(mode, *given);
  return cudaSuccess;
}
cudaError_t cudaMalloc(void** p, size_t bytes) {
  const cudaError_t result = called("malloc", text(bytes), true);
  if (result == cudaSuccess) *p = std::malloc(bytes);
  return result;
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  return called("memset", text(reinterpret_cast<uint64_t>(p), value, bytes, reinterpret_cast<uint64_t>(stream)));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void** arguments) {
  bool cooperative = false;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    cooperative |= c->attrs[i].id == cudaLaunchAttributeCooperative && c->attrs[i].val.cooperative == 1;
  }
  const auto* params = static_cast<const Params*>(arguments[0]);
  return called("launch", text(name_of(kernel), c->gridDim.x, c->blockDim.x, c->dynamicSmemBytes, cooperative,
                               reinterpret_cast<uint64_t>(c->stream), params->stage_begin, params->stage_end));
}

extern "C" {

void set_attribute(int which, int value) { attributes[which] = value; }
void fail(const char* call, int with) { failing = call, failure = static_cast<cudaError_t>(with); }
void set_other_captures(int yes) { other_captures = yes; }
void set_capturing(uint64_t stream) { capturing = reinterpret_cast<cudaStream_t>(stream); }
int last_error() { return last; }
int capture_mode() { return mode; }
const char* take_calls() {
  static std::string taken;
  taken = calls.str();
  calls.str("");
  return taken.c_str();
}

// The numbers of a device: capability, multiprocessors, cooperative, then the blocks of each kernel.
const char* device(int index, int* numbers) {
  return message_of([&] {
    const Device& d = device_of(index);
    int* to = numbers;
    *to++ = d.capability, *to++ = d.multiprocessors, *to++ = d.cooperative;
    for (int blocks : d.resident) *to++ = blocks;
  });
}
const char* words(int index, uint64_t stream, int64_t count, uint64_t* at) {
  return message_of(
      [&] { *at = reinterpret_cast<uint64_t>(words_of_stream(index, reinterpret_cast<void*>(stream), count)); });
}
const char* stream(int index) {
  return message_of([&] { current_stream(index); });
}
// Two launches: stages [0, 2) with a barrier, then stage [2, 3).
const char* launch(uint64_t on) {
  return message_of([&] {
    Problem problem;
    problem.op = "ff_step_";
    problem.rows = 128;
    problem.labels.candidates = 1;
    Layer layer{};
    layer.depth = 784, layer.cols = 500;
    problem.layers = {layer};
    Params first{}, second{};
    first.stage_end = 2, second.stage_begin = 2, second.stage_end = 3;
    run({{Math::bf16, 7, true, first}, {Math::fp16, 5, false, second}}, problem, reinterpret_cast<void*>(on));
  });
}
}
