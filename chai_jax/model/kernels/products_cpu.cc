// Products of a few rows with a matrix, for CPUs.
//
// They are bound by memory: each weight is read once, from several places of the matrix at a time, since one stream does
// not fill a core's queue of loads. Compiled and registered by cpu.py; called by products_cpu.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "checks.h"
#include "parallel.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kDeep = 8;  // rows of the matrix read at once
constexpr int kWide = 2;  // vectors of its columns read at once
constexpr int64_t kPanel = 1536;  // columns whose sums stay in the nearest caches
constexpr int64_t kTerms = 16, kColumns = 32;  // of which the matrix has a multiple: as in products_cpu.py
static_assert(kTerms % kLanes == 0 && kTerms % kDeep == 0 && kColumns % (kWide * kLanes) == 0 &&
              kPanel % kColumns == 0);

// out [M, N] = rows [M, K] matrix [K, N], of columns begin ... end - 1.
template <int M, typename T>
void TimesMatrix(const float* rows, const T* matrix, float* out, int64_t K, int64_t N, int64_t begin, int64_t end) {
  // Copies side by side: rows of `out` and of `rows` may lie a multiple of 4,096 bytes apart, and push each other out of
  // the first cache.
  alignas(64) float sums[M][kPanel + kLanes];
  float terms[kDeep][M];
  for (int64_t panel = begin; panel < end; panel += kPanel) {
    const int64_t width = std::min(kPanel, end - panel);
    std::memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < K; k += kDeep) {
      for (int m = 0; m < M; ++m)
        for (int d = 0; d < kDeep; ++d) terms[d][m] = rows[m * K + k + d];
      const T* weights = matrix + k * N + panel;
      for (int64_t n = 0; n < width; n += kWide * kLanes) {
        Vec sum[M][kWide];
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < kWide; ++i) sum[m][i] = Load(sums[m] + n + i * kLanes);
#pragma GCC unroll 8
        for (int d = 0; d < kDeep; ++d) {
          Vec read[kWide];
          for (int i = 0; i < kWide; ++i) {
            const T* from = weights + d * N + n + i * kLanes;
            __builtin_prefetch(from + kDeep * N);
            read[i] = Load(from);
          }
          for (int m = 0; m < M; ++m)
            for (int i = 0; i < kWide; ++i) sum[m][i] += terms[d][m] * read[i];
        }
        for (int m = 0; m < M; ++m)
          for (int i = 0; i < kWide; ++i) Store(sums[m] + n + i * kLanes, sum[m][i]);
      }
    }
    for (int m = 0; m < M; ++m) std::copy_n(sums[m], width, out + m * N + panel);
  }
}

// out [M, N] = rows [M, K] times matrix [N, K] turned, of its rows begin ... end - 1, two at a time.
template <int M, typename T>
void TimesTurned(const float* rows, const T* matrix, float* out, int64_t K, int64_t N, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += 2) {
    const T *one = matrix + n * K, *two = n + 1 < end ? one + K : one;
    Vec first[M] = {}, second[M] = {};
    for (int64_t k = 0; k < K; k += kLanes) {
      __builtin_prefetch(one + 2 * K + k);
      __builtin_prefetch(two + 2 * K + k);
      Vec read_one = Load(one + k), read_two = Load(two + k);
      for (int m = 0; m < M; ++m) {
        Vec row = Load(rows + m * K + k);
        first[m] += read_one * row;
        second[m] += read_two * row;
      }
    }
    for (int m = 0; m < M; ++m) {
      out[m * N + n] = Sum(first[m]);
      if (n + 1 < end) out[m * N + n + 1] = Sum(second[m]);
    }
  }
}

template <int M, typename T>
void Times(bool turned, const float* rows, const T* matrix, float* out, int64_t K, int64_t N, int64_t begin,
           int64_t end) {
  (turned ? TimesTurned<M, T> : TimesMatrix<M, T>)(rows, matrix, out, K, N, begin, end);
}

template <typename T>
ffi::Error Multiply(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> rows, const void* matrix,
                    ffi::ResultBufferR2<ffi::F32> out, bool turned) {
  constexpr void (*products[])(bool, const float*, const T*, float*, int64_t, int64_t, int64_t, int64_t) = {
      Times<1, T>, Times<2, T>, Times<3, T>, Times<4, T>, Times<5, T>, Times<6, T>, Times<7, T>, Times<8, T>};
  const int64_t M = rows.dimensions()[0], K = rows.dimensions()[1], N = out->dimensions()[1];
  if (M < 1 || M > static_cast<int64_t>(std::size(products))) return Wrong("expected 1 to 8 rows");
  const auto product = products[M - 1];
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), parts = threads * (turned ? 8 : 1);
  const int64_t each = (N + parts * kColumns - 1) / (parts * kColumns) * kColumns;
  return AllDone(InParallel(pool, (N + each - 1) / each, K * N * static_cast<int64_t>(sizeof(T)), [&](int64_t part) {
    product(turned, rows.typed_data(), static_cast<const T*>(matrix), out->typed_data(), K, N, part * each,
            std::min(N, (part + 1) * each));
  }));
}

ffi::Error FewRows(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> rows, ffi::AnyBuffer matrix,
                   ffi::ResultBufferR2<ffi::F32> out, bool turned) {
  const int64_t M = rows.dimensions()[0], K = rows.dimensions()[1], N = out->dimensions()[1];
  if (!Is(out->dimensions(), {M, N}) || !Is(matrix.dimensions(), {turned ? N : K, turned ? K : N}))
    return Wrong("expected rows [M, K], a matrix [K, N], or [N, K] where it is turned, and out [M, N]");
  if (N < 1 || K % kTerms || (!turned && N % kColumns))
    return Wrong("expected K a multiple of 16, and N one of 32 or a matrix that is turned");
  switch (matrix.element_type()) {
    case ffi::F32: return Multiply<float>(pool, rows, matrix.untyped_data(), out, turned);
    case ffi::BF16: return Multiply<BFloat16>(pool, rows, matrix.untyped_data(), out, turned);
    case ffi::S8: return Multiply<int8_t>(pool, rows, matrix.untyped_data(), out, turned);
    default: return Wrong("expected a matrix of float32, bfloat16 or int8");
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chai_jax_few_rows, FewRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<bool>("turned"));
