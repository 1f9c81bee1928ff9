// Philox4x32-10 (Salmon et al. 2011), Box-Muller and the 16-bit formats, for the CPU and the GPU alike.
//
// Every operation rounds once and in the same way on both: no contraction (the compiler flags forbid it), fma only where
// it is written, correctly rounded square root, polynomials of our own in place of the libraries' log, sin and cos.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ENCDIFF_FN static __host__ __device__ __forceinline__
#else
#define ENCDIFF_FN static inline __attribute__((always_inline))
#endif

namespace encdiff {

struct Words {
  uint32_t x, y, z, w;
};

ENCDIFF_FN float fma_(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

ENCDIFF_FN float sqrt_(float a) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

ENCDIFF_FN uint32_t bits_of(float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  return bits;
}

ENCDIFF_FN float from_bits(uint32_t bits) {
  float a;
  memcpy(&a, &bits, 4);
  return a;
}

ENCDIFF_FN Words philox(Words c, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#ifdef __CUDACC__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c.x, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c.z;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// log(u) for normal u in (0, 1]: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); the polynomial is a Chebyshev
// interpolant of (log(1 + f) - f + f^2/2) / f^3, 2.6e-8 off at most. Log 2 is split so that e * 0.693359375 is exact.
ENCDIFF_FN float log_(float u) {
  const uint32_t shifted = bits_of(u) - 0x3F3504F3u;  // sqrt(1/2)
  const float e = static_cast<float>(static_cast<int32_t>(shifted) >> 23);
  const float f = from_bits((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 0x1.24da9ap-4f;
  p = fma_(p, f, -0x1.d9f4d6p-4f);
  p = fma_(p, f, 0x1.dda7cep-4f);
  p = fma_(p, f, -0x1.fc5b4cp-4f);
  p = fma_(p, f, 0x1.23d6b6p-3f);
  p = fma_(p, f, -0x1.555ed8p-3f);
  p = fma_(p, f, 0x1.999d5p-3f);
  p = fma_(p, f, -0x1.fffff2p-3f);
  p = fma_(p, f, 0x1.555554p-2f);
  const float f2 = f * f;
  float tail = fma_(e, -2.12194440e-4f, p * (f * f2));
  tail = fma_(-0.5f, f2, tail);
  return fma_(e, 0.693359375f, f + tail);
}

// Two standard normal numbers from two words: the first gives the radius, the upper 26 bits of the second the angle. The
// nearest quarter turn is taken off in integers, so sin and cos keep their digits beside their zeros.
ENCDIFF_FN void box_muller(uint32_t a, uint32_t b, float& cosine, float& sine) {
  const float u = fma_(static_cast<float>(a), 0x1p-32f, 0x1p-33f);
  const float radius = sqrt_(-2.0f * log_(u));
  const uint32_t quarter = (b + 0x20000000u) >> 30;
  const float fraction = static_cast<float>(static_cast<int32_t>((b & ~63u) - (quarter << 30)));  // 24 bits: exact
  const float r = fma_(fraction, 0x1.921fb6p-30f, fraction * -0x1.777a5cp-55f);  // pi 2^-31 in two parts
  const float r2 = r * r;
  float s = fma_(0x1.6dbe2ap-19f, r2, -0x1.a013a8p-13f);
  s = fma_(s, r2, 0x1.11110ep-7f);
  s = fma_(s, r2, -0x1.555556p-3f);
  s = fma_(s * r2, r, r);
  float c = fma_(0x1.9bd8d2p-16f, r2, -0x1.6c12d4p-10f);
  c = fma_(c, r2, 0x1.555554p-5f);
  c = fma_(c * r2, r2, fma_(-0.5f, r2, 1.0f));
  const uint32_t odd = 0u - (quarter & 1u), sb = bits_of(s), cb = bits_of(c);
  const uint32_t swapped = (sb ^ cb) & odd;
  const uint32_t minus_cosine = ((quarter + 1u) << 30) & 0x80000000u, minus_sine = (quarter << 30) & 0x80000000u;
  cosine = radius * from_bits(cb ^ swapped ^ minus_cosine);
  sine = radius * from_bits(sb ^ swapped ^ minus_sine);
}

// Storage formats by tag; arithmetic is float. Rounding is to nearest even, as PyTorch's.
struct Float32 {
  float value;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

ENCDIFF_FN float load(Float32 a) { return a.value; }

ENCDIFF_FN float load(BFloat16 a) { return from_bits(static_cast<uint32_t>(a.bits) << 16); }

ENCDIFF_FN float load(Float16 a) {
  const uint32_t sign = (a.bits & 0x8000u) << 16, magnitude = a.bits & 0x7FFFu;
  const float scaled = from_bits(magnitude << 13) * 0x1p112f;  // moves the exponent's bias, subnormals included
  const uint32_t infinite = magnitude >= 0x7C00u ? 0x7F800000u : 0u;
  return from_bits(bits_of(scaled) | infinite | sign);
}

ENCDIFF_FN void store(Float32& to, float a) { to.value = a; }

ENCDIFF_FN void store(BFloat16& to, float a) {
  const uint32_t bits = bits_of(a), rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

ENCDIFF_FN void store(Float16& to, float a) {
  const uint32_t bits = bits_of(a), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3F000000u;  // the addition rounds to 2^-24
  const uint32_t normal = (magnitude - 0x38000000u + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  to.bits = static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? special : finite));
}

}  // namespace encdiff
