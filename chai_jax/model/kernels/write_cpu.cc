// New tokens copied into a cache, each sequence's behind its own. Compiled and registered by cpu.py; called by write.py.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "checks.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// old and out [B, heads, S, ...], tokens [B, heads, T, ...], start [B]. XLA gives out the memory of old, where it can.
ffi::Error PutTokens(ffi::AnyBuffer old, ffi::AnyBuffer tokens, ffi::BufferR1<ffi::S32> start,
                     ffi::Result<ffi::AnyBuffer> out) {
  const auto shape = old.dimensions(), part = tokens.dimensions();
  if (shape.size() < 3 || part.size() != shape.size() || old.element_type() != tokens.element_type() ||
      out->element_type() != old.element_type() || out->size_bytes() != old.size_bytes())
    return Wrong("expected a cache [B, heads, S, ...], and tokens of its type and number of axes");
  for (size_t axis = 0; axis < shape.size(); ++axis)
    if (axis != 2 && part[axis] != shape[axis]) return Wrong("expected tokens that differ from the cache in S alone");
  const int64_t batch = shape[0], heads = shape[1], columns = shape[2], count = part[2];
  if (count > columns || !Is(start.dimensions(), {batch})) return Wrong("expected a start for each sequence");
  if (out->untyped_data() != old.untyped_data()) std::memcpy(out->untyped_data(), old.untyped_data(), old.size_bytes());
  if (tokens.size_bytes() == 0) return ffi::Error::Success();
  const int64_t bytes = static_cast<int64_t>(tokens.size_bytes()) / (batch * heads * count);  // of a token
  auto* to = static_cast<char*>(out->untyped_data());
  const auto* from = static_cast<const char*>(tokens.untyped_data());
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t first = std::clamp<int64_t>(start.typed_data()[row], 0, columns - count);
    for (int64_t head = row * heads; head < (row + 1) * heads; ++head)
      std::memcpy(to + (head * columns + first) * bytes, from + head * count * bytes, count * bytes);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(chai_jax_put_tokens, PutTokens,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
