// y = x @ w.T of bfloat16 weights by AMX tiles.
//
//   few rows of x    w's rows are A as they lie, x is packed: each weight is read once, nothing of w's size is written
//   many             x's rows are A, 32 rows of w at a time are packed, and used for all rows of x
//
// Both take a sum's terms in one order, so a row's result does not depend on its batch.
#pragma once

#include <algorithm>
#include <vector>

#include "parallel.h"
#include "tiles.h"

#if JAXSERVE_TILES
namespace jaxserve {

constexpr int64_t kPair = 2 * kTile;        // rows and columns of multiply_2x2
constexpr int64_t kFewRows = 64;            // of x
constexpr int64_t kTileItems = 3;           // a thread, where the columns suffice
constexpr int64_t kMostTileColumns = 512;   // of an item

// Packs up to 32 rows of x or w for multiply_2x2: two tiles a step, or one if `Columns` is 16. Depths and rows past the
// end are zeros.
template <int64_t Columns, class T>
inline void pack_panel(const T* rows, int64_t stride, int64_t count, int64_t depth, uint16_t* panel) {
  constexpr int64_t tiles = Columns / kTile;
  for (int64_t at = 0; at < depth; at += kDeep) {
    for (int64_t tile = 0; tile < tiles; ++tile, panel += kTileValues) {
      const int64_t left = std::clamp<int64_t>(count - tile * kTile, 0, kTile), first = tile * kTile;
      if (at + kDeep <= depth) {
        pack_tile(rows + first * stride + at, stride, left, panel);
      } else {
        T rest[kTile * kDeep] = {};
        for (int64_t i = 0; i < left; ++i)
          std::memcpy(rest + i * kDeep, rows + (first + i) * stride + at, (depth - at) * sizeof(T));
        pack_tile(rest, kDeep, left, panel);
      }
    }
  }
}

// Up to 16 rows of y from as many columns of c [16, ..].
inline void store_transposed(const float* c, int64_t c_stride, int64_t count, float* y, int64_t y_stride) {
  __m512i r[kTile];
  for (int64_t i = 0; i < kTile; ++i) r[i] = load<__m512i>(c + i * c_stride);
  transpose(r);
  for (int64_t i = 0; i < count; ++i) store(y + i * y_stride, r[i]);
}

// Columns [first, last) of y for few rows; `packed` holds blocks of Columns rows of x. The whole of y has at least Tall
// columns: where fewer are left, some are computed again.
template <int64_t Columns>
void multiply_few(const uint16_t* packed, const uint16_t* w, float* y, int64_t rows, int64_t depth, int64_t columns,
                  int64_t first, int64_t last) {
  constexpr int64_t tall = Columns == kTile ? 4 * kTile : kPair;
  const int64_t steps = depth / kDeep, block = steps * kDeep * Columns;
  const Tiles tiles;
  alignas(64) float c[tall * Columns];
  for (int64_t column = first; column < last; column += tall) {
    const int64_t at = std::min(column, columns - tall);
    const char* ahead = reinterpret_cast<const char*>(w + (at + tall) * depth);
    for (int64_t row = 0; row < rows; row += Columns) {
      const int64_t lines = row == 0 && at + 2 * tall <= last ? tall : 0;  // a line a row of w and a step
      const uint16_t* x = packed + row / Columns * block;
      if constexpr (Columns == kTile) {
        multiply_tall<4>(w + at * depth, depth, x, steps, c, Columns, ahead, lines);
      } else {
        multiply_2x2(w + at * depth, depth, x, steps, c, Columns, ahead, lines);
      }
      for (int64_t i = 0; i < Columns && row + i < rows; i += kTile)
        for (int64_t j = 0; j < tall; j += kTile)
          store_transposed(c + j * Columns + i, Columns, std::min(kTile, rows - row - i),
                           y + (row + i) * columns + at + j, columns);
    }
  }
}

// Columns [first, first + 32) of y for all rows; x [rows padded to 32, stride] is bfloat16.
inline void multiply_many(const uint16_t* x, int64_t stride, const uint16_t* w, float* y, int64_t rows, int64_t depth,
                          int64_t columns, int64_t first) {
  static thread_local std::vector<uint16_t> room;
  const int64_t steps = (depth + kDeep - 1) / kDeep, width = std::min(kPair, columns - first);
  room.resize(steps * 2 * kTileValues + kDeep);
  uint16_t* panel = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
  pack_panel<kPair>(w + first * depth, depth, width, depth, panel);
  const Tiles tiles;
  alignas(64) float c[kPair * kPair];
  for (int64_t row = 0; row < rows; row += kPair) {
    float* to = y + row * columns + first;
    if (width == kPair && row + kPair <= rows) {
      multiply_2x2(x + row * stride, stride, panel, steps, to, columns);
    } else {
      multiply_2x2(x + row * stride, stride, panel, steps, c, kPair);
      for (int64_t i = 0; i < std::min(kPair, rows - row); ++i)
        std::memcpy(to + i * columns, c + i * kPair, width * sizeof(float));
    }
  }
}

template <class T>
void multiply_tiles(xla::ffi::ThreadPool& pool, const T* x, const uint16_t* w, float* y, int64_t rows, int64_t depth,
                    int64_t columns) {
  const int64_t stride = (depth + kDeep - 1) / kDeep * kDeep;
  static thread_local std::vector<uint16_t> room;
  room.resize((rows + kPair - 1) / kPair * kPair * stride + kDeep);
  uint16_t* const prepared = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
  const bool few = rows <= kFewRows && depth == stride && columns >= 4 * kTile;
  const bool one = few && rows <= kTile;
  const int64_t block = one ? kTile : kPair, blocks = (rows + block - 1) / block;
  parallel_for(pool, blocks, [&](int64_t i) {
    const T* from = x + i * block * depth;
    uint16_t* to = prepared + i * block * stride;
    const int64_t count = std::min(block, rows - i * block);
    if (one) {
      pack_panel<kTile>(from, depth, count, depth, to);
    } else if (few) {
      pack_panel<kPair>(from, depth, count, depth, to);
    } else {
      for (int64_t r = 0; r < count; ++r) round_row(from + r * depth, depth, to + r * stride);
      std::memset(to + count * stride, 0, (block - count) * stride * sizeof(uint16_t));
    }
  });
  const int64_t tall = one ? 4 * kTile : kPair;
  const int64_t wanted = few ? std::min(kMostTileColumns, columns / (kTileItems * pool.num_threads())) : kPair;
  const int64_t each = std::max<int64_t>(1, wanted / tall) * tall;
  const int64_t items = few ? columns / each : (columns + each - 1) / each;  // the last of few takes what is left
  parallel_for(pool, items, [&](int64_t i) {
    const int64_t first = i * each, last = i + 1 < items ? first + each : columns;
    if (one) {
      multiply_few<kTile>(prepared, w, y, rows, depth, columns, first, last);
    } else if (few) {
      multiply_few<kPair>(prepared, w, y, rows, depth, columns, first, last);
    } else {
      multiply_many(prepared, stride, w, y, rows, depth, columns, first);
    }
  });
}

}  // namespace jaxserve
#endif
