// The GPU half: one thread makes four neighbouring elements of one sample, which is one Philox counter.
//
// Grids are one-dimensional and strided, so no batch is too large; a 64-bit index is divided in 32 bits where it fits.
// The draw counter is read on the device: a captured graph advances with it.
#include <cuda_runtime.h>

#undef NDEBUG
#include <cassert>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "noise.h"

namespace encdiff {
namespace {

constexpr int kThreads = 256;

struct Quad {
  int64_t sample, quad, offset;
  int count;
};

__device__ __forceinline__ Quad quad_of(int64_t i, int64_t quads, int64_t size) {
  const int64_t sample = (i | quads) >> 32 ? i / quads : static_cast<uint32_t>(i) / static_cast<uint32_t>(quads);
  const int64_t quad = i - sample * quads, left = size - 4 * quad;
  return {sample, quad, sample * size + 4 * quad, left < 4 ? static_cast<int>(left) : 4};
}

template <class T>
struct alignas(4 * sizeof(T)) Packed {
  T values[4];
};

// kAligned: the size is a multiple of 4 and the pointers are aligned, so four elements move at once.
template <class T, bool kAligned>
__device__ __forceinline__ void read(const void* from, const Quad& q, float (&to)[4]) {
  const T* p = static_cast<const T*>(from) + q.offset;
  if constexpr (kAligned) {
    const Packed<T> packed = *reinterpret_cast<const Packed<T>*>(p);
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = load(packed.values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = k < q.count ? load(p[k]) : 0.0f;
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void write(void* to, const Quad& q, const float (&from)[4]) {
  T* p = static_cast<T*>(to) + q.offset;
  if constexpr (kAligned) {
    Packed<T> packed;
#pragma unroll
    for (int k = 0; k < 4; ++k) store(packed.values[k], from[k]);
    *reinterpret_cast<Packed<T>*>(p) = packed;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < q.count) store(p[k], from[k]);
  }
}

__device__ __forceinline__ void normals(const Key& key, const Quad& q, float (&z)[4]) {
  const Words w = philox(counter(key, q.sample, q.quad), static_cast<uint64_t>(key.seed));
  box_muller(w.x, w.y, z[0], z[1]);
  box_muller(w.z, w.w, z[2], z[3]);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) q_sample_kernel(const QSample q, int64_t quads, int64_t total) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total;
       i += gridDim.x * static_cast<int64_t>(kThreads)) {
    const Quad at_quad = quad_of(i, quads, q.size);
    const int64_t t = timestep(q, at_quad.sample);
    assert(t >= 0 && t < q.schedule.rows && "t must lie in 0 to T - 1, the schedule's last row");  // as PyTorch's indexing
    float signal, sigma, x[4], e[4], y[4];
    signal_and_sigma(q, t, signal, sigma);
    if (q.weight && at_quad.quad == 0) q.weight[at_quad.sample] = static_cast<float>(at(q.loss_weights, t, 0));
    read<T, kAligned>(q.x0, at_quad, x);
    if (q.noise) read<T, kAligned>(q.noise, at_quad, e);
    else normals(q.key, at_quad, e);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      y[k] = signal * x[k] + sigma * e[k];
      if (q.kind == kV) e[k] = signal * e[k] - sigma * x[k];
      if (q.kind == kFlow) e[k] = e[k] - x[k];
    }
    write<T, kAligned>(q.x_t, at_quad, y);
    if (q.kind != kNone) write<T, kAligned>(q.target, at_quad, e);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) step_kernel(const Step s, int64_t quads, int64_t total) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total;
       i += gridDim.x * static_cast<int64_t>(kThreads)) {
    const Quad q = quad_of(i, quads, s.size);
    float x[4], x0[4], y[4], c[5];
#pragma unroll
    for (int k = 0; k < 5; ++k) c[k] = coefficient(s.coefficients, q.sample, k);
    const float limit = s.limits ? s.limits[q.sample] : s.clip, scale = s.limits ? s.clip / limit : 1.0f;
    read<T, kAligned>(s.x, q, x);
    read<T, kAligned>(s.output, q, x0);
    if (s.unconditional) {
      read<T, kAligned>(s.unconditional, q, y);
#pragma unroll
      for (int k = 0; k < 4; ++k) x0[k] = y[k] + s.guidance * (x0[k] - y[k]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float a = c[0] * x[k] + c[1] * x0[k], b = a < -limit ? -limit : a;
      x0[k] = (b > limit ? limit : b) * scale;
      y[k] = c[2] * x0[k] + c[3] * x[k];
    }
    if (s.noise || s.key.sample_ids) {
      if (s.noise) read<T, kAligned>(s.noise, q, x);
      else normals(s.key, q, x);
#pragma unroll
      for (int k = 0; k < 4; ++k) y[k] = y[k] + c[4] * x[k];
    }
#pragma unroll
    for (int h = 0; h < kHistory; ++h) {
      if (!s.history[h]) continue;
      const float c_h = coefficient(s.coefficients, q.sample, 5 + h);
      read<T, kAligned>(s.history[h], q, x);
#pragma unroll
      for (int k = 0; k < 4; ++k) y[k] = y[k] + c_h * x[k];
    }
    write<T, kAligned>(s.x_prev, q, y);
    if (s.x0) write<T, kAligned>(s.x0, q, x0);
  }
}

template <class T>
__device__ __forceinline__ uint32_t magnitude_at(const Threshold& s, float c0, float c1, int64_t i) {
  float output = load(static_cast<const T*>(s.output)[i]);
  if (s.unconditional) {
    const float other = load(static_cast<const T*>(s.unconditional)[i]);
    output = other + s.guidance * (output - other);
  }
  return magnitude(c0, c1, load(static_cast<const T*>(s.x)[i]), output);
}

// A block per sample. Counts are added in any order and come out the same.
template <class T>
__global__ void __launch_bounds__(kThreads) threshold_kernel(const Threshold s) {
  __shared__ unsigned long long histogram[kThreads];
  __shared__ Search search;
  __shared__ uint32_t next;
  for (int64_t sample = blockIdx.x; sample < s.batch; sample += gridDim.x) {
    const float c0 = coefficient(s.coefficients, sample, 0), c1 = coefficient(s.coefficients, sample, 1);
    const int64_t begin = sample * s.size + threadIdx.x, end = (sample + 1) * s.size;
    if (threadIdx.x == 0) search = {s.rank, 0, 0, false}, next = 0xFFFFFFFFu;
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
      histogram[threadIdx.x] = 0;
      __syncthreads();
#pragma unroll 1
      for (int64_t i = begin; i < end; i += kThreads) {
        const uint32_t bits = magnitude_at<T>(s, c0, c1, i);
        if ((bits & search.known) == search.found) atomicAdd(&histogram[bits >> shift & 0xFFu], 1ull);
      }
      __syncthreads();
      if (threadIdx.x == 0) narrow(search, histogram, shift);
      __syncthreads();
    }
#pragma unroll 1
    for (int64_t i = begin; i < end && !search.has_twin; i += kThreads) {
      const uint32_t bits = magnitude_at<T>(s, c0, c1, i);
      if (bits > search.found) atomicMin(&next, bits);
    }
    __syncthreads();
    if (threadIdx.x == 0) s.limits[sample] = limit_of(s, search.found, next == 0xFFFFFFFFu ? search.found : next);
    __syncthreads();
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) draw_kernel(const Draw d, int64_t quads, int64_t total) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < total;
       i += gridDim.x * static_cast<int64_t>(kThreads)) {
    const Quad q = quad_of(i, quads, d.size);
    float z[4];
    if (d.kind == kNormal) {
      normals(d.key, q, z);
    } else {
      const Words w = philox(counter(d.key, q.sample, q.quad), static_cast<uint64_t>(d.key.seed));
      const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) z[k] = static_cast<float>(words[k] >> 8) * 0x1p-24f;
    }
    write<T, kAligned>(d.out, q, z);
  }
}

bool aligned(DType dtype, int64_t size, std::initializer_list<const void*> pointers) {
  const uintptr_t width = dtype == kFloat32 ? 16 : 8;
  bool all = size % 4 == 0;
  for (const void* p : pointers) all = all && reinterpret_cast<uintptr_t>(p) % width == 0;
  return all;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("noise engine: ") + cudaGetErrorString(error));
}

template <class Args>
using Kernel = void (*)(Args, int64_t, int64_t);

// `kernels` in the order of DType, the unaligned form before the aligned one.
template <class Args>
void start(const Kernel<Args> (&kernels)[3][2], const Args& args, bool is_aligned, int device, void* stream) {
  check(cudaSetDevice(device));  // our CUDA runtime is linked in and does not know of PyTorch's choice
  const int64_t quads = (args.size + 3) / 4, total = args.batch * quads, blocks = (total + kThreads - 1) / kThreads;
  const unsigned grid = static_cast<unsigned>(blocks < (1 << 30) ? blocks : (1 << 30));
  kernels[args.dtype][is_aligned]<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args, quads, total);
  check(cudaGetLastError());
}

#define FORMS(kernel)                                                  \
  {{kernel<Float32, false>, kernel<Float32, true>},                    \
   {kernel<BFloat16, false>, kernel<BFloat16, true>},                  \
   {kernel<Float16, false>, kernel<Float16, true>}}

}  // namespace

void launch(const QSample& q, int device, void* stream) {
  static const Kernel<const QSample> kernels[3][2] = FORMS(q_sample_kernel);
  start<const QSample>(kernels, q, aligned(q.dtype, q.size, {q.x0, q.noise, q.x_t, q.target}), device, stream);
}

void launch(const Step& s, int device, void* stream) {
  static const Kernel<const Step> kernels[3][2] = FORMS(step_kernel);
  const bool is_aligned = aligned(
      s.dtype, s.size, {s.x, s.output, s.unconditional, s.noise, s.history[0], s.history[1], s.history[2], s.x_prev, s.x0});
  start<const Step>(kernels, s, is_aligned, device, stream);
}

void launch(const Threshold& s, int device, void* stream) {
  check(cudaSetDevice(device));
  const unsigned grid = static_cast<unsigned>(s.batch < (1 << 30) ? s.batch : (1 << 30));
  const auto kernel = s.dtype == kFloat32    ? threshold_kernel<Float32>
                      : s.dtype == kBFloat16 ? threshold_kernel<BFloat16>
                                             : threshold_kernel<Float16>;
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(s);
  check(cudaGetLastError());
}

void launch(const Draw& d, int device, void* stream) {
  static const Kernel<const Draw> kernels[3][2] = FORMS(draw_kernel);
  start<const Draw>(kernels, d, aligned(d.dtype, d.size, {d.out}), device, stream);
}

}  // namespace encdiff
