// Rows times panels of weights. Included once for each level; see kernels.h for how weights are stored.
//
// A panel is multiplied GROUP by GROUP: two vectors, outputs from j and from j + 16 on. ROWS rows of them stay in
// registers while the panel streams by. With more rows the panel is unpacked once, DEPTH inputs at a time, into floats
// that stay in the nearest caches; floats are read where they lie.

constexpr int DEPTH = 256;  // divided by the inputs of every block of int4
constexpr int HALF = PANEL / 2;

struct Floats {
  static constexpr int STEP = 1;  // inputs that are read at once
  const float* panel;

  INLINE void start(int64_t, int) {}
  INLINE void read(int64_t i, int j, F (&w)[STEP][2]) const {
    const float* row = panel + i * PANEL + j;
    __builtin_prefetch(row + AHEAD * PANEL);
    __builtin_prefetch(row + AHEAD * PANEL + HALF);
    w[0][0] = load(row), w[0][1] = load(row + HALF);
  }
  INLINE void finish(int, F&, F&) const {}

  static constexpr int AHEAD = 16;
};

struct BFloats {
  static constexpr int STEP = 1;
  const uint16_t* panel;

  INLINE void start(int64_t, int) {}
  INLINE void read(int64_t i, int j, F (&w)[STEP][2]) const {
    const uint16_t* row = panel + i * PANEL + 2 * j;
    __builtin_prefetch(row + 32 * PANEL);
    I32 pair;
    __builtin_memcpy(&pair, row, sizeof pair);
    w[0][0] = as_floats(pair << 16), w[0][1] = as_floats(pair & (int32_t)0xffff0000);
  }
  INLINE void finish(int, F&, F&) const {}
};

struct Codes8 {
  static constexpr int STEP = 1;
  const int8_t* panel;
  const float* scale;

  INLINE void start(int64_t, int) {}
  INLINE void read(int64_t i, int j, F (&w)[STEP][2]) const {
    const int8_t* row = panel + i * PANEL + j;
    __builtin_prefetch(row + 64 * PANEL);
    w[0][0] = load(row), w[0][1] = load(row + HALF);
  }
  INLINE void finish(int j, F& low, F& high) const { low *= load(scale + j), high *= load(scale + j + HALF); }
};

struct Codes4 {
  static constexpr int STEP = 2;
  const int8_t* panel;
  const float *scale, *offset;
  int64_t block;  // inputs
  F scales[2], offsets[2];

  INLINE void start(int64_t i, int j) {
    const int64_t at = i / block * PANEL + j;
    scales[0] = load(scale + at), scales[1] = load(scale + at + HALF);
    offsets[0] = load(offset + at), offsets[1] = load(offset + at + HALF);
  }
  INLINE void read(int64_t i, int j, F (&w)[STEP][2]) const {
    const int8_t* row = panel + i / 2 * PANEL + j;
    __builtin_prefetch(row + 64 * PANEL);
    for (int half = 0; half < 2; ++half) {
      const I32 pair = widened(row + half * HALF);
      w[0][half] = __builtin_convertvector(pair << 28 >> 28, F) * scales[half] + offsets[half];
      w[1][half] = __builtin_convertvector(pair >> 4, F) * scales[half] + offsets[half];
    }
  }
  INLINE void finish(int, F&, F&) const {}
};

// Where a block of inputs ends that share a scale; floats and int8 have one block of all.
template <typename Codes>
static INLINE int64_t block_of(const Codes&, int64_t inputs) { return inputs; }
template <>
INLINE int64_t block_of(const Codes4& codes, int64_t) { return codes.block; }

// out[N, 32] (+)= x[N, first ... last) times the panel; `x` and `out` have rows of their own lengths.
template <int N, typename Codes>
static void multiply(const float* x, int64_t x_row, Codes codes, int64_t first, int64_t last, float* out,
                     int64_t out_row, bool adds) {
  for (int j = 0; j < HALF; j += LANES) {
    F sums[N][2];
    for (int n = 0; n < N; ++n) sums[n][0] = sums[n][1] = F{};
    const int64_t block = block_of(codes, last - first);
    for (int64_t from = first; from < last; from += block) {
      const int64_t to = from + block < last ? from + block : last;
      codes.start(from, j);
      for (int64_t i = from; i < to; i += Codes::STEP) {
        F w[Codes::STEP][2];
        codes.read(i, j, w);
#pragma GCC unroll 2
        for (int s = 0; s < Codes::STEP; ++s)
#pragma GCC unroll 16
          for (int n = 0; n < N; ++n) {
            const F value = splat(x[n * x_row + i + s]);
            sums[n][0] += value * w[s][0], sums[n][1] += value * w[s][1];
          }
      }
    }
    for (int n = 0; n < N; ++n) {
      codes.finish(j, sums[n][0], sums[n][1]);
      float* row = out + n * out_row + j;
      store(row, adds ? load(row) + sums[n][0] : sums[n][0]);
      store(row + HALF, adds ? load(row + HALF) + sums[n][1] : sums[n][1]);
    }
  }
}

// The same for `rows` rows, at most ROWS.
template <int N, typename Codes>
static INLINE void multiply_rows(int64_t rows, const float* x, int64_t x_row, const Codes& codes, int64_t first,
                                 int64_t last, float* out, int64_t out_row, bool adds) {
  if constexpr (N > 0) {
    if (rows == N) return multiply<N>(x, x_row, codes, first, last, out, out_row, adds);
    multiply_rows<N - 1>(rows, x, x_row, codes, first, last, out, out_row, adds);
  }
}

// All rows, in even portions.
template <typename Codes>
static void multiply_all(int64_t rows, const float* x, int64_t x_row, const Codes& codes, int64_t first, int64_t last,
                         float* out, int64_t out_row, bool adds) {
  const int64_t portions = (rows + ROWS - 1) / ROWS;
  for (int64_t p = 0, done = 0; p < portions; ++p) {
    const int64_t count = (rows - done + portions - p - 1) / (portions - p);
    multiply_rows<ROWS>(count, x + done * x_row, x_row, codes, first, last, out + done * out_row, out_row, adds);
    done += count;
  }
}

template <typename Codes>
static void multiply_panel(const float* x, Codes codes, int64_t inputs, float* out, int64_t out_row, int64_t rows) {
  if (rows <= ROWS) return multiply_rows<ROWS>(rows, x, inputs, codes, 0, inputs, out, out_row, false);
  alignas(64) float unpacked[DEPTH * PANEL];
  for (int64_t first = 0; first < inputs; first += DEPTH) {
    const int64_t last = first + DEPTH < inputs ? first + DEPTH : inputs;
    for (int j = 0; j < HALF; j += LANES) {
      const int64_t block = block_of(codes, last - first);
      for (int64_t from = first; from < last; from += block) {
        const int64_t to = from + block < last ? from + block : last;
        codes.start(from, j);
        for (int64_t i = from; i < to; i += Codes::STEP) {
          F w[Codes::STEP][2];
          codes.read(i, j, w);
          for (int s = 0; s < Codes::STEP; ++s) {
            codes.finish(j, w[s][0], w[s][1]);
            store(unpacked + (i - first + s) * PANEL + j, w[s][0]);
            store(unpacked + (i - first + s) * PANEL + j + HALF, w[s][1]);
          }
        }
      }
    }
    multiply_all(rows, x + first, inputs, Floats{unpacked}, 0, last - first, out, out_row, first > 0);
  }
}

template <>
void multiply_panel(const float* x, Floats codes, int64_t inputs, float* out, int64_t out_row, int64_t rows) {
  if (rows <= ROWS) return multiply_rows<ROWS>(rows, x, inputs, codes, 0, inputs, out, out_row, false);
  for (int64_t first = 0; first < inputs; first += DEPTH) {
    const int64_t last = first + DEPTH < inputs ? first + DEPTH : inputs;
    multiply_all(rows, x + first, inputs, Floats{codes.panel + first * PANEL}, 0, last - first, out, out_row, first > 0);
  }
}

static void panels(const float* x, const Panels& weight, float* out, int64_t rows, int64_t first, int64_t last) {
  const int64_t I = weight.inputs, O = weight.outputs;
  for (int64_t p = first; p < last; ++p) {
    const int64_t count = O - p * PANEL < PANEL ? O - p * PANEL : PANEL;
    // A last panel of fewer outputs is computed aside.
    std::vector<float> aside(count < PANEL ? rows * PANEL : 0);
    float* to = count < PANEL ? aside.data() : out + p * PANEL;
    const int64_t to_row = count < PANEL ? PANEL : O;
    switch (weight.stored) {
      case Stored::kF32:
        multiply_panel(x, Floats{static_cast<const float*>(weight.code) + p * I * PANEL}, I, to, to_row, rows);
        break;
      case Stored::kBF16:
        multiply_panel(x, BFloats{static_cast<const uint16_t*>(weight.code) + p * I * PANEL}, I, to, to_row, rows);
        break;
      case Stored::kInt8: {
        const auto* code = static_cast<const int8_t*>(weight.code) + p * I * PANEL;
        multiply_panel(x, Codes8{code, weight.scale + p * PANEL}, I, to, to_row, rows);
        break;
      }
      case Stored::kInt4: {
        const auto* code = static_cast<const int8_t*>(weight.code) + p * I / 2 * PANEL;
        const int64_t grid = p * weight.blocks * PANEL;
        const Codes4 codes{code, weight.scale + grid, weight.offset + grid, I / weight.blocks, {}, {}};
        multiply_panel(x, codes, I, to, to_row, rows);
        break;
      }
    }
    for (int64_t r = 0; count < PANEL && r < rows; ++r)
      std::copy_n(to + r * PANEL, count, out + r * O + p * PANEL);
  }
}
