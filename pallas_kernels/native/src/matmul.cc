// Products of a step's tokens with a checkpoint's weights, [out, in], with what stands before and behind them in a model.
#include "matmul_dots.h"
#include "matmul_panels.h"
#include "matmul_tiles.h"

namespace jaxserve {

// Whether products of bfloat16 weights run on tiles, on this machine as it is now.
extern "C" int jaxserve_has_tiles() {
#if JAXSERVE_TILES
  return tiles_allowed();
#else
  return 0;
#endif
}

// How many rows of weights of so many bytes a value make a panel; 0: they are not to lie in panels.
extern "C" int jaxserve_panel_columns(int bytes) {
#if JAXSERVE_PANELS
  if (bytes == 4 || (bytes == 2 && !jaxserve_has_tiles())) return kPanelColumns;
#endif
  return 0;
}

namespace {

namespace ffi = xla::ffi;

template <class T, class W, class Y>
void multiply(ffi::ThreadPool& pool, const Product& product, const void* x_data, const void* w_data, void* y_data,
              bool panels) {
  const T* x = static_cast<const T*>(x_data);
  const W* w = static_cast<const W*>(w_data);
  Y* y = static_cast<Y*>(y_data);
#if JAXSERVE_PANELS
  if (panels) return multiply_panels(pool, product, x, w, y);
#endif
#if JAXSERVE_TILES
  if constexpr (!std::is_same_v<W, float>) {
    if (tiles_allowed()) return multiply_tiles(pool, product, x, w, y);
  }
#endif
  multiply_dots(pool, product, x, w, y);
}

ffi::Error Matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::AnyBuffer norm,
                  ffi::Buffer<ffi::F32> residual, ffi::BufferR0<ffi::S32> num_rows, ffi::Result<ffi::AnyBuffer> y,
                  float epsilon, bool panels) {
  const bool gated = w.dimensions().size() == 3;
  std::vector<float> wide_norm;
  const float* norm_values = nullptr;
  if (norm.element_count() && norm.element_type() == ffi::F32) {
    norm_values = static_cast<const float*>(norm.untyped_data());
  } else if (norm.element_count()) {
    const auto* from = static_cast<const uint16_t*>(norm.untyped_data());
    for (size_t i = 0; i < norm.element_count(); ++i) wide_norm.push_back(widen(from[i]));
    norm_values = wide_norm.data();
  }
  const int64_t all_rows = x.dimensions()[0];
  const Product product = {
      std::clamp<int64_t>(num_rows.typed_data()[0], 0, all_rows),
      x.dimensions()[1],
      y->dimensions()[1],
      norm_values,
      epsilon,
      residual.element_count() ? residual.typed_data() : nullptr,
      gated,
  };
  const bool wide_x = x.element_type() == ffi::F32, wide_y = y->element_type() == ffi::F32;
  const void *const from = x.untyped_data(), *const weights = w.untyped_data();
  void* const to = y->untyped_data();
  if (product.residual && product.residual != to)
    return ffi::Error::Internal("matmul: the residual stream was copied, where it should be added to in place");
  if (!product.residual) {  // there, rows of padding stay what they are
    const int64_t row_bytes = product.columns * (wide_y ? 4 : 2);
    std::memset(static_cast<char*>(to) + product.rows * row_bytes, 0, (all_rows - product.rows) * row_bytes);
  }
  if (!product.rows) return ffi::Error::Success();
  if (product.norm && !wide_x) return ffi::Error::InvalidArgument("matmul: rows to be normalised must be float32");
  if (panels && !jaxserve_panel_columns(w.element_type() == ffi::F32 ? 4 : 2))
    return ffi::Error::InvalidArgument("matmul: this processor does not take these weights in panels");
  if (w.element_type() == ffi::F32) {
    if (!wide_x || !wide_y) return ffi::Error::InvalidArgument("matmul: float32 weights want and give float32");
    multiply<float, float, float>(pool, product, from, weights, to, panels);
  } else if (wide_x && wide_y) {
    multiply<float, uint16_t, float>(pool, product, from, weights, to, panels);
  } else if (wide_x) {
    multiply<float, uint16_t, uint16_t>(pool, product, from, weights, to, panels);
  } else if (wide_y) {
    multiply<uint16_t, uint16_t, float>(pool, product, from, weights, to, panels);
  } else {
    multiply<uint16_t, uint16_t, uint16_t>(pool, product, from, weights, to, panels);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxserve_matmul, Matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()           // x [rows, depth], float32 or bfloat16
                                  .Arg<ffi::AnyBuffer>()           // w [columns, depth], or gated [2, columns, depth]
                                  .Arg<ffi::AnyBuffer>()           // norm [depth], float32 or bfloat16, or [0]
                                  .Arg<ffi::Buffer<ffi::F32>>()    // residual [rows, columns], or [0]
                                  .Arg<ffi::BufferR0<ffi::S32>>()  // rows, behind which x is padding
                                  .Ret<ffi::AnyBuffer>()           // y [rows, columns]
                                  .Attr<float>("epsilon")
                                  .Attr<bool>("panels"));          // how w lies: see matmul_panels.h

}  // namespace jaxserve
