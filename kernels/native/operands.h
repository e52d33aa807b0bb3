// Operands of products as XLA hands them over. Shapes and types are checked where the calls are made, in op.py.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace slipstream {

constexpr int64_t SMALL = 1 << 16;  // multiplications that are not worth a second thread
constexpr int64_t ROWS_OF_A_PART = 144;  // a piece of 128 is one: its panels are read once

// Panels of a part of a product with one row: codes are taken in twos.
inline int64_t in_turn(Stored stored) {
  const bool is_float = stored == Stored::kF32 || stored == Stored::kBF16 || stored == Stored::kF16;
  return is_float ? 1 : 2;
}

// Weights in panels, all of one kind, stacked along an axis in front: those of layers, or of experts.
struct Weights {
  ffi::AnyBuffer code, scale, offset, table;  // what there is not is empty
  int64_t inputs, outputs;

  int64_t count() const { return code.dimensions()[0]; }
  int64_t panels() const { return code.dimensions()[1]; }

  // A scale with a value for each block is one of blocks.
  std::optional<Stored> stored() const {
    switch (code.element_type()) {
      case ffi::DataType::F32:
        return Stored::kF32;
      case ffi::DataType::BF16:
        return Stored::kBF16;
      case ffi::DataType::F16:
        return Stored::kF16;
      case ffi::DataType::S8:
        if (scale.dimensions().size() != 4) return Stored::kInt8;
        if (table.element_count()) return Stored::kTable4;
        return code.dimensions()[2] * 2 == inputs ? Stored::kBlocks4 : Stored::kBlocks8;
      case ffi::DataType::F8E4M3FN:
        return Stored::kFloat8;
      default:
        return std::nullopt;
    }
  }

  // One of them.
  Panels at(Stored stored, int64_t index) const {
    const bool is_in_blocks = in_turn(stored) == 2 && stored != Stored::kInt8;
    return {
        stored, part(code, index), part(scale, index), part(offset, index),
        inputs, outputs, is_in_blocks ? scale.dimensions()[2] : 1, scale.element_type() == ffi::DataType::F16,
        static_cast<const int8_t*>(part(table, index)),
    };
  }

 private:
  const void* part(ffi::AnyBuffer stack, int64_t index) const {
    if (!stack.element_count()) return nullptr;
    return static_cast<const char*>(stack.untyped_data()) + stack.size_bytes() / stack.dimensions()[0] * index;
  }
};

// Which rows of a product count. The others are padding: nothing of them is read, and zeros are what they give.
struct LiveRows {
  std::vector<int64_t> live, padding;

  LiveRows(const bool* is_live, int64_t count) {
    for (int64_t row = 0; row < count; ++row) (is_live[row] ? live : padding).push_back(row);
  }

  int64_t count() const { return static_cast<int64_t>(live.size()); }
  // Whether they lie one behind another.
  bool is_run() const { return live.empty() || live.back() - live.front() + 1 == count(); }

  // Those of `rows`, one behind another.
  std::unique_ptr<char[]> gathered(const char* rows, int64_t row_bytes) const {
    std::unique_ptr<char[]> found(new char[live.size() * row_bytes]);
    for (size_t i = 0; i < live.size(); ++i) std::memcpy(&found[i * row_bytes], rows + live[i] * row_bytes, row_bytes);
    return found;
  }
};

// Rows of activations as a level's products take them: bfloat16 where it multiplies that by itself, else floats.
class Rows {
 public:
  Rows(ffi::DataType type, const void* rows, int64_t count, int64_t inputs, Stored stored, const Kernels& level)
      : inputs_(inputs), level_(&level) {
    if (type != ffi::DataType::BF16) {
      floats_ = static_cast<const float*>(rows);
    } else if (level.dots && (stored == Stored::kBF16 || stored == Stored::kInt8) && inputs % 2 == 0) {
      halves_ = static_cast<const uint16_t*>(rows);
    } else {
      widen(static_cast<const uint16_t*>(rows), count * inputs);
      floats_ = widened_.data();
    }
  }
  Rows(const Rows&) = delete;

  // What products need of them; valid as long as they are.
  struct View {
    const float* floats;
    const uint16_t* halves;
    int64_t inputs;
    const Kernels* level;

    // out[count, outputs] of the rows from `row` on and the panels [first, last).
    void multiply(int64_t row, int64_t count, const Panels& weight, float* out, int64_t first, int64_t last) const {
      if (floats) return level->panels(floats + row * inputs, weight, out, count, first, last);
      level->dots(halves + row * inputs, weight, out, count, first, last);
    }
  };
  View view() const { return {floats_, halves_, inputs_, level_}; }

 private:
  void widen(const uint16_t* halves, int64_t count) {
    widened_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
      std::memcpy(&widened_[i], &bits, sizeof bits);
    }
  }

  const float* floats_ = nullptr;
  const uint16_t* halves_ = nullptr;
  int64_t inputs_;
  const Kernels* level_;
  std::vector<float> widened_;
};

}  // namespace slipstream
