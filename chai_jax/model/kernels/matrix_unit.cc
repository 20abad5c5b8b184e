// Products of many rows with a matrix on CPUs that have a matrix unit for bfloat16 (Intel's AMX): out = rows matrix.
//
// A float32 is the sum of three bfloat16, the first its rounding and each next one that of what is left. Of the nine
// products of such parts the six that matter at float32's precision are summed in float32 (Henry, Tang & Heinecke 2019,
// arXiv 1904.06376; XLA's BF16_BF16_F32_X6 means the same). Weights that were float16, as those of every published OPT,
// are the sum of two: five products; a bfloat16 or int8 is one part: three. Infinite numbers of three parts make NaN, and
// the few NaN whose bits are nearly all set count as 0.
//
// Rows are packed once, in panels of 32 by terms; a thread packs the columns that it multiplies, and keeps them in its
// second cache while all panels of rows pass by (Goto & van de Geijn 2008, ACM TOMS 34:12). Compiled by cpu.py, called
// by products_cpu.py.
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

// Clang before 16 spells it without the underscore.
#if (defined(__AMX_BF16__) || defined(__AMXBF16__)) && defined(__AVX512BW__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTile = 16;  // rows of a tile, and columns of float32
constexpr int64_t kSide = 2 * kTile;  // rows and columns of a panel, and terms of a step
constexpr int64_t kTileBytes = 1024, kPairBytes = 2 * kTileBytes;
constexpr int64_t kColumns = 384, kTerms = 384;  // at most, of a block that stays in the second cache: 0.9 MB

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr Config kTiles;  // all eight, of 16 x 64 bytes; constant, since GCC's instruction names 8 bytes of it as read

struct Tiles {  // while it lives
  Tiles() { _tile_loadconfig(&kTiles); }
  ~Tiles() { _tile_release(); }
};

// Rounds x to a bfloat16 in the upper half of each entry, and leaves the rest in x.
inline __m512i Part(__m512& x) {
  __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
  rounded = _mm512_and_si512(rounded, _mm512_set1_epi32(0xFFFF0000));
  x = _mm512_sub_ps(x, _mm512_castsi512_ps(rounded));
  return rounded;
}

inline __m512i Widened(const uint16_t* from) {  // bfloat16 in the upper halves
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_slli_epi32(wide, 16);
}
inline __m512 Load(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 Load(const uint16_t* from) { return _mm512_castsi512_ps(Widened(from)); }
inline __m512 Load(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}

template <typename T>
constexpr int kParts = sizeof(T) == 4 ? 3 : 1;

// A panel's rows (32, or `count` and zeros) of all K terms: by step of 32 terms, part, and half of the panel a tile of
// 16 rows of 32 terms.
template <typename T>
void PackRows(const T* rows, int64_t count, int64_t K, char* to) {
  alignas(64) uint16_t odd[32];
  for (int at = 0; at < 32; ++at) odd[at] = 2 * at + 1;
  const __m512i upper = _mm512_load_si512(odd);
  for (int64_t k = 0; k < K; k += kSide, to += kParts<T> * kPairBytes)
    for (int64_t row = 0; row < kSide; ++row) {
      __m512 low = {}, high = {};
      if (row < count) low = Load(rows + row * K + k), high = Load(rows + row * K + k + kTile);
      for (int part = 0; part < kParts<T>; ++part) {
        __m512i one = Part(low), two = Part(high);
        _mm512_storeu_si512(to + part * kPairBytes + row * 64, _mm512_permutex2var_epi16(one, upper, two));
      }
    }
}

// Panels of 32 columns of `count` terms: by step, part and half of the panel a tile whose rows are pairs of terms of 16
// columns. All panels of a step before the next one, which comes from memory meanwhile.
// Returns how many parts there are: of what was a float16 two, of a bfloat16 one.
template <typename T>
int PackColumns(const T* matrix, int64_t count, int64_t columns, int64_t N, char* to) {
  constexpr int64_t bytes = kParts<T> * kPairBytes;
  __m512i any[kParts<T>] = {};
  for (int64_t k = 0; k < count; k += kSide, to += bytes)
    for (int64_t n = 0; n < columns; n += kSide) {
      char* tile = to + n / kSide * (count / kSide) * bytes;
      const T* from = matrix + k * N + n;
      for (int64_t pair = 0; pair < kTile; ++pair, tile += 64, from += 2 * N)
        for (int half = 0; half < 2; ++half) {
          __builtin_prefetch(from + kSide * N + half * kTile);
          __builtin_prefetch(from + (kSide + 1) * N + half * kTile);
          __m512 first = Load(from + half * kTile), second = Load(from + N + half * kTile);
          for (int part = 0; part < kParts<T>; ++part) {
            __m512i one = _mm512_srli_epi32(Part(first), 16), two = Part(second);
            __m512i both = _mm512_or_si512(one, two);
            _mm512_store_si512(tile + part * kPairBytes + half * kTileBytes, both);
            any[part] = _mm512_or_si512(any[part], both);
          }
        }
    }
  int used = kParts<T>;
  while (used > 1 && !_mm512_test_epi32_mask(any[used - 1], any[used - 1])) --used;
  return used;
}

// GCC's instructions for tiles do not say which memory they read and write.
inline void Settle() { __asm__ volatile("" ::: "memory"); }

// sums [32, 32] (+)= a panel of rows times one of columns; `stride` bytes between rows of the sums.
template <int kA, int kUsed, int kB>
void Multiply(const char* a, const char* b, int64_t steps, bool more, float* sums, int64_t stride) {
  float* lower = reinterpret_cast<float*>(reinterpret_cast<char*>(sums) + kTile * stride);
  auto rows = [&](int part) {
    _tile_loadd(4, a + part * kPairBytes, 64);
    _tile_loadd(5, a + part * kPairBytes + kTileBytes, 64);
  };
  auto columns = [&](int part) {
    _tile_loadd(6, b + part * kPairBytes, 64);
    _tile_loadd(7, b + part * kPairBytes + kTileBytes, 64);
  };
  auto add = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  Settle();
  if (more) {
    _tile_loadd(0, sums, stride);
    _tile_loadd(1, sums + kTile, stride);
    _tile_loadd(2, lower, stride);
    _tile_loadd(3, lower + kTile, stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, a += kA * kPairBytes, b += kB * kPairBytes) {
    rows(0);
    if constexpr (kUsed > 2) columns(2), add();
    if constexpr (kUsed > 1) columns(1), add();
    columns(0), add();
    if constexpr (kA > 1) {
      rows(1), add();
      if constexpr (kUsed > 1) columns(1), add(), columns(0);
      rows(2), add();
    }
  }
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + kTile, stride);
  _tile_stored(2, lower, stride);
  _tile_stored(3, lower + kTile, stride);
  Settle();
}

template <typename A, typename B>
struct Product {
  const A* rows;
  const B* matrix;
  float* out;
  char* packed;
  int64_t M, K, N, at_once;  // rows that there is room to pack

  int64_t PanelBytes() const { return K / kSide * kParts<A> * kPairBytes; }

  // `width` columns from `column` on, of the rows from `begin` to `end` among those that are packed, `row` and on.
  void Columns(int64_t row, int64_t begin, int64_t end, int64_t column, int64_t width) const {
    alignas(64) thread_local char block[kColumns / kSide * kTerms / kSide * kParts<B> * kPairBytes];
    alignas(64) float last[kSide * kSide];
    const int64_t last_column = std::min(N, column + width), stride = N * sizeof(float);
    Tiles tiles;
    for (int64_t k = 0; k < K; k += kTerms) {
      const int64_t terms = std::min(kTerms, K - k), bytes = terms / kSide * kParts<B> * kPairBytes;
      const int used = PackColumns(matrix + k * N + column, terms, last_column - column, N, block);
      const auto multiply = used == 1   ? Multiply<kParts<A>, 1, kParts<B>>
                            : used == 2 ? Multiply<kParts<A>, std::min(2, kParts<B>), kParts<B>>
                                        : Multiply<kParts<A>, kParts<B>, kParts<B>>;
      for (int64_t m = begin; m < end; m += kSide) {
        const char* a = packed + m / kSide * PanelBytes() + k / kSide * kParts<A> * kPairBytes;
        const char* b = block;
        const int64_t height = std::min(kSide, end - m);
        for (int64_t n = column; n < last_column; n += kSide, b += bytes) {
          float* sums = out + (row + m) * N + n;
          if (height == kSide) {
            multiply(a, b, terms / kSide, k > 0, sums, stride);
            continue;
          }
          for (int64_t i = 0; k > 0 && i < height; ++i) std::copy_n(sums + i * N, kSide, last + i * kSide);
          multiply(a, b, terms / kSide, k > 0, last, kSide * sizeof(float));
          for (int64_t i = 0; i < height; ++i) std::copy_n(last + i * kSide, kSide, sums + i * N);
        }
      }
    }
  }

  void Run(ffi::ThreadPool pool) const {
    // Equal blocks of columns, as many for each thread; of few columns, of some rows each.
    const int64_t threads = std::max<int64_t>(1, pool.num_threads()), most = kColumns * threads;
    const int64_t parts = (N + most - 1) / most * threads;
    const int64_t width = (N / kSide + parts - 1) / parts * kSide, blocks = (N + width - 1) / width;
    for (int64_t row = 0; row < M; row += at_once) {
      const int64_t count = std::min(at_once, M - row), panels = (count + kSide - 1) / kSide;
      const int64_t shares = std::min(panels, (threads + blocks - 1) / blocks);
      const int64_t height = (panels + shares - 1) / shares * kSide;
      InParallel(pool, panels, count * K * sizeof(A), [&](int64_t panel) {
        const int64_t first = panel * kSide;
        PackRows(rows + (row + first) * K, std::min(kSide, count - first), K, packed + panel * PanelBytes());
      });
      InParallel(pool, blocks * shares, count * K * N, [&](int64_t task) {
        const int64_t begin = task / blocks * height;
        Columns(row, begin, std::min(count, begin + height), task % blocks * width, width);
      });
    }
  }
};

template <typename A, typename B>
ffi::Error Run(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer matrix, float* out, ffi::Buffer<ffi::U8> packed) {
  const int64_t M = rows.dimensions()[0], K = rows.dimensions()[1], N = matrix.dimensions()[1];
  const int64_t at_once = packed.element_count() / (K * kParts<A> * 2) / kSide * kSide;
  if (K % kSide || N % kSide || at_once == 0) return ffi::Error::InvalidArgument("terms, columns or room do not fit");
  Product<A, B>{static_cast<const A*>(rows.untyped_data()), static_cast<const B*>(matrix.untyped_data()), out,
                reinterpret_cast<char*>(packed.typed_data()), M, K, N, at_once}.Run(pool);
  return ffi::Error::Success();
}

ffi::Error ManyRows(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer matrix, ffi::ResultBuffer<ffi::F32> out,
                    ffi::ResultBuffer<ffi::U8> packed) {
  const auto a = rows.element_type(), b = matrix.element_type();
  auto run = a == ffi::F32 && b == ffi::F32    ? Run<float, float>
             : a == ffi::F32 && b == ffi::S8   ? Run<float, int8_t>
             : a == ffi::BF16 && b == ffi::S8 ? Run<uint16_t, int8_t> : nullptr;
  if (!run) return ffi::Error::InvalidArgument("expected float32 and float32 or int8, or bfloat16 and int8");
  return run(pool, rows, matrix, out->typed_data(), *packed);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chai_jax_many_rows, ManyRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>());

// Whether there is such a unit; Linux lets a process use it that has asked.
extern "C" int chai_jax_matrix_unit() {
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
}

#else

extern "C" int chai_jax_matrix_unit() { return 0; }

#endif
