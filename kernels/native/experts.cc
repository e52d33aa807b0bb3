// Products of rows with the experts that they chose, as XLA calls them. Rows of one expert are multiplied together.
#include <algorithm>
#include <cstring>
#include <vector>

#include "operands.h"
#include "share.h"

namespace slipstream {
namespace {

// Some rows of one expert, in the order of experts, times a run of its panels.
struct ExpertPart {
  int64_t expert, row, rows, first, last;
};

// The choices of rows that count, numbered row by row, expert by expert; where each expert's begin. Empty for a number
// that no expert has.
struct Sorted {
  std::vector<int64_t> choice, start;
};

Sorted sorted(const int32_t* expert, const std::vector<int64_t>& rows, int64_t of_a_row, int64_t experts) {
  std::vector<int64_t> start(experts + 1);
  for (int64_t row : rows)
    for (int64_t i = row * of_a_row; i < (row + 1) * of_a_row; ++i) {
      if (expert[i] < 0 || expert[i] >= experts) return {};
      ++start[expert[i] + 1];
    }
  for (int64_t e = 0; e < experts; ++e) start[e + 1] += start[e];
  std::vector<int64_t> choice(rows.size() * of_a_row), next(start.begin(), start.end() - 1);
  for (int64_t row : rows)
    for (int64_t i = row * of_a_row; i < (row + 1) * of_a_row; ++i) choice[next[expert[i]]++] = i;
  return {choice, start};
}

std::vector<ExpertPart> parts_of(const std::vector<int64_t>& start, int64_t panels, Stored stored) {
  std::vector<ExpertPart> parts;
  for (int64_t e = 0; e + 1 < static_cast<int64_t>(start.size()); ++e) {
    const int64_t each = start[e + 1] - start[e] == 1 ? in_turn(stored) : 1;
    for (int64_t panel = 0; panel < panels; panel += each)
      for (int64_t row = start[e]; row < start[e + 1]; row += ROWS_OF_A_PART)
        parts.push_back({e, row, std::min(ROWS_OF_A_PART, start[e + 1] - row), panel, std::min(panel + each, panels)});
  }
  return parts;
}

ffi::Error multiply_chosen(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::DataType::PRED> is_live,
                           ffi::Buffer<ffi::DataType::S32> expert, ffi::AnyBuffer code, ffi::AnyBuffer scale,
                           ffi::AnyBuffer offset, ffi::AnyBuffer table, ffi::ResultBuffer<ffi::DataType::F32> out) {
  const int64_t I = x.dimensions()[1], X = expert.dimensions()[1], O = out->dimensions()[2];
  const LiveRows rows(is_live.typed_data(), x.dimensions()[0]);
  const int64_t choices = rows.count() * X;
  const Weights weights{code, scale, offset, table, I, O};
  const auto stored = weights.stored();
  if (!stored) return ffi::Error::InvalidArgument("weights of a type that has no kernel");
  const Sorted order = sorted(expert.typed_data(), rows.live, X, weights.count());
  if (order.start.empty()) return ffi::Error::InvalidArgument("an expert that there is not");

  const int64_t bytes = x.element_count() ? x.size_bytes() / x.dimensions()[0] : 0;
  std::vector<char> gathered(choices * bytes);
  for (int64_t i = 0; i < choices; ++i)
    std::memcpy(&gathered[i * bytes], static_cast<const char*>(x.untyped_data()) + order.choice[i] / X * bytes, bytes);
  const Rows given(x.element_type(), gathered.data(), choices, I, *stored, kernels());
  std::vector<float> answers(choices * O);

  const std::vector<ExpertPart> parts = parts_of(order.start, weights.panels(), *stored);
  const int64_t threads = choices * I * O < SMALL ? 1 : pool.num_threads();
  share(pool, threads, static_cast<int64_t>(parts.size()),
        [=, from = given.view(), of = parts.data(), to = answers.data(), stored = *stored](int64_t i) {
          const ExpertPart& part = of[i];
          const Panels weight = weights.at(stored, part.expert);
          from.multiply(part.row, part.rows, weight, to + part.row * O, part.first, part.last);
        });
  for (int64_t row : rows.padding) std::fill_n(out->typed_data() + row * X * O, X * O, 0.0f);
  for (int64_t i = 0; i < choices; ++i)
    std::memcpy(out->typed_data() + order.choice[i] * O, &answers[i * O], O * sizeof(float));
  return ffi::Error::Success();
}

}  // namespace
}  // namespace slipstream

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* slipstream_expert_matmul(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(slipstream_expert_matmul, slipstream::multiply_chosen,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()                    // x_RI, float or bfloat16
                                  .Arg<ffi::Buffer<ffi::DataType::PRED>>()  // is_live_R
                                  .Arg<ffi::Buffer<ffi::DataType::S32>>()   // expert_RX
                                  .Arg<ffi::AnyBuffer>()                    // code
                                  .Arg<ffi::AnyBuffer>()                    // scale, or empty
                                  .Arg<ffi::AnyBuffer>()                    // offset, or empty
                                  .Arg<ffi::AnyBuffer>()                    // table, or empty
                                  .Ret<ffi::Buffer<ffi::DataType::F32>>());  // out_RXO
