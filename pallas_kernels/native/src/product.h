// What a product does besides multiplying: to each row of x before, and to each sum after.
#pragma once

#include <algorithm>

#include "dot.h"

namespace jaxserve {

// y [rows, columns] = x [rows, depth] @ w.T, where w is [columns, depth], or if `gated` [2, columns, depth].
struct Product {
  int64_t rows, depth, columns;  // rows without those of padding
  const float* norm;      // [depth]: x is x / rms(x) * norm; or nullptr
  float epsilon;          // of rms
  const float* residual;  // [rows, columns]: y itself, which is added to; or nullptr
  bool gated;             // y = silu(first half) * second half
};

// A row of x as floats, normalised where it shall be: x itself, or `room` [depth].
inline const float* floats_of(const Product& product, const float* x, float* room) {
  if (!product.norm) return x;
  const int64_t whole = product.depth / kLanes * kLanes;
  Vec squares = {};
  for (int64_t i = 0; i < whole; i += kLanes) squares = multiply_add(squares, load<Vec>(x + i), load<Vec>(x + i));
  float total = sum(squares);
  for (int64_t i = whole; i < product.depth; ++i) total += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(product.depth) + product.epsilon);
  for (int64_t i = 0; i < whole; i += kLanes)
    store(room + i, load<Vec>(x + i) * scale * load<Vec>(product.norm + i));
  for (int64_t i = whole; i < product.depth; ++i) room[i] = x[i] * scale * product.norm[i];
  return room;
}
inline const float* floats_of(const Product& product, const uint16_t* x, float* room) {
  for (int64_t i = 0; i < product.depth; ++i) room[i] = widen(x[i]);
  return room;
}

// gate / (1 + e^-gate) * up
inline Vec silu_times(Vec gate, Vec up) {
  const Vec tiny = exp_negative(gate < 0 ? gate : -gate);
  return gate * ((gate < 0 ? tiny : broadcast(1.0f)) / (1.0f + tiny)) * up;
}
inline float silu_times(float gate, float up) { return silu_times(broadcast(gate), broadcast(up))[0]; }

inline void store_floats(float* p, Vec v) { store(p, v); }
inline void store_floats(uint16_t* p, Vec v) {
#if defined(__AVX512BF16__)
  store(p, _mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = round_to_bf16(v[i]);
#endif
}

// A row of x in bfloat16.
inline void round_floats(const float* from, int64_t count, uint16_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_floats(to + i, load<Vec>(from + i));
  for (; i < count; ++i) to[i] = round_to_bf16(from[i]);
}

// `count` values of a row of y from `column` on, of their sums; `ups` are those of the second half.
template <class Y>
inline void finish_row(const Product& product, int64_t row, int64_t column, const float* sums, const float* ups,
                       int64_t count, Y* y) {
  Y* const to = y + row * product.columns + column;
  const float* const residual = product.residual ? product.residual + row * product.columns + column : nullptr;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vec value = load<Vec>(sums + i);
    if (product.gated) value = silu_times(value, load<Vec>(ups + i));
    if (residual) value += load<Vec>(residual + i);
    store_floats(to + i, value);
  }
  for (; i < count; ++i) {
    float value = sums[i];
    if (product.gated) value = silu_times(value, ups[i]);
    if (residual) value += residual[i];
    store_as(to + i, value);
  }
}

}  // namespace jaxserve
