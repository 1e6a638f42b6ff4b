// Vectors of the machine at hand, in the compilers' vector extension: AVX-512, AVX2 and Neon alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace jaxserve {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// How many rows times kWide columns of sums fit the registers, beside what they are summed from.
#if defined(__AVX512F__)
constexpr int kMaxRows = 6;
#else
constexpr int kMaxRows = 2;
#endif
constexpr int kWide = 4;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * 2)));
typedef float Quad __attribute__((vector_size(16)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

inline Vec broadcast(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);  // of a value in memory a load alone, where Vec{} + x takes a port of the multipliers
#elif defined(__AVX__)
  return (Vec)_mm256_set1_ps(x);
#else
  return Vec{} + x;
#endif
}

// sum + x * w, rounded once where the machine can. Compilers are told not to fuse by themselves (build.py): they do it
// here and not there, by what stands around, and a row's bits would depend on its batch.
inline Vec multiply_add(Vec sum, Vec x, Vec w) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)x, (__m512)w, (__m512)sum);
#elif defined(__AVX__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)x, (__m256)w, (__m256)sum);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)w);
#else
  return sum + x * w;
#endif
}

template <class To, class From>
inline To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(To));
  return y;
}

// bfloat16 is the upper half of float32.
inline float widen(uint16_t x) { return bits_as<float>(uint32_t{x} << 16); }
inline Vec widen(HalfVec x) { return bits_as<Vec>(__builtin_convertvector(x, BitVec) << 16); }

inline Vec load_floats(const float* p) { return load<Vec>(p); }
inline Vec load_floats(const uint16_t* p) { return widen(load<HalfVec>(p)); }

// To nearest, ties to even; a NaN stays one.
inline uint16_t round_to_bf16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline void store_as(float* p, float x) { *p = x; }
inline void store_as(uint16_t* p, float x) { *p = round_to_bf16(x); }

// e^x for x <= 0, within 2 units in the last place (Cody and Waite's reduction, a polynomial of degree 6); below the
// smallest normal number zero.
inline Vec exp_negative(Vec x) {
  const Vec lowest = broadcast(-87.3f);
  const IntVec is_tiny = x < lowest;
  x = is_tiny ? lowest : x;
  const Vec shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Vec n = multiply_add(shift, x, broadcast(1.44269504088896341f)) - shift;
  const Vec r = multiply_add(multiply_add(x, n, broadcast(-0.693359375f)), n, broadcast(2.12194440e-4f));
  Vec p = broadcast(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = multiply_add(broadcast(c), p, r);
  p = multiply_add(r, p, r * r) + 1.0f;
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return is_tiny ? Vec{} : p * bits_as<Vec>(exponent);
}

// Halves are added to each other until one value is left.
#if defined(__AVX512F__)
inline float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
inline float max_of(Vec v) { return _mm512_reduce_max_ps((__m512)v); }
#else
inline float sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float max_of(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
}
#endif

// The sums of four vectors, side by side.
inline Quad sums(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
#define PAIRS(x, y)                                                                                             \
  (__builtin_shufflevector(x, y, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +                     \
   __builtin_shufflevector(x, y, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31))
  const Vec ab = PAIRS(a, b), cd = PAIRS(c, d);  // a0 b0 a1 b1 | ..
#undef PAIRS
  const Vec abcd = __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                   __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  Quad parts[4];
#elif defined(__AVX__)
#define PAIRS(x, y)                                                        \
  (__builtin_shufflevector(x, y, 0, 8, 1, 9, 4, 12, 5, 13) +               \
   __builtin_shufflevector(x, y, 2, 10, 3, 11, 6, 14, 7, 15))
  const Vec ab = PAIRS(a, b), cd = PAIRS(c, d);
#undef PAIRS
  const Vec abcd = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                   __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  Quad parts[2];
#else
  const Vec ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Vec cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Vec abcd = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  Quad parts[1];
#endif
  std::memcpy(parts, &abcd, sizeof(abcd));
  Quad total = parts[0];
  for (int i = 1; i < kLanes / 4; ++i) total += parts[i];
  return total;
}

}  // namespace jaxserve
