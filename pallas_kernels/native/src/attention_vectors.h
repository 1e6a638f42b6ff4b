// Attention by vectors of positions and of a head's values, for any processor, with an online softmax.
//
//   scores[queries, chunk] = q . k     of keys that were turned: [head_dim, chunk]
//   out[queries, head_dim] += p . v    row by row of v
//
// Chunks start at multiples of 64 and sums take their terms in order, so that a query's result depends on nothing but its
// sequence.
#pragma once

#include <type_traits>
#include <vector>

#include "attention_batch.h"
#include "product.h"
#include "transpose.h"

namespace jaxserve {

// How queries are multiplied with keys: by units of one value, in float32.
template <class W>
struct Scores {
  static constexpr int64_t kValues = 1;
  static void prepare(const float* q, int64_t depth, float* to) {
    for (int64_t i = 0; i < depth; ++i) to[i] = std::is_same_v<W, float> ? q[i] : widen(round_to_bf16(q[i]));
  }
  static Vec load_units(const W* k) { return load_floats(k); }
  static Vec add(Vec sum, Vec q, Vec k) { return multiply_add(sum, q, k); }
};
#if defined(__AVX512BF16__)
template <>
struct Scores<uint16_t> {  // by pairs of bfloat16 in the bits of a float
  static constexpr int64_t kValues = 2;
  static void prepare(const float* q, int64_t depth, float* to) {
    round_floats(q, depth, reinterpret_cast<uint16_t*>(to));
  }
  static Vec load_units(const uint16_t* k) { return load<Vec>(k); }
  static Vec add(Vec sum, Vec q, Vec k) { return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)q, (__m512bh)k); }
};
#endif

// Keys or values of a chunk: where each position's lies.
template <class W>
using Places = const W* [kChunk];

// Keys and values of the next chunk are asked for while this one's are used, a few at a time: all at once they would fill
// the queue to memory, and nothing else would go on.
template <class W>
inline void ask_for(const W* from) {
  __builtin_prefetch(from, 0, 2);
}

// Rows become columns: kLanes units of the keys of as many positions, of `width` units; `next` are keys to ask for.
template <class W>
inline void turn(const W* const* keys, const W* const* next, int64_t unit, int64_t width, Vec* columns) {
  constexpr int64_t values = Scores<W>::kValues;
  for (int64_t i = 0; i < kLanes; ++i) {
    const W* const from = keys[i] + unit * values;
    ask_for(next[i] + unit * values);
    if (width >= kLanes) {
      columns[i] = Scores<W>::load_units(from);
    } else {
      W rest[kLanes * values] = {};
      std::memcpy(rest, from, width * values * sizeof(W));
      columns[i] = Scores<W>::load_units(rest);
    }
  }
  transpose(columns);
}

// turned [units, kChunk] of the keys of `count` positions; what stands behind these means nothing.
template <class W>
inline void turn_keys(const W* const* keys, const W* const* next, int64_t count, int64_t units, float* turned) {
  for (int64_t at = 0; at < count; at += kLanes) {
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      Vec columns[kLanes];
      turn(keys + at, next + at, unit, units - unit, columns);
      for (int64_t i = 0; i < std::min<int64_t>(kLanes, units - unit); ++i)
        store(turned + (unit + i) * kChunk + at, columns[i]);
    }
  }
}

// scores [Rows, kChunk] of few queries, which multiply keys as they are turned.
template <class W, int Rows>
inline void score_few(const float* q, const W* const* keys, const W* const* next, int64_t count, int64_t units,
                      float* scores) {
  for (int64_t at = 0; at < count; at += kLanes) {
    Vec sums[Rows] = {};
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      Vec columns[kLanes];
      turn(keys + at, next + at, unit, units - unit, columns);
      auto add = [&](int64_t i) {
        for (int r = 0; r < Rows; ++r)
          sums[r] = Scores<W>::add(sums[r], broadcast(q[r * units + unit + i]), columns[i]);
      };
      if (units - unit >= kLanes) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) add(i);
      } else {
        for (int64_t i = 0; i < units - unit; ++i) add(i);
      }
    }
    for (int r = 0; r < Rows; ++r) store(scores + r * kChunk + at, sums[r]);
  }
}

// sums [Rows, Vecs] += x[r, i] * vectors(i, v), for i in [from, to), as D::add does.
template <class D, int Rows, int Vecs, class Vectors>
inline void accumulate(const float* x, int64_t x_stride, int64_t from, int64_t to, const Vectors& vectors, bool begins,
                       float* sums_of, int64_t sums_stride) {
  Vec sums[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) sums[r][v] = begins ? Vec{} : load<Vec>(sums_of + r * sums_stride + v * kLanes);
  for (int64_t i = from; i < to; ++i) {
    Vec values[Vecs];
    for (int v = 0; v < Vecs; ++v) values[v] = vectors(i, v);
    for (int r = 0; r < Rows; ++r) {
      const Vec value = broadcast(x[r * x_stride + i]);
      for (int v = 0; v < Vecs; ++v) sums[r][v] = D::add(sums[r][v], value, values[v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vecs; ++v) store(sums_of + r * sums_stride + v * kLanes, sums[r][v]);
}

// body(number of rows as a constant), for up to Rows rows.
template <int Rows, class Body>
inline void with_rows(int64_t rows, const Body& body) {
  if (rows >= Rows) {
    body(std::integral_constant<int, Rows>{});
  } else if constexpr (Rows > 1) {
    with_rows<Rows - 1>(rows, body);
  }
}

// Floats from a cache line's beginning on; grows, and stays the thread's.
class AlignedFloats {
 public:
  float* data() { return lines_.data()->values; }
  void resize(int64_t count) { lines_.resize((count + kLineFloats - 1) / kLineFloats); }
  void clear(int64_t count) {
    resize(count);
    std::fill(data(), data() + count, 0.0f);
  }

 private:
  static constexpr int64_t kLineFloats = kLine / sizeof(float);
  struct alignas(kLine) Line {
    float values[kLineFloats];
  };
  std::vector<Line> lines_;
};

// One query of an item.
struct Query {
  int64_t place;     // of its head in q and in out
  int64_t position;  // in its sequence
  float top, total;  // of its softmax so far: the sum of exp(score - top)
};

// Turns a query's products with a chunk into weights, and rescales what it has so far. Positions from `low` up to `high`
// of the chunk are visible to it.
inline void soften(const Batch& batch, int64_t low, int64_t high, float* scores, Query& query, float* out) {
  const bool sees_all = low <= 0 && high >= kChunk;
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Vec highest = broadcast(query.top);
  Vec score[kChunk / kLanes];
  for (int i = 0; i < kChunk / kLanes; ++i) {
    score[i] = load<Vec>(scores + i * kLanes) * batch.scale;
    if (batch.soft_cap > 0)
      for (int j = 0; j < kLanes; ++j) score[i][j] = batch.soft_cap * std::tanh(score[i][j] / batch.soft_cap);
    if (!sees_all) {
      const IntVec position = lane + i * kLanes;
      const IntVec visible = (position >= static_cast<int32_t>(low)) & (position < static_cast<int32_t>(high));
      score[i] = visible ? score[i] : broadcast(kMasked);
    }
    highest = score[i] > highest ? score[i] : highest;
  }
  const float now = max_of(highest);
  Vec added = {};
  for (int i = 0; i < kChunk / kLanes; ++i) {
    Vec weight = exp_negative(score[i] - now);
    if (!sees_all) weight = score[i] > broadcast(kMasked) ? weight : Vec{};
    store(scores + i * kLanes, weight);
    added += weight;
  }
  if (now != query.top) {
    const float decay = exp_negative(broadcast(query.top - now))[0];
    query.total *= decay;
    for (int64_t d = 0; d < batch.head_dim; d += kLanes) store(out + d, load<Vec>(out + d) * decay);
    query.top = now;
  }
  query.total += sum(added);
}

// An item's walk over its keys and values.
template <class W>
class Walk {
 public:
  struct Room {  // stays the thread's
    std::vector<Query> queries;
    AlignedFloats q;       // [queries, units]
    AlignedFloats turned;  // [units, kChunk]
    AlignedFloats scores;  // [queries, kChunk]; then weights
    AlignedFloats out;     // [queries, head_dim], sums of exp(score - top) * v
  };

  Walk(const Batch& batch, const W* k_pool, const W* v_pool, Room& room)
      : batch_(batch), k_pool_(k_pool), v_pool_(v_pool), room_(room) {}

  void attend(const Item& item, const float* q, float* out) {
    const int64_t group = batch_.group(), depth = batch_.head_dim;
    head_ = item.head;
    room_.queries.clear();
    for (int64_t part = 0; part < item.num_parts; ++part) {
      const Part& own = item.parts[part];
      for (int64_t i = 0; i < own.tokens * group; ++i) {
        const int64_t token = i / group, head = item.head * group + i % group;
        room_.queries.push_back({((own.token + token) * batch_.q_heads + head) * depth, own.position + token, kMasked, 0});
      }
    }
    const int64_t count = room_.queries.size();
    room_.q.resize(count * units());
    room_.turned.resize(units() * kChunk);
    room_.scores.resize(count * kChunk);
    room_.out.clear(count * depth);
    for (int64_t i = 0; i < count; ++i) Scores<W>::prepare(q + room_.queries[i].place, depth, room_.q.data() + i * units());

    if (item.shared) pass(0, count, batch_.table(item.parts->row), 0, item.shared);
    for (int64_t part = 0, first = 0; part < item.num_parts; ++part) {
      const Part& own = item.parts[part];
      const int64_t last = first + own.tokens * group;
      pass(first, last, batch_.table(own.row), item.shared, own.end());
      first = last;
    }

    for (int64_t i = 0; i < count; ++i) {
      const Query& query = room_.queries[i];
      float decay = 1.0f, total = query.total;
      if (batch_.sinks) {
        const float sink = batch_.sinks[head_ * group + i % group], top = std::max(query.top, sink);
        decay = std::exp(query.top - top);
        total = total * decay + std::exp(sink - top);
      }
      for (int64_t d = 0; d < depth; d += kLanes)
        store(out + query.place + d, load<Vec>(room_.out.data() + i * depth + d) * (decay / total));
    }
  }

 private:
  int64_t units() const { return batch_.head_dim / Scores<W>::kValues; }

  // The queries [first, last) over the positions [begin, end) of one sequence. They are in order of their positions, or
  // each sees them all.
  void pass(int64_t first, int64_t last, const int32_t* table, int64_t begin, int64_t end) {
    const int64_t seen = batch_.window ? std::max<int64_t>(0, room_.queries[first].position - batch_.window + 1) : 0;
    begin = std::max(begin, seen / kChunk * kChunk);
    if (begin >= end) return;  // a decode that ends where what it shares does
    Places<W> keys_of[2], values_of[2];  // this chunk's and the next one's
    find(table, begin, end, keys_of[0], values_of[0]);
    begin_fetching(keys_of[0], values_of[0], end - begin);
    int64_t now = 0;
    for (int64_t at = begin; at < end; at += kChunk) {
      const int64_t count = std::min<int64_t>(kChunk, end - at);
      const int64_t next = at + kChunk < end ? 1 - now : now;
      if (next != now) find(table, at + kChunk, end, keys_of[next], values_of[next]);
      while (room_.queries[first].position < at) ++first;
      score(first, last, keys_of[now], keys_of[next], count);
      for (int64_t i = first; i < last; ++i) {
        const int64_t position = room_.queries[i].position;
        const int64_t low = batch_.window ? std::max<int64_t>(0, position - batch_.window + 1 - at) : 0;
        soften(batch_, low, std::min(count, position + 1 - at), room_.scores.data() + i * kChunk, room_.queries[i],
               room_.out.data() + i * batch_.head_dim);
      }
      add_values(first, last, values_of[now], values_of[next], std::max<int64_t>(0, seen - at), count);
      now = next;
    }
  }

  // Where a chunk's keys and values lie, from position `at` on; places behind `end` repeat the last one.
  void find(const int32_t* table, int64_t at, int64_t end, const W** keys, const W** values) const {
    const int64_t stride = batch_.kv_heads * batch_.head_dim, count = std::min<int64_t>(kChunk, end - at);
    int64_t block = at / batch_.block_size, offset = at % batch_.block_size, place = 0;
    for (int64_t i = 0; i < count; ++i, place += stride) {
      if (i == 0 || offset == batch_.block_size) {
        if (i) offset = 0, ++block;
        place = (table[block] * batch_.block_size + offset) * stride + head_ * batch_.head_dim;
      }
      ++offset;
      keys[i] = k_pool_ + place;
      values[i] = v_pool_ + place;
    }
    std::fill(keys + count, keys + kChunk, keys[count - 1]);
    std::fill(values + count, values + kChunk, values[count - 1]);
  }

  // Asks memory for the first chunk.
  void begin_fetching(const W* const* keys, const W* const* values, int64_t count) const {
    for (int64_t i = 0; i < std::min<int64_t>(kChunk, count); ++i) {
      for (int64_t d = 0; d < batch_.head_dim; d += kLine / sizeof(W)) {
        ask_for(keys[i] + d);
        ask_for(values[i] + d);
      }
    }
  }

  void score(int64_t first, int64_t last, const W* const* keys, const W* const* next, int64_t count) {
    if (last - first <= kMaxRows) {
      with_rows<kMaxRows>(last - first, [&](auto rows) {
        score_few<W, rows()>(room_.q.data() + first * units(), keys, next, count, units(),
                             room_.scores.data() + first * kChunk);
      });
      return;
    }
    turn_keys(keys, next, count, units(), room_.turned.data());
    for (int64_t i = first; i < last; i += kMaxRows) {
      with_rows<kMaxRows>(last - i, [&](auto rows) {
        auto some = [&](auto vecs, int64_t at) {
          const float* const turned = room_.turned.data() + at;
          const auto vectors = [=](int64_t unit, int v) { return load<Vec>(turned + unit * kChunk + v * kLanes); };
          accumulate<Scores<W>, rows(), vecs()>(room_.q.data() + i * units(), units(), 0, units(), vectors, true,
                                                room_.scores.data() + i * kChunk + at, kChunk);
        };
        int64_t at = 0;
        for (; at + kWide * kLanes / 2 < count; at += kWide * kLanes) some(std::integral_constant<int, kWide>{}, at);
        for (; at < count; at += kLanes) some(std::integral_constant<int, 1>{}, at);
      });
    }
  }

  void add_values(int64_t first, int64_t last, const W* const* values, const W* const* next, int64_t from,
                  int64_t count) {
    const int64_t depth = batch_.head_dim;
    for (int64_t i = first; i < last; i += kMaxRows) {
      const bool asks = i == first;  // for the next chunk's
      with_rows<kMaxRows>(last - i, [&](auto rows) {
        auto some = [&](auto vecs, int64_t d) {
          const auto vectors = [=](int64_t at, int v) {
            if (asks) ask_for(next[at] + d + v * kLanes);
            return load_floats(values[at] + d + v * kLanes);
          };
          accumulate<Scores<float>, rows(), vecs()>(room_.scores.data() + i * kChunk, kChunk, from, count, vectors,
                                                    false, room_.out.data() + i * depth + d, depth);
        };
        int64_t d = 0;
        for (; d + kWide * kLanes <= depth; d += kWide * kLanes) some(std::integral_constant<int, kWide>{}, d);
        for (; d < depth; d += kLanes) some(std::integral_constant<int, 1>{}, d);
      });
    }
  }

  const Batch& batch_;
  const W *const k_pool_, *const v_pool_;
  Room& room_;
  int64_t head_ = 0;
};

}  // namespace jaxserve
