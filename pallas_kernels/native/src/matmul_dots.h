// y = x @ w.T by dot products, with weights as checkpoints have them: no repacking, so a step reads them once at most.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "product.h"

namespace jaxserve {

constexpr int64_t kColumns = 16;               // an item writes whole cache lines of y
constexpr int64_t kMostColumns = 256;          // of an item
constexpr int64_t kItems = 8;                  // a thread, where the columns suffice
constexpr int64_t kAhead = 4 * kWide;          // columns
constexpr int64_t kStreamedBytes = 128 << 10;  // of x
constexpr int64_t kWeightBytes = 48 << 10;     // of an item, where x is larger: both pass through a core's caches
constexpr int64_t kRowBytes = 384 << 10;       // of the rows of x that weights are multiplied with at a time

// Asks for the weights that come next: the processor's own prefetching starts anew, and late, with each row.
template <class W>
inline void fetch_ahead(const W* from, int64_t count, const W* end) {
  constexpr int64_t line = 64 / sizeof(W);
  for (const W* at = from; at < std::min(from + count, end); at += line) __builtin_prefetch(at, 0, 3);
}

// Rows of x by the columns [first, last) of w: sums [rows, last - first].
template <class W>
void multiply_range(const typename Dot<W>::X* x, int64_t stride, int64_t rows, const W* w, const W* end, int64_t depth,
                    int64_t first, int64_t last, bool streams, float* sums_of) {
  const int64_t width = last - first;
  auto block = [&](int64_t r, int64_t c) {  // up to kMaxRows rows by kWide columns, or by those that are left
    const int count = static_cast<int>(std::min<int64_t>(kMaxRows, rows - r));
    float* to = sums_of + r * width + c - first;
    if (c + kWide <= last) {
      const W* const at[kWide] = {w + c * depth, w + (c + 1) * depth, w + (c + 2) * depth, w + (c + 3) * depth};
      dots_of<W, kWide>(count, x + r * stride, stride, at, depth, to, width);
    } else {
      for (; c < last; ++c, ++to) {
        const W* const at[1] = {w + c * depth};
        dots_of<W, 1>(count, x + r * stride, stride, at, depth, to, width);
      }
    }
  };
  if (streams) {
    for (int64_t c = first; c < last; c += kWide) {
      fetch_ahead(w + (c + kAhead) * depth, kWide * depth, end);
      for (int64_t r = 0; r < rows; r += kMaxRows) block(r, c);
    }
  } else {
    for (int64_t r = 0; r < rows; r += kMaxRows) {
      for (int64_t c = first; c < last; c += kWide) {
        if (r == 0) fetch_ahead(w + (c + kAhead) * depth, kWide * depth, end);
        block(r, c);
      }
    }
  }
}

template <class W, class T, class Y>
void multiply_dots(xla::ffi::ThreadPool& pool, const Product& product, const T* x, const W* w, Y* y) {
  using X = typename Dot<W>::X;
  const int64_t rows = product.rows, depth = product.depth, columns = product.columns;
  const int64_t stride = prepared_depth<W>(depth);
  constexpr bool is_ready = std::is_same_v<T, X> && std::is_same_v<T, W>;  // not floats that are to be rounded
  const X* prepared;
  std::vector<X> room;
  if constexpr (is_ready) prepared = x;
  if (!is_ready || stride != depth || product.norm) {
    room.resize(rows * stride);
    constexpr int64_t kRows = 16;
    parallel_for(pool, (rows + kRows - 1) / kRows, [&](int64_t item) {
      static thread_local std::vector<float> floats;
      floats.resize(depth);
      for (int64_t r = item * kRows; r < std::min(rows, (item + 1) * kRows); ++r)
        prepare_row<W>(floats_of(product, x + r * depth, floats.data()), depth, room.data() + r * stride);
    });
    prepared = room.data();
  }
  // Few rows of x stay beside the core: each weight is fetched while others are used, and used for all rows at once.
  const bool streams = rows * stride * sizeof(X) <= kStreamedBytes;
  const int64_t wanted = streams ? std::min(kMostColumns, columns / (kItems * pool.num_threads()))
                                 : kWeightBytes / (depth * sizeof(W));
  const int64_t columns_each = std::max<int64_t>(1, wanted / kColumns) * kColumns;
  const int64_t rows_each =
      std::max<int64_t>(kMaxRows, kRowBytes / (stride * sizeof(X)) / kMaxRows * kMaxRows);
  const int64_t column_items = (columns + columns_each - 1) / columns_each;
  const int64_t row_items = (rows + rows_each - 1) / rows_each;
  const W* const ups_of = w + columns * depth;  // if it is gated
  const W* const end = product.gated ? ups_of + columns * depth : ups_of;
  parallel_for(pool, row_items * column_items, [&](int64_t item) {
    const int64_t row = item / column_items * rows_each, count = std::min(rows_each, rows - row);
    const int64_t first = item % column_items * columns_each, last = std::min(columns, first + columns_each);
    const int64_t width = last - first;
    static thread_local std::vector<float> room_for_sums;
    room_for_sums.resize((product.gated ? 2 : 1) * count * width);
    float *const sums_of = room_for_sums.data(), *const ups = sums_of + (product.gated ? count * width : 0);
    const X* from = prepared + row * stride;
    multiply_range<W>(from, stride, count, w, end, depth, first, last, streams, sums_of);
    if (product.gated) multiply_range<W>(from, stride, count, ups_of, end, depth, first, last, streams, ups);
    for (int64_t r = 0; r < count; ++r)
      finish_row(product, row + r, first, sums_of + r * width, ups + r * width, width, y);
  });
}

}  // namespace jaxserve
