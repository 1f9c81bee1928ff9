// The CPU half, compiled once per instruction set (ENCDIFF_ISA names the namespace) and chosen at run time in noise.cpp.
//
// Loops run over a tile in one cache line after the other and are left to the compiler to vectorise. Nothing of the
// standard library is used here: an inline function compiled for AVX-512 must not be the copy the linker keeps.
// `ivdep`: an output may be an input itself (in place), never a shifted view of one.
#include "noise.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define IVDEP _Pragma("GCC ivdep")

namespace encdiff::ENCDIFF_ISA {
namespace {

constexpr int64_t kQuads = kTile / 4;

struct Tile {
  int64_t sample, first, count, offset;  // first element within the sample, and within the tensor
};

// The tile of an index, or as many as `tiles` in one, within the sample.
Tile tile_of(int64_t index, int64_t size, int64_t tiles = 1) {
  const int64_t per_sample = tiles_per_sample(size), sample = index / per_sample;
  const int64_t first = index % per_sample * kTile;
  const int64_t left = size - first;
  return {sample, first, left < tiles * kTile ? left : tiles * kTile, sample * size + first};
}

#if defined(__AVX512F__)
using Lanes = __m512i;
Lanes spread(uint64_t a) { return _mm512_set1_epi64(static_cast<int64_t>(a)); }
Lanes upper(Lanes a) { return _mm512_srli_epi64(a, 32); }
Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
Lanes count_up(Lanes a) { return _mm512_add_epi64(a, _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)); }
void put(uint32_t* to, Lanes a) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi64_epi32(0xFF, a));
}
#elif defined(__AVX2__)
using Lanes = __m256i;
Lanes spread(uint64_t a) { return _mm256_set1_epi64x(static_cast<int64_t>(a)); }
Lanes upper(Lanes a) { return _mm256_srli_epi64(a, 32); }
Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
Lanes count_up(Lanes a) { return _mm256_add_epi64(a, _mm256_set_epi64x(3, 2, 1, 0)); }
void put(uint32_t* to, Lanes a) {
  const Lanes packed = _mm256_permutevar8x32_epi32(a, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
  _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
#else
#define ENCDIFF_SCALAR
#endif

// The words of a tile's 64 counters, one array per word. A tile starts at a multiple of 64: the low word cannot overflow.
void words_of(const Key& key, const Tile& tile, uint32_t (*words)[kQuads]) {
  const Words c = counter(key, tile.sample, tile.first / 4);
  const uint64_t seed = static_cast<uint64_t>(key.seed);
#ifdef ENCDIFF_SCALAR
  for (int64_t j = 0; j < kQuads; ++j) {
    const Words w = philox({c.x + static_cast<uint32_t>(j), c.y, c.z, c.w}, seed);
    words[0][j] = w.x, words[1][j] = w.y, words[2][j] = w.z, words[3][j] = w.w;
  }
#else
  // A 32-bit word per 64-bit lane; what is in a lane's upper half is never looked at. Written out, because the compiler
  // would multiply 64 by 64 bits.
  constexpr int64_t kLanes = sizeof(Lanes) / 8;
  const Lanes m0 = spread(0xD2511F53u), m1 = spread(0xCD9E8D57u);
  for (int64_t j = 0; j < kQuads; j += kLanes) {
    Lanes x = count_up(spread(c.x + static_cast<uint32_t>(j))), y = spread(c.y), z = spread(c.z), w = spread(c.w);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Lanes p0 = multiply(x, m0), p1 = multiply(z, m1);
      x = xor3(upper(p1), y, spread(k0)), y = p1;
      z = xor3(upper(p0), w, spread(k1)), w = p0;
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    put(words[0] + j, x), put(words[1] + j, y), put(words[2] + j, z), put(words[3] + j, w);
  }
#endif
}

void normals(const Key& key, const Tile& tile, float* out) {
  alignas(64) uint32_t words[4][kQuads];
  alignas(64) float z[4][kQuads];
  words_of(key, tile, words);
  for (int half = 0; half < 4; half += 2)
    for (int64_t j = 0; j < kQuads; ++j) box_muller(words[half][j], words[half + 1][j], z[half][j], z[half + 1][j]);
  for (int64_t j = 0; j < kQuads; ++j)
    for (int k = 0; k < 4; ++k) out[4 * j + k] = z[k][j];
}

void uniforms(const Key& key, const Tile& tile, float* out) {
  alignas(64) uint32_t words[4][kQuads];
  words_of(key, tile, words);
  for (int64_t j = 0; j < kQuads; ++j)
    for (int k = 0; k < 4; ++k) out[4 * j + k] = static_cast<float>(words[k][j] >> 8) * 0x1p-24f;
}

template <class T>
void read(const void* from, const Tile& tile, float* to) {
  const T* p = static_cast<const T*>(from) + tile.offset;
  IVDEP for (int64_t i = 0; i < tile.count; ++i) to[i] = load(p[i]);
}

template <class T>
void write(void* to, const Tile& tile, const float* from) {
  T* p = static_cast<T*>(to) + tile.offset;
  IVDEP for (int64_t i = 0; i < tile.count; ++i) store(p[i], from[i]);
}

template <class T>
const T* in(const void* tensor, const Tile& tile) { return static_cast<const T*>(tensor) + tile.offset; }
template <class T>
T* out(void* tensor, const Tile& tile) { return static_cast<T*>(tensor) + tile.offset; }

template <class T>
void q_sample_tile(const QSample& q, const Tile& tile) {
  alignas(64) float e[kTile];
  float signal, sigma;
  const int64_t t = timestep(q, tile.sample);
  signal_and_sigma(q, t, signal, sigma);
  if (q.weight && tile.first == 0) q.weight[tile.sample] = static_cast<float>(at(q.loss_weights, t, 0));
  q.noise ? read<T>(q.noise, tile, e) : normals(q.key, tile, e);
  const T* x0 = in<T>(q.x0, tile);
  T *x_t = out<T>(q.x_t, tile), *target = q.kind == kNone ? nullptr : out<T>(q.target, tile);
  if (q.kind == kEpsilon) IVDEP for (int64_t i = 0; i < tile.count; ++i) store(target[i], e[i]);
  if (q.kind == kV)
    IVDEP for (int64_t i = 0; i < tile.count; ++i) store(target[i], signal * e[i] - sigma * load(x0[i]));
  if (q.kind == kFlow) IVDEP for (int64_t i = 0; i < tile.count; ++i) store(target[i], e[i] - load(x0[i]));
  IVDEP for (int64_t i = 0; i < tile.count; ++i) store(x_t[i], signal * load(x0[i]) + sigma * e[i]);  // x_t may be x0
}

ENCDIFF_FN float clipped(float a, float clip) {
  const float b = a < -clip ? -clip : a;  // a NaN stays one
  return b > clip ? clip : b;
}

// Nothing to keep beside: one loop from memory to memory, over as many tiles as there are.
bool is_plain(const Step& s) {
  return !s.unconditional && !s.noise && !s.key.sample_ids && !s.history[0] && !s.x0 && !s.limits;
}

template <class T>
void step_tile(const Step& s, const Tile& tile) {
  float c[5 + kHistory];
  for (int64_t j = 0; j < s.coefficients.columns; ++j) c[j] = coefficient(s.coefficients, tile.sample, j);
  const float c0 = c[0], c1 = c[1], c2 = c[2], c3 = c[3], clip = s.clip;
  if (is_plain(s)) {
    const T *x = in<T>(s.x, tile), *output = in<T>(s.output, tile);
    T* x_prev = out<T>(s.x_prev, tile);
    IVDEP for (int64_t i = 0; i < tile.count; ++i) {
      const float a = load(x[i]);
      store(x_prev[i], c2 * clipped(c0 * a + c1 * load(output[i]), clip) + c3 * a);
    }
    return;
  }
  alignas(64) float x[kTile], x0[kTile], y[kTile];
  read<T>(s.x, tile, x);
  read<T>(s.output, tile, x0);
  if (s.unconditional) {
    read<T>(s.unconditional, tile, y);
    for (int64_t i = 0; i < tile.count; ++i) x0[i] = y[i] + s.guidance * (x0[i] - y[i]);
  }
  const float limit = s.limits ? s.limits[tile.sample] : clip, scale = s.limits ? clip / limit : 1.0f;
  for (int64_t i = 0; i < tile.count; ++i) {
    x0[i] = clipped(c0 * x[i] + c1 * x0[i], limit) * scale;
    y[i] = c2 * x0[i] + c3 * x[i];
  }
  if (s.noise || s.key.sample_ids) {
    s.noise ? read<T>(s.noise, tile, x) : normals(s.key, tile, x);
    for (int64_t i = 0; i < tile.count; ++i) y[i] = y[i] + c[4] * x[i];
  }
  for (int k = 0; k < kHistory && s.history[k]; ++k) {
    read<T>(s.history[k], tile, x);
    for (int64_t i = 0; i < tile.count; ++i) y[i] = y[i] + c[5 + k] * x[i];
  }
  write<T>(s.x_prev, tile, y);
  if (s.x0) write<T>(s.x0, tile, x0);
}

template <class T>
void draw_tile(const Draw& d, const Tile& tile) {
  alignas(64) float z[kTile];
  d.kind == kNormal ? normals(d.key, tile, z) : uniforms(d.key, tile, z);
  write<T>(d.out, tile, z);
}

// A sample's x0 is made anew in each pass: it lies in the cache, where a copy of it might not.
template <class T>
void threshold_sample(const Threshold& s, int64_t sample) {
  const float c0 = coefficient(s.coefficients, sample, 0), c1 = coefficient(s.coefficients, sample, 1);
  const auto for_each = [&](auto&& see) {
    for (int64_t first = 0; first < s.size; first += kTile) {
      const int64_t left = s.size - first;
      const Tile tile{sample, first, left < kTile ? left : kTile, sample * s.size + first};
      alignas(64) float x[kTile], output[kTile], other[kTile];
      alignas(64) uint32_t bits[kTile];
      read<T>(s.x, tile, x);
      read<T>(s.output, tile, output);
      if (s.unconditional) {
        read<T>(s.unconditional, tile, other);
        for (int64_t i = 0; i < tile.count; ++i) output[i] = other[i] + s.guidance * (output[i] - other[i]);
      }
      for (int64_t i = 0; i < tile.count; ++i) bits[i] = magnitude(c0, c1, x[i], output[i]);
      for (int64_t i = 0; i < tile.count; ++i) see(bits[i]);
    }
  };
  Search search{s.rank, 0, 0, false};
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for_each([&](uint32_t bits) { histogram[bits >> shift & 0xFFu] += (bits & search.known) == search.found; });
    narrow(search, histogram, shift);
  }
  uint32_t next = search.has_twin ? search.found : 0xFFFFFFFFu;
  if (!search.has_twin) for_each([&](uint32_t bits) { next = bits > search.found && bits < next ? bits : next; });
  s.limits[sample] = limit_of(s, search.found, next == 0xFFFFFFFFu ? search.found : next);
}

#define FOR_DTYPE(name, args, where)                                  \
  do {                                                                \
    if ((args).dtype == kFloat32) name<Float32>(args, where);         \
    if ((args).dtype == kBFloat16) name<BFloat16>(args, where);       \
    if ((args).dtype == kFloat16) name<Float16>(args, where);         \
  } while (false)

void q_sample(const QSample& q, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) FOR_DTYPE(q_sample_tile, q, tile_of(i, q.size));
}

void step(const Step& s, int64_t begin, int64_t end) {
  while (begin < end) {
    const Tile tile = tile_of(begin, s.size, is_plain(s) ? end - begin : 1);
    FOR_DTYPE(step_tile, s, tile);
    begin += tiles_per_sample(tile.count);
  }
}

void threshold(const Threshold& s, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) FOR_DTYPE(threshold_sample, s, i);
}

void draw(const Draw& d, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) FOR_DTYPE(draw_tile, d, tile_of(i, d.size));
}

}  // namespace

extern const CpuKernels kernels = {q_sample, step, threshold, draw};

}  // namespace encdiff::ENCDIFF_ISA
