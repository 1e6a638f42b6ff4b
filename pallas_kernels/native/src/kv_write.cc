// Rotates queries and keys, and writes keys and values to their slots of the pools, in place.
#include <algorithm>

#include "parallel.h"
#include "vector.h"

namespace jaxserve {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTokens = 8;  // of an item

template <class T>
inline void rotate(const float* from, const float* cos, const float* sin, int64_t half, T* to) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = from[i], second = from[half + i];
    store_as(to + i, first * cos[i] - second * sin[i]);
    store_as(to + half + i, second * cos[i] + first * sin[i]);
  }
}

template <class T>
void rotate_and_write(ffi::ThreadPool& pool, const ffi::Buffer<ffi::F32>& qkv, const float* cos, const float* sin,
                      T* k_pool, T* v_pool, int64_t num_slots, const int32_t* slots, float* q) {
  const auto shape = qkv.dimensions();
  const int64_t tokens = shape[0], heads = shape[1], parts = shape[2], depth = shape[3], half = depth / 2;
  parallel_for(pool, (tokens + kTokens - 1) / kTokens, [&](int64_t item) {
    for (int64_t t = item * kTokens; t < std::min(tokens, (item + 1) * kTokens); ++t) {
      const bool writes = slots[t] >= 0 && slots[t] < num_slots;
      for (int64_t h = 0; h < heads; ++h) {
        const float* from = qkv.typed_data() + (t * heads + h) * parts * depth;
        float* to = q + (t * heads + h) * (parts - 2) * depth;
        for (int64_t part = 0; part < parts - 2; ++part)
          rotate(from + part * depth, cos + t * half, sin + t * half, half, to + part * depth);
        if (!writes) continue;
        const int64_t at = (slots[t] * heads + h) * depth;
        rotate(from + (parts - 2) * depth, cos + t * half, sin + t * half, half, k_pool + at);
        for (int64_t i = 0; i < depth; ++i) store_as(v_pool + at + i, from[(parts - 1) * depth + i]);
      }
    }
  });
}

ffi::Error RotateAndWrite(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> qkv, ffi::Buffer<ffi::F32> cos,
                          ffi::Buffer<ffi::F32> sin, ffi::AnyBuffer k_in, ffi::AnyBuffer v_in,
                          ffi::Buffer<ffi::S32> slots, ffi::ResultBuffer<ffi::F32> q, ffi::Result<ffi::AnyBuffer> k_out,
                          ffi::Result<ffi::AnyBuffer> v_out) {
  if (k_in.untyped_data() != k_out->untyped_data() || v_in.untyped_data() != v_out->untyped_data())
    return ffi::Error::Internal("rotate_and_write: a pool was copied, where it should be written in place");
  const auto shape = k_out->dimensions();
  const int64_t num_slots = shape[0] * shape[1];
  if (k_out->element_type() == ffi::F32) {
    rotate_and_write(pool, qkv, cos.typed_data(), sin.typed_data(), k_out->typed_data<float>(),
                     v_out->typed_data<float>(), num_slots, slots.typed_data(), q->typed_data());
  } else {
    rotate_and_write(pool, qkv, cos.typed_data(), sin.typed_data(), static_cast<uint16_t*>(k_out->untyped_data()),
                     static_cast<uint16_t*>(v_out->untyped_data()), num_slots, slots.typed_data(), q->typed_data());
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_rotate_and_write, RotateAndWrite,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()    // qkv [tokens, kv_heads, group + 2, head_dim]
                                  .Arg<ffi::Buffer<ffi::F32>>()    // cos [tokens, head_dim / 2]
                                  .Arg<ffi::Buffer<ffi::F32>>()    // sin
                                  .Arg<ffi::AnyBuffer>()           // k_pool, v_pool: aliased to the results
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()    // slots [tokens]
                                  .Ret<ffi::Buffer<ffi::F32>>()    // q [tokens, kv_heads, group, head_dim]
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace jaxserve
