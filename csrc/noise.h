// What the checks (noise.cpp) hand to the CPU (noise_cpu.cpp) and to the GPU (noise.cu): plain pointers and numbers.
// A sample has `size` elements, contiguous; batch x size can exceed 2^31.
#pragma once

#include "philox.h"

namespace encdiff {

enum DType : int { kFloat32, kBFloat16, kFloat16 };
enum Target : int { kNone, kEpsilon, kV, kFlow };
enum Random : int { kNormal, kUniform };

// The counter is (element / 4, sample id, draw), the key is the seed; `stream` is the top bit of the second word.
struct Key {
  const int64_t* sample_ids;  // null: the noise is not drawn here
  const int64_t* draw_tensor;  // null or one number, added to `draw`: a captured CUDA graph reads it anew
  int64_t draw, seed, stream;
};

// A row of numbers per timestep or sample, float or double.
struct Table {
  const void* data;
  bool is_double;
  int64_t rows, columns;
};

struct QSample {
  DType dtype;
  int64_t batch, size;
  const void *x0, *noise;  // noise null: drawn from the key
  const void* t;
  bool t_is_int64;
  Table schedule;      // (T, 1) alpha_bar, or (T, 2) signal and sigma
  Table loss_weights;  // (T, 1), or null
  Target kind;
  void *x_t, *target;  // target null where kind is kNone
  float* weight;       // (B,), null without loss_weights
  Key key;
};

// x0 = c0 x + c1 output, clipped; x_prev = c2 x0 + c3 x + c4 noise + c5 history0 + c6 history1 + ..,
// with output = unconditional + guidance (output - unconditional). A limit s clips to [-s, s] and multiplies by clip / s.
constexpr int kHistory = 3;

struct Step {
  DType dtype;
  int64_t batch, size;
  const void *x, *output, *unconditional, *noise, *history[kHistory];  // all but x and output can be null
  Table coefficients;   // (B, 5 + histories), or one row for all
  const float* limits;  // (B,), or null
  float clip, guidance;  // clip: infinity for none
  void *x_prev, *x0;     // x0 can be null
  Key key;
};

// limits = max(clip, quantile of |x0| over a sample), the quantile between the values of `rank` and of the next.
struct Threshold {
  DType dtype;
  int64_t batch, size;
  const void *x, *output, *unconditional;
  Table coefficients;
  float clip, guidance;
  int64_t rank;
  float weight;  // of the next value
  float* limits;
};

struct Draw {
  DType dtype;
  int64_t batch, size;
  Random kind;
  void* out;
  Key key;
};

ENCDIFF_FN double at(const Table& table, int64_t row, int64_t column) {
  const int64_t i = row * table.columns + column;
  return table.is_double ? static_cast<const double*>(table.data)[i] : static_cast<const float*>(table.data)[i];
}

ENCDIFF_FN float coefficient(const Table& table, int64_t sample, int64_t column) {
  return static_cast<float>(at(table, table.rows == 1 ? 0 : sample, column));
}

// The bits of |x0|: they order as the numbers do, a NaN last.
ENCDIFF_FN uint32_t magnitude(float c0, float c1, float x, float output) {
  return bits_of(c0 * x + c1 * output) & 0x7FFFFFFFu;
}

// A search for the value of a rank, eight bits of it per pass: the values that begin with `found` are still in question.
struct Search {
  int64_t rank;  // among those
  uint32_t found, known;
  bool has_twin;  // at the end: the next rank has the same value
};

template <class Count>
ENCDIFF_FN void narrow(Search& search, const Count* histogram, int shift) {
  uint32_t bin = 0;
  for (; search.rank >= static_cast<int64_t>(histogram[bin]); ++bin) search.rank -= static_cast<int64_t>(histogram[bin]);
  search.found |= bin << shift;
  search.known |= 0xFFu << shift;
  search.has_twin = search.rank + 1 < static_cast<int64_t>(histogram[bin]);
}

ENCDIFF_FN float limit_of(const Threshold& s, uint32_t value, uint32_t next) {
  const float a = from_bits(value), quantile = a + s.weight * (from_bits(next) - a);
  return quantile < s.clip ? s.clip : quantile;  // a NaN stays one
}

ENCDIFF_FN int64_t timestep(const QSample& q, int64_t sample) {
  return q.t_is_int64 ? static_cast<const int64_t*>(q.t)[sample] : static_cast<const int32_t*>(q.t)[sample];
}

ENCDIFF_FN Words counter(const Key& key, int64_t sample, int64_t quad) {
  const int64_t draw = key.draw + (key.draw_tensor ? *key.draw_tensor : 0);
  return {static_cast<uint32_t>(quad),
          static_cast<uint32_t>(quad >> 32) | static_cast<uint32_t>(key.stream) << 31,
          static_cast<uint32_t>(key.sample_ids[sample]), static_cast<uint32_t>(draw)};
}

// x_t = signal x0 + sigma e. 1 - alpha_bar can be small, so it is taken in double; so are the roots on the CPU, once per
// tile. A GPU takes them once per thread, where double is slow: in float, one rounding more.
ENCDIFF_FN void signal_and_sigma(const QSample& q, int64_t t, float& signal, float& sigma) {
  const double a = at(q.schedule, t, 0);
  if (q.schedule.columns == 2) {
    signal = static_cast<float>(a);
    sigma = static_cast<float>(at(q.schedule, t, 1));
    return;
  }
#ifdef __CUDA_ARCH__
  signal = sqrt_(static_cast<float>(a));
  sigma = sqrt_(static_cast<float>(1.0 - a));
#else
  signal = static_cast<float>(__builtin_sqrt(a));
  sigma = static_cast<float>(__builtin_sqrt(1.0 - a));
#endif
}

// One pass over `tiles` [begin, end); a tile is kTile elements of one sample, the last of a sample can be shorter.
constexpr int64_t kTile = 256;
ENCDIFF_FN int64_t tiles_per_sample(int64_t size) { return (size + kTile - 1) / kTile; }

struct CpuKernels {
  void (*q_sample)(const QSample&, int64_t begin, int64_t end);
  void (*step)(const Step&, int64_t begin, int64_t end);
  void (*threshold)(const Threshold&, int64_t begin, int64_t end);  // over samples
  void (*draw)(const Draw&, int64_t begin, int64_t end);
};
namespace baseline {
extern const CpuKernels kernels;
}
namespace avx2 {
extern const CpuKernels kernels;
}
namespace avx512 {
extern const CpuKernels kernels;
}

void launch(const QSample&, int device, void* stream);
void launch(const Step&, int device, void* stream);
void launch(const Threshold&, int device, void* stream);
void launch(const Draw&, int device, void* stream);

}  // namespace encdiff
