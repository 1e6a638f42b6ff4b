// A ragged batch over paged keys and values, and how attention shares it out.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

namespace jaxserve {

constexpr int kChunk = 64;     // positions of keys at a time
constexpr int kQueries = 48;   // of an item, unless one token has more
constexpr int64_t kLine = 64;  // bytes
constexpr float kMasked = -2.38e38f;  // -inf would give nan where nothing has been seen

struct Batch {
  const int32_t* query_starts;  // [rows + 1]
  const int32_t* kv_lens;       // [rows]
  const int32_t* block_tables;  // [rows, blocks_per_seq]
  int64_t rows, blocks_per_seq, block_size;
  int64_t q_heads, kv_heads, head_dim;
  float scale, soft_cap;  // soft_cap 0: none
  int64_t window;         // 0: none
  const float* sinks;     // [q_heads], or nullptr
  int64_t group() const { return q_heads / kv_heads; }
};

struct Item {
  int64_t row, token, tokens, position, head;  // `tokens` from `token` on; the first is at `position` of its sequence
  int64_t cost() const { return tokens * (position + tokens); }
};

inline std::vector<Item> items_of(const Batch& batch) {
  std::vector<Item> items;
  const int64_t most = std::max<int64_t>(1, kQueries / batch.group());
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t first = batch.query_starts[row], count = batch.query_starts[row + 1] - first;
    for (int64_t done = 0; done < count; done += most) {
      const int64_t tokens = std::min(most, count - done), position = batch.kv_lens[row] - count + done;
      for (int64_t head = 0; head < batch.kv_heads; ++head) items.push_back({row, first + done, tokens, position, head});
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost() > b.cost(); });
  return items;
}

}  // namespace jaxserve
