// Vectors of float32 by the extensions that GCC and Clang share: loads that widen half types, stores
// that round to them, sums of lanes, exp and tanh.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_LINES = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_LINES = 2;  // half the registers
#else
constexpr int LANES = 4, TILE_LINES = 4;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef float Four __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

inline Floats all(float x) { return Floats{} + x; }

inline Floats load(const float* p) {
  Floats x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }

inline Ints bits_of(const void* p) {
  Halves x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Ints);
}

inline Floats load(const Bfloat16* p) { return (Floats)(bits_of(p) << 16); }

inline Floats load(const Float16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX2__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  const Ints bits = bits_of(p);
  const Ints magnitude = (bits & 0x7fff) << 13;
  // the exponent's bias is 112 larger in float32; subnormals come out right as well
  const Floats finite = (Floats)magnitude * 0x1p112f;
  const Ints special = magnitude | 0x7f800000;
  const Ints value = magnitude >= 0x0f800000 ? special : (Ints)finite;
  return (Floats)(value | (bits & 0x8000) << 16);
#endif
}

inline void store_one(float* p, float x) { *p = x; }

inline void store_one(Bfloat16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (std::isnan(x)) {
    p->bits = 0x7fc0;
    return;
  }
  p->bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest even
}

inline void store_one(Float16* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds beyond the largest
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: the sum is rounded by the addition itself
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, 4);
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  p->bits = uint16_t(sign | half);
}

inline void store(Bfloat16* p, Floats x) {
  const Ints bits = (Ints)x;
  const Ints rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest even
  const Halves halves = __builtin_convertvector(x == x ? rounded : Ints{} + 0x7fc0, Halves);
  std::memcpy(p, &halves, sizeof halves);
}

inline void store(Float16* p, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && defined(__AVX2__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < LANES; ++lane) store_one(p + lane, x[lane]);
#endif
}

inline Four folded(Floats x) {
#if defined(__AVX512F__)
  const __m512 wide = (__m512)x;
  const __m256 half = _mm512_castps512_ps256(wide) +
                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(wide), 1));
  return (Four)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 wide = (__m256)x;
  return (Four)(_mm256_castps256_ps128(wide) + _mm256_extractf128_ps(wide, 1));
#else
  return x;
#endif
}

inline float sum(Floats x) {
  const Four f = folded(x);
  return (f[0] + f[2]) + (f[1] + f[3]);
}

// [sum of a, of b, of c, of d]
inline Four sums(Floats a, Floats b, Floats c, Floats d) {
  const Four w = folded(a), x = folded(b), y = folded(c), z = folded(d);
  const Four wx = Four{w[0], x[0], w[1], x[1]} + Four{w[2], x[2], w[3], x[3]};
  const Four yz = Four{y[0], z[0], y[1], z[1]} + Four{y[2], z[2], y[3], z[3]};
  return Four{wx[0], wx[1], yz[0], yz[1]} + Four{wx[2], wx[3], yz[2], yz[3]};
}

// e to the x for x <= 0, within 2 units in the last place; 0 below the smallest normal number.
// Cody and Waite's reduction, a polynomial of Moshier's Cephes library.
inline Floats exponential(Floats x) {
  const Floats least = all(-87.33654f);
  const Ints gone = x < least;
  const Floats y = gone ? least : x;
  const Floats magic = all(0x1.8p23f);  // adding it rounds to an integer
  const Floats n = (y * 1.44269504f + magic) - magic;
  Floats r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Floats found = p * (Floats)power;
  return gone ? Floats{} : found;
}

// 2 to the x for x <= 0 or little above, within 2 units in the last place, and 1 for 0 to the bit;
// 0 where that is too small for a float32. A minimax polynomial of the fraction.
inline Floats power_of_two(Floats x) {
#if defined(__AVX512F__)
  const Floats y = (Floats)_mm512_max_ps(_mm512_set1_ps(-200.0f), (__m512)x);  // a NaN stays
  const Floats n = (Floats)_mm512_roundscale_ps(
      (__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Ints gone = x < -126.0f;
  const Floats y = gone ? all(-126.0f) : x;
  const Floats magic = all(0x1.8p23f);
  const Floats n = (y + magic) - magic;
#endif
  const Floats r = y - n;
  Floats p = all(1.32647273e-3f);
  p = p * r + 9.67151299e-3f;
  p = p * r + 5.55073358e-2f;
  p = p * r + 2.40222424e-1f;
  p = p * r + 6.93147004e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  return gone ? Floats{} : p * (Floats)power;
#endif
}

// Also from Cephes: near 0 by a polynomial, as 1 - 2 / (exp + 1) would lose digits there.
inline Floats hyperbolic_tangent(Floats x) {
  const Floats size = x < 0.0f ? -x : x;
  const Floats e = exponential(size * -2.0f);
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats z = x * x;
  Floats p = all(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Floats near = p * z * x + x;
  const Floats signed_far = x < 0.0f ? -far : far;
  return size < 0.625f ? near : signed_far;
}

}  // namespace
