// Products of bfloat16 by AMX's tiles. Included once, for the level that has them.
//
// Two tiles side by side hold 16 pairs of inputs of a panel's 32 outputs, as they lie. Tiles 0 ... 3 are the sums of two
// tiles of rows, 4 and 5, with those two, 6 and 7: by Intel's manual the four are loaded in 32 cycles, multiplied in 64.
//
// One row goes this way too: so a row's sums do not depend on the others. Its two products of 2 KB of weights take the
// 52 cycles of one's latency, which no core's memory feeds.

constexpr int TILE_ROWS = 16;
constexpr int TILE_ROW_BYTES = 64;

// What LDTILECFG reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t unused[15] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The rows that this thread's tiles have the shapes for, or 0.
static thread_local int64_t shaped_rows = 0;

// What was stored is in memory, where the tiles' instructions look for it unseen by the compiler.
static INLINE void settle(const void* memory) { __asm__ volatile("" ::"r"(memory) : "memory"); }

static void shape_tiles(int64_t rows) {
  if (rows == shaped_rows) return;
  const auto upper = static_cast<uint8_t>(std::min<int64_t>(rows, TILE_ROWS)), lower = static_cast<uint8_t>(rows - upper);
  const uint8_t shapes[] = {upper, upper, lower, lower, upper, lower, TILE_ROWS, TILE_ROWS};
  TileShapes all;
  for (int tile = 0; tile < 8; ++tile) {
    all.rows[tile] = shapes[tile];
    all.row_bytes[tile] = shapes[tile] ? TILE_ROW_BYTES : 0;
  }
  settle(&all);
  _tile_loadconfig(&all);
  shaped_rows = rows;
}

static void release_tiles() {
  _tile_release();
  shaped_rows = 0;
}

// Adds the products of 16 pairs of inputs; `x_row` in pairs. `has_lower` where there are more rows than a tile's.
template <bool has_lower>
static INLINE void add_tiles(const Pair* x, int64_t x_row, const Pair* panel) {
  constexpr int64_t PANEL_BYTES = PANEL * sizeof(Pair);
  const int64_t x_bytes = x_row * sizeof(Pair);
  _tile_loadd(4, x, x_bytes);
  _tile_loadd(6, panel, PANEL_BYTES);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, panel + HALF, PANEL_BYTES);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (has_lower) {
    _tile_loadd(5, x + TILE_ROWS * x_row, x_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

template <bool has_lower>
static void multiply_tiles(int64_t rows, const Pair* x, int64_t x_row, const Plain<Pair>& weights, int64_t pairs,
                           const Sums& to) {
  const int64_t out_bytes = to.row * sizeof(float);
  float *const upper = to.out, *const lower = to.out + TILE_ROWS * to.row;
  settle(weights.panel);
  if (to.adds) {
    _tile_loadd(0, upper, out_bytes);
    _tile_loadd(1, upper + HALF, out_bytes);
    if constexpr (has_lower) {
      _tile_loadd(2, lower, out_bytes);
      _tile_loadd(3, lower + HALF, out_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (has_lower) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  int64_t i = 0;
  for (; i + TILE_PAIRS <= pairs; i += TILE_PAIRS) {
    fetch(weights.next + i * weights.stride, TILE_PAIRS * weights.stride);
    add_tiles<has_lower>(x + i, x_row, weights.panel + i * PANEL);
  }
  if (i < pairs) {  // the last inputs, zeros behind them
    alignas(64) Pair last_x[2 * TILE_ROWS * TILE_PAIRS] = {}, last_panel[TILE_PAIRS * PANEL] = {};
    for (int64_t n = 0; n < rows; ++n) std::copy_n(x + n * x_row + i, pairs - i, last_x + n * TILE_PAIRS);
    std::copy_n(weights.panel + i * PANEL, (pairs - i) * PANEL, last_panel);
    settle(last_x);
    settle(last_panel);
    add_tiles<has_lower>(last_x, TILE_PAIRS, last_panel);
  }
  _tile_stored(0, upper, out_bytes);
  _tile_stored(1, upper + HALF, out_bytes);
  if constexpr (has_lower) {
    _tile_stored(2, lower, out_bytes);
    _tile_stored(3, lower + HALF, out_bytes);
  }
  settle(to.out);
  if (!to.scale) return;
  for (int64_t n = 0; n < rows; ++n)
    for (int j = 0; j < PANEL; j += LANES) {
      float* out = to.out + n * to.row + j;
      store(out, load(out) * load(to.scale + j));
    }
}

static void multiply_portion(int64_t rows, const Pair* x, int64_t x_row, const Plain<Pair>& weights, int64_t pairs,
                             const Sums& to) {
  shape_tiles(rows);
  if (rows > TILE_ROWS) return multiply_tiles<true>(rows, x, x_row, weights, pairs, to);
  multiply_tiles<false>(rows, x, x_row, weights, pairs, to);
}
