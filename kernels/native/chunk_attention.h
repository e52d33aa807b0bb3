// Attention of a prompt's piece, PANEL tokens of one kv head's query heads at a time. Included once for each level.
//
// A query is a lane throughout: scores are [keys, PANEL], the sums of values [H, PANEL], and an online softmax takes no
// sum across lanes. So both products are those of panel_matmul.h, rows times a panel: the keys' rows times the queries
// as a panel, and the values' columns times the weights as one. Blocks of keys go backwards from the queries' own, of
// which each query sees one at least, over the piece's rows and on over the cached ones.

constexpr int64_t KEYS = 64;  // rows whose scores, keys and values stay in the nearest cache
constexpr float LOWEST = -1e30f;  // a maximum of no scores; differences to it are finite

// What the heads of one part are computed in.
struct Workspace {
  static constexpr int64_t ALIGNMENT = 64;
  std::vector<float> memory;

  // So many floats from a cache line's border on.
  float* of(int64_t floats) {
    memory.resize(floats + ALIGNMENT / sizeof(float));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return memory.data() + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT / sizeof(float);
  }
};

// Rows of keys and values. The first one's place counts from the first query, as a negative number of tokens before it.
struct Block {
  const float *k, *v;
  int64_t k_row, v_row;  // floats from one to the next
  int64_t count, place;
};

// sums[h, query] = decay[query] * sums[h, query] + values of N dimensions times weight[key, query].
template <int N>
static void add_values(const float* v, int64_t v_row, const float* weight, int64_t count, const float* decay, float* sums) {
  constexpr int V = VECTORS<N, Plain<float>>;
  for (int j = 0; j < PANEL; j += V * LANES) {
    F own[N][V];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i)
        own[n][i] = load(sums + n * PANEL + j + i * LANES) * load(decay + j + i * LANES);
    for (int64_t s = 0; s < count; ++s) {
      const float *value = v + s * v_row, *w = weight + s * PANEL + j;
      if constexpr (V == 4) {  // N values stay in registers, else V weights
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i)
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) own[n][i] += splat(value[n]) * load(w + i * LANES);
      } else {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n)
#pragma GCC unroll 2
          for (int i = 0; i < V; ++i) own[n][i] += splat(value[n]) * load(w + i * LANES);
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) store(sums + n * PANEL + j + i * LANES, own[n][i]);
  }
}

template <int N>
static INLINE void add_values(int64_t dims, const float* v, int64_t v_row, const float* weight, int64_t count,
                              const float* decay, float* sums) {
  if constexpr (N > 0) {
    if (dims == N) return add_values<N>(v, v_row, weight, count, decay, sums);
    add_values<N - 1>(dims, v, v_row, weight, count, decay, sums);
  }
}

// Of the queries, each its own lane, those get -inf that stand before a key or do not reach back to it.
static void hide(const Block& block, int32_t window, float* score) {
  I32 lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  for (int64_t s = 0; s < block.count; ++s) {
    const int64_t first = block.place + s, end = window > 0 ? first + window : PANEL;
    const int32_t from = static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(first, 0), PANEL));
    const int32_t to = static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(end, 0), PANEL));
    for (int j = 0; j < PANEL; j += LANES) {
      float* at = score + s * PANEL + j;
      store(at, (lane + j >= from) & (lane + j < to) ? load(at) : splat(-INFINITY));
    }
  }
}

// One head's queries over a block. m, l and decay are [PANEL], score is [KEYS, PANEL], q and sums are [H, PANEL].
static void add_block(const Cached& of, const Block& block, const float* q, float* score, float* m, float* l,
                      float* decay, float* sums) {
  const int64_t H = of.head_dim;
  multiply_all(block.count, block.k, block.k_row, q, H, reinterpret_cast<const char*>(q), 0, {score, PANEL, false, nullptr});
  if (of.soft_cap > 0)
    for (int64_t i = 0; i < block.count * PANEL; i += LANES) store(score + i, capped(load(score + i), of.soft_cap));
  if (block.place + block.count > 1 || (of.window > 0 && block.place + of.window < PANEL)) hide(block, of.window, score);
  for (int j = 0; j < PANEL; j += LANES) {
    F most = load(m + j), total = F{};
    for (int64_t s = 0; s < block.count; ++s) most = larger(most, load(score + s * PANEL + j));
    for (int64_t s = 0; s < block.count; ++s) {
      const F weight = exp_of_negative(load(score + s * PANEL + j) - most);
      store(score + s * PANEL + j, weight);
      total += weight;
    }
    const F rest = exp_of_negative(load(m + j) - most);
    store(decay + j, rest), store(m + j, most), store(l + j, load(l + j) * rest + total);
  }
  const int64_t portions = (H + PORTION - 1) / PORTION;
  for (int64_t p = 0, h = 0; p < portions; ++p) {
    const int64_t dims = (H - h + portions - p - 1) / (portions - p);
    add_values<PORTION>(dims, block.v + h, block.v_row, score, block.count, decay, sums + h * PANEL);
    h += dims;
  }
}

// Calls add(block) for what the tokens from `first` to `end` of a text's piece see. `unpacked` is [KEYS, 2 H].
template <typename Add>
static void of_blocks(const Chunk& of, int64_t text, int64_t kv_head, int64_t first, int64_t end, float* unpacked,
                      const Add& add) {
  const int64_t H = of.head_dim, R = of.page_rows, row = of.kv_heads * H;
  const int64_t start = std::min<int64_t>(std::max(of.start[text], 0), of.pages_per_text * R), place = start + first;
  const int64_t oldest = of.window > 0 ? std::max<int64_t>(place - of.window + 1, 0) : 0;
  const int64_t own = oldest > start ? oldest - start : 0;
  for (int64_t to = end, border = first + PANEL; to > own;) {  // blocks are the same wherever the piece ends
    const int64_t from = std::max(border - KEYS, own), at = (text * of.tokens + from) * row + kv_head * H;
    add(Block{of.k + at, of.v + at, row, row, to - from, from - first});
    to = border = from;
  }
  for (int64_t to = start; to > oldest;) {
    const int64_t page = (to - 1) / R, from = std::max({to - KEYS, oldest, page * R}), count = to - from;
    const int64_t at = page_at(of, text, kv_head, page), r = from - page * R;
    const float* rows = unpacked;
    if (of.scale) {
      const auto* code = static_cast<const int8_t*>(of.cache) + (at * R + r) * 2 * H;
      const float* scale = of.scale + at * 2 * R + r;
      for (int64_t s = 0; s < count; ++s)
        for (int64_t half = 0; half < 2; ++half)
          for (int64_t h = 0; h < H; ++h)
            unpacked[(2 * s + half) * H + h] = code[(2 * s + half) * H + h] * scale[half * R + s];
    } else {
      rows = static_cast<const float*>(of.cache) + (at * R + r) * 2 * H;
    }
    add(Block{rows, rows + H, 2 * H, 2 * H, count, from - place});
    to = from;
  }
}

static void attend_part(const Chunk& of, int64_t text, int64_t kv_head, int64_t first) {
  const int64_t H = of.head_dim, N = of.heads, G = N / of.kv_heads, last = std::min(first + PANEL, of.tokens);
  const int64_t end = std::clamp<int64_t>(of.count[text], first, last);  // of the tokens, behind it is padding
  const int64_t at = ((text * of.tokens + first) * N + kv_head * G) * H;
  for (int64_t x = end - first; x < last - first; ++x) std::fill_n(of.out + at + x * N * H, G * H, 0.0f);
  if (end == first) return;
  static thread_local Workspace workspace;
  float* q = workspace.of((2 * G * H + KEYS + 2 * G + 1) * PANEL + KEYS * 2 * H);
  float *sums = q + G * H * PANEL, *score = sums + G * H * PANEL, *m = score + KEYS * PANEL, *l = m + G * PANEL;
  float *decay = l + G * PANEL, *unpacked = decay + PANEL;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));
  std::fill(q, score, 0.0f);  // also the lanes of no query
  for (int64_t g = 0; g < G; ++g) {
    for (int64_t x = 0; x < end - first; ++x)
      for (int64_t h = 0; h < H; ++h) q[(g * H + h) * PANEL + x] = of.q[at + (x * N + g) * H + h] * scale;
    std::fill_n(m + g * PANEL, PANEL, of.sink ? of.sink[kv_head * G + g] : LOWEST);
    std::fill_n(l + g * PANEL, PANEL, of.sink ? 1.0f : 0.0f);
  }
  of_blocks(of, text, kv_head, first, end, unpacked, [&](const Block& block) {
    for (int64_t g = 0, of_head = 0; g < G; ++g, of_head += H * PANEL)
      add_block(of, block, q + of_head, score, m + g * PANEL, l + g * PANEL, decay, sums + of_head);
  });
  for (int64_t g = 0; g < G; ++g)
    for (int64_t x = 0; x < end - first; ++x)
      for (int64_t h = 0; h < H; ++h)
        of.out[at + (x * N + g) * H + h] = sums[(g * H + h) * PANEL + x] / l[g * PANEL + x];
}

// Every other block from the last one on, then those between: both halves take about as long, and end with short ones.
static void attend_chunk(const Chunk& of, int64_t first, int64_t last) {
  const int64_t each = of.texts * of.kv_heads, blocks = (of.tokens + PANEL - 1) / PANEL, half = (blocks + 1) / 2;
  for (int64_t i = first; i < last; ++i) {
    const int64_t at = i / each, before_last = at < half ? 2 * at : 2 * (at - half) + 1;
    attend_part(of, i % each / of.kv_heads, i % of.kv_heads, (blocks - 1 - before_last) * PANEL);
  }
}
