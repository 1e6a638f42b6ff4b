// Dot products of a few rows of x with a few rows of weights: the inner loop of matmul.
//
// Each product is summed in the same order whatever stands beside it, so a row's result does not depend on its batch.
#pragma once

#include "vector.h"

namespace jaxserve {

// How rows of W are multiplied: X is what rows of x are prepared as, kStep how many values one step takes.
template <class W>
struct Widening {  // W is float, or uint16_t for bfloat16; products of floats
  using X = float;
  static constexpr int kStep = kLanes;
  using Loaded = Vec;
  static X prepare(float x) { return std::is_same_v<W, float> ? x : widen(round_to_bf16(x)); }
  static Loaded load_x(const X* p) { return load<Vec>(p); }
  static Loaded load_w(const W* p) { return load_floats(p); }
  static Vec add(Vec sum, Loaded x, Loaded w) { return multiply_add(sum, x, w); }
};

#if defined(__AVX512BF16__)
struct Pairs {  // products of bfloat16 by vdpbf16ps, which adds pairs in float32
  using X = uint16_t;
  static constexpr int kStep = 2 * kLanes;
  using Loaded = __m512bh;
  static X prepare(float x) { return round_to_bf16(x); }
  static Loaded load_x(const X* p) { return load<__m512bh>(p); }
  static Loaded load_w(const uint16_t* p) { return load<__m512bh>(p); }
  static Vec add(Vec sum, Loaded x, Loaded w) { return (Vec)_mm512_dpbf16_ps((__m512)sum, x, w); }
};
template <class W>
using Dot = std::conditional_t<std::is_same_v<W, float>, Widening<float>, Pairs>;
#else
template <class W>
using Dot = Widening<W>;
#endif

// Values of a prepared row of x: `depth` ones, and zeros up to a whole step.
template <class W>
constexpr int64_t prepared_depth(int64_t depth) {
  constexpr int64_t step = Dot<W>::kStep;
  return (depth + step - 1) / step * step;
}

template <class W>
inline void prepare_row(const float* x, int64_t depth, typename Dot<W>::X* out) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (!std::is_same_v<W, float>)
    for (; i + kLanes <= depth; i += kLanes) store(out + i, _mm512_cvtneps_pbh(load<__m512>(x + i)));
#endif
  for (; i < depth; ++i) out[i] = Dot<W>::prepare(x[i]);
  for (; i < prepared_depth<W>(depth); ++i) out[i] = 0;
}

// y[r, c] = x[r] . w[c] for `Rows` prepared rows and `Columns` rows of `depth` weights.
template <class W, int Rows, int Columns>
inline void dots(const typename Dot<W>::X* x, int64_t x_stride, const W* const* w, int64_t depth, float* y,
                 int64_t y_stride) {
  using D = Dot<W>;
  Vec sums_of[Rows][Columns] = {};
  const int64_t whole = depth / D::kStep * D::kStep;
  auto step = [&](int64_t at, const typename D::Loaded* weights) {
    for (int r = 0; r < Rows; ++r) {
      const auto values = D::load_x(x + r * x_stride + at);
      for (int c = 0; c < Columns; ++c) sums_of[r][c] = D::add(sums_of[r][c], values, weights[c]);
    }
  };
  for (int64_t at = 0; at < whole; at += D::kStep) {
    typename D::Loaded weights[Columns];
    for (int c = 0; c < Columns; ++c) weights[c] = D::load_w(w[c] + at);
    step(at, weights);
  }
  if (whole < depth) {
    typename D::Loaded weights[Columns];
    for (int c = 0; c < Columns; ++c) {
      W rest[D::kStep] = {};
      std::memcpy(rest, w[c] + whole, (depth - whole) * sizeof(W));
      weights[c] = D::load_w(rest);
    }
    step(whole, weights);
  }
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Columns == kWide) {
      store(y + r * y_stride, sums(sums_of[r][0], sums_of[r][1], sums_of[r][2], sums_of[r][3]));
    } else {
      for (int c = 0; c < Columns; ++c) {  // lanes in the order of four columns at once
        const Vec& lanes = sums_of[r][c];
        y[r * y_stride + c] = sums(lanes, lanes, lanes, lanes)[0];
      }
    }
  }
}

// The same for any number of rows up to kMaxRows.
template <class W, int Columns, int Rows = kMaxRows>
inline void dots_of(int rows, const typename Dot<W>::X* x, int64_t x_stride, const W* const* w, int64_t depth, float* y,
                    int64_t y_stride) {
  if (rows == Rows) {
    dots<W, Rows, Columns>(x, x_stride, w, depth, y, y_stride);
  } else if constexpr (Rows > 1) {
    dots_of<W, Columns, Rows - 1>(rows, x, x_stride, w, depth, y, y_stride);
  }
}

}  // namespace jaxserve
