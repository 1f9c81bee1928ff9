// Attention of one head after the other, compiled once per instruction set as noise_cpu.cpp is.
//
// A vector holds one number of kLanes queries (or, for the gradient of keys and values, of kLanes keys); the other side
// of the product goes by row after row, each number of it spread over a vector. So nothing is ever summed across lanes,
// rows are read as they lie, and the order of each sum is fixed.
#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define UNROLL _Pragma("GCC unroll 8")

namespace encdiff::ENCDIFF_ISA {
namespace {

// max gives b where either is NaN.
#if defined(__AVX512F__)
using Floats = __m512;
Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
using Floats = __m256;
Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
#else
typedef float Floats __attribute__((vector_size(16)));
Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
Floats max(Floats a, Floats b) { return a > b ? a : b; }
#endif
typedef uint32_t Ints __attribute__((vector_size(sizeof(Floats))));

constexpr int64_t kLanes = sizeof(Floats) / 4;
constexpr int64_t kBlock = 128;  // rows at a time: their products stay in the first cache
constexpr float kLog2E = 0x1.715476p+0f, kLn2 = 0x1.62e43p-1f;

Floats all(float a) { return a - Floats{}; }
Floats at(const float* p) {
  Floats v;
  memcpy(&v, p, sizeof v);
  return v;
}
void put(float* p, Floats v) { memcpy(p, &v, sizeof v); }

// 2^x for x <= 0, and 0 below -126.5. The sum with 1.5 2^23 rounds x to a whole number and leaves it, with the bias of
// an exponent, in the lowest bits. The polynomial is 1 + f q, q a Chebyshev interpolant of (2^f - 1) / f on
// [-1/2, 1/2]: 1e-8 off at most.
Floats exp2(Floats x) {
  constexpr float kShift = 12582912.0f + 127.0f;
  x = max(all(-127.0f), x);
  const Floats shifted = x + kShift, f = x - (shifted - kShift);
  Floats p = all(0x1.44138ap-13f);
  p = fma(p, f, all(0x1.5f0890p-10f));
  p = fma(p, f, all(0x1.3b2a54p-7f));
  p = fma(p, f, all(0x1.c6af6cp-5f));
  p = fma(p, f, all(0x1.ebfbe0p-3f));
  p = fma(p, f, all(0x1.62e430p-1f));
  p = fma(p, f, all(1.0f));
  return p * (Floats)((Ints)shifted << 23);
}

// products[j] = sum over c of rows[j][c] lanes[c]. Unrolled, or the compiler copies the sums by way of the stack.
template <int J>
void multiply_rows(const float* rows, int64_t width, const Floats* lanes, Floats* products) {
  const int64_t stride = padded(width);
  Floats sums[J] = {};
  for (int64_t c = 0; c < width; ++c)
    UNROLL for (int j = 0; j < J; ++j) sums[j] = fma(lanes[c], all(rows[j * stride + c]), sums[j]);
  UNROLL for (int j = 0; j < J; ++j) products[j] = sums[j];
}

void multiply(const float* rows, int64_t count, int64_t width, const Floats* lanes, Floats* products) {
  const int64_t stride = padded(width);
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) multiply_rows<8>(rows + j * stride, width, lanes, products + j);
  for (; j < count; ++j) multiply_rows<1>(rows + j * stride, width, lanes, products + j);
}

// sums[c] += sum over j of weights[j] rows[j][c]: a block's sum is made first, so that errors grow with blocks only.
template <int C>
void add_columns(const Floats* weights, const float* rows, int64_t stride, int64_t count, Floats* sums) {
  Floats s[C] = {};
  for (int64_t j = 0; j < count; ++j)
    UNROLL for (int c = 0; c < C; ++c) s[c] = fma(weights[j], all(rows[j * stride + c]), s[c]);
  UNROLL for (int c = 0; c < C; ++c) sums[c] += s[c];
}

void add(const Floats* weights, const float* rows, int64_t count, int64_t width, Floats* sums) {
  const int64_t stride = padded(width);
  int64_t c = 0;
  for (; c + 8 <= stride; c += 8) add_columns<8>(weights, rows + c, stride, count, sums + c);
  if (c < stride) add_columns<4>(weights, rows + c, stride, count, sums + c);
}

// In four parts, so that no comparison waits for the one before.
Floats largest_of(const Floats* x, int64_t count, Floats start) {
  Floats part[4] = {start, start, start, start};
  int64_t j = 0;
  for (; j + 4 <= count; j += 4)
    UNROLL for (int k = 0; k < 4; ++k) part[k] = max(part[k], x[j + k]);
  for (; j < count; ++j) part[0] = max(part[0], x[j]);
  return max(max(part[0], part[1]), max(part[2], part[3]));
}

// One head of one sample of a tensor: `count` rows of `width` numbers.
template <class T>
struct Head {
  T* data;
  int64_t stride, count, width;
  Head(const Rows& x, const Attention& a, int64_t index, int64_t count)
      : data(static_cast<T*>(x.data) + index / a.heads * x.batch_stride + index % a.heads * a.width),
        stride(x.row_stride), count(count), width(a.width) {}

  float at(int64_t i, int64_t c) const { return load(data[i * stride + c]); }

  void read(float scale, float* rows) const {
    const int64_t to = padded(width);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < width; ++c) rows[i * to + c] = scale * at(i, c);
      for (int64_t c = width; c < to; ++c) rows[i * to + c] = 0;
    }
  }

  // kLanes rows from `first` on; what would lie past the end is not written.
  void write(int64_t first, Floats scale, const Floats* lanes) const {
    alignas(64) float numbers[kMaxWidth * kLanes];
    for (int64_t c = 0; c < width; ++c) put(numbers + c * kLanes, scale * lanes[c]);
    const int64_t last = count < first + kLanes ? count : first + kLanes;
    for (int64_t i = first; i < last; ++i)
      for (int64_t c = 0; c < width; ++c) store(data[i * stride + c], numbers[c * kLanes + i - first]);
  }
};

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// kLanes rows from `first` on as vectors, zero past the end.
void to_lanes(const float* rows, int64_t first, int64_t count, int64_t width, Floats* lanes) {
  alignas(64) float numbers[kMaxWidth * kLanes];
  for (int64_t i = 0; i < kLanes; ++i)
    for (int64_t c = 0; c < width; ++c)
      numbers[c * kLanes + i] = first + i < count ? rows[(first + i) * padded(width) + c] : 0.0f;
  for (int64_t c = 0; c < width; ++c) lanes[c] = at(numbers + c * kLanes);
}

void clear(Floats* lanes, int64_t width) {
  for (int64_t c = 0; c < padded(width); ++c) lanes[c] = Floats{};
}

// Block after block of keys, the sums so far scaled down whenever a larger logit comes (Milakov & Gimelshein 2018).
template <class T>
void forward_head(const Attention& a, int64_t index, float* scratch) {
  const int64_t stride = padded(a.width);
  float *k = scratch, *v = k + a.keys * stride, *q = v + a.keys * stride;
  Head<T>(a.k, a, index, a.keys).read(1, k);
  Head<T>(a.v, a, index, a.keys).read(1, v);
  Head<T>(a.q, a, index, a.queries).read(kLog2E / __builtin_sqrtf(static_cast<float>(a.width)), q);
  const Head<T> out(a.out, a, index, a.queries);
  float* stats = a.stats + index * 2 * a.queries;
  for (int64_t i = 0; i < a.queries; i += kLanes) {
    Floats query[kMaxWidth], sums[kMaxWidth], p[kBlock], largest = all(-__builtin_inff()), total = {};
    to_lanes(q, i, a.queries, a.width, query);
    clear(sums, a.width);
    for (int64_t first = 0; first < a.keys; first += kBlock) {
      const int64_t count = smaller(kBlock, a.keys - first);
      multiply(k + first * stride, count, a.width, query, p);
      const Floats next = largest_of(p, count, largest), shrink = exp2(largest - next);
      for (int64_t c = 0; c < stride; ++c) sums[c] *= shrink;
      Floats of_block = {};
      for (int64_t j = 0; j < count; ++j) of_block += p[j] = exp2(p[j] - next);
      total = total * shrink + of_block;
      add(p, v + first * stride, count, a.width, sums);
      largest = next;
    }
    const Floats scale = 1.0f / total;
    out.write(i, scale, sums);
    for (int64_t j = 0; j < smaller(kLanes, a.queries - i); ++j) {
      stats[i + j] = largest[j];
      stats[a.queries + i + j] = scale[j];
    }
  }
}

// grad_s = p (grad_out v^T - delta) with delta = grad_out . out. The 1 / sum in p goes into grad_out and delta once.
template <class T>
void backward_head(const Attention& a, int64_t index, float* scratch) {
  const int64_t width = a.width, stride = padded(width);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(width));
  float *k = scratch, *v = k + a.keys * stride, *q = v + a.keys * stride, *g = q + a.queries * stride;
  float* delta = g + a.queries * stride;
  const float *largest = a.stats + index * 2 * a.queries, *inverse = largest + a.queries;
  Head<T>(a.k, a, index, a.keys).read(1, k);
  Head<T>(a.v, a, index, a.keys).read(1, v);
  Head<T>(a.q, a, index, a.queries).read(kLog2E * scale, q);
  Head<T>(a.grad_out, a, index, a.queries).read(1, g);
  const Head<T> out(a.out, a, index, a.queries);
  for (int64_t i = 0; i < a.queries; ++i) delta[i] = 0;
  for (int64_t c = 0; c < width; ++c)
    for (int64_t i = 0; i < a.queries; ++i) delta[i] += (g[i * stride + c] *= inverse[i]) * out.at(i, c);
  Floats p[kBlock], grad_s[kBlock];
  const Head<T> grad_q(a.grad_q, a, index, a.queries), grad_k(a.grad_k, a, index, a.keys);
  const Head<T> grad_v(a.grad_v, a, index, a.keys);
  for (int64_t i = 0; i < a.queries; i += kLanes) {
    Floats query[kMaxWidth], grad[kMaxWidth], sums[kMaxWidth], top = {}, dot = {};
    to_lanes(q, i, a.queries, width, query);
    to_lanes(g, i, a.queries, width, grad);
    clear(sums, width);
    for (int64_t j = 0; j < smaller(kLanes, a.queries - i); ++j) top[j] = largest[i + j], dot[j] = delta[i + j];
    for (int64_t first = 0; first < a.keys; first += kBlock) {
      const int64_t count = smaller(kBlock, a.keys - first);
      multiply(k + first * stride, count, width, query, p);
      multiply(v + first * stride, count, width, grad, grad_s);
      for (int64_t j = 0; j < count; ++j) grad_s[j] = exp2(p[j] - top) * (grad_s[j] - dot);
      add(grad_s, k + first * stride, count, width, sums);
    }
    grad_q.write(i, all(scale), sums);
  }
  for (int64_t j = 0; j < a.keys; j += kLanes) {
    Floats key[kMaxWidth], value[kMaxWidth], sums_k[kMaxWidth], sums_v[kMaxWidth];
    to_lanes(k, j, a.keys, width, key);
    to_lanes(v, j, a.keys, width, value);
    clear(sums_k, width), clear(sums_v, width);
    for (int64_t first = 0; first < a.queries; first += kBlock) {
      const int64_t count = smaller(kBlock, a.queries - first);
      multiply(q + first * stride, count, width, key, p);
      multiply(g + first * stride, count, width, value, grad_s);
      for (int64_t i = 0; i < count; ++i) {
        p[i] = exp2(p[i] - largest[first + i]);
        grad_s[i] = p[i] * (grad_s[i] - delta[first + i]);
      }
      add(p, g + first * stride, count, width, sums_v);
      add(grad_s, q + first * stride, count, width, sums_k);
    }
    grad_k.write(j, all(kLn2), sums_k);
    grad_v.write(j, all(1), sums_v);
  }
}

void forward(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i)
    a.is_bfloat16 ? forward_head<BFloat16>(a, i, scratch) : forward_head<Float32>(a, i, scratch);
}

void backward(const Attention& a, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i)
    a.is_bfloat16 ? backward_head<BFloat16>(a, i, scratch) : backward_head<Float32>(a, i, scratch);
}

}  // namespace

extern const AttentionKernels attention = {forward, backward};

}  // namespace encdiff::ENCDIFF_ISA
