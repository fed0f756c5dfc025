// What happens to single values beside the products: types, row scale, activations, loss, optimizers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/params.h"
#include "cuda/ptx.cuh"

namespace ffkernels::cuda {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

template <typename T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// The two halves of a word of packed values, the lower first.
template <typename T>
__device__ inline float2 unpack(uint32_t word);
template <>
__device__ inline float2 unpack<__nv_bfloat16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
__device__ inline float2 unpack<__half>(uint32_t word) {
  return __half22float2(*reinterpret_cast<__half2*>(&word));
}
template <typename T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<__nv_bfloat16>(float low, float high) {
  return pack_bf16(low, high);
}
template <>
__device__ inline uint32_t pack<__half>(float low, float high) {
  return pack_fp16(low, high);
}

// -- four neighbours in memory, of which `count` exist; `whole`: all four do, and they are aligned

__device__ inline bool aligned_for_four(const void* p, int64_t row_stride, int bytes) {
  return (reinterpret_cast<uintptr_t>(p) % (4 * bytes)) == 0 && row_stride % 4 == 0;
}

__device__ inline void spread(float (&to)[4], float4 v) { to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w; }

template <typename T>
__device__ inline void load_four(float (&v)[4], const T* p, int count, bool whole) {
  if (whole) {
    if constexpr (sizeof(T) == 4) {
      spread(v, *reinterpret_cast<const float4*>(p));
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(p);
      const float2 low = unpack<T>(words.x), high = unpack<T>(words.y);
      spread(v, make_float4(low.x, low.y, high.x, high.y));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = i < count ? to_float(p[i]) : 0.f;
  }
}

template <typename T>
__device__ inline void store_four(T* p, const float (&v)[4], int count, bool whole) {
  if (whole) {
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<uint2*>(p) = make_uint2(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) p[i] = from_float<T>(v[i]);
    }
  }
}

// -- rows

__device__ inline float at(const Vector& v, int64_t i, int64_t offset = 0) { return v.data[offset + i * v.stride]; }

// r = 1 / (sqrt(q / D) + eps)
__device__ inline float row_scale(const Layer& layer, float q) {
  if (layer.normalize == Normalize::none) return 1.f;
  return 1.f / (sqrtf(layer.normalize == Normalize::rms ? q / static_cast<float>(layer.depth) : q) + layer.eps);
}

struct RowLoss {
  float loss, coef;  // the row's share of the loss times M; d loss / d G
};
// Logistic loss without overflow: a huge goodness has a finite loss as long as it is finite itself.
__device__ inline RowLoss row_loss(const Layer& layer, float goodness, float sign, int rows) {
  const float v = -sign * (goodness / layer.divisor - layer.threshold), u = v / layer.temperature;
  const float positive = v < 0.f ? 0.f : v;  // NaN stays
  const float away = expf(-fabsf(u));
  const float sigmoid = (u < 0.f ? away : 1.f) / (1.f + away);
  return {positive + layer.temperature * log1pf(away), -sign * sigmoid / (layer.divisor * static_cast<float>(rows))};
}

// -- activations: NaN stays NaN

struct Activated {
  float y, slope;
};
__device__ inline Activated activate(Activation kind, float z) {
  switch (kind) {
    case Activation::relu:
      return {z <= 0.f ? 0.f : z, z <= 0.f ? 0.f : 1.f};
    case Activation::leaky_relu:
      return {z <= 0.f ? 0.01f * z : z, z <= 0.f ? 0.01f : 1.f};
    case Activation::gelu: {
      const float cdf = 0.5f * (1.f + erff(z * 0.70710678118654752f));
      return {z * cdf, cdf + z * expf(-0.5f * z * z) * 0.39894228040143268f};
    }
    case Activation::silu: {
      const float s = 1.f / (1.f + expf(-z));
      return {z * s, s * (1.f + z * (1.f - s))};
    }
    default: {
      const float y = tanhf(z);
      return {y, 1.f - y * y};
    }
  }
}

// -- optimizers: torch.optim's formulas

// What does not depend on the element.
struct OptimizerStep {
  float lr, step_size, inverse_root_correction2;  // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  bool first;                                     // sgd: the momentum buffer is the gradient itself
};

// `before`: steps of the same launch, which the count in memory does not hold yet.
__device__ inline OptimizerStep begin_step(const Optimizer& o, int before = 0) {
  if (o.kind == OptimizerKind::store) return {};
  const float lr = o.lr_tensor ? *o.lr_tensor : o.lr, step = *o.step + static_cast<float>(before);
  const float t = step + 1.f;
  // 1 - beta^t, which would cancel for small t
  return {lr, lr / -expm1f(t * o.log_beta1), rsqrtf(-expm1f(t * o.log_beta2)), step == 0.f};
}

// New weights; their slots are changed in place.
template <int count>
__device__ inline void optimize(const Optimizer& o, const OptimizerStep& s, float (&w)[count],
                                const float (&gradient)[count], float (&slot0)[count], float (&slot1)[count]) {
  if (o.kind == OptimizerKind::sgd) {
    const bool has_slot = o.slot[0] != nullptr;
    const float rest = 1.f - o.dampening;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float g = gradient[i];
      if (o.weight_decay != 0.f) g += o.weight_decay * w[i];
      if (has_slot) {
        slot0[i] = s.first ? g : o.momentum * slot0[i] + rest * g;
        g = o.nesterov ? g + o.momentum * slot0[i] : slot0[i];
      }
      w[i] -= s.lr * g;
    }
  } else if (o.kind == OptimizerKind::hinton_sgd) {
    const float rest = 1.f - o.momentum;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      slot0[i] = o.momentum * slot0[i] + rest * gradient[i];
      w[i] -= s.lr * (slot0[i] + o.weight_decay * w[i]);
    }
  } else {
    const bool decoupled = o.kind == OptimizerKind::adamw;
    const float keep = 1.f - s.lr * o.weight_decay;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      float g = gradient[i];
      if (decoupled) {
        w[i] *= keep;
      } else if (o.weight_decay != 0.f) {
        g += o.weight_decay * w[i];
      }
      slot0[i] = o.beta1 * slot0[i] + o.rest1 * g;
      slot1[i] = o.beta2 * slot1[i] + o.rest2 * g * g;
      w[i] -= s.step_size * __fdividef(slot0[i], fast_root(slot1[i]) * s.inverse_root_correction2 + o.eps);
    }
  }
}

}  // namespace ffkernels::cuda
