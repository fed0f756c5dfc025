#include "cuda/record.h"

#include <memory>
#include <sstream>

namespace ffkernels::cuda {
namespace {

struct Recording {
  Device device;
  std::ostringstream calls;  // JSON
  std::vector<Tensor> scratch;
};

thread_local std::unique_ptr<Recording> current;

void write_hex(std::ostream& out, const Params& params) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(&params);
  for (size_t i = 0; i < sizeof(Params); ++i)
    out << "0123456789abcdef"[bytes[i] >> 4] << "0123456789abcdef"[bytes[i] & 15];
}

}  // namespace

bool recording() { return current != nullptr; }

const Device& recorded_device() { return current->device; }

void record(const std::vector<Launch>& launches, const std::string& call, const Tensor& scratch,
            const std::vector<Part>& parts) {
  std::ostream& out = current->calls;
  out << (current->scratch.empty() ? "" : ", ") << "{\"call\": \"" << call << "\", \"parts\": [";
  for (const Part& part : parts) {
    out << (&part == parts.data() ? "" : ", ") << "{\"name\": \"" << part.name << "\", \"offset\": " << part.offset
        << ", \"bytes\": " << part.bytes << "}";
  }
  out << "], \"launches\": [";
  for (const Launch& launch : launches) {
    out << (&launch == launches.data() ? "" : ", ") << "{\"kernel\": \"" << kernel_name(launch.math)
        << "\", \"grid\": " << launch.grid << ", \"block\": " << kThreads
        << ", \"shared\": " << shared_bytes(launch.math)
        << ", \"cooperative\": " << (launch.cooperative ? "true" : "false") << ", \"arguments\": \"";
    write_hex(out, launch.params);
    out << "\"}";
  }
  out << "]}";
  current->scratch.push_back(scratch);
}

void cuda_record(int64_t capability, int64_t multiprocessors, bool cooperative, const std::vector<int64_t>& resident) {
  STD_TORCH_CHECK(resident.size() == kMathKinds, "resident: must have ", kMathKinds, " entries");
  current = std::make_unique<Recording>();
  current->device.capability = static_cast<int32_t>(capability);
  current->device.multiprocessors = static_cast<int32_t>(multiprocessors);
  current->device.cooperative = cooperative;
  for (size_t i = 0; i < kMathKinds; ++i) current->device.resident[i] = static_cast<int32_t>(resident[i]);
}

std::tuple<std::string, std::vector<Tensor>> cuda_recorded() {
  STD_TORCH_CHECK(recording(), "cuda_record was not called in this thread");
  const std::unique_ptr<Recording> done = std::move(current);
  return {"[" + done->calls.str() + "]", done->scratch};
}

}  // namespace ffkernels::cuda
