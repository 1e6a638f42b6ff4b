// y = x @ w.T of weights that lie in panels of as many rows as two vectors hold, 32 by AVX-512 and 16 by AVX2: each
// [depth, 32]; the last may be narrower.
//
//   sums [14 rows of x, 32] += x [14, k] * panel [k, 32]     for k = 0, 1, ..     by AVX2 [6, 16]
//
// Of bfloat16, k counts pairs of values, which vdpbf16ps multiplies and adds; without it they are widened and take their
// turns. Each sum takes its terms in that order, so a row's result does not depend on its batch.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "product.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define JAXSERVE_PANELS 1

namespace jaxserve {

constexpr int64_t kPanelColumns = 2 * kLanes;
#if defined(__AVX512F__)
constexpr int64_t kPanelRows = 14;     // of x: sums in 28 of 32 registers
#else
constexpr int64_t kPanelRows = 6;      // in 12 of 16
#endif
constexpr int64_t kPanelDepth = 2048;  // units: what is used of a panel at a time stays in the core's own cache
constexpr int64_t kFewDepth = 256;     // where rows of x are few: in its nearest, and what comes next is asked for
constexpr int64_t kPanelItems = 6;     // a thread, where rows of x are few and the columns suffice
constexpr int64_t kFewPanelRows = 64;

// What stands at one k: a float, or a pair of bfloat16 values in the bits of one. kParts: how many values of x it takes,
// each in the bits of a float.
template <class W>
struct Unit {
  using X = float;
  static constexpr int64_t kValues = 1, kParts = 1;
  static void prepare(const float* from, int64_t count, float* to) { std::copy(from, from + count, to); }
  static Vec part(Vec w, int) { return w; }
  static Vec add(Vec sum, Vec x, Vec w) { return multiply_add(sum, x, w); }
};
#if defined(__AVX512BF16__)
template <>
struct Unit<uint16_t> {
  using X = uint16_t;
  static constexpr int64_t kValues = 2, kParts = 1;
  static void prepare(const float* from, int64_t count, uint16_t* to) { round_floats(from, count, to); }
  static Vec part(Vec w, int) { return w; }
  static Vec add(Vec sum, Vec x, Vec w) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
  }
};
#else
template <>
struct Unit<uint16_t> {
  using X = float;
  static constexpr int64_t kValues = 2, kParts = 2;
  static void prepare(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(round_to_bf16(from[i]));
  }
  static Vec part(Vec w, int i) {
    const BitVec bits = bits_as<BitVec>(w);
    return bits_as<Vec>(i == 0 ? bits << 16 : bits & 0xffff0000u);
  }
  static Vec add(Vec sum, Vec x, Vec w) { return multiply_add(sum, x, w); }
};
#endif

// sums [Rows, 32] of x [Rows, stride] and a panel of `depth` units; goes on from what is there unless `begins`.
// Meanwhile the processor fetches what lies `ahead` floats further on, if anything.
template <class W, int Rows>
inline void multiply_panel(const float* x, int64_t stride, const float* panel, int64_t depth, int64_t ahead,
                           bool begins, float* sums_of) {
  Vec low[Rows], high[Rows];
  for (int r = 0; r < Rows; ++r) {
    low[r] = begins ? Vec{} : load<Vec>(sums_of + r * kPanelColumns);
    high[r] = begins ? Vec{} : load<Vec>(sums_of + r * kPanelColumns + kLanes);
  }
  const float* rows[(Rows + 2) / 3];  // three rows a pointer: what addresses can add
  for (int i = 0; i < (Rows + 2) / 3; ++i) rows[i] = x + 3 * i * stride;
  constexpr int kParts = Unit<W>::kParts;
  for (int64_t k = 0; k < depth; ++k, panel += kPanelColumns) {
    if (ahead)
      for (int64_t i = 0; i < kPanelColumns; i += 64 / sizeof(float)) __builtin_prefetch(panel + ahead + i, 0, 3);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const Vec first = Unit<W>::part(load<Vec>(panel), part), second = Unit<W>::part(load<Vec>(panel + kLanes), part);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
        const Vec value = broadcast(rows[r / 3][r % 3 * stride + k * kParts + part]);
        low[r] = Unit<W>::add(low[r], value, first);
        high[r] = Unit<W>::add(high[r], value, second);
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    store(sums_of + r * kPanelColumns, low[r]);
    store(sums_of + r * kPanelColumns + kLanes, high[r]);
  }
}

template <class W, int Rows = kPanelRows>
inline void multiply_panel_of(int64_t rows, const float* x, int64_t stride, const float* panel, int64_t depth,
                              int64_t ahead, bool begins, float* sums_of) {
  if (rows == Rows) {
    multiply_panel<W, Rows>(x, stride, panel, depth, ahead, begins, sums_of);
  } else if constexpr (Rows > 1) {
    multiply_panel_of<W, Rows - 1>(rows, x, stride, panel, depth, ahead, begins, sums_of);
  }
}

// sums [rows, 32] of x [rows, depth] and a panel of `count` columns, which is widened in `room` where these are fewer
// than 32. Depths in units.
template <class W>
inline void multiply_rows(int64_t rows, int64_t depth, const float* x, const float* panel, int64_t count, float* room,
                          float* sums_of) {
  constexpr int64_t kParts = Unit<W>::kParts;
  // Few rows use a panel's parts again and again; those that go through at once pass over it in order.
  const bool few = rows > kPanelRows && rows <= kFewPanelRows;
  const int64_t most = few ? kFewDepth : kPanelDepth, ahead = few ? kFewDepth * kPanelColumns : 0;
  for (int64_t at = 0; at < depth; at += most) {
    const int64_t deep = std::min(most, depth - at);
    const float* from = panel + at * count;
    if (count < kPanelColumns) {
      for (int64_t k = 0; k < deep; ++k) std::memcpy(room + k * kPanelColumns, from + k * count, count * sizeof(float));
      from = room;
    }
    for (int64_t r = 0; r < rows; r += kPanelRows)
      multiply_panel_of<W>(std::min(kPanelRows, rows - r), x + (r * depth + at) * kParts, depth * kParts, from, deep,
                           ahead, at == 0, sums_of + r * kPanelColumns);
  }
}

// The depth is a whole number of units.
template <class W, class T, class Y>
void multiply_panels(xla::ffi::ThreadPool& pool, const Product& product, const T* x, const W* w, Y* y) {
  using X = typename Unit<W>::X;
  const int64_t rows = product.rows, columns = product.columns, depth = product.depth / Unit<W>::kValues;
  static thread_local std::vector<X> room;
  const void* prepared = x;
  constexpr bool is_ready = std::is_same_v<T, X> && std::is_same_v<T, W>;  // not floats that are to be rounded
  if (!is_ready || product.norm) {
    room.resize(rows * product.depth);
    constexpr int64_t kRows = 16;
    parallel_for(pool, (rows + kRows - 1) / kRows, [&, to = room.data()](int64_t item) {
      static thread_local std::vector<float> floats;
      floats.resize(product.depth);
      for (int64_t r = item * kRows; r < std::min(rows, (item + 1) * kRows); ++r) {
        const float* row = floats_of(product, x + r * product.depth, floats.data());
        Unit<W>::prepare(row, product.depth, to + r * product.depth);
      }
    });
    prepared = room.data();
  }
  const auto *from = static_cast<const float*>(prepared), *panels = reinterpret_cast<const float*>(w);
  const bool few = rows <= kFewPanelRows;
  const int64_t wanted = few ? columns / (kPanelItems * pool.num_threads()) : kPanelColumns;
  const int64_t each = std::max<int64_t>(1, wanted / kPanelColumns) * kPanelColumns;
  parallel_for(pool, (columns + each - 1) / each, [&](int64_t item) {
    static thread_local std::vector<float> item_room;
    const int64_t panel_size = std::min(depth, kPanelDepth) * kPanelColumns, sums_size = rows * kPanelColumns;
    item_room.resize(panel_size + 2 * sums_size);
    float *const panel = item_room.data(), *const sums_of = panel + panel_size, *const ups = sums_of + sums_size;
    for (int64_t c = item * each; c < std::min(columns, (item + 1) * each); c += kPanelColumns) {
      const int64_t count = std::min(kPanelColumns, columns - c);
      multiply_rows<W>(rows, depth, from, panels + c * depth, count, panel, sums_of);
      if (product.gated) multiply_rows<W>(rows, depth, from, panels + (columns + c) * depth, count, panel, ups);
      for (int64_t r = 0; r < rows; ++r)
        finish_row(product, r, c, sums_of + r * kPanelColumns, ups + r * kPanelColumns, count, y);
    }
  });
}

}  // namespace jaxserve
#endif
