// What products are made of: units of 32 bits, one float32 or, where the processor multiplies pairs,
// two bfloat16. Rows of q, k and v become rows of units; everything else is the same for both.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "vectors.h"

namespace {

inline Ints load_units(const float* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store_units(float* p, Ints x) { std::memcpy(p, &x, sizeof x); }

inline Ints every(const float* p) {
  int32_t x;
  std::memcpy(&x, p, sizeof x);
  return Ints{} + x;
}

struct Single {
  static constexpr int ELEMENTS = 1;

  static Floats add_product(Floats sum, Ints a, Ints b) { return sum + (Floats)a * (Floats)b; }

  template <typename T>
  static void row(const T* from, int64_t dim, float* to) {
    for (int64_t d = 0; d < dim; d += LANES) store(to + d, load(from + d));
  }

  // one row of values
  template <typename T>
  static void values(const T* const* from, int64_t dim, float* to) {
    row(from[0], dim, to);
  }

  static Ints weights(const Floats* of_keys) { return (Ints)of_keys[0]; }
};

#if defined(__AVX512BF16__)
struct Pair {
  static constexpr int ELEMENTS = 2;

  static Floats add_product(Floats sum, Ints a, Ints b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  static void row(const Bfloat16* from, int64_t dim, float* to) {
    std::memcpy(to, from, dim * sizeof(Bfloat16));
  }

  // the values of two keys, side by side
  static void values(const Bfloat16* const* from, int64_t dim, float* to) {
    for (int64_t d = 0; d < dim; d += LANES) {
      store_units(to + d, bits_of(from[0] + d) | bits_of(from[1] + d) << 16);
    }
  }

  static Ints weights(const Floats* of_keys) {
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)of_keys[1], (__m512)of_keys[0]);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    return (Ints)_mm512_permutexvar_epi16(order, (__m512i)both);
  }
};

template <typename T>
using UnitOf = std::conditional_t<std::is_same_v<T, Bfloat16>, Pair, Single>;
#else
template <typename T>
using UnitOf = Single;
#endif

// LANES rows of LANES units, in place: row i becomes column i
inline void transpose(Ints (&x)[LANES]) {
#if defined(__AVX512F__)
  __m512i a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32((__m512i)x[i], (__m512i)x[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32((__m512i)x[i], (__m512i)x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i even_low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
    x[i] = (Ints)_mm512_shuffle_i32x4(even_low, even_high, 0x88);
    x[i + 4] = (Ints)_mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    x[i + 8] = (Ints)_mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    x[i + 12] = (Ints)_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#else
  int32_t all[LANES][LANES];
  std::memcpy(all, x, sizeof all);
  for (int i = 0; i < LANES; ++i) {
    for (int j = 0; j < i; ++j) std::swap(all[i][j], all[j][i]);
  }
  std::memcpy(x, all, sizeof all);
#endif
}

}  // namespace
