// The kernels as XLA calls them: handlers of its foreign function interface, on its own thread pool.
#include <string>

#include "groups.h"
#include "operands.h"
#include "share.h"

namespace slipstream {
namespace {

constexpr int64_t PARTS_OF_A_THREAD = 4;  // of a step's attention
constexpr int64_t MOST_TOGETHER = 4;  // slots whose queries stay in the nearest cache beside a page

// Shapes and types are checked where the call is made, in op.py.
//
// Rows that count and do not lie one behind another are multiplied as though they did, so that panels are read once.
ffi::Error multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::DataType::PRED> is_live,
                    ffi::AnyBuffer code, ffi::AnyBuffer scale, ffi::AnyBuffer offset, ffi::AnyBuffer table,
                    ffi::Buffer<ffi::DataType::S32> layer, ffi::ResultBuffer<ffi::DataType::F32> out) {
  const int64_t R = x.dimensions()[0], I = x.dimensions()[1], O = out->dimensions()[1];
  const Weights weights{code, scale, offset, table, I, O};
  const auto stored = weights.stored();
  if (!stored) return ffi::Error::InvalidArgument("weights of a type that has no kernel");
  const int64_t own = std::clamp<int64_t>(*layer.typed_data(), 0, weights.count() - 1);  // as XLA clamps
  const Panels weight = weights.at(*stored, own);
  const LiveRows of(is_live.typed_data(), R);
  const int64_t live = of.count(), padding = R - live, first = live ? of.live.front() : 0;
  const int64_t P = weights.panels(), threads = live * I * O < SMALL ? 1 : pool.num_threads();
  const int64_t row_parts = live > ROWS_OF_A_PART ? (live + ROWS_OF_A_PART - 1) / ROWS_OF_A_PART : 1;
  const int64_t rows = (live + row_parts - 1) / row_parts, each = live == 1 ? in_turn(*stored) : 1;
  const int64_t row_bytes = R ? static_cast<int64_t>(x.size_bytes()) / R : 0;
  const auto* lying = static_cast<const char*>(x.untyped_data()) + first * row_bytes;
  const bool is_run = of.is_run();
  const auto gathered = is_run ? nullptr : of.gathered(static_cast<const char*>(x.untyped_data()), row_bytes);
  const std::unique_ptr<float[]> apart(is_run ? nullptr : new float[live * O]);
  const Rows given(x.element_type(), is_run ? lying : gathered.get(), live, I, *stored, kernels());
  const int64_t parts = row_parts * ((P + each - 1) / each);
  share(pool, threads, parts,
        [=, from = given.view(), all = out->typed_data(), apart = apart.get(), at = of.live.data(),
         empty = of.padding.data()](int64_t part) {
          const int64_t row = part % row_parts * rows, count = std::min(rows, live - row);
          const int64_t panel = part / row_parts * each, last = std::min(panel + each, P);
          float* to = apart ? apart : all + first * O;
          if (count > 0) from.multiply(row, count, weight, to + row * O, panel, last);
          if (apart) {
            const int64_t output = panel * PANEL, outputs = std::min(last * PANEL, O) - output;
            for (int64_t r = row; r < row + count; ++r)
              std::copy_n(apart + r * O + output, outputs, all + at[r] * O + output);
          }
          for (int64_t i = padding * part / parts; i < padding * (part + 1) / parts; ++i)
            std::fill_n(all + empty[i] * O, O, 0.0f);
        });
  return ffi::Error::Success();
}

// Of operands that attention of both kinds has. There is a kernel for this cache, `has_kernel` says.
Cached cached(ffi::AnyBuffer cache, ffi::Buffer<ffi::DataType::F32> scale, ffi::Buffer<ffi::DataType::S32> layer,
              ffi::Buffer<ffi::DataType::S32> page, ffi::Buffer<ffi::DataType::S32> window,
              ffi::Buffer<ffi::DataType::F32> sink, int64_t heads, float soft_cap) {
  const auto pages = cache.dimensions();
  return {
      cache.untyped_data(), cache.element_type() == ffi::DataType::S8 ? scale.typed_data() : nullptr, page.typed_data(),
      heads, pages[2], pages[4] / 2,
      pages[0], pages[1], pages[3], page.dimensions()[1],
      *layer.typed_data(), *window.typed_data(), soft_cap,
      sink.element_count() ? sink.typed_data() : nullptr,
  };
}

bool has_kernel(ffi::AnyBuffer cache) {
  return cache.element_type() == ffi::DataType::S8 || cache.element_type() == ffi::DataType::F32;
}

ffi::Error attend(ffi::ThreadPool pool, ffi::Buffer<ffi::DataType::F32> q, ffi::Buffer<ffi::DataType::F32> fresh,
                  ffi::AnyBuffer cache, ffi::Buffer<ffi::DataType::F32> scale, ffi::Buffer<ffi::DataType::S32> layer,
                  ffi::Buffer<ffi::DataType::S32> length, ffi::Buffer<ffi::DataType::S32> page,
                  ffi::Buffer<ffi::DataType::S32> window, ffi::Buffer<ffi::DataType::F32> sink,
                  ffi::ResultBuffer<ffi::DataType::F32> out, float soft_cap) {
  if (!has_kernel(cache)) return ffi::Error::InvalidArgument("a cache of a type that has no kernel");
  const auto query = q.dimensions();
  Attention of{
      cached(cache, scale, layer, page, window, sink, query[2], soft_cap),
      q.typed_data(), fresh.typed_data(), length.typed_data(), out->typed_data(), query[0], query[1], nullptr, nullptr,
  };
  int64_t rows = 0, live = 0;
  for (int64_t b = 0; b < of.slots; ++b) rows += of.length[b] + 1, live += of.length[b] > 0;
  const Kernels& own = kernels();
  const int64_t threads = rows * of.tokens * of.heads * of.head_dim < SMALL ? 1 : pool.num_threads();
  const int64_t wanted = threads * PARTS_OF_A_THREAD;
  const Groups found = groups_of(of, std::clamp<int64_t>(live * of.kv_heads / wanted, 1, MOST_TOGETHER));
  of.order = found.order.data(), of.groups = found.groups.data();
  int64_t longest = 1;
  for (const Group& group : found.groups) {
    int64_t all = 0;
    for (int64_t i = 0; i < group.count; ++i) all += of.length[of.order[group.first + i]] + 1;
    longest = std::max(longest, all);
  }
  // A part is several heads one behind another, whose rows are fetched ahead; but a long text's heads are shared.
  const int64_t heads = static_cast<int64_t>(found.groups.size()) * of.kv_heads;
  const int64_t each = std::max<int64_t>(1, rows * of.kv_heads / (longest * wanted));
  share(pool, threads, (heads + each - 1) / each,
        [=, &own](int64_t part) { own.attend(of, part * each, std::min(heads, (part + 1) * each)); });
  return ffi::Error::Success();
}

ffi::Error attend_chunk(ffi::ThreadPool pool, ffi::Buffer<ffi::DataType::F32> q, ffi::Buffer<ffi::DataType::F32> k,
                        ffi::Buffer<ffi::DataType::F32> v, ffi::AnyBuffer cache, ffi::Buffer<ffi::DataType::F32> scale,
                        ffi::Buffer<ffi::DataType::S32> layer, ffi::Buffer<ffi::DataType::S32> start,
                        ffi::Buffer<ffi::DataType::S32> count, ffi::Buffer<ffi::DataType::S32> page,
                        ffi::Buffer<ffi::DataType::S32> window, ffi::Buffer<ffi::DataType::F32> sink,
                        ffi::ResultBuffer<ffi::DataType::F32> out, float soft_cap) {
  if (!has_kernel(cache)) return ffi::Error::InvalidArgument("a cache of a type that has no kernel");
  const int64_t texts = start.dimensions()[0];
  const Chunk of{
      cached(cache, scale, layer, page, window, sink, q.dimensions()[1], soft_cap),
      q.typed_data(), k.typed_data(), v.typed_data(), start.typed_data(), count.typed_data(), out->typed_data(),
      texts, q.dimensions()[0] / texts,
  };
  const Kernels& own = kernels();
  share(pool, pool.num_threads(), parts_of(of), [=, &own](int64_t part) { own.attend_chunk(of, part, part + 1); });
  return ffi::Error::Success();
}

ffi::Error rms_norm(ffi::ThreadPool pool, ffi::Buffer<ffi::DataType::F32> x, ffi::Buffer<ffi::DataType::F32> weight,
                    ffi::ResultBuffer<ffi::DataType::F32> out, float eps) {
  const int64_t width = weight.dimensions()[0], rows = x.element_count() / width;
  const int64_t each = SMALL / 2 / width + 1;  // of a part
  const float *from = x.typed_data(), *by = weight.typed_data();
  float* to = out->typed_data();
  const Kernels& own = kernels();
  share(pool, pool.num_threads(), (rows + each - 1) / each, [=, &own](int64_t part) {
    const int64_t first = part * each, count = std::min(each, rows - first);
    own.rms_norm(from + first * width, by, to + first * width, count, width, eps);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace slipstream

#define EXPORTED __attribute__((visibility("default")))

extern "C" {
EXPORTED XLA_FFI_Error* slipstream_panel_matmul(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* slipstream_ragged_attention(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* slipstream_chunk_attention(XLA_FFI_CallFrame*);
EXPORTED XLA_FFI_Error* slipstream_rms_norm(XLA_FFI_CallFrame*);
EXPORTED const char* slipstream_level() { return slipstream::kernels().name; }
EXPORTED bool slipstream_use_level(const char* name) { return slipstream::use_level(name); }
EXPORTED const char* slipstream_source() { return SLIPSTREAM_SOURCE; }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipstream_panel_matmul, slipstream::multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()                    // x_RI, float or bfloat16
                                  .Arg<ffi::Buffer<ffi::DataType::PRED>>()  // is_live_R
                                  .Arg<ffi::AnyBuffer>()                    // code
                                  .Arg<ffi::AnyBuffer>()                    // scale, or empty
                                  .Arg<ffi::AnyBuffer>()                    // offset, or empty
                                  .Arg<ffi::AnyBuffer>()                    // table, or empty
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()   // layer
                                  .Ret<ffi::Buffer<ffi::DataType::F32>>());  // out_RO

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipstream_ragged_attention, slipstream::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // q_BWNH
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // new_BWKC
                                  .Arg<ffi::AnyBuffer>()                   // cache_LPKRC
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // scale_LPK2R, or empty
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // layer
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // length_B
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // page_BJ
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // window, 0 is none
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // sink_N, or empty
                                  .Ret<ffi::Buffer<ffi::DataType::F32>>()  // out_BWNH
                                  .Attr<float>("soft_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipstream_chunk_attention, slipstream::attend_chunk,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // q_TNH
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // k_TKH
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // v_TKH
                                  .Arg<ffi::AnyBuffer>()                   // cache_LPKRC
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // scale_LPK2R, or empty
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // layer
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // start_M
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // count_M
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // page_MJ
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()  // window, 0 is none
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // sink_N, or empty
                                  .Ret<ffi::Buffer<ffi::DataType::F32>>()  // out_TNH
                                  .Attr<float>("soft_cap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipstream_rms_norm, slipstream::rms_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // x, rows of the weight's width
                                  .Arg<ffi::Buffer<ffi::DataType::F32>>()  // weight_D
                                  .Ret<ffi::Buffer<ffi::DataType::F32>>()  // out
                                  .Attr<float>("eps"));
