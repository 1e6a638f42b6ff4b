// Tiles of Intel's AMX: 16 rows of 64 bytes, multiplied whole. Products of bfloat16 with sums in float32.
//
//   C [16 rows, 16 columns] += A [16 rows, 32 deep] . B [32 deep, 16 columns]
//
// A's rows lie as they are, any stride apart; B is packed: pairs of two depths, 16 columns side by side, 1 KiB a tile.
// A sum is taken in one order whatever stands beside it, and the same with A and B exchanged.
#pragma once

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define JAXSERVE_TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <vector>

#include "transpose.h"

namespace jaxserve {

constexpr int64_t kTile = 16;               // rows of A, columns of B, rows and columns of C
constexpr int64_t kDeep = 32;               // bfloat16 values of a row of A
constexpr int64_t kTileValues = kTile * kDeep;

// Whether the system lets this process use tiles: it must be asked once, and may refuse.
inline bool tiles_allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  static const bool allowed = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
}

// Tiles are this thread's while it lives: all eight of full size. Other code on the thread may leave its own behind.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Shape {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static const Shape shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Room for bfloat16 values that starts with a cache line; grows, and stays the thread's.
class Room {
 public:
  uint16_t* of(int64_t values) {
    values_.resize(values + kDeep);
    return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(values_.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<uint16_t> values_;
};

// The compilers' own intrinsics do not all say that they read memory, so that stores before them may be lost.
#define TILE_ZERO(c) asm volatile("tilezero %%tmm" #c ::)
#define TILE_LOAD(t, p, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_STORE(t, p, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(static_cast<int64_t>(stride)) : "memory")
#define TILE_MULTIPLY(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::)

// c [32, 32] = a [32, depth] . b [depth, 32] for `steps` of kDeep; b holds two tiles a step. Strides in values. Asks for
// `lines` cache lines a step from `ahead` on.
inline void multiply_2x2(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t steps, float* c,
                         int64_t c_stride, const uint16_t* ahead = nullptr, int64_t lines = 0) {
  const int64_t row = a_stride * sizeof(uint16_t), to = c_stride * sizeof(float);
  const uint16_t* a_low = a + kTile * a_stride;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t step = 0; step < steps; ++step) {
    TILE_LOAD(6, b, 64);
    TILE_LOAD(4, a, row);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(7, b + kTileValues, 64);
    TILE_MULTIPLY(1, 4, 7);
    TILE_LOAD(5, a_low, row);
    TILE_MULTIPLY(2, 5, 6);
    TILE_MULTIPLY(3, 5, 7);
    a += kDeep;
    a_low += kDeep;
    b += 2 * kTileValues;
    for (int64_t i = 0; i < lines; ++i, ahead += kDeep) __builtin_prefetch(ahead, 0, 2);
  }
  TILE_STORE(0, c, to);
  TILE_STORE(1, c + kTile, to);
  TILE_STORE(2, c + kTile * c_stride, to);
  TILE_STORE(3, c + kTile * c_stride + kTile, to);
}

// c [64, 16] = a [64, depth] . b [depth, 16]; b holds one tile a step.
inline void multiply_tall(const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t steps, float* c,
                          int64_t c_stride, const uint16_t* ahead, int64_t lines) {
  const int64_t row = a_stride * sizeof(uint16_t), to = c_stride * sizeof(float), next = kTile * a_stride;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t step = 0; step < steps; ++step) {
    TILE_LOAD(6, b, 64);
    TILE_LOAD(4, a, row);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(5, a + next, row);
    TILE_MULTIPLY(1, 5, 6);
    TILE_LOAD(4, a + 2 * next, row);
    TILE_MULTIPLY(2, 4, 6);
    TILE_LOAD(5, a + 3 * next, row);
    TILE_MULTIPLY(3, 5, 6);
    a += kDeep;
    b += kTileValues;
    for (int64_t i = 0; i < lines; ++i, ahead += kDeep) __builtin_prefetch(ahead, 0, 2);
  }
  TILE_STORE(0, c, to);
  TILE_STORE(1, c + kTile * c_stride, to);
  TILE_STORE(2, c + 2 * kTile * c_stride, to);
  TILE_STORE(3, c + 3 * kTile * c_stride, to);
}

// c [16 * tiles, 16] = the rows at a[0], a[1], .. [16, depth] each . b [depth, 16], up to four; c's rows are 16 long.
inline void multiply_chunk(const uint16_t* const* a, int64_t tiles, int64_t a_stride, const uint16_t* b, int64_t steps,
                           float* c) {
  const int64_t row = a_stride * sizeof(uint16_t);
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  for (int64_t step = 0; step < steps; ++step) {
    TILE_LOAD(6, b + step * kTileValues, 64);
    TILE_LOAD(4, a[0] + step * kDeep, row);
    TILE_MULTIPLY(0, 4, 6);
    if (tiles > 1) {
      TILE_LOAD(5, a[1] + step * kDeep, row);
      TILE_MULTIPLY(1, 5, 6);
    }
    if (tiles > 2) {
      TILE_LOAD(4, a[2] + step * kDeep, row);
      TILE_MULTIPLY(2, 4, 6);
    }
    if (tiles > 3) {
      TILE_LOAD(5, a[3] + step * kDeep, row);
      TILE_MULTIPLY(3, 5, 6);
    }
  }
  TILE_STORE(0, c, 64);
  TILE_STORE(1, c + kTile * kTile, 64);
  TILE_STORE(2, c + 2 * kTile * kTile, 64);
  TILE_STORE(3, c + 3 * kTile * kTile, 64);
}

// c [16, 32] += a [16, depth] . b [depth, 32]: a's tiles one after the other, b's two side by side, b_step values apart.
inline void add_product(const uint16_t* a, const uint16_t* b, int64_t b_step, int64_t steps, float* c,
                        int64_t c_stride) {
  const int64_t to = c_stride * sizeof(float);
  TILE_LOAD(0, c, to);
  TILE_LOAD(1, c + kTile, to);
  for (int64_t step = 0; step < steps; ++step) {
    TILE_LOAD(4, a + step * kTileValues, 64);
    TILE_LOAD(6, b + step * b_step, 64);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(7, b + step * b_step + kTileValues, 64);
    TILE_MULTIPLY(1, 4, 7);
  }
  TILE_STORE(0, c, to);
  TILE_STORE(1, c + kTile, to);
}

#undef TILE_ZERO
#undef TILE_LOAD
#undef TILE_STORE
#undef TILE_MULTIPLY

// Packs `count` (up to 16) rows of 32 values from `rows` as a tile of B: each row becomes a column, those missing zeros.
inline void pack_tile(const uint16_t* rows, int64_t stride, int64_t count, uint16_t* tile) {
  __m512i r[kTile];
  for (int64_t i = 0; i < kTile; ++i) r[i] = i < count ? load<__m512i>(rows + i * stride) : _mm512_setzero_si512();
  transpose(r);
  for (int64_t i = 0; i < kTile; ++i) store(tile + i * kDeep, r[i]);
}

}  // namespace jaxserve
#endif
