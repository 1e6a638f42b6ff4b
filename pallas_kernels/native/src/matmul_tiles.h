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
#include "product.h"
#include "tiles.h"

#if JAXSERVE_TILES
namespace jaxserve {

constexpr int64_t kPair = 2 * kTile;       // rows and columns of multiply_2x2
constexpr int64_t kFewRows = 64;           // of x
constexpr int64_t kTileItems = 3;          // a thread, where the columns suffice
constexpr int64_t kMostTileColumns = 512;  // of an item

// Packs up to `Columns` rows of x or w: one tile or two a step. Depths and rows past the end are zeros.
template <int64_t Columns>
inline void pack_panel(const uint16_t* rows, int64_t stride, int64_t count, int64_t depth, uint16_t* panel) {
  for (int64_t at = 0; at < depth; at += kDeep) {
    for (int64_t first = 0; first < Columns; first += kTile, panel += kTileValues) {
      const int64_t left = std::clamp<int64_t>(count - first, 0, kTile);
      if (at + kDeep <= depth) {
        pack_tile(rows + first * stride + at, stride, left, panel);
      } else {
        uint16_t rest[kTile * kDeep] = {};
        for (int64_t i = 0; i < left; ++i)
          std::memcpy(rest + i * kDeep, rows + (first + i) * stride + at, (depth - at) * sizeof(uint16_t));
        pack_tile(rest, kDeep, left, panel);
      }
    }
  }
}

// A row of x in bfloat16, normalised where it shall be, with zeros up to a whole step.
template <class T>
inline void round_row(const Product& product, const T* x, uint16_t* to) {
  if constexpr (std::is_same_v<T, float>) {
    static thread_local std::vector<float> room;
    room.resize(product.depth);
    round_floats(floats_of(product, x, room.data()), product.depth, to);
  } else {
    std::memcpy(to, x, product.depth * sizeof(T));
  }
  for (int64_t at = product.depth; at % kDeep; ++at) to[at] = 0;
}

// Up to 16 rows of y from as many columns of c and `ups` [16, ..].
template <class Y>
inline void finish_columns(const Product& product, int64_t row, int64_t count, int64_t column, const float* c,
                           const float* ups, int64_t c_stride, Y* y) {
  __m512i r[kTile];
  for (int64_t i = 0; i < kTile; ++i) {
    Vec value = load<Vec>(c + i * c_stride);
    if (product.gated) value = silu_times(value, load<Vec>(ups + i * c_stride));
    r[i] = bits_as<__m512i>(value);
  }
  transpose(r);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (row + i) * product.columns + column;
    Vec value = bits_as<Vec>(r[i]);
    if (product.residual) value += load<Vec>(product.residual + at);
    store_floats(y + at, value);
  }
}

// Columns [first, last) of y for few rows; `packed` holds blocks of Columns rows of x. Items have at least Tall columns:
// where fewer are left, some are computed again.
template <int64_t Columns, class Y>
void multiply_few(const Product& product, const uint16_t* packed, const uint16_t* w, int64_t first, int64_t last,
                  Y* y) {
  constexpr int64_t tall = Columns == kTile ? 4 * kTile : kPair;
  const int64_t depth = product.depth, steps = depth / kDeep, block = depth * Columns;
  const uint16_t* const end = w + (product.gated ? 2 : 1) * product.columns * depth;
  const Tiles tiles;
  alignas(64) float sums[tall * Columns], ups[tall * Columns];
  auto multiply = [&](const uint16_t* x, const uint16_t* weights, bool fetches, float* c) {
    const uint16_t* ahead = weights + tall * depth;
    const int64_t lines = fetches && ahead + tall * depth <= end ? tall : 0;  // a line a row of w and a step
    if constexpr (Columns == kTile) {
      multiply_tall(weights, depth, x, steps, c, Columns, ahead, lines);
    } else {
      multiply_2x2(weights, depth, x, steps, c, Columns, ahead, lines);
    }
  };
  int64_t done = first;  // columns that are finished: with a residual in place, none may be finished twice
  for (int64_t column = first; column < last; column += tall) {
    const int64_t at = std::min(column, last - tall);
    for (int64_t row = 0; row < product.rows; row += Columns) {
      const uint16_t* x = packed + row / Columns * block;
      multiply(x, w + at * depth, row == 0, sums);
      if (product.gated) multiply(x, w + (product.columns + at) * depth, row == 0, ups);
      for (int64_t i = 0; i < Columns && row + i < product.rows; i += kTile) {
        for (int64_t j = 0; j < tall; j += kTile) {
          const int64_t count = std::min(kTile, product.rows - row - i);
          const float *c = sums + j * Columns + i, *u = ups + j * Columns + i;
          if (at + j >= done) {
            finish_columns(product, row + i, count, at + j, c, u, Columns, y);
          } else {
            for (int64_t k = std::max<int64_t>(0, done - at - j); k < kTile; ++k)
              for (int64_t r = 0; r < count; ++r)
                finish_row(product, row + i + r, at + j + k, c + k * Columns + r, u + k * Columns + r, 1, y);
          }
        }
      }
    }
    done = at + tall;
  }
}

// Columns [first, first + 32) of y for all rows; x [rows padded to 32, stride] is bfloat16.
template <class Y>
void multiply_many(const Product& product, const uint16_t* x, int64_t stride, const uint16_t* w, int64_t first, Y* y) {
  static thread_local Room room;
  const int64_t depth = product.depth, steps = stride / kDeep, width = std::min(kPair, product.columns - first);
  uint16_t* const panel = room.of(2 * kPair * stride);
  uint16_t* const up_panel = panel + kPair * stride;
  pack_panel<kPair>(w + first * depth, depth, width, depth, panel);
  if (product.gated) pack_panel<kPair>(w + (product.columns + first) * depth, depth, width, depth, up_panel);
  const bool is_plain = std::is_same_v<Y, float> && !product.gated && !product.residual && width == kPair;
  const Tiles tiles;
  alignas(64) float sums[kPair * kPair], ups[kPair * kPair];
  for (int64_t row = 0; row < product.rows; row += kPair) {
    const uint16_t* from = x + row * stride;
    if constexpr (std::is_same_v<Y, float>) {
      if (is_plain && row + kPair <= product.rows) {
        multiply_2x2(from, stride, panel, steps, y + row * product.columns + first, product.columns);
        continue;
      }
    }
    multiply_2x2(from, stride, panel, steps, sums, kPair);
    if (product.gated) multiply_2x2(from, stride, up_panel, steps, ups, kPair);
    for (int64_t i = 0; i < std::min(kPair, product.rows - row); ++i)
      finish_row(product, row + i, first, sums + i * kPair, ups + i * kPair, width, y);
  }
}

template <class T, class Y>
void multiply_tiles(xla::ffi::ThreadPool& pool, const Product& product, const T* x, const uint16_t* w, Y* y) {
  const int64_t rows = product.rows, depth = product.depth, columns = product.columns;
  const int64_t stride = (depth + kDeep - 1) / kDeep * kDeep;
  static thread_local Room room;
  uint16_t* const prepared = room.of((rows + kPair - 1) / kPair * kPair * stride);
  const bool few = rows <= kFewRows && depth == stride && columns >= 4 * kTile;
  const bool one = few && rows <= kTile;
  const int64_t block = one ? kTile : kPair;
  parallel_for(pool, (rows + block - 1) / block, [&](int64_t i) {
    static thread_local Room rounded;
    const int64_t count = std::min(block, rows - i * block);
    uint16_t* const to = prepared + i * block * stride;
    uint16_t* const plain = few ? rounded.of(block * stride) : to;
    for (int64_t r = 0; r < count; ++r) round_row(product, x + (i * block + r) * depth, plain + r * stride);
    if (one) {
      pack_panel<kTile>(plain, stride, count, depth, to);
    } else if (few) {
      pack_panel<kPair>(plain, stride, count, depth, to);
    } else {
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
      multiply_few<kTile>(product, prepared, w, first, last, y);
    } else if (few) {
      multiply_few<kPair>(product, prepared, w, first, last, y);
    } else {
      multiply_many(product, prepared, stride, w, first, y);
    }
  });
}

}  // namespace jaxserve
#endif
