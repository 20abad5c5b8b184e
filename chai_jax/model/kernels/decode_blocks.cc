// Attention of one new token over a cache of blocks of few bits, for CPUs.
//
// In one pass it reads the packed blocks (few_bits.h, int4.h), the first tokens and the block in progress, which are
// bfloat16. Compiled and registered by cpu.py; called by decode_cpu.py.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "few_bits.h"
#include "int4.h"
#include "parallel.h"
#include "softmax.h"
#include "vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Planes = ffi::Buffer<ffi::U8, 6>;
using Packed = ffi::Buffer<ffi::U8, 5>;
using Grid = ffi::Buffer<ffi::BF16, 5>;

// The part of keys or values that is bfloat16: the block in progress [heads, M, R], the first tokens [heads, F, R].
struct Whole {
  const BFloat16 *recent, *first;
};

// All of one group: query [B, C, q, R], allowed and real [B, S], out [B, C, v q, Rv].
struct Group {
  const Keys& keys;
  const Values& values;
  Whole whole_keys, whole_values;
  const float* query;
  const bool *allowed, *real;
  const int32_t* start;
  float* out;
  int64_t batch, clusters, queries, heads, columns, rank, value_rank, block, blocks, first_tokens;

  // What one cluster of one sequence reads: columns from `begin`, where a block begins, up to `end`.
  struct Span {
    int64_t begin, end, size, own;  // size: up to the end of its last block; own: the number of that in progress
    std::vector<int64_t> first;  // the column of each first token that is not in the block in progress, or -1
  };

  Span Reach(int64_t sequence) const {
    const bool *readable = allowed + sequence * columns, *tokens = real + sequence * columns;
    int64_t begin = std::find(readable, readable + columns, true) - readable, end = columns;
    if (begin == columns) begin = 0;  // then it reads all alike
    else while (!readable[end - 1]) --end;
    begin = begin / block * block;
    Span span{begin, end, (end - begin + block - 1) / block * block, start[sequence] / block,
              std::vector<int64_t>(first_tokens, -1)};
    for (int64_t column = 0, found = 0; column < columns && found < first_tokens; ++column) {
      if (!tokens[column]) continue;
      if (column >= begin && column < end && column / block != span.own) span.first[found] = column - begin;
      ++found;
    }
    return span;
  }

  // Blocks of few bits that are read: `run(number, offset)`.
  template <typename Run>
  void EachBlock(const Span& span, const Run& run) const {
    for (int64_t at = span.begin; at < span.end; at += block)
      if (at / block < blocks && at / block != span.own) run(at / block, at - span.begin);
  }

  // Rows of bfloat16 that are read: `run(row, offset)`.
  template <typename Run>
  void EachWhole(const Span& span, const Whole& whole, int64_t head, int64_t rank, const Run& run) const {
    const int64_t base = span.own * block;
    for (int64_t column = std::max(base, span.begin); column < std::min(base + block, span.end); ++column)
      run(whole.recent + (head * block + column - base) * rank, column - span.begin);
    for (int64_t number = 0; number < first_tokens; ++number)
      if (span.first[number] >= 0) run(whole.first + (head * first_tokens + number) * rank, span.first[number]);
  }

  // `count` of a cluster's queries, from query `from` on.
  void Attend(int64_t sequence, int64_t cluster, int64_t from, int64_t count) const {
    const Span span = Reach(sequence);
    const int64_t at = sequence * clusters + cluster, size = span.size;
    const float* asked = query + (at * queries + from) * rank;
    std::vector<float> scores(count * size), totals(count);
    Scratch scratch;
    EachBlock(span, [&](int64_t number, int64_t offset) {
      keys.Score(count, asked, at * blocks + number, scores.data() + offset, size, scratch);
    });
    EachWhole(span, whole_keys, at, rank, [&](const BFloat16* key, int64_t offset) {
      for (int64_t row = 0; row < count; ++row) scores[row * size + offset] = Product(asked + row * rank, key, rank);
    });
    for (int64_t row = 0; row < count; ++row) {
      float* mine = scores.data() + row * size;
      totals[row] = SoftmaxWeights(mine, allowed + sequence * columns + span.begin, span.end - span.begin);
      std::fill(mine + span.end - span.begin, mine + size, 0.0f);
    }
    std::vector<float> few = scores;  // without those of first tokens
    for (int64_t offset : span.first)
      if (offset >= 0)
        for (int64_t row = 0; row < count; ++row) few[row * size + offset] = 0.0f;
    for (int64_t head = at * heads; head < (at + 1) * heads; ++head) {
      float* sums = out + (head * queries + from) * value_rank;
      std::fill(sums, sums + count * value_rank, 0.0f);
      EachBlock(span, [&](int64_t number, int64_t offset) {
        values.Mix(count, few.data() + offset, size, head * blocks + number, sums, scratch);
      });
      EachWhole(span, whole_values, head, value_rank, [&](const BFloat16* value, int64_t offset) {
        for (int64_t row = 0; row < count; ++row)
          Add(scores[row * size + offset], value, value_rank, sums + row * value_rank);
      });
      for (int64_t row = 0; row < count; ++row)
        for (int64_t entry = 0; entry < value_rank; ++entry) sums[row * value_rank + entry] /= totals[row];
    }
  }

  static void Add(float weight, const BFloat16* value, int64_t rank, float* sums) {
    int64_t at = 0;
    for (; at + kLanes <= rank; at += kLanes) Store(sums + at, Load(sums + at) + weight * Load(value + at));
    for (; at < rank; ++at) sums[at] += weight * ToFloat(value[at]);
  }

  ffi::Error All(ffi::ThreadPool& pool, int64_t bytes) const {
    return AllDone(InParallel(pool, batch * clusters, bytes, [&](int64_t task) {
      const int64_t sequence = task / clusters, cluster = task % clusters;
      for (int64_t from = 0; from < queries;) {
        const int64_t left = queries - from, now = left == 4 ? 2 : std::min<int64_t>(left, kTogether);
        Attend(sequence, cluster, from, now);
        from += now;
      }
    }));
  }
};

// What both formats have, checked against each other: shapes as in `Group`.
struct Given {
  ffi::BufferR4<ffi::F32> query;
  ffi::BufferR2<ffi::PRED> allowed, real;
  ffi::BufferR1<ffi::S32> start;
  ffi::BufferR4<ffi::BF16> recent_keys, recent_values, first_keys, first_values;
  float* out;
  ffi::Span<const int64_t> out_shape;

  int64_t batch() const { return query.dimensions()[0]; }
  int64_t clusters() const { return query.dimensions()[1]; }
  int64_t heads() const { return recent_values.dimensions()[1]; }
  int64_t rank() const { return query.dimensions()[3]; }
  int64_t value_rank() const { return recent_values.dimensions()[3]; }
  int64_t columns() const { return allowed.dimensions()[1]; }
  int64_t first_tokens() const { return first_keys.dimensions()[2]; }

  bool Fits(int64_t block) const {
    const int64_t queries = query.dimensions()[2];
    return clusters() > 0 && columns() > 0 && rank() > 0 && value_rank() > 0 && heads() % clusters() == 0 &&
           Is(start.dimensions(), {batch()}) && Is(allowed.dimensions(), {batch(), columns()}) && Is(real.dimensions(), {batch(), columns()}) &&
           Is(recent_keys.dimensions(), {batch(), clusters(), block, rank()}) &&
           Is(recent_values.dimensions(), {batch(), heads(), block, value_rank()}) &&
           Is(first_keys.dimensions(), {batch(), clusters(), first_tokens(), rank()}) &&
           Is(first_values.dimensions(), {batch(), heads(), first_tokens(), value_rank()}) &&
           Is(out_shape, {batch(), clusters(), queries * (heads() / clusters()), value_rank()});
  }

  ffi::Error Attend(ffi::ThreadPool& pool, const Keys& keys, const Values& values, int64_t block, int64_t blocks,
                    int64_t bytes) const {
    const int32_t* at = start.typed_data();
    if (std::any_of(at, at + batch(), [&](int32_t each) { return each < 0 || each > columns(); }))
      return Wrong("expected starts within the columns");
    auto floats = [](const auto& buffer) { return reinterpret_cast<const BFloat16*>(buffer.typed_data()); };
    return Group{keys, values, {floats(recent_keys), floats(first_keys)},
                               {floats(recent_values), floats(first_values)}, query.typed_data(),
                               allowed.typed_data(), real.typed_data(), at, out, batch(), clusters(),
                               query.dimensions()[2], heads() / clusters(), columns(), rank(), value_rank(), block, blocks,
                 first_tokens()}
        .All(pool, bytes);
  }
};

const char* const kShapes =
    "expected query [B, C, q, R], allowed and real [B, S], start [B], recent [B, heads, M, R], first tokens [B, heads, F, R], out "
    "[B, C, v q, Rv] and the blocks of S // M of keys and of values as they are packed";

template <template <int> class Format, typename... Given>
std::unique_ptr<const std::conditional_t<std::is_base_of_v<Keys, Format<2>>, Keys, Values>> OfBits(int64_t bits,
                                                                                                 Given... given) {
  if (bits == 2) return std::make_unique<Format<2>>(given...);
  if (bits == 3) return std::make_unique<Format<3>>(given...);
  return std::make_unique<Format<4>>(given...);
}

ffi::Error FewBits(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> query, ffi::BufferR2<ffi::PRED> allowed,
                   ffi::BufferR2<ffi::PRED> real, ffi::BufferR1<ffi::S32> start,
                   ffi::BufferR4<ffi::BF16> recent_keys, ffi::BufferR4<ffi::BF16> recent_values,
                   ffi::BufferR4<ffi::BF16> first_keys, ffi::BufferR4<ffi::BF16> first_values,
                   Planes keys, ffi::BufferR4<ffi::U8> key_scale, ffi::BufferR4<ffi::BF16> key_low,
                   Planes values, ffi::BufferR4<ffi::BF16> value_scale,
                   ffi::BufferR1<ffi::F32> scales, ffi::BufferR1<ffi::F32> levels,
                   ffi::ResultBufferR4<ffi::F32> out) {
  const Given given{query, allowed, real, start, recent_keys, recent_values, first_keys, first_values,
                    out->typed_data(), out->dimensions()};
  const int64_t blocks = keys.dimensions()[2], key_bits = keys.dimensions()[3], bits = values.dimensions()[3];
  if (!given.Fits(64) || blocks != given.columns() / 64 ||
      !Is(keys.dimensions(), {given.batch(), given.clusters(), blocks, key_bits, given.rank(), 8}) ||
      !Is(key_scale.dimensions(), {given.batch(), given.clusters(), blocks, given.rank()}) ||
      !Is(key_low.dimensions(), {given.batch(), given.clusters(), blocks, given.rank()}) ||
      !Is(values.dimensions(), {given.batch(), given.heads(), blocks, bits, 8, (given.value_rank() + 7) / 8 * 8}) ||
      !Is(value_scale.dimensions(), {given.batch(), given.heads(), blocks, 64}) || !Is(scales.dimensions(), {256}) ||
      bits < 2 || bits > 4 || !Is(levels.dimensions(), {int64_t{1} << bits}) || key_bits < 2 || key_bits > 4)
    return Wrong(kShapes);
  auto floats = [](const auto& buffer) { return reinterpret_cast<const BFloat16*>(buffer.typed_data()); };
  auto read_keys = OfBits<FewKeys>(key_bits, keys.typed_data(), key_scale.typed_data(), floats(key_low),
                                   scales.typed_data(), given.rank());
  auto read_values =
      OfBits<FewValues>(bits, values.typed_data(), floats(value_scale), levels.typed_data(), given.value_rank());
  return given.Attend(pool, *read_keys, *read_values, 64, blocks, keys.size_bytes() + values.size_bytes());
}

ffi::Error Int4(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> query, ffi::BufferR2<ffi::PRED> allowed,
                ffi::BufferR2<ffi::PRED> real, ffi::BufferR1<ffi::S32> start,
                ffi::BufferR4<ffi::BF16> recent_keys, ffi::BufferR4<ffi::BF16> recent_values,
                ffi::BufferR4<ffi::BF16> first_keys, ffi::BufferR4<ffi::BF16> first_values,
                Packed keys, Grid key_scale, Grid key_low,
                Packed values, Grid value_scale,
                Grid value_low, ffi::ResultBufferR4<ffi::F32> out) {
  const Given given{query, allowed, real, start, recent_keys, recent_values, first_keys, first_values,
                    out->typed_data(), out->dimensions()};
  const int64_t blocks = keys.dimensions()[2], rank = given.rank(), value_rank = given.value_rank();
  const int64_t groups = (value_rank + Int4Values::kGroup - 1) / Int4Values::kGroup;
  if (!given.Fits(32) || blocks != given.columns() / 32 ||
      !Is(keys.dimensions(), {given.batch(), given.clusters(), blocks, 16, rank}) ||
      !Is(key_scale.dimensions(), {given.batch(), given.clusters(), blocks, 1, rank}) ||
      !Is(key_low.dimensions(), {given.batch(), given.clusters(), blocks, 1, rank}) ||
      !Is(values.dimensions(), {given.batch(), given.heads(), blocks, 32, (value_rank + 1) / 2}) ||
      !Is(value_scale.dimensions(), {given.batch(), given.heads(), blocks, 32, groups}) ||
      !Is(value_low.dimensions(), {given.batch(), given.heads(), blocks, 32, groups}))
    return Wrong(kShapes);
  auto floats = [](const auto& buffer) { return reinterpret_cast<const BFloat16*>(buffer.typed_data()); };
  return given.Attend(pool, Int4Keys{keys.typed_data(), floats(key_scale), floats(key_low), rank},
                      Int4Values{values.typed_data(), floats(value_scale), floats(value_low), value_rank}, 32, blocks,
                      keys.size_bytes() + values.size_bytes());
}

auto Common() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::BufferR4<ffi::F32>>()
      .Arg<ffi::BufferR2<ffi::PRED>>()
      .Arg<ffi::BufferR2<ffi::PRED>>()
      .Arg<ffi::BufferR1<ffi::S32>>()
      .Arg<ffi::BufferR4<ffi::BF16>>()
      .Arg<ffi::BufferR4<ffi::BF16>>()
      .Arg<ffi::BufferR4<ffi::BF16>>()
      .Arg<ffi::BufferR4<ffi::BF16>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chai_jax_attention_few_bits, FewBits,
                              Common()
                                  .Arg<Planes>()
                                  .Arg<ffi::BufferR4<ffi::U8>>()
                                  .Arg<ffi::BufferR4<ffi::BF16>>()
                                  .Arg<Planes>()
                                  .Arg<ffi::BufferR4<ffi::BF16>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::BufferR4<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(chai_jax_attention_int4, Int4,
                              Common()
                                  .Arg<Packed>()
                                  .Arg<Grid>()
                                  .Arg<Grid>()
                                  .Arg<Packed>()
                                  .Arg<Grid>()
                                  .Arg<Grid>()
                                  .Ret<ffi::BufferR4<ffi::F32>>());
