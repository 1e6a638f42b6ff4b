// y = x @ w.T of float32 weights that lie in panels of 32 rows, each [depth, 32]; the last may be narrower.
//
//   sums [14 rows of x, 32] += x [14, k] * panel [k, 32]     for k = 0, 1, ..
//
// Each sum takes its terms in that order, so a row's result does not depend on its batch.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "product.h"

#if defined(__AVX512F__)
#define JAXSERVE_PANELS 1

namespace jaxserve {

constexpr int64_t kPanelColumns = 2 * kLanes;
constexpr int64_t kPanelRows = 14;       // of x: sums in 28 registers
constexpr int64_t kPanelDepth = 2048;    // what is used of a panel at a time stays in the core's own cache
constexpr int64_t kPanelItems = 6;       // a thread, where rows of x are few and the columns suffice
constexpr int64_t kFewPanelRows = 64;

// sums [Rows, 32] of x [Rows, stride] and a panel; goes on from what is there unless `begins`.
template <int Rows>
inline void multiply_panel(const float* x, int64_t stride, const float* panel, int64_t depth, bool begins,
                           float* sums_of) {
  Vec low[Rows], high[Rows];
  for (int r = 0; r < Rows; ++r) {
    low[r] = begins ? Vec{} : load<Vec>(sums_of + r * kPanelColumns);
    high[r] = begins ? Vec{} : load<Vec>(sums_of + r * kPanelColumns + kLanes);
  }
  const float* rows[(Rows + 2) / 3];  // three rows a pointer: what addresses can add
  for (int i = 0; i < (Rows + 2) / 3; ++i) rows[i] = x + 3 * i * stride;
  for (int64_t k = 0; k < depth; ++k, panel += kPanelColumns) {
    const Vec first = load<Vec>(panel), second = load<Vec>(panel + kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      const Vec value = broadcast(rows[r / 3][r % 3 * stride + k]);
      low[r] += value * first;
      high[r] += value * second;
    }
  }
  for (int r = 0; r < Rows; ++r) {
    store(sums_of + r * kPanelColumns, low[r]);
    store(sums_of + r * kPanelColumns + kLanes, high[r]);
  }
}

template <int Rows = kPanelRows>
inline void multiply_panel_of(int64_t rows, const float* x, int64_t stride, const float* panel, int64_t depth,
                              bool begins, float* sums_of) {
  if (rows == Rows) {
    multiply_panel<Rows>(x, stride, panel, depth, begins, sums_of);
  } else if constexpr (Rows > 1) {
    multiply_panel_of<Rows - 1>(rows, x, stride, panel, depth, begins, sums_of);
  }
}

// sums [rows, 32] of x and a panel of `count` columns, which is widened in `room` where these are fewer than 32.
inline void multiply_rows(const Product& product, const float* x, const float* panel, int64_t count, float* room,
                          float* sums_of) {
  for (int64_t at = 0; at < product.depth; at += kPanelDepth) {
    const int64_t depth = std::min(kPanelDepth, product.depth - at);
    const float* from = panel + at * count;
    if (count < kPanelColumns) {
      for (int64_t k = 0; k < depth; ++k) std::copy(from + k * count, from + (k + 1) * count, room + k * kPanelColumns);
      from = room;
    }
    for (int64_t r = 0; r < product.rows; r += kPanelRows)
      multiply_panel_of(std::min(kPanelRows, product.rows - r), x + r * product.depth + at, product.depth, from, depth,
                        at == 0, sums_of + r * kPanelColumns);
  }
}

inline void multiply_panels(xla::ffi::ThreadPool& pool, const Product& product, const float* x, const float* w,
                            float* y) {
  const int64_t rows = product.rows, depth = product.depth, columns = product.columns;
  static thread_local std::vector<float> room;
  if (product.norm) {
    room.resize(rows * depth);
    constexpr int64_t kRows = 16;
    parallel_for(pool, (rows + kRows - 1) / kRows, [&, normal = room.data()](int64_t item) {
      for (int64_t r = item * kRows; r < std::min(rows, (item + 1) * kRows); ++r)
        floats_of(product, x + r * depth, normal + r * depth);
    });
    x = room.data();
  }
  const bool few = rows <= kFewPanelRows;
  const int64_t wanted = few ? columns / (kPanelItems * pool.num_threads()) : kPanelColumns;
  const int64_t each = std::max<int64_t>(1, wanted / kPanelColumns) * kPanelColumns;
  const float* const ups_of = w + columns * depth;
  parallel_for(pool, (columns + each - 1) / each, [&](int64_t item) {
    static thread_local std::vector<float> item_room;
    const int64_t panel_size = std::min(depth, kPanelDepth) * kPanelColumns, sums_size = rows * kPanelColumns;
    item_room.resize(panel_size + 2 * sums_size);
    float *const panel = item_room.data(), *const sums_of = panel + panel_size, *const ups = sums_of + sums_size;
    for (int64_t c = item * each; c < std::min(columns, (item + 1) * each); c += kPanelColumns) {
      const int64_t count = std::min(kPanelColumns, columns - c);
      multiply_rows(product, x, w + c * depth, count, panel, sums_of);
      if (product.gated) multiply_rows(product, x, ups_of + c * depth, count, panel, ups);
      for (int64_t r = 0; r < rows; ++r)
        finish_row(product, r, c, sums_of + r * kPanelColumns, ups + r * kPanelColumns, count, y);
    }
  });
}

}  // namespace jaxserve
#endif
