// Rows times panels of weights. Included once for each level; see kernels.h for how weights are stored.
//
// Some vectors of a panel are multiplied at once, outputs from j on. The sums of few rows, ROWS of codes, stay in registers
// while the panel streams by. With more rows DEPTH inputs of a panel are taken at a time, unpacked once where they are
// codes, so that they stay in the nearest cache while PORTION rows after the others pass over them; the portions fetch
// what comes next.
//
// Every sum is made input after input, by tiles 32 inputs after 32, whatever the number of rows: a row's result does not
// depend on the others.

constexpr int DEPTH = 256;  // a multiple of the inputs of every block, or a divisor; or a block has all inputs
constexpr int HALF = PANEL / 2;
constexpr int UNROLLED = 4;  // a multiple of each STEP
constexpr int64_t LINE = 64;  // bytes that a cache fetches at once
constexpr int64_t AHEAD = 32 * LINE;  // so long before they are read codes are fetched
constexpr int TILE_PAIRS = 16;  // pairs of inputs of a tile; DEPTH is a multiple

// Two inputs in bfloat16, the earlier in the low half.
using Pair = uint32_t;

template <typename Lane>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef F type;
};
template <>
struct VectorOf<Pair> {
  typedef U32 type;
};
template <typename Lane>
using Vector = typename VectorOf<Lane>::type;

template <typename Lane>
constexpr bool BY_TILES = DOTS == 2 && std::is_same_v<Lane, Pair>;
// Rows of a portion, at most.
template <typename Lane>
constexpr int64_t ROWS_TOGETHER = BY_TILES<Lane> ? 32 : PORTION;

static INLINE void multiply_add(F& sum, F x, F w) { sum += x * w; }
#if DOTS == 1
static INLINE void multiply_add(F& sum, U32 x, U32 w) { sum = dot(sum, x, w); }
#endif

// Weights as they are multiplied. What is read beside them, `next`, comes into the cache meanwhile.
template <typename Lane>
struct Plain {
  using X = Lane;
  static constexpr int STEP = 1;  // inputs, or pairs of them, that are read at once
  static constexpr int KEPT = 0;  // vectors beside those read
  const Lane* panel;
  const char* next;
  int64_t stride;  // bytes of `next` for each input

  INLINE void read(int64_t i, int j, int, Vector<Lane> (&w)[STEP]) const { w[0] = load(panel + i * PANEL + j); }
};

// bfloat16 as floats.
struct Widened {
  using X = float;
  static constexpr int STEP = 2;
  static constexpr int KEPT = 0;
  static constexpr int64_t BYTES = 2 * PANEL;  // of an input
  const Pair* panel;

  INLINE const char* at(int64_t i) const { return reinterpret_cast<const char*>(panel) + i * BYTES; }
  INLINE void read(int64_t i, int j, int, F (&w)[STEP]) const {
    const U32 pair = load(panel + i * (PANEL / 2) + j);
    w[0] = as_floats(pair << 16), w[1] = as_floats(pair & 0xffff0000);
  }
};

// Half precision as floats.
struct Halves {
  using X = float;
  static constexpr int STEP = 1;
  static constexpr int KEPT = 0;
  static constexpr int64_t BYTES = 2 * PANEL;
  const Half* panel;

  INLINE const char* at(int64_t i) const { return reinterpret_cast<const char*>(panel) + i * BYTES; }
  INLINE void read(int64_t i, int j, int, F (&w)[STEP]) const { w[0] = load(panel + i * PANEL + j); }
};

// Codes whose scale multiplies the whole sum.
struct Codes8 {
  using X = float;
  static constexpr int STEP = 1;
  static constexpr int KEPT = 0;
  static constexpr int64_t BYTES = PANEL;
  const int8_t* panel;

  INLINE const char* at(int64_t i) const { return reinterpret_cast<const char*>(panel) + i * BYTES; }
  INLINE void read(int64_t i, int j, int, F (&w)[STEP]) const { w[0] = load(panel + i * PANEL + j); }
};

// The same by pairs of inputs: bfloat16 holds each code exactly, in the upper half of a float.
struct PairedCodes8 {
  using X = Pair;
  static constexpr int STEP = 1;
  static constexpr int KEPT = 0;
  static constexpr int64_t BYTES = 2 * PANEL;
  const int8_t* panel;

  INLINE const char* at(int64_t i) const { return reinterpret_cast<const char*>(panel) + i * BYTES; }
  INLINE void read(int64_t i, int j, int, U32 (&w)[STEP]) const {
    const int8_t* row = panel + 2 * i * PANEL + j;
    const F low = load(row), high = load(row + PANEL);
    w[0] = as_bits(low) >> 16 | as_bits(high);
  }
};

// Scales and offsets of codes in blocks, those of one block at hand.
struct Grid {
  const void *scale, *offset;  // of the panel
  bool is_f16;
  int64_t block;  // inputs
  F scales[4], offsets[4];

  INLINE F at(const void* grid, int64_t i) const {
    return is_f16 ? load(static_cast<const Half*>(grid) + i) : load(static_cast<const float*>(grid) + i);
  }
  template <int V>
  INLINE void start(int64_t q, int j) {
    for (int v = 0; v < V; ++v) {
      const int64_t where = q * PANEL + j + v * LANES;
      scales[v] = at(scale, where), offsets[v] = offset ? at(offset, where) : F{};
    }
  }
  INLINE F weight(F code, int v) const { return code * scales[v] + offsets[v]; }
};

struct Blocks8 {
  using X = float;
  static constexpr int STEP = 1;
  static constexpr int KEPT = 8;
  static constexpr int64_t BYTES = PANEL;
  const int8_t* panel;
  Grid grid;

  INLINE const char* at(int64_t i) const { return reinterpret_cast<const char*>(panel) + i * BYTES; }
  INLINE void read(int64_t i, int j, int v, F (&w)[STEP]) const { w[0] = grid.weight(load(panel + i * PANEL + j), v); }
};

struct Blocks4 {
  using X = float;
  static constexpr int STEP = 2;
  static constexpr int KEPT = 8;
  static constexpr int64_t BYTES = PANEL / 2;
  const uint8_t* panel;
  Grid grid;

  INLINE const char* at(int64_t i) const { return reinterpret_cast<const char*>(panel) + i * BYTES; }
  INLINE void read(int64_t i, int j, int v, F (&w)[STEP]) const {
    const I32 pair = widened(panel + i * (PANEL / 2) + j);
    w[0] = grid.weight(low_half(pair), v), w[1] = grid.weight(high_half(pair), v);
  }
};

// Codes that stand for a table's values.
struct Table4 : Blocks4 {
  static constexpr int KEPT = 5;
  Table table;

  INLINE void read(int64_t i, int j, int v, F (&w)[STEP]) const {
    const I32 pair = widened(panel + i * (PANEL / 2) + j);
    w[0] = looked_up(table, pair) * grid.scales[v], w[1] = looked_up(table, pair >> 4) * grid.scales[v];
  }
};

// Floats of 8 bits. Their scales make up for what `load` gives.
struct Floats8 {
  using X = float;
  static constexpr int STEP = 1;
  static constexpr int KEPT = 5;
  static constexpr int64_t BYTES = PANEL;
  struct Scales : Grid {
    template <int V>
    INLINE void start(int64_t q, int j) {
      Grid::start<V>(q, j);
      for (int v = 0; v < V; ++v) scales[v] *= OF_FLOAT8;
    }
  };
  const Float8* panel;
  Scales grid;

  INLINE const char* at(int64_t i) const { return reinterpret_cast<const char*>(panel) + i * BYTES; }
  INLINE void read(int64_t i, int j, int v, F (&w)[STEP]) const { w[0] = load(panel + i * PANEL + j) * grid.scales[v]; }
};

// Brings memory into the nearest cache, once for many products: it takes instructions that could multiply.
static INLINE void fetch(const char* from, int64_t bytes) {
  for (const char* end = from + bytes; from < end; from += LINE) __builtin_prefetch(from);
}

// What is read next, as much as UNROLLED inputs are.
template <typename Codes>
static INLINE void fetch_next(const Codes& codes, int64_t i) {
  fetch(codes.at(i) + AHEAD, UNROLLED * Codes::BYTES);
}
template <typename Lane>
static INLINE void fetch_next(const Plain<Lane>& codes, int64_t i) {
  fetch(codes.next + i * codes.stride, UNROLLED * codes.stride);
}

template <typename Codes>
constexpr bool IN_BLOCKS =
    std::is_same_v<Codes, Blocks8> || std::is_base_of_v<Blocks4, Codes> || std::is_same_v<Codes, Floats8>;

// Calls each(from, end) for the blocks of inputs that share a scale, whose scales are at hand then; others are one block.
template <int V, typename Codes, typename Each>
static INLINE void each_block(Codes& codes, int64_t first, int64_t last, int j, const Each& each) {
  if constexpr (IN_BLOCKS<Codes>) {
    int64_t q = first / codes.grid.block;
    for (int64_t from = first; from < last; from += codes.grid.block, ++q) {
      codes.grid.template start<V>(q, j);
      each(from, std::min(from + codes.grid.block, last));
    }
  } else {
    each(first, last);
  }
}

// Where a row's sums go, and the scales that end them, or null.
struct Sums {
  float* out;
  int64_t row;
  bool adds;  // to what is there
  const float* scale;
};

// Vectors of a panel that are multiplied at once: four where the registers hold the sums of N rows, their activations and
// what the codes keep there, or two; one vector's sums are too few for few rows.
template <int N, typename Codes>
constexpr int VECTORS = 4 * LANES <= PANEL && N * (4 + Codes::STEP) + Codes::KEPT <= REGISTERS ? 4
                        : 2 * N + 3 <= REGISTERS                                                ? 2
                                                                                                : 1;

template <int N, int V, typename Codes>
static INLINE void add_inputs(const typename Codes::X* x, int64_t x_row, const Codes& codes, int64_t i, int j,
                              F (&sums)[N][V]) {
  using Lane = typename Codes::X;
  constexpr int STEP = Codes::STEP;
  Vector<Lane> w[V][STEP];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    codes.read(i, j + v * LANES, v, w[v]);
    if constexpr (V == 4)  // at once: so the fewest registers are in use
#pragma GCC unroll 2
      for (int s = 0; s < STEP; ++s)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) multiply_add(sums[n][v], splat(x[n * x_row + i + s]), w[v][s]);
  }
  if constexpr (V != 4)
#pragma GCC unroll 2
    for (int s = 0; s < STEP; ++s)
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        const Vector<Lane> value = splat(x[n * x_row + i + s]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) multiply_add(sums[n][v], value, w[v][s]);
      }
}

// out[N, 32] (+)= x[N, first ... last) times the panel; `x` and `out` have rows of their own lengths.
template <int N, typename Codes>
static void multiply(const typename Codes::X* x, int64_t x_row, const Codes& given, int64_t first, int64_t last,
                     const Sums& to) {
  constexpr int V = VECTORS<N, Codes>;
  Codes codes = given;  // copied by the caller, its members would be read together before they are in memory
  for (int j = 0; j < PANEL; j += V * LANES) {
    F sums[N][V];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[n][v] = to.adds ? load(to.out + n * to.row + j + v * LANES) : F{};
    each_block<V>(codes, first, last, j, [&](int64_t i, int64_t end) INLINED {
      for (; i + UNROLLED <= end; i += UNROLLED) {
        fetch_next(codes, i);
#pragma GCC unroll 4
        for (int u = 0; u < UNROLLED; u += Codes::STEP) add_inputs<N, V>(x, x_row, codes, i + u, j, sums);
      }
      for (; i < end; i += Codes::STEP) add_inputs<N, V>(x, x_row, codes, i, j, sums);
    });
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if (to.scale) sums[n][v] *= load(to.scale + j + v * LANES);
        store(to.out + n * to.row + j + v * LANES, sums[n][v]);
      }
  }
}

// The same for `rows` rows, at most N.
template <int N, typename Codes>
static INLINE void multiply_rows(int64_t rows, const typename Codes::X* x, int64_t x_row, const Codes& codes,
                                 int64_t first, int64_t last, const Sums& to) {
  if constexpr (N > 0) {
    if (rows == N) return multiply<N>(x, x_row, codes, first, last, to);
    multiply_rows<N - 1>(rows, x, x_row, codes, first, last, to);
  }
}

// A portion of rows.
template <typename Lane>
static INLINE void multiply_portion(int64_t rows, const Lane* x, int64_t x_row, const Plain<Lane>& weights,
                                    int64_t inputs, const Sums& to) {
  multiply_rows<PORTION>(rows, x, x_row, weights, 0, inputs, to);
}
#if DOTS == 2
#include "tiles.h"
#endif

// All rows, in even portions, each of which fetches its share of the `bytes` of each input at `next`.
template <typename Lane>
static void multiply_all(int64_t rows, const Lane* x, int64_t x_row, const Lane* panel, int64_t inputs,
                         const char* next, int64_t bytes, Sums to) {
  const int64_t portions = (rows + ROWS_TOGETHER<Lane> - 1) / ROWS_TOGETHER<Lane>;
  const int64_t stride = (bytes + portions - 1) / portions, least = rows / portions, larger = rows % portions;
  for (int64_t p = 0; p < portions; ++p) {
    const int64_t count = least + (p < larger);
    const Plain<Lane> codes{panel, next + p * inputs * stride, stride};
    multiply_portion(count, x, x_row, codes, inputs, to);
    x += count * x_row, to.out += count * to.row;
  }
}

// One row times two panels side by side: of one the sums are too few to keep the multipliers busy.
template <typename Codes>
static void multiply_two(const float* x, Codes left, Codes right, int64_t inputs, const Sums& to) {
  constexpr int V = VECTORS<1, Codes>;
  for (int j = 0; j < PANEL; j += V * LANES) {
    F sums[2][1][V] = {};
    each_block<V>(left, 0, inputs, j, [&](int64_t from, int64_t last) INLINED {
      each_block<V>(right, from, last, j, [&](int64_t i, int64_t end) INLINED {
        for (; i + UNROLLED <= end; i += UNROLLED) {
          fetch_next(left, i);
          fetch_next(right, i);
#pragma GCC unroll 4
          for (int u = 0; u < UNROLLED; u += Codes::STEP) {
            add_inputs<1, V>(x, inputs, left, i + u, j, sums[0]);
            add_inputs<1, V>(x, inputs, right, i + u, j, sums[1]);
          }
        }
        for (; i < end; i += Codes::STEP) {
          add_inputs<1, V>(x, inputs, left, i, j, sums[0]);
          add_inputs<1, V>(x, inputs, right, i, j, sums[1]);
        }
      });
    });
#pragma GCC unroll 2
    for (int panel = 0; panel < 2; ++panel)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int at = panel * PANEL + j + v * LANES;
        F sum = sums[panel][0][v];
        if (to.scale) sum *= load(to.scale + at);
        store(to.out + at, sum);
      }
  }
}

// The scales of whole sums of a panel, or null.
static INLINE const float* scale_at(const Panels& weight, int64_t panel) {
  return weight.stored == Stored::kInt8 ? static_cast<const float*>(weight.scale) + panel * PANEL : nullptr;
}

// One row times whole panels of codes from `first` on, in twos. Returns the first panel that is left.
template <typename CodesAt>
static int64_t in_twos(const float* x, const Panels& weight, float* out, int64_t first, int64_t last,
                       const CodesAt& codes_at) {
  const int64_t O = weight.outputs, whole = std::min(last, O / PANEL);
  for (; first + 2 <= whole; first += 2) {
    const Sums to{out + first * PANEL, O, false, scale_at(weight, first)};
    multiply_two(x, codes_at(first), codes_at(first + 1), weight.inputs, to);
  }
  return first;
}

// A panel of codes. `inputs` are pairs where x is.
template <typename Codes>
static void multiply_panel(const typename Codes::X* x, Codes codes, int64_t inputs, int64_t rows, Sums to) {
  using Lane = typename Codes::X;
  if constexpr (!BY_TILES<Lane>)
    if (rows <= ROWS) return multiply_rows<ROWS>(rows, x, inputs, codes, 0, inputs, to);
  alignas(64) Lane unpacked[DEPTH * PANEL];
  const float* scale = to.scale;
  for (int64_t first = 0; first < inputs; first += DEPTH) {
    const int64_t last = first + DEPTH < inputs ? first + DEPTH : inputs;
    constexpr int V = VECTORS<1, Codes>;
    for (int j = 0; j < PANEL; j += V * LANES)
      each_block<V>(codes, first, last, j, [&](int64_t i, int64_t end) INLINED {
        for (; i < end; i += Codes::STEP) {
          if (i % UNROLLED == 0) fetch_next(codes, i);
          for (int v = 0; v < V; ++v) {
            Vector<Lane> w[Codes::STEP];
            codes.read(i, j + v * LANES, v, w);
            for (int s = 0; s < Codes::STEP; ++s) store(unpacked + (i - first + s) * PANEL + j + v * LANES, w[s]);
          }
        }
      });
    to.adds = first > 0, to.scale = last == inputs ? scale : nullptr;
    multiply_all(rows, x + first, inputs, unpacked, last - first, codes.at(last), Codes::BYTES, to);
  }
}

// A panel that is multiplied as it lies.
template <typename Lane>
static void multiply_panel(const Lane* x, const Lane* panel, int64_t inputs, int64_t rows, Sums to) {
  constexpr int64_t BYTES = PANEL * sizeof(Lane), INPUTS_AHEAD = 64;
  const auto* bytes = reinterpret_cast<const char*>(panel);
  if (rows <= ROWS_TOGETHER<Lane>)
    return multiply_portion(rows, x, inputs, Plain<Lane>{panel, bytes + INPUTS_AHEAD * BYTES, BYTES}, inputs, to);
  // In even runs: each takes the sums from memory and back, a short one for few inputs.
  constexpr int64_t STEP = BY_TILES<Lane> ? TILE_PAIRS : UNROLLED;
  const int64_t runs = (inputs + DEPTH - 1) / DEPTH, depth = (inputs + runs * STEP - 1) / (runs * STEP) * STEP;
  for (int64_t first = 0; first < inputs; first += depth) {
    const int64_t last = first + depth < inputs ? first + depth : inputs;
    to.adds = first > 0;
    multiply_all(rows, x + first, inputs, panel + first * PANEL, last - first, bytes + last * BYTES, BYTES, to);
  }
}

// Calls multiply(panel, sums) for each panel; a last one of fewer outputs is computed aside.
template <typename Multiply>
static void of_panels(const Panels& weight, float* out, int64_t rows, int64_t first, int64_t last,
                      const Multiply& multiply) {
  const int64_t O = weight.outputs;
  for (int64_t p = first; p < last; ++p) {
    const int64_t count = O - p * PANEL < PANEL ? O - p * PANEL : PANEL;
    const float* scale = scale_at(weight, p);
    if (count == PANEL) {
      multiply(p, Sums{out + p * PANEL, O, false, scale});
      continue;
    }
    std::vector<float> aside(rows * PANEL);
    multiply(p, Sums{aside.data(), PANEL, false, scale});
    for (int64_t r = 0; r < rows; ++r) std::copy_n(aside.data() + r * PANEL, count, out + r * O + p * PANEL);
  }
}

static void panels(const float* x, const Panels& weight, float* out, int64_t rows, int64_t first, int64_t last) {
  const int64_t I = weight.inputs;
  const auto* bytes = static_cast<const uint8_t*>(weight.code);
  const auto codes8 = [=](int64_t p) { return Codes8{reinterpret_cast<const int8_t*>(bytes) + p * I * PANEL}; };
  const auto grid = [=, &weight](int64_t p) {
    const int64_t at = p * weight.blocks * PANEL * (weight.grid_is_f16 ? sizeof(Half) : sizeof(float));
    const auto* offset = weight.offset ? static_cast<const char*>(weight.offset) + at : nullptr;
    return Grid{static_cast<const char*>(weight.scale) + at, offset, weight.grid_is_f16, I / weight.blocks, {}, {}};
  };
  const auto blocks8 = [=](int64_t p) { return Blocks8{codes8(p).panel, grid(p)}; };
  const auto blocks4 = [=](int64_t p) { return Blocks4{bytes + p * I / 2 * PANEL, grid(p)}; };
  const auto table4 = [=, table = weight.table ? table_of(weight.table) : Table{}](int64_t p) {
    return Table4{blocks4(p), table};
  };
  const auto floats8 = [=](int64_t p) {
    return Floats8{reinterpret_cast<const Float8*>(bytes) + p * I * PANEL, {grid(p)}};
  };
#if LANES == 16
  if (rows == 1 && weight.stored == Stored::kFloat8) first = in_twos(x, weight, out, first, last, floats8);
  if (rows == 1 && weight.stored == Stored::kInt8) first = in_twos(x, weight, out, first, last, codes8);
  if (rows == 1 && weight.stored == Stored::kBlocks8) first = in_twos(x, weight, out, first, last, blocks8);
  if (rows == 1 && weight.stored == Stored::kBlocks4) first = in_twos(x, weight, out, first, last, blocks4);
  if (rows == 1 && weight.stored == Stored::kTable4) first = in_twos(x, weight, out, first, last, table4);
#endif
  of_panels(weight, out, rows, first, last, [&](int64_t p, const Sums& to) {
    switch (weight.stored) {
      case Stored::kF32:
        return multiply_panel(x, static_cast<const float*>(weight.code) + p * I * PANEL, I, rows, to);
      case Stored::kBF16:
        return multiply_panel(x, Widened{static_cast<const Pair*>(weight.code) + p * I / 2 * PANEL}, I, rows, to);
      case Stored::kF16:
        return multiply_panel(x, Halves{static_cast<const Half*>(weight.code) + p * I * PANEL}, I, rows, to);
      case Stored::kInt8:
        return multiply_panel(x, codes8(p), I, rows, to);
      case Stored::kBlocks8:
        return multiply_panel(x, blocks8(p), I, rows, to);
      case Stored::kBlocks4:
        return multiply_panel(x, blocks4(p), I, rows, to);
      case Stored::kTable4:
        return multiply_panel(x, table4(p), I, rows, to);
      case Stored::kFloat8:
        return multiply_panel(x, floats8(p), I, rows, to);
    }
  });
}

#if DOTS
// Of bfloat16 or int8; the inputs are even in number.
static void dots(const uint16_t* x, const Panels& weight, float* out, int64_t rows, int64_t first, int64_t last) {
  const int64_t pairs = weight.inputs / 2;
  const auto* from = reinterpret_cast<const Pair*>(x);
  of_panels(weight, out, rows, first, last, [&](int64_t p, const Sums& to) {
    if (weight.stored == Stored::kInt8) {
      const auto* code = static_cast<const int8_t*>(weight.code) + p * weight.inputs * PANEL;
      return multiply_panel(from, PairedCodes8{code}, pairs, rows, to);
    }
    return multiply_panel(from, static_cast<const Pair*>(weight.code) + p * pairs * PANEL, pairs, rows, to);
  });
#if DOTS == 2
  release_tiles();
#endif
}
#else
constexpr auto dots = nullptr;
#endif
