// A ragged batch over paged keys and values, and how attention shares it out.
#pragma once

#include <algorithm>
#include <vector>

#include "vector.h"

namespace jaxserve {

constexpr int kChunk = 64;            // positions of keys at a time
constexpr int kQueries = 48;          // of an item, unless one token has more
constexpr int kItemsWanted = 4;       // a thread, before decodes walk together what they share
constexpr int64_t kLine = 64;         // bytes
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
  const int32_t* table(int64_t row) const { return block_tables + row * blocks_per_seq; }
};

// A few tokens of one row: `tokens` from `token` on; the first is at `position` of its sequence.
struct Part {
  int64_t row, token, tokens, position;
  int64_t end() const { return position + tokens; }
};

// Parts and one KV head. Several parts are decodes whose sequences begin with the same blocks: `shared` positions.
struct Item {
  const Part* parts;
  int64_t num_parts, head, shared;
  int64_t cost() const {
    int64_t sum = 0;
    for (int64_t i = 0; i < num_parts; ++i) sum += parts[i].tokens * parts[i].end();
    return sum;
  }
};

// How many positions, in whole chunks, two decodes have in the same blocks.
inline int64_t shared_positions(const Batch& batch, const Part& a, const Part& b) {
  const int32_t *const one = batch.table(a.row), *const other = batch.table(b.row);
  const int64_t most = std::min(a.end(), b.end()) / batch.block_size;
  int64_t blocks = 0;
  while (blocks < most && one[blocks] == other[blocks]) ++blocks;
  return blocks * batch.block_size / kChunk * kChunk;
}

// The work, the longest items first. `parts` is what they point to.
inline std::vector<Item> items_of(const Batch& batch, int64_t num_threads, bool groups, std::vector<Part>& parts) {
  std::vector<Part> decodes;
  const int64_t most = std::max<int64_t>(1, kQueries / batch.group());
  for (int64_t row = 0; row < batch.rows; ++row) {
    const int64_t first = batch.query_starts[row], count = batch.query_starts[row + 1] - first;
    const int64_t num_parts = (count + most - 1) / most, position = batch.kv_lens[row] - count;
    for (int64_t i = 0; i < num_parts; ++i) {
      const int64_t done = count * i / num_parts, end = count * (i + 1) / num_parts;
      (count == 1 ? decodes : parts).push_back({row, first + done, end - done, position + done});
    }
  }
  const int64_t num_longer = parts.size();
  // As many decodes together as leave every thread enough items; with a window they do not begin at the same position.
  const int64_t num_items = (num_longer + decodes.size()) * batch.kv_heads;
  const int64_t together = groups && !batch.window ? std::min(most, num_items / (kItemsWanted * num_threads)) : 1;
  if (together > 1) {
    std::stable_sort(decodes.begin(), decodes.end(), [&](const Part& a, const Part& b) {
      const int32_t *const one = batch.table(a.row), *const other = batch.table(b.row);
      return std::lexicographical_compare(one, one + a.end() / batch.block_size, other,
                                          other + b.end() / batch.block_size);
    });
  }
  parts.insert(parts.end(), decodes.begin(), decodes.end());
  std::vector<Item> items;
  const int64_t num_all = parts.size();
  for (int64_t at = 0, count; at < num_all; at += count) {
    int64_t shared = 0;
    for (count = 1; at >= num_longer && count < together && at + count < num_all; ++count) {
      const int64_t with_next = shared_positions(batch, parts[at], parts[at + count]);
      if (with_next == 0 || with_next < shared) break;
      shared = count == 1 ? with_next : shared;
    }
    for (int64_t head = 0; head < batch.kv_heads; ++head) items.push_back({&parts[at], count, head, shared});
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.cost() > b.cost(); });
  return items;
}

}  // namespace jaxserve
