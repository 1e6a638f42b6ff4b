// Attention over bfloat16 keys and values by AMX tiles, 16 queries and 64 positions at a time.
//
//   scores [positions, 16 queries] = k . q      k's rows are A as they lie in their blocks, q is packed
//   weights of each query, online softmax       a vector holds one position of 16 queries
//   out [16 queries, head_dim] += weights . v   weights in bfloat16 are A, v is packed
//
// Chunks start at multiples of 64, so that a query's result depends on nothing but its sequence.
#pragma once

#include <array>
#include <vector>

#include "attention_batch.h"
#include "product.h"
#include "tiles.h"

#if JAXSERVE_TILES
namespace jaxserve {

constexpr int64_t kChunkTiles = kChunk / kTile, kChunkSteps = kChunk / kDeep;

inline bool takes_tiles(const Batch& batch) {
  return tiles_allowed() && batch.head_dim % kDeep == 0 && batch.block_size % kTile == 0;
}

// The 16 queries of a block of an item: one a lane, and a tile row.
struct QueryBlock {
  IntVec position;  // -1: no query
  Vec top, total;   // of its softmax so far
};

struct TileWork {
  Room q, v, p;                // tiles of B, of B, and of A
  std::vector<float> scores;   // [kChunk, 16]
  std::vector<float> out;      // [blocks * 16, head_dim], sums of exp(score - top) * v
  std::vector<QueryBlock> blocks;
};

// Packs the rows [from, count) of v, two positions a row of a tile: [kChunkSteps, head_dim / 16] tiles. The others, which
// nobody may read, are zeros.
inline void pack_values(const uint16_t* const* v, int64_t stride, int64_t from, int64_t count, int64_t depth,
                        uint16_t* tiles) {
  alignas(64) static const auto order = [] {
    std::array<uint16_t, 64> pairs{};
    for (int i = 0; i < 32; ++i) pairs[2 * i] = i, pairs[2 * i + 1] = 32 + i;
    return pairs;
  }();
  const __m512i low = load<__m512i>(order.data()), high = load<__m512i>(order.data() + 32);
  for (int64_t pair = 0; pair < (count + kDeep - 1) / kDeep * kTile; ++pair) {
    const int64_t at = 2 * pair;
    auto row = [&](int64_t i) { return i >= from && i < count ? v[i / kTile] + i % kTile * stride : nullptr; };
    const uint16_t *const first = row(at), *const second = row(at + 1);
    uint16_t* to = tiles + (pair / kTile * (depth / kTile) * kTile + pair % kTile) * kDeep;
    for (int64_t d = 0; d < depth; d += kDeep, to += 2 * kTileValues) {
      const __m512i a = first ? load<__m512i>(first + d) : _mm512_setzero_si512();
      const __m512i b = second ? load<__m512i>(second + d) : _mm512_setzero_si512();
      store(to, _mm512_permutex2var_epi16(a, low, b));
      store(to + kTileValues, _mm512_permutex2var_epi16(a, high, b));
    }
  }
}

// What both ways of softening a chunk find of each query: its highest score, and the sum of its weights.
struct Softened {
  Vec highest, added;
};

// Scores as they count: scaled, and masked where their query does not see the position. The lanes are queries at one
// position, or positions of one query.
inline Vec visible_scores(const Batch& batch, Vec score, IntVec query, IntVec position) {
  score *= batch.scale;
  if (batch.soft_cap > 0)
    for (int i = 0; i < kLanes; ++i) score[i] = batch.soft_cap * std::tanh(score[i] / batch.soft_cap);
  IntVec visible = query >= position;
  if (batch.window) visible &= query - static_cast<int32_t>(batch.window) < position;
  return visible ? score : broadcast(kMasked);
}
inline Vec weights_of(Vec score, Vec highest) {
  return score > broadcast(kMasked) ? exp_negative(score - highest) : Vec{};
}

// Turns scores [kChunk, 16] of positions from `first` on into weights, tiles of A a step.
inline Softened soften_tiles(const Batch& batch, int64_t first, int64_t tiles, float* scores, const QueryBlock& block,
                             uint16_t* weights) {
  const int64_t count = tiles * kTile;
  Vec highest = block.top;
  for (int64_t at = 0; at < count; ++at) {
    const IntVec position = IntVec{} + static_cast<int32_t>(first + at);
    const Vec score = visible_scores(batch, load<Vec>(scores + at * kTile), block.position, position);
    store(scores + at * kTile, score);
    highest = score > highest ? score : highest;
  }
  Vec added[kTile] = {};  // of positions 16 apart, then halved as `sum` does
  for (int64_t step = 0; step < (tiles + 1) / 2; ++step) {
    __m512i r[kTile];
    for (int64_t pair = 0; pair < kTile; ++pair) {
      Vec weight[2] = {};
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t at = step * kDeep + 2 * pair + i;
        if (at >= count) continue;
        weight[i] = weights_of(load<Vec>(scores + at * kTile), highest);
        added[at % kTile] += weight[i];
      }
      const __m512i wide = bits_as<__m512i>(_mm512_cvtne2ps_pbh((__m512)weight[1], (__m512)weight[0]));
      const __m512i even = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(wide));
      const __m512i odd = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(wide, 1));
      r[pair] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
    transpose(r);
    for (int64_t i = 0; i < kTile; ++i) store(weights + step * kTileValues + i * kDeep, r[i]);
  }
  for (int64_t width = kTile / 2; width > 0; width /= 2)
    for (int64_t i = 0; i < width; ++i) added[i] += added[i + width];
  return {highest, added[0]};
}

constexpr int64_t kFewQueries = 4;

// The same, to the bit, for up to four queries: a vector holds 16 positions of one of them.
inline Softened soften_rows(const Batch& batch, int64_t first, int64_t tiles, const float* scores,
                            const QueryBlock& block, int64_t queries, uint16_t* weights) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Vec rows[kFewQueries][kChunkTiles];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    __m512 z[4];  // of positions i, 4 + i, 8 + i, 12 + i the first four queries
    for (int i = 0; i < 4; ++i) {
      const float* from = scores + (tile * kTile + i) * kTile;
      z[i] = _mm512_castps128_ps512(_mm_loadu_ps(from));
      z[i] = _mm512_insertf32x4(z[i], _mm_loadu_ps(from + 4 * kTile), 1);
      z[i] = _mm512_insertf32x4(z[i], _mm_loadu_ps(from + 8 * kTile), 2);
      z[i] = _mm512_insertf32x4(z[i], _mm_loadu_ps(from + 12 * kTile), 3);
    }
    const __m512d a = (__m512d)_mm512_unpacklo_ps(z[0], z[1]), b = (__m512d)_mm512_unpacklo_ps(z[2], z[3]);
    const __m512d c = (__m512d)_mm512_unpackhi_ps(z[0], z[1]), d = (__m512d)_mm512_unpackhi_ps(z[2], z[3]);
    rows[0][tile] = (Vec)_mm512_unpacklo_pd(a, b);
    rows[1][tile] = (Vec)_mm512_unpackhi_pd(a, b);
    rows[2][tile] = (Vec)_mm512_unpacklo_pd(c, d);
    rows[3][tile] = (Vec)_mm512_unpackhi_pd(c, d);
  }
  Softened found = {block.top, Vec{}};
  for (int64_t query = 0; query < queries; ++query) {
    const IntVec place = IntVec{} + block.position[query];
    Vec highest = broadcast(block.top[query]);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      Vec& score = rows[query][tile];
      score = visible_scores(batch, score, place, lane + static_cast<int32_t>(first + tile * kTile));
      highest = score > highest ? score : highest;
    }
    found.highest[query] = max_of(highest);
    Vec added = {};
    for (int64_t tile = 0; tile < (tiles + 1) / 2 * 2; ++tile) {
      const Vec weight = tile < tiles ? weights_of(rows[query][tile], broadcast(found.highest[query])) : Vec{};
      added += weight;
      store_floats(weights + tile / 2 * kTileValues + query * kDeep + tile % 2 * kTile, weight);
    }
    found.added[query] = sum(added);
  }
  return found;
}

inline void attend_tiles(const Batch& batch, const Item& item, const float* q, const uint16_t* k_pool,
                         const uint16_t* v_pool, float* out) {
  static thread_local TileWork work;
  const Part& part = *item.parts;  // its only one
  const int64_t group = batch.group(), depth = batch.head_dim, steps = depth / kDeep;
  const int64_t queries = part.tokens * group, blocks = (queries + kTile - 1) / kTile;
  const int64_t stride = batch.kv_heads * depth;  // of positions in a block of the pool
  work.scores.resize(kChunk * kTile + kTile);
  work.out.assign(blocks * kTile * depth, 0.0f);
  work.blocks.resize(blocks);
  uint16_t *const q_tiles = work.q.of(blocks * kTile * depth), *const v_tiles = work.v.of(kChunk * depth),
           *const p_tiles = work.p.of(kChunkSteps * kTileValues);
  auto place = [&](int64_t query) {  // of a query's head in q and in out
    return ((part.token + query / group) * batch.q_heads + item.head * group + query % group) * depth;
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t count = std::min(kTile, queries - b * kTile);
    for (int64_t i = 0; i < kTile; ++i) {
      work.blocks[b].position[i] =
          i < count ? static_cast<int32_t>(part.position + (b * kTile + i) / group) : int32_t{-1};
      if (i < count) round_floats(q + place(b * kTile + i), depth, v_tiles + i * depth);  // room that is free yet
    }
    for (int64_t step = 0; step < steps; ++step)
      pack_tile(v_tiles + step * kDeep, depth, count, q_tiles + (b * steps + step) * kTileValues);
    work.blocks[b].top = broadcast(kMasked);
    work.blocks[b].total = Vec{};
  }

  const int32_t* table = batch.table(part.row);
  const int64_t end = part.end();
  const int64_t seen = batch.window ? std::max<int64_t>(0, part.position - batch.window + 1) : 0;
  const uint16_t *keys[kChunkTiles], *values[kChunkTiles], *next_keys[kChunkTiles], *next_values[kChunkTiles];
  // Where the tiles of a chunk's keys and values begin; they are asked for a chunk ahead, since blocks lie anywhere.
  auto find = [&](int64_t first, const uint16_t** k, const uint16_t** v) {
    for (int64_t tile = 0; tile * kTile < std::min<int64_t>(kChunk, end - first); ++tile) {
      const int64_t position = first + tile * kTile;
      const int64_t slot = table[position / batch.block_size] * batch.block_size + position % batch.block_size;
      k[tile] = k_pool + (slot * batch.kv_heads + item.head) * depth;
      v[tile] = v_pool + (slot * batch.kv_heads + item.head) * depth;
      for (int64_t i = 0; i < kTile; ++i) {
        for (int64_t d = 0; d < depth; d += kDeep) {
          __builtin_prefetch(k[tile] + i * stride + d, 0, 3);
          __builtin_prefetch(v[tile] + i * stride + d, 0, 3);
        }
      }
    }
  };
  const Tiles configured;
  const int64_t begin = seen / kChunk * kChunk;
  find(begin, keys, values);
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, end - first), tiles = (count + kTile - 1) / kTile;
    if (first + kChunk < end) find(first + kChunk, next_keys, next_values);
    pack_values(values, stride, std::max<int64_t>(0, seen - first), count, depth, v_tiles);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t last = std::min(queries, (b + 1) * kTile) - 1;
      if (part.position + last / group < first) continue;  // none of its queries sees the chunk
      multiply_chunk(keys, tiles, stride, q_tiles + b * steps * kTileValues, steps, work.scores.data());
      QueryBlock& block = work.blocks[b];
      const int64_t present = last + 1 - b * kTile;
      const Softened found = present <= kFewQueries
                                 ? soften_rows(batch, first, tiles, work.scores.data(), block, present, p_tiles)
                                 : soften_tiles(batch, first, tiles, work.scores.data(), block, p_tiles);
      const Vec decay = exp_negative(block.top - found.highest);  // of what has been summed so far
      block.total = block.total * decay + found.added;
      block.top = found.highest;
      float* const sums_of = work.out.data() + b * kTile * depth;
      for (int64_t i = 0; i < kTile; ++i)
        if (decay[i] != 1.0f)
          for (int64_t d = 0; d < depth; d += kLanes)
            store(sums_of + i * depth + d, load<Vec>(sums_of + i * depth + d) * decay[i]);
      for (int64_t d = 0; d < depth; d += kDeep)
        add_product(p_tiles, v_tiles + d / kTile * kTileValues, depth / kTile * kTileValues, (tiles + 1) / 2,
                    sums_of + d, depth);
    }
    std::swap(keys, next_keys);
    std::swap(values, next_values);
  }
  for (int64_t i = 0; i < queries; ++i) {
    const QueryBlock& block = work.blocks[i / kTile];
    const float highest = block.top[i % kTile];
    float decay = 1.0f, total = block.total[i % kTile];
    if (batch.sinks) {
      const float sink = batch.sinks[item.head * group + i % group], top = std::max(highest, sink);
      decay = std::exp(highest - top);
      total = total * decay + std::exp(sink - top);
    }
    for (int64_t d = 0; d < depth; ++d) out[place(i) + d] = work.out[i * depth + d] * (decay / total);
  }
}

}  // namespace jaxserve
#endif
