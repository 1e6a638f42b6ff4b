// Attention of a ragged batch over paged keys and values, with an online softmax; nothing has the size of the context.
//
// An item is a few tokens of one row and one KV head: up to kQueries queries, which walk their keys chunk by chunk.
//   scores[queries, chunk] = q . k     by dots, as matmul does
//   out[queries, head_dim] += p . v    row by row of v
#include "attention_batch.h"
#include "attention_tiles.h"
#include "dot.h"
#include "parallel.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

// Online softmax of some queries: `out` and `total` are sums of exp(score - top).
template <class W>
struct Work {
  std::vector<typename Dot<W>::X> q;  // [queries, prepared_depth]
  std::vector<float> scores;          // [queries, kChunk]; then weights
  std::vector<float> out;             // [queries, head_dim]
  std::vector<float> top, total;      // [queries]

  void reset(int64_t queries, int64_t head_dim) {
    q.resize(queries * prepared_depth<W>(head_dim));
    scores.resize(queries * kChunk);
    out.assign(queries * head_dim, 0.0f);
    top.assign(queries, kMasked);
    total.assign(queries, 0.0f);
  }
};

// out[r] += sum over positions of p[r, position] * v[position], for `Rows` queries, `Vecs` vectors of head_dim at once.
template <class W, int Rows, int Vecs>
inline void add_values(const float* p, const W* const* v, int64_t count, float* out, int64_t out_stride) {
  Vec sums_of[Rows][Vecs];
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < Vecs; ++i) sums_of[r][i] = load<Vec>(out + r * out_stride + i * kLanes);
  for (int64_t at = 0; at < count; ++at) {
    Vec values[Vecs];
    for (int i = 0; i < Vecs; ++i) values[i] = load_floats(v[at] + i * kLanes);
    for (int r = 0; r < Rows; ++r) {
      const Vec weight = broadcast(p[r * kChunk + at]);
      for (int i = 0; i < Vecs; ++i) sums_of[r][i] = multiply_add(sums_of[r][i], weight, values[i]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < Vecs; ++i) store(out + r * out_stride + i * kLanes, sums_of[r][i]);
}

template <class W, int Rows>
inline void add_values_of(int rows, const float* p, const W* const* v, int64_t count, int64_t head_dim, float* out) {
  if (rows == Rows) {
    constexpr int kVecs = kMaxRows > 2 ? 4 : 2;
    const W* at[kChunk];
    int64_t d = 0;
    auto shifted = [&] {
      for (int64_t i = 0; i < count; ++i) at[i] = v[i] + d;
      return at;
    };
    for (; d + kVecs * kLanes <= head_dim; d += kVecs * kLanes)
      add_values<W, Rows, kVecs>(p, shifted(), count, out + d, head_dim);
    for (; d < head_dim; d += kLanes) add_values<W, Rows, 1>(p, shifted(), count, out + d, head_dim);
  } else if constexpr (Rows > 1) {
    add_values_of<W, Rows - 1>(rows, p, v, count, head_dim, out);
  }
}

// Turns one query's products with a chunk into weights, and rescales what it has so far. Positions from `low` up to
// `high` of the chunk are visible to it.
inline void soften(const Batch& batch, float* scores, int64_t low, int64_t high, float* top, float* total, float* out) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  Vec highest = broadcast(*top);
  for (int at = 0; at < kChunk; at += kLanes) {
    Vec score = load<Vec>(scores + at) * batch.scale;
    if (batch.soft_cap > 0)
      for (int i = 0; i < kLanes; ++i) score[i] = batch.soft_cap * std::tanh(score[i] / batch.soft_cap);
    const IntVec position = lane + at;
    const IntVec visible = (position >= static_cast<int32_t>(low)) & (position < static_cast<int32_t>(high));
    score = visible ? score : broadcast(kMasked);
    store(scores + at, score);
    highest = score > highest ? score : highest;
  }
  const float now = max_of(highest);
  Vec added = {};
  for (int at = 0; at < kChunk; at += kLanes) {
    const Vec score = load<Vec>(scores + at);
    const Vec weight = score > broadcast(kMasked) ? exp_negative(score - now) : Vec{};
    store(scores + at, weight);
    added += weight;
  }
  if (now != *top) {
    const float decay = exp_negative(broadcast(*top - now))[0];
    *total *= decay;
    for (int64_t d = 0; d < batch.head_dim; ++d) out[d] *= decay;
    *top = now;
  }
  *total += sum(added);
}

template <class W>
void attend(const Batch& batch, const Item& item, const float* q, const W* k_pool, const W* v_pool, float* out) {
  static thread_local Work<W> work;
  const int64_t group = batch.group(), depth = batch.head_dim, q_stride = prepared_depth<W>(depth);
  const int64_t queries = item.tokens * group;
  work.reset(queries, depth);
  auto place = [&](int64_t query) {  // of a query's head in q and in out
    return ((item.token + query / group) * batch.q_heads + item.head * group + query % group) * depth;
  };
  for (int64_t i = 0; i < queries; ++i) prepare_row<W>(q + place(i), depth, work.q.data() + i * q_stride);

  const int32_t* table = batch.block_tables + item.row * batch.blocks_per_seq;
  const int64_t end = item.position + item.tokens;
  const int64_t begin = batch.window ? std::max<int64_t>(0, item.position - batch.window + 1) : 0;
  const W *keys[kChunk], *values[kChunk], *next_keys[kChunk], *next_values[kChunk];
  // Where a chunk's keys and values lie; they are asked for a chunk ahead, since blocks lie anywhere.
  auto find = [&](int64_t first, const W** k, const W** v) {
    const int64_t count = std::min<int64_t>(kChunk, end - first);
    int64_t block = first / batch.block_size, offset = first % batch.block_size;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = ((table[block] * batch.block_size + offset) * batch.kv_heads + item.head) * depth;
      k[i] = k_pool + at;
      v[i] = v_pool + at;
      for (int64_t d = 0; d < depth; d += kLine / sizeof(W)) __builtin_prefetch(k[i] + d, 0, 3);
      for (int64_t d = 0; d < depth; d += kLine / sizeof(W)) __builtin_prefetch(v[i] + d, 0, 3);
      if (++offset == batch.block_size) offset = 0, ++block;
    }
  };
  find(begin, keys, values);
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t count = std::min<int64_t>(kChunk, end - first);
    if (first + kChunk < end) find(first + kChunk, next_keys, next_values);
    for (int64_t i = 0; i < queries; i += kMaxRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kMaxRows, queries - i));
      const auto* from = work.q.data() + i * q_stride;
      int64_t c = 0;
      for (; c + kWide <= count; c += kWide)
        dots_of<W, kWide>(rows, from, q_stride, keys + c, depth, work.scores.data() + i * kChunk + c, kChunk);
      for (; c < count; ++c)
        dots_of<W, 1>(rows, from, q_stride, keys + c, depth, work.scores.data() + i * kChunk + c, kChunk);
    }
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t position = item.position + i / group;
      const int64_t low = batch.window ? std::max<int64_t>(0, position - batch.window + 1 - first) : 0;
      soften(batch, work.scores.data() + i * kChunk, low, std::min(count, position + 1 - first), &work.top[i],
             &work.total[i], work.out.data() + i * depth);
    }
    constexpr int kRows = kMaxRows > 2 ? 4 : 2;
    for (int64_t i = 0; i < queries; i += kRows)
      add_values_of<W, kRows>(static_cast<int>(std::min<int64_t>(kRows, queries - i)), work.scores.data() + i * kChunk,
                              values, count, depth, work.out.data() + i * depth);
    std::swap(keys, next_keys);
    std::swap(values, next_values);
  }
  for (int64_t i = 0; i < queries; ++i) {
    float decay = 1.0f, total = work.total[i];
    if (batch.sinks) {
      const float sink = batch.sinks[item.head * group + i % group], top = std::max(work.top[i], sink);
      decay = std::exp(work.top[i] - top);
      total = total * decay + std::exp(sink - top);
    }
    for (int64_t d = 0; d < depth; ++d) out[place(i) + d] = work.out[i * depth + d] * (decay / total);
  }
}

ffi::Error PagedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k_pool, ffi::AnyBuffer v_pool,
                          ffi::Buffer<ffi::S32> query_starts, ffi::Buffer<ffi::S32> kv_lens,
                          ffi::Buffer<ffi::S32> block_tables, ffi::Buffer<ffi::F32> sinks,
                          ffi::ResultBuffer<ffi::F32> out, float scale, float soft_cap, int64_t window) {
  const auto pool_shape = k_pool.dimensions();
  const Batch batch = {
      query_starts.typed_data(),
      kv_lens.typed_data(),
      block_tables.typed_data(),
      static_cast<int64_t>(kv_lens.element_count()),
      block_tables.dimensions()[1],
      pool_shape[1],
      q.dimensions()[1],
      pool_shape[2],
      pool_shape[3],
      scale,
      soft_cap,
      window,
      sinks.element_count() ? sinks.typed_data() : nullptr,
  };
  const std::vector<Item> items = items_of(batch);
  parallel_for(pool, items.size(), [&](int64_t i) {
    if (k_pool.element_type() == ffi::F32) {
      attend(batch, items[i], q.typed_data(), k_pool.typed_data<float>(), v_pool.typed_data<float>(), out->typed_data());
#if JAXSERVE_TILES
    } else if (takes_tiles(batch)) {
      attend_tiles(batch, items[i], q.typed_data(), static_cast<const uint16_t*>(k_pool.untyped_data()),
                   static_cast<const uint16_t*>(v_pool.untyped_data()), out->typed_data());
#endif
    } else {
      attend(batch, items[i], q.typed_data(), static_cast<const uint16_t*>(k_pool.untyped_data()),
             static_cast<const uint16_t*>(v_pool.untyped_data()), out->typed_data());
    }
  });
  const int64_t width = batch.q_heads * batch.head_dim, used = batch.query_starts[batch.rows];
  std::fill(out->typed_data() + used * width, out->typed_data() + q.dimensions()[0] * width, 0.0f);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_paged_attention, PagedAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()    // q [tokens, q_heads, head_dim]
                                  .Arg<ffi::AnyBuffer>()           // k_pool [blocks, block_size, kv_heads, head_dim]
                                  .Arg<ffi::AnyBuffer>()           // v_pool; uint16: bits of bfloat16
                                  .Arg<ffi::Buffer<ffi::S32>>()    // query_starts [rows + 1]
                                  .Arg<ffi::Buffer<ffi::S32>>()    // kv_lens [rows]
                                  .Arg<ffi::Buffer<ffi::S32>>()    // block_tables [rows, blocks_per_seq]
                                  .Arg<ffi::Buffer<ffi::F32>>()    // sinks [q_heads], or [0]
                                  .Ret<ffi::Buffer<ffi::F32>>()    // [tokens, q_heads, head_dim]
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window"));

}  // namespace jaxserve
