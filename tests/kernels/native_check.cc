// The native kernels against plain loops in double precision, to be run under sanitizers: make native-check.
//
// Every array is as long as it must be and not longer, so that the address sanitizer finds a value read too many; what
// must not be used is NaN. Each level that this CPU runs is forced in turn.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#include "../../kernels/native/groups.h"
#include "../../kernels/native/kernels.h"
#include "../../kernels/native/share.h"

using namespace slipstream;

namespace {

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
int failures = 0;

// Cheap, so that the draws take no longer than what is checked: also where each instruction is emulated.
unsigned generator() {
  static uint64_t state = 1;
  state = state * 6364136223846793005 + 1442695040888963407;
  return static_cast<unsigned>(state >> 32);
}

// Between -2 and 2.
std::vector<float> numbers(size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(static_cast<int32_t>(generator())) * 0x1p-30f;
  return values;
}

std::vector<int8_t> codes(size_t count) {
  std::vector<int8_t> values(count);
  for (int8_t& value : values) value = static_cast<int8_t>(generator() % 256 - 128);
  return values;
}

void expect(bool is_fine, const char* what, double error) {
  if (is_fine) return;
  ++failures;
  std::printf("FAILED %s: %s, off by %g\n", kernels().name, what, error);
}

// The larger one, or NaN if one is.
double larger(double a, double b) { return a >= b || std::isnan(a) ? a : b; }

// A thread for each task; `late` ones begin when all work may be done.
struct Pool {
  bool late;
  std::vector<std::thread> threads;

  template <typename Task>
  void Schedule(Task task) {
    threads.emplace_back([task, wait = late] {
      if (wait) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      task();
    });
  }
  ~Pool() {
    for (std::thread& thread : threads) thread.join();
  }
};

void check_sharing() {
  for (int64_t threads : {0, 1, 2, 7})
    for (int64_t parts : {0, 1, 2, 50})
      for (bool late : {false, true}) {
        std::vector<std::atomic<int>> count(parts);
        {
          Pool pool{late, {}};
          auto* first = count.data();
          share(pool, threads, parts, [first](int64_t part) { ++first[part]; });
          for (auto& of_part : count) expect(of_part == 1, "a part is done once, before share returns", of_part);
        }
      }
}

struct Weight {
  std::vector<float> floats, scale, offset;
  std::vector<uint16_t> halves, scale_halves, offset_halves;
  std::vector<int8_t> bytes, table;
  std::vector<float> values;   // [P, I, 32], the weight in panels; of kInt8 without its scale
  std::vector<double> plain;  // [O, I]
  Panels panels;
};

constexpr Stored ALL[] = {Stored::kF32,  Stored::kBF16,    Stored::kF16,
                          Stored::kInt8, Stored::kBlocks8, Stored::kBlocks4, Stored::kTable4, Stored::kFloat8};

bool is_of_4_bits(Stored stored) { return stored == Stored::kBlocks4 || stored == Stored::kTable4; }

bool is_in_blocks(Stored stored) {
  return stored == Stored::kBlocks8 || stored == Stored::kFloat8 || is_of_4_bits(stored);
}

double widened(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Half precision, by what its bits mean.
float of_half(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                     : std::ldexp(mantissa, -24);
  return static_cast<float>(half >> 15 ? -size : size);
}

// float8_e4m3fn, by what its bits mean.
float of_float8(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent == 15 && mantissa == 7 ? NAN
                      : exponent                      ? std::ldexp(8 + mantissa, exponent - 10)
                                                      : std::ldexp(mantissa, -9);
  return static_cast<float>(bits >> 7 ? -size : size);
}

// Of around 1, small ones, and now and then a subnormal one or a zero.
std::vector<uint16_t> halves(size_t count) {
  std::vector<uint16_t> values(count);
  for (uint16_t& half : values) {
    const unsigned draw = generator();
    half = (draw >> 16 & 0x83ff) | (draw % 7 ? 0x3400 + draw % 3 * 0x400 : draw % 2 * 0x400);
  }
  return values;
}

std::vector<float> of_halves(const std::vector<uint16_t>& halves) {
  std::vector<float> values(halves.size());
  std::transform(halves.begin(), halves.end(), values.begin(), of_half);
  return values;
}

// What the weights of blocks share: scales and offsets, floats or in half precision, or no offset.
struct Grids {
  int64_t block = 32;
  bool is_f16 = false, has_offset = true;
};

// Lanes behind the last output are NaN where floats can say so.
void fill(Weight& weight, Stored stored, int64_t I, int64_t O, Grids grids) {
  const int64_t P = (O + PANEL - 1) / PANEL, Q = is_in_blocks(stored) ? I / grids.block : 1;
  weight.plain.resize(O * I), weight.values.resize(P * I * PANEL);
  if (stored == Stored::kF32) weight.floats = numbers(P * I * PANEL);
  if (stored == Stored::kF16) weight.halves = halves(P * I * PANEL);
  if (stored == Stored::kBF16) {
    weight.halves.resize(P * I * PANEL);
    for (uint16_t& half : weight.halves) half = static_cast<uint16_t>(0x3c00 + generator() % 0x400 + (generator() % 2 << 15));
  }
  if (stored == Stored::kInt8) weight.bytes = codes(P * I * PANEL), weight.scale = numbers(P * PANEL);
  if (is_in_blocks(stored)) {
    weight.bytes = codes(P * I * PANEL / (is_of_4_bits(stored) ? 2 : 1));
    weight.table = codes(16);
    grids.has_offset &= stored != Stored::kTable4 && stored != Stored::kFloat8;
    weight.scale_halves = halves(P * Q * PANEL), weight.scale = of_halves(weight.scale_halves);
    weight.offset_halves = halves(P * Q * PANEL), weight.offset = of_halves(weight.offset_halves);
    if (!grids.is_f16) weight.offset = numbers(P * Q * PANEL);
    if (!grids.has_offset) std::fill(weight.offset.begin(), weight.offset.end(), 0.0f);
  }
  for (int64_t o = 0; o < P * PANEL; ++o)
    for (int64_t i = 0; i < I; ++i) {
      const int64_t p = o / PANEL, lane = o % PANEL, at = (p * I + i) * PANEL + lane;
      const int64_t grid = (p * Q + i / grids.block) * PANEL + lane;
      float value = 0;
      double scale = 1;
      switch (stored) {
        case Stored::kF32:
          if (o >= O) weight.floats[at] = NOT_A_NUMBER;
          value = weight.floats[at];
          break;
        case Stored::kBF16: {
          uint16_t& half = weight.halves[((p * I + i) / 2 * PANEL + lane) * 2 + i % 2];
          if (o >= O) half = 0x7fc0;
          value = widened(half);
          break;
        }
        case Stored::kF16:
          if (o >= O) weight.halves[at] = 0x7e00;
          value = of_half(weight.halves[at]);
          break;
        case Stored::kInt8:
          value = weight.bytes[at], scale = weight.scale[p * PANEL + lane];
          break;
        case Stored::kBlocks8:
          value = std::fma(static_cast<float>(weight.bytes[at]), weight.scale[grid], weight.offset[grid]);
          break;
        case Stored::kBlocks4: {
          const uint8_t pair = weight.bytes[(p * I / 2 + i / 2) * PANEL + lane];
          const float code = i % 2 ? pair >> 4 : pair & 15;
          value = std::fma(code, weight.scale[grid], weight.offset[grid]);
          break;
        }
        case Stored::kFloat8: {
          int8_t& code = weight.bytes[at];
          if (o >= O) code = 0x7f;
          if (o < O && (code & 0x7f) == 0x7f) code = 0x55;  // there is no NaN
          value = of_float8(code) * weight.scale[grid];
          break;
        }
        case Stored::kTable4: {
          const uint8_t pair = weight.bytes[(p * I / 2 + i / 2) * PANEL + lane];
          value = weight.table[i % 2 ? pair >> 4 : pair & 15] * weight.scale[grid];
          break;
        }
      }
      weight.values[at] = value;
      if (o < O) weight.plain[o * I + i] = scale * value;
    }
  const void* code = !weight.floats.empty()   ? static_cast<const void*>(weight.floats.data())
                     : !weight.halves.empty() ? static_cast<const void*>(weight.halves.data())
                                              : static_cast<const void*>(weight.bytes.data());
  const bool is_f16 = is_in_blocks(stored) && grids.is_f16;
  const void* scale = is_f16 ? static_cast<const void*>(weight.scale_halves.data()) : weight.scale.data();
  const void* offset = is_f16 ? static_cast<const void*>(weight.offset_halves.data()) : weight.offset.data();
  if (!is_in_blocks(stored) || !grids.has_offset) offset = nullptr;
  const int8_t* table = stored == Stored::kTable4 ? weight.table.data() : nullptr;
  weight.panels = Panels{stored, code, scale, offset, I, O, Q, is_f16, table};
}

// The rows that `multiply` makes of panels [first, last), in two parts.
template <typename Multiply>
std::vector<float> multiplied(const Weight& weight, int64_t R, const Multiply& multiply) {
  const int64_t O = weight.panels.outputs, P = (O + PANEL - 1) / PANEL, middle = P / 2;
  std::vector<float> out(R * O, NOT_A_NUMBER);
  multiply(out.data(), R, 0, middle);
  multiply(out.data(), R, middle, P);
  return out;
}

void compare(const char* what, const Weight& weight, const std::vector<float>& x, const std::vector<float>& out) {
  const int64_t I = weight.panels.inputs, O = weight.panels.outputs, R = x.size() / I;
  double worst = 0;
  for (int64_t r = 0; r < R; ++r)
    for (int64_t o = 0; o < O; ++o) {
      double sum = 0, size = 1e-30;
      for (int64_t i = 0; i < I; ++i) {
        const double term = x[r * I + i] * weight.plain[o * I + i];
        sum += term, size += std::fabs(term);
      }
      worst = larger(worst, std::fabs(out[r * O + o] - sum) / size);
    }
  expect(worst < 2e-6, what, worst);
}

// Bit by bit: a row does not depend on how many there are. `alone` makes a row by its number.
template <typename Alone>
void compare_alone(const std::vector<float>& all, int64_t R, const Alone& alone) {
  for (int64_t r : {int64_t{0}, R / 2, R - 1}) {
    const std::vector<float> row = alone(r);
    expect(std::equal(row.begin(), row.end(), all.begin() + r * row.size()), "a row that is alone", r);
  }
}

void check_product(Stored stored, int64_t R, int64_t I, int64_t O, Grids grids = {}) {
  Weight weight;
  fill(weight, stored, I, O, grids);
  std::vector<float> x = numbers(R * I);
  std::vector<uint16_t> halves;
  for (float& value : x) {
    if (stored != Stored::kBF16 && stored != Stored::kInt8) break;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    halves.push_back(bits >> 16);
    value = widened(bits >> 16);
  }
  const auto panels_from = [&](int64_t row) {
    return [&, row](float* out, int64_t rows, int64_t first, int64_t last) {
      kernels().panels(x.data() + row * I, weight.panels, out, rows, first, last);
    };
  };
  const auto out = multiplied(weight, R, panels_from(0));
  compare("a product", weight, x, out);
  compare_alone(out, R, [&](int64_t row) { return multiplied(weight, 1, panels_from(row)); });
  if (stored != Stored::kInt8) {
    const Panels values{Stored::kF32, weight.values.data(), nullptr, nullptr, I, O, 1, false};
    const auto of_values = multiplied(weight, R, [&](float* out, int64_t rows, int64_t first, int64_t last) {
      kernels().panels(x.data(), values, out, rows, first, last);
    });
    expect(of_values == out, "a product is that of the weight in floats, bit by bit", R);
  }
  if (!kernels().dots || halves.empty() || I % 2) return;
  const auto dots_from = [&](int64_t row) {
    return [&, row](float* out, int64_t rows, int64_t first, int64_t last) {
      kernels().dots(halves.data() + row * I, weight.panels, out, rows, first, last);
    };
  };
  const auto dotted = multiplied(weight, R, dots_from(0));
  compare("dot products", weight, x, dotted);
  compare_alone(dotted, R, [&](int64_t row) { return multiplied(weight, 1, dots_from(row)); });
  for (int64_t r = 1; r < R; r += 2) std::fill_n(halves.begin() + r * I, I, uint16_t{0x7fc0});
  const auto beside_nan = multiplied(weight, R, dots_from(0));
  for (int64_t r = 0; r < R; r += 2) {
    const auto row = dotted.begin() + r * O;
    expect(std::equal(row, row + O, beside_nan.begin() + r * O), "a row beside NaN", r);
  }
}

void check_products() {
  for (Stored stored : ALL)
    for (int64_t R : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 25, 40})
      for (int64_t I : {64, 288, 608})  // 288 and 608 end within a run of unpacked inputs
        for (int64_t O : {1, 31, 32, 33, 70}) check_product(stored, R, I, O);
  for (Stored stored : ALL)  // several panels of a part, whole ones and the last
    for (int64_t R : {1, 2, 3})
      for (int64_t O : {128, 140, 200}) check_product(stored, R, 288, O);
  for (int64_t I : {1, 3, 17, 257}) {  // inputs that nothing divides
    check_product(Stored::kInt8, 1, I, 140);
    for (int64_t R : {1, 14}) {
      check_product(Stored::kF32, R, I, 40);
      check_product(Stored::kF16, R, I, 40);
      check_product(Stored::kBF16, R, I + 1, 40);
      check_product(Stored::kInt8, R, I, 40);
    }
  }
  for (Stored stored : {Stored::kBF16, Stored::kInt8})
    for (int64_t R : {15, 16, 17, 31, 32, 33, 65})  // around 16 rows of 32 inputs, a tile
      for (int64_t I : {30, 32, 34, 1058}) check_product(stored, R, I, 40);
  for (Stored stored : ALL)
    for (int64_t R : {97, 131})  // a prompt's
      for (int64_t I : {128, 544}) check_product(stored, R, I, 33);
  for (int64_t R : {1, 3, 30})
    for (int64_t I : {34, 300, 512, 1024}) {  // one scale for all, or for several runs of unpacked inputs
      check_product(Stored::kFloat8, R, I, 140, {I});
      if (I % 512 == 0) check_product(Stored::kFloat8, R, I, 40, {512});
    }
  for (Stored stored : {Stored::kBlocks8, Stored::kBlocks4, Stored::kTable4, Stored::kFloat8})
    for (int64_t R : {1, 3, 30})
      for (bool is_f16 : {false, true})
        for (bool has_offset : {false, true}) {
          for (int64_t block : {2, 8, 16, 64, 128}) check_product(stored, R, 384, 40, {block, is_f16, has_offset});
          check_product(stored, R, 768, 70, {256, is_f16, has_offset});
        }
}

// Threads with rows and weights of their own, at once, as many rows and others: what one has set up is not the other's.
void check_threads() {
  struct Task {
    int64_t rows;
    Weight weight;
    std::vector<float> x, out;
    std::vector<uint16_t> halves;
    int differing;
  };
  constexpr int64_t I = 1058, O = 128;
  Task tasks[] = {{3, {}, {}, {}, {}, 0}, {3, {}, {}, {}, {}, 0}, {40, {}, {}, {}, {}, 0}};
  const auto multiply = [](const Task& task) {
    return multiplied(task.weight, task.rows, [&](float* out, int64_t rows, int64_t first, int64_t last) {
      if (kernels().dots) return kernels().dots(task.halves.data(), task.weight.panels, out, rows, first, last);
      kernels().panels(task.x.data(), task.weight.panels, out, rows, first, last);
    });
  };
  for (Task& task : tasks) {
    fill(task.weight, task.rows == 3 ? Stored::kBF16 : Stored::kInt8, I, O, {});
    task.x = numbers(task.rows * I);
    for (float value : task.x) {
      uint32_t bits;
      __builtin_memcpy(&bits, &value, sizeof bits);
      task.halves.push_back(bits >> 16);
    }
    task.out = multiply(task);
  }
  std::vector<std::thread> threads;
  for (Task& task : tasks)
    threads.emplace_back([&task, multiply] {
      for (int64_t n = 0; n < 2000 / task.rows; ++n) task.differing += multiply(task) != task.out;
    });
  for (std::thread& thread : threads) thread.join();
  for (const Task& task : tasks) expect(!task.differing, "products of threads at once", task.differing);
}

// Each number of half precision, as a product has it: 1 times it.
void check_halves() {
  for (uint32_t first = 0; first < 1 << 16; first += PANEL) {
    uint16_t half[PANEL];
    float out[PANEL];
    for (int lane = 0; lane < PANEL; ++lane) half[lane] = static_cast<uint16_t>(first + lane);
    const float one = 1;
    kernels().panels(&one, {Stored::kF16, half, nullptr, nullptr, 1, PANEL, 1, false}, out, 1, 0, 1);
    for (int lane = 0; lane < PANEL; ++lane) {
      const float value = of_half(half[lane]);
      expect(out[lane] == value || (std::isnan(value) && std::isnan(out[lane])), "half precision", first + lane);
    }
  }
}

// Attention in groups of `most` slots at most, several parts of growing size.
std::vector<float> attended(Attention of, int64_t most) {
  const Groups found = groups_of(of, most);
  std::vector<float> out(of.slots * of.tokens * of.heads * of.head_dim, NOT_A_NUMBER);
  of.order = found.order.data(), of.groups = found.groups.data(), of.out = out.data();
  const int64_t heads = static_cast<int64_t>(found.groups.size()) * of.kv_heads;
  for (int64_t head = 0, each = 1; head < heads; head += each++) kernels().attend(of, head, std::min(head + each, heads));
  return out;
}

// Attention of one query [H] over `count` keys and values [count, H]; `sink` may be null.
std::vector<double> plainly(const float* q, const double* keys, const double* values, int64_t count, int64_t H, float cap,
                            const float* sink) {
  std::vector<double> score(count), sum(H, 0.0);
  double most = sink ? *sink : -1e300;
  for (int64_t s = 0; s < count; ++s) {
    double dot = 0;
    for (int64_t h = 0; h < H; ++h) dot += q[h] * keys[s * H + h];
    dot /= std::sqrt(static_cast<double>(H));
    score[s] = cap > 0 ? cap * std::tanh(dot / cap) : dot;
    most = std::max(most, score[s]);
  }
  double whole = sink ? std::exp(*sink - most) : 0;
  for (int64_t s = 0; s < count; ++s) {
    const double weight = std::exp(score[s] - most);
    whole += weight;
    for (int64_t h = 0; h < H; ++h) sum[h] += weight * values[s * H + h];
  }
  for (double& value : sum) value /= whole;
  return sum;
}

// The larger of `worst` and what `out` is off by.
double worse(double worst, const std::vector<double>& plain, const float* out) {
  for (size_t h = 0; h < plain.size(); ++h) worst = larger(worst, std::fabs(out[h] - plain[h]));
  return worst;
}

void check_attention(bool coded, int64_t W, int64_t K, int64_t G, int64_t H, int32_t window, float cap,
                     bool sinks = false, int64_t R = 128) {
  const int64_t J = 3, L = 2, P = 9, N = K * G, layer = 1;
  const auto rows = static_cast<int32_t>(R);
  const std::vector<int32_t> length = {0, 1, rows - 1, 3 * rows, rows, rows + 1, rows * 3 / 2 + 8, 3 * rows, rows * 7 / 3};
  const int64_t B = length.size();
  std::vector<int32_t> page(B * J, -7);
  std::vector<float> cache(coded ? 0 : L * P * K * R * 2 * H, NOT_A_NUMBER);
  std::vector<int8_t> cells = coded ? codes(L * P * K * R * 2 * H) : std::vector<int8_t>();
  std::vector<float> scale(coded ? L * P * K * 2 * R : 0, NOT_A_NUMBER);
  const std::vector<float> q = numbers(B * W * N * H), fresh = numbers(B * W * K * 2 * H), sink = numbers(sinks ? N : 0);
  int32_t next = 2;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j * R < length[b]; ++j) {  // whole pages of most are shared: one by six slots, one by three
      const bool shared = j < 2 && (j + 1) * R <= length[b];
      page[b * J + j] = shared ? static_cast<int32_t>(j) : next++;
    }
  auto row = [&](int64_t b, int64_t k, int64_t s) { return ((layer * P + page[b * J + s / R]) * K + k) * R + s % R; };
  auto first = [&](int64_t b, int64_t w) { return window ? std::max<int64_t>(0, length[b] + w - window + 1) : 0; };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k)
      for (int64_t s = first(b, 0); s < length[b]; ++s) {
        const std::vector<float> values = numbers(2 * H);
        for (int64_t h = 0; h < 2 * H && !coded; ++h) cache[row(b, k, s) * 2 * H + h] = values[h];
        if (coded) {
          const int64_t at = row(b, k, s) / R * 2 * R + s % R;
          scale[at] = 0.01f * std::fabs(values[0]), scale[at + R] = 0.01f * std::fabs(values[1]);
        }
      }
  auto value = [&](int64_t b, int64_t k, int64_t s, int64_t h) -> double {
    if (s >= length[b]) return fresh[((b * W + s - length[b]) * K + k) * 2 * H + h];
    const int64_t at = row(b, k, s);
    if (!coded) return cache[at * 2 * H + h];
    return static_cast<double>(cells[at * 2 * H + h]) * scale[at / R * 2 * R + s % R + (h < H ? 0 : R)];
  };
  const void* stored = coded ? static_cast<const void*>(cells.data()) : static_cast<const void*>(cache.data());
  const Attention of{{stored, coded ? scale.data() : nullptr, page.data(), N, K, H, L, P, R, J,
                      static_cast<int32_t>(layer), window, cap, sinks ? sink.data() : nullptr},
                     q.data(), fresh.data(), length.data(), nullptr, B, W, nullptr, nullptr};
  const std::vector<float> out = attended(of, 1);
  for (int64_t most : {2, 4, 32}) {
    const std::vector<float> together = attended(of, most);
    bool same = true;
    for (size_t i = 0; i < out.size(); ++i) same = same && together[i] == out[i];
    expect(same, "attention in groups is as that of each slot alone", most);
  }
  double worst = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t k = 0; k < K; ++k) {
      std::vector<double> keys, values;
      for (int64_t s = first(b, 0); s < length[b] + W; ++s)
        for (int64_t h = 0; h < H; ++h) keys.push_back(value(b, k, s, h)), values.push_back(value(b, k, s, H + h));
      for (int64_t w = 0; w < W; ++w)
        for (int64_t n = k * G; n < (k + 1) * G; ++n) {
          const int64_t at = ((b * W + w) * N + n) * H, from = first(b, w), skipped = (from - first(b, 0)) * H;
          const auto plain = plainly(&q[at], &keys[skipped], &values[skipped], length[b] + w + 1 - from, H, cap,
                                     sinks ? &sink[n] : nullptr);
          worst = worse(worst, plain, &out[at]);
        }
    }
  expect(worst < 1e-5, coded ? "attention over int8" : "attention", worst);
}

void check_attentions() {
  for (bool coded : {false, true})
    for (int64_t H : {8, 16, 24, 64, 80, 96, 128})
      for (int64_t G : {1, 2, 3, 4, 7}) check_attention(coded, 1, 2, G, H, 0, 0);
  for (bool coded : {false, true})
    for (int64_t R : {16, 20, 64}) check_attention(coded, 2, 2, 3, 64, 0, 0, false, R);
  for (bool coded : {false, true})
    for (int64_t W : {2, 3, 5, 8})
      for (int64_t G : {1, 3}) check_attention(coded, W, 2, G, 24, 0, 0);
  for (bool coded : {false, true})
    for (int64_t W : {1, 4})
      for (int32_t window : {1, 2, 3, 100, 128, 129, 1000}) check_attention(coded, W, 1, 3, 64, window, 5.0f);
  for (bool coded : {false, true})
    for (int64_t W : {1, 3})
      for (int32_t window : {0, 1, 128}) check_attention(coded, W, 2, 4, 64, window, 0, true);
}

// Texts of which `start` rows are cached and T are a piece's. Cached rows and scales that no query sees are NaN.
void check_chunk(bool coded, int64_t T, int64_t K, int64_t G, int64_t H, int32_t window, float cap, bool sinks = false) {
  const int64_t R = 128, J = 3, L = 2, P = 8, N = K * G, layer = 1;
  const std::vector<int32_t> start = {0, 128, 384, 256};
  const int64_t B = start.size();
  std::vector<int32_t> page(B * J, -7);
  std::vector<float> cache(coded ? 0 : L * P * K * R * 2 * H, NOT_A_NUMBER);
  std::vector<int8_t> cells = coded ? codes(L * P * K * R * 2 * H) : std::vector<int8_t>();
  std::vector<float> scale(coded ? L * P * K * 2 * R : 0, NOT_A_NUMBER);
  const std::vector<int32_t> count = {static_cast<int32_t>(T), static_cast<int32_t>(T / 2), 0, static_cast<int32_t>(T - 1)};
  std::vector<float> q = numbers(B * T * N * H), k = numbers(B * T * K * H), v = numbers(B * T * K * H);
  for (int64_t b = 0; b < B; ++b)
    for (auto [rows, width] : {std::pair{&q, N * H}, {&k, K * H}, {&v, K * H}})
      std::fill_n(rows->begin() + (b * T + count[b]) * width, (T - count[b]) * width, NOT_A_NUMBER);
  const std::vector<float> sink = numbers(sinks ? N : 0);
  std::vector<float> out(B * T * N * H, NOT_A_NUMBER);
  int32_t next = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t j = 0; j * R < start[b]; ++j) page[b * J + j] = next++ % P;
  auto row = [&](int64_t b, int64_t of_kv, int64_t s) {
    return ((layer * P + page[b * J + s / R]) * K + of_kv) * R + s % R;
  };
  for (int64_t b = 0; b < B; ++b)
    for (int64_t of_kv = 0; of_kv < K; ++of_kv)
      for (int64_t s = window ? std::max<int64_t>(0, start[b] - window + 1) : 0; s < start[b]; ++s) {
        const std::vector<float> values = numbers(2 * H);
        if (!coded) std::copy(values.begin(), values.end(), cache.begin() + row(b, of_kv, s) * 2 * H);
        if (coded) {
          const int64_t at = row(b, of_kv, s) / R * 2 * R + s % R;
          scale[at] = 0.01f * std::fabs(values[0]), scale[at + R] = 0.01f * std::fabs(values[1]);
        }
      }
  auto value = [&](int64_t b, int64_t of_kv, int64_t s, int64_t h, bool is_v) -> double {
    if (s >= start[b]) return (is_v ? v : k)[((b * T + s - start[b]) * K + of_kv) * H + h];
    const int64_t at = row(b, of_kv, s), cell = at * 2 * H + (is_v ? H : 0) + h;
    return coded ? static_cast<double>(cells[cell]) * scale[at / R * 2 * R + s % R + (is_v ? R : 0)] : cache[cell];
  };
  const void* stored = coded ? static_cast<const void*>(cells.data()) : static_cast<const void*>(cache.data());
  const Chunk of{{stored, coded ? scale.data() : nullptr, page.data(), N, K, H, L, P, R, J, static_cast<int32_t>(layer),
                  window, cap, sinks ? sink.data() : nullptr},
                 q.data(), k.data(), v.data(), start.data(), count.data(), out.data(), B, T};
  const int64_t parts = parts_of(of);
  for (int64_t part = 0, each = 1; part < parts; part += each++) kernels().attend_chunk(of, part, std::min(part + each, parts));
  double worst = 0;
  for (int64_t b = 0; b < B; ++b)
    for (int64_t of_kv = 0; of_kv < K; ++of_kv) {
      const auto first = [&](int64_t x) { return window ? std::max<int64_t>(0, start[b] + x - window + 1) : 0; };
      std::vector<double> keys, values;
      for (int64_t s = first(0); s < start[b] + count[b]; ++s)
        for (int64_t h = 0; h < H; ++h)
          keys.push_back(value(b, of_kv, s, h, false)), values.push_back(value(b, of_kv, s, h, true));
      for (int64_t x = count[b]; x < T; ++x)
        for (int64_t i = of_kv * G * H; i < (of_kv + 1) * G * H; ++i)
          expect(out[(b * T + x) * N * H + i] == 0, "padding of a chunk", out[(b * T + x) * N * H + i]);
      for (int64_t x = 0; x < count[b]; ++x)
        for (int64_t n = of_kv * G; n < (of_kv + 1) * G; ++n) {
          const int64_t at = ((b * T + x) * N + n) * H, skipped = (first(x) - first(0)) * H;
          const auto plain = plainly(&q[at], &keys[skipped], &values[skipped], start[b] + x + 1 - first(x), H, cap,
                                     sinks ? &sink[n] : nullptr);
          worst = worse(worst, plain, &out[at]);
        }
    }
  expect(worst < 1e-5, coded ? "attention of a chunk over int8" : "attention of a chunk", worst);
}

void check_chunks() {
  for (bool coded : {false, true})
    for (int64_t T : {1, 31, 33, 130})
      for (int64_t H : {8, 20, 64, 128}) check_chunk(coded, T, 2, H == 20 ? 3 : 1, H, 0, 0);
  for (bool coded : {false, true})
    for (int64_t T : {5, 70})
      for (int32_t window : {1, 2, 31, 32, 33, 64, 100, 128, 129, 2147483647}) check_chunk(coded, T, 1, 2, 16, window, 5.0f);
  for (int32_t window : {0, 1, 128}) check_chunk(false, 40, 2, 4, 24, window, 0, true);
}

void check_norms() {
  for (int64_t rows : {1, 3})
    for (int64_t width : {1, 5, 16, 33, 576}) {
      const std::vector<float> x = numbers(rows * width), weight = numbers(width);
      std::vector<float> out(rows * width, NOT_A_NUMBER);
      kernels().rms_norm(x.data(), weight.data(), out.data(), rows, width, 0.5f);
      double worst = 0;
      for (int64_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (int64_t i = 0; i < width; ++i) squares += double{x[r * width + i]} * x[r * width + i];
        for (int64_t i = 0; i < width; ++i) {
          const double expected = weight[i] * x[r * width + i] / std::sqrt(squares / width + 0.5);
          const double error = std::fabs(out[r * width + i] - expected) / (std::fabs(expected) + 1e-30);
          worst = error <= worst ? worst : error;  // a NaN is kept
        }
      }
      expect(worst < 1e-6, "a norm", worst);
    }
}

// What the groups are: order, and {first, count, pages} of each.
void check_groups() {
  const std::vector<int32_t> page = {
      5, 6, 7,   // sees a page and a half
      1, 2, 9,   // two and a half
      5, 6, 8,   // all three
      1, 2, 3,   // two and a half
      5, 6, 4,   // all three
      1, 2, 0,   // nothing
  };
  const std::vector<int32_t> length = {24, 40, 48, 40, 48, 0};
  Attention of{};
  of.page = page.data(), of.pages_per_text = 3, of.page_rows = 16, of.length = length.data(), of.slots = 6, of.tokens = 2;
  const auto told = [&](int64_t most) {
    std::vector<std::vector<int64_t>> groups;
    const Groups found = groups_of(of, most);
    for (const Group& group : found.groups) {
      groups.push_back({group.pages});
      std::vector<int64_t> slots(found.order.begin() + group.first, found.order.begin() + group.first + group.count);
      std::sort(slots.begin(), slots.end());
      groups.back().insert(groups.back().end(), slots.begin(), slots.end());
    }
    std::sort(groups.begin(), groups.end());
    return groups;
  };
  using Told = std::vector<std::vector<int64_t>>;
  expect(told(1) == Told{{0, 0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}, {0, 5}}, "slots alone", 1);
  expect(told(8) == Told{{0, 5}, {1, 0, 2, 4}, {2, 1, 3}}, "groups of those that begin alike", 8);
  expect(told(2) == Told{{0, 2}, {0, 5}, {1, 0, 4}, {2, 1, 3}}, "groups of two", 2);
  of.window = 42;  // of two tokens the second sees 40 cached rows
  expect(told(8) == Told{{0, 0}, {0, 2}, {0, 4}, {0, 5}, {2, 1, 3}}, "a window that leaves rows out", 42);
}

}  // namespace

// Checks the levels that are named, each of which this CPU must run, or all that it does run.
int main(int count, char** names) {
  const bool is_named = count > 1;
  const std::vector<const char*> named(names + 1, names + count);
  const std::vector<const char*> all = {"generic", "avx2", "avx512", "avx512_bf16", "amx"};
  check_sharing();
  check_groups();
  int levels = 0;
  for (const char* level : is_named ? named : all) {
    if (!use_level(level)) {
      std::printf("%s: not on this CPU\n", level);
      failures += is_named;
      continue;
    }
    ++levels;
    check_halves();
    check_products();
    check_threads();
    check_attentions();
    check_chunks();
    check_norms();
    std::printf("%s: checked\n", level);
  }
  expect(levels > 0 && !use_level("avx9000"), "levels by their names", levels);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
