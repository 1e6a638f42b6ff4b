// y = x @ w.T with weights as checkpoints have them, [out, in]: no repacking, so a step reads them once at most.
#include <algorithm>
#include <vector>

#include "dot.h"
#include "matmul_tiles.h"
#include "parallel.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

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

template <class W>
void multiply(ffi::ThreadPool& pool, const float* x, const W* w, float* y, int64_t rows, int64_t depth,
              int64_t columns) {
  using X = typename Dot<W>::X;
  const int64_t stride = prepared_depth<W>(depth);
  const X* prepared;
  std::vector<X> room;
  if constexpr (std::is_same_v<W, float>) {
    prepared = x;
  }
  if (!std::is_same_v<W, float> || stride != depth) {
    room.resize(rows * stride);
    constexpr int64_t kRows = 16;
    parallel_for(pool, (rows + kRows - 1) / kRows, [&](int64_t item) {
      for (int64_t r = item * kRows; r < std::min(rows, (item + 1) * kRows); ++r)
        prepare_row<W>(x + r * depth, depth, room.data() + r * stride);
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
  parallel_for(pool, row_items * column_items, [&](int64_t item) {
    const int64_t first_row = item / column_items * rows_each, last_row = std::min(rows, first_row + rows_each);
    const int64_t first = item % column_items * columns_each, last = std::min(columns, first + columns_each);
    const W* const end = w + columns * depth;
    static thread_local std::vector<float> room_for_sums;
    const int64_t width = last - first;
    room_for_sums.resize((last_row - first_row) * width);
    float* const sums_of = room_for_sums.data();  // [rows, columns] of the item
    auto block = [&](int64_t r, int64_t c) {      // up to kMaxRows rows by kWide columns, or by those that are left
      const int count = static_cast<int>(std::min<int64_t>(kMaxRows, last_row - r));
      float* to = sums_of + (r - first_row) * width + c - first;
      if (c + kWide <= last) {
        const W* const at[kWide] = {w + c * depth, w + (c + 1) * depth, w + (c + 2) * depth, w + (c + 3) * depth};
        dots_of<W, kWide>(count, prepared + r * stride, stride, at, depth, to, width);
      } else {
        for (; c < last; ++c, ++to) {
          const W* const at[1] = {w + c * depth};
          dots_of<W, 1>(count, prepared + r * stride, stride, at, depth, to, width);
        }
      }
    };
    auto write = [&](int64_t from_row, int64_t to_row) {
      for (int64_t r = from_row; r < to_row; ++r)
        std::memcpy(y + r * columns + first, sums_of + (r - first_row) * width, width * sizeof(float));
    };
    if (streams) {
      for (int64_t c = first; c < last; c += kWide) {
        fetch_ahead(w + (c + kAhead) * depth, kWide * depth, end);
        for (int64_t r = first_row; r < last_row; r += kMaxRows) block(r, c);
      }
      write(first_row, last_row);
    } else {
      for (int64_t r = first_row; r < last_row; r += kMaxRows) {
        for (int64_t c = first; c < last; c += kWide) {
          if (r == first_row) fetch_ahead(w + (c + kAhead) * depth, kWide * depth, end);
          block(r, c);
        }
        write(r, std::min(r + kMaxRows, last_row));
      }
    }
  });
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::ResultBuffer<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], depth = x.dimensions()[1], columns = w.dimensions()[0];
  if (w.element_type() == ffi::F32) {
    multiply(pool, x.typed_data(), w.typed_data<float>(), y->typed_data(), rows, depth, columns);
  } else {
    const auto* weights = static_cast<const uint16_t*>(w.untyped_data());
#if JAXSERVE_TILES
    if (tiles_allowed()) {
      multiply_tiles(pool, x.typed_data(), weights, y->typed_data(), rows, depth, columns);
      return ffi::Error::Success();
    }
#endif
    multiply(pool, x.typed_data(), weights, y->typed_data(), rows, depth, columns);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_matmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()      // x [rows, depth]
                                  .Arg<ffi::AnyBuffer>()             // w [columns, depth], float32 or bfloat16
                                  .Ret<ffi::Buffer<ffi::F32>>());    // y [rows, columns]

}  // namespace jaxserve
