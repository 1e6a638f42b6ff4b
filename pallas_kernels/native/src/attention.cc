// Attention of a ragged batch over paged keys and values; nothing has the size of the context.
//
// An item is a few tokens of one row, or one of each of several rows that share their first blocks, and one KV head: up to
// kQueries queries, which walk their keys chunk by chunk.
#include "attention_batch.h"
#include "attention_tiles.h"
#include "attention_vectors.h"
#include "parallel.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

template <class W>
void attend(const Batch& batch, const Item& item, const float* q, const W* k_pool, const W* v_pool, float* out) {
  static thread_local typename Walk<W>::Room room;
  Walk<W>(batch, k_pool, v_pool, room).attend(item, q, out);
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
#if JAXSERVE_TILES
  const bool on_tiles = k_pool.element_type() != ffi::F32 && takes_tiles(batch);
#else
  constexpr bool on_tiles = false;
#endif
  std::vector<Part> parts;
  const std::vector<Item> items = items_of(batch, pool.num_threads(), !on_tiles, parts);
  parallel_for(pool, items.size(), [&](int64_t i) {
    if (k_pool.element_type() == ffi::F32) {
      return attend(batch, items[i], q.typed_data(), k_pool.typed_data<float>(), v_pool.typed_data<float>(),
                    out->typed_data());
    }
    const auto* keys = static_cast<const uint16_t*>(k_pool.untyped_data());
    const auto* values = static_cast<const uint16_t*>(v_pool.untyped_data());
#if JAXSERVE_TILES
    if (on_tiles) return attend_tiles(batch, items[i], q.typed_data(), keys, values, out->typed_data());
#endif
    attend(batch, items[i], q.typed_data(), keys, values, out->typed_data());
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
