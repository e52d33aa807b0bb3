// Decode attention of one kv head's queries, page by page. Included once for each level.
//
// An online softmax that starts from the slot's new token: m, l, acc = score of it, 1, its v. Rows outside
// [first, end) are not read.

constexpr int TOGETHER = 4;  // rows whose scores are computed together

struct Scratch {
  std::vector<float> q, acc, score, decay;
};

// score[g, row] = q[g] . k[row] for N heads and TOGETHER rows, or one.
template <int N, int COUNT, typename Cell>
static INLINE void score_rows(const float* q, const Cell* rows, int64_t H, float* score, int64_t score_row) {
  F sums[N][COUNT];
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < COUNT; ++c) sums[n][c] = F{};
  int64_t h = 0;
  for (; h + LANES <= H; h += LANES) {
    F k[COUNT];
    for (int c = 0; c < COUNT; ++c) k[c] = load(rows + c * 2 * H + h);
    for (int n = 0; n < N; ++n) {
      const F value = load(q + n * H + h);
      for (int c = 0; c < COUNT; ++c) sums[n][c] += value * k[c];
    }
  }
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < COUNT; ++c) {
      float dot = sum(sums[n][c]);
      for (int64_t rest = h; rest < H; ++rest) dot += q[n * H + rest] * static_cast<float>(rows[c * 2 * H + rest]);
      score[n * score_row + c] = dot;
    }
}

template <int N, typename Cell>
static void score_page(const float* q, const Cell* rows, int64_t count, int64_t H, float* score, int64_t score_row) {
  int64_t r = 0;
  for (; r + TOGETHER <= count; r += TOGETHER) {
    __builtin_prefetch(rows + (r + 2 * TOGETHER) * 2 * H);
    score_rows<N, TOGETHER>(q, rows + r * 2 * H, H, score + r, score_row);
  }
  for (; r < count; ++r) score_rows<N, 1>(q, rows + r * 2 * H, H, score + r, score_row);
}

// acc[g] += weight[g, row] v[row] for N heads; `rows` begin at their v.
template <int N, typename Cell>
static void weigh_page(const float* weight, int64_t weight_row, const Cell* rows, int64_t count, int64_t H,
                       float* acc) {
  int64_t h = 0;
  for (; h + 2 * LANES <= H; h += 2 * LANES) {
    F sums[N][2];
    for (int n = 0; n < N; ++n) sums[n][0] = load(acc + n * H + h), sums[n][1] = load(acc + n * H + h + LANES);
    for (int64_t r = 0; r < count; ++r) {
      const F low = load(rows + r * 2 * H + h), high = load(rows + r * 2 * H + h + LANES);
      for (int n = 0; n < N; ++n) {
        const F value = splat(weight[n * weight_row + r]);
        sums[n][0] += value * low, sums[n][1] += value * high;
      }
    }
    for (int n = 0; n < N; ++n) store(acc + n * H + h, sums[n][0]), store(acc + n * H + h + LANES, sums[n][1]);
  }
  for (; h < H; ++h)
    for (int n = 0; n < N; ++n)
      for (int64_t r = 0; r < count; ++r)
        acc[n * H + h] += weight[n * weight_row + r] * static_cast<float>(rows[r * 2 * H + h]);
}

static INLINE float capped(float score, float cap) { return cap > 0 ? cap * std::tanh(score / cap) : score; }

// Scores become weights, exp(score - m), under a new maximum: what was summed before is to be multiplied by the result.
static float softened(float* score, int64_t count, float& m, float& l) {
  const int64_t whole = (count + LANES - 1) / LANES * LANES;  // the scratch is as long
  for (int64_t i = count; i < whole; ++i) score[i] = -INFINITY;
  F most = splat(m);
  for (int64_t i = 0; i < whole; i += LANES) most = larger(most, load(score + i));
  const float next = largest(most);
  F sums = F{};
  for (int64_t i = 0; i < whole; i += LANES) {
    const F p = exp_of_negative(load(score + i) - next);
    store(score + i, p);
    sums += p;
  }
  const float decay = std::exp(m - next);
  m = next, l = l * decay + sum(sums);
  return decay;
}

template <typename Cell>
static void attend_over(const Attention& of, int64_t slot, int64_t kv_head) {
  const int64_t H = of.head_dim, G = of.heads / of.kv_heads, R = of.page_rows;
  const int64_t reach = of.pages_per_slot * R;
  const int64_t length = of.length[slot] < reach ? of.length[slot] : reach;
  const int64_t end = of.window == 1 ? 0 : length;
  const int64_t back = of.window > 0 ? of.length[slot] - of.window + 1 : 0;
  const int64_t first = back > 0 ? back : 0;
  const int64_t score_row = (R + LANES - 1) / LANES * LANES;

  static thread_local Scratch scratch;
  scratch.q.resize(G * H), scratch.score.resize(G * score_row);
  std::vector<float>&q = scratch.q, &score = scratch.score;
  scratch.acc.assign(2 * G, 0.0f);
  float *m = scratch.acc.data(), *l = m + G;
  float* acc = of.out + (slot * of.heads + kv_head * G) * H;
  const float* fresh = of.fresh + (slot * of.kv_heads + kv_head) * 2 * H;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));
  for (int64_t g = 0; g < G; ++g) {
    float dot = 0;
    for (int64_t h = 0; h < H; ++h) {
      q[g * H + h] = of.q[(slot * of.heads + kv_head * G + g) * H + h] * scale;
      dot += q[g * H + h] * fresh[h];
      acc[g * H + h] = fresh[H + h];
    }
    m[g] = capped(dot, of.soft_cap), l[g] = 1;
    if (of.sink) {
      const float own = of.sink[kv_head * G + g], most = own > m[g] ? own : m[g], decay = std::exp(m[g] - most);
      for (int64_t h = 0; h < H; ++h) acc[g * H + h] *= decay;
      m[g] = most, l[g] = decay + std::exp(own - most);
    }
  }
  const int64_t layer = of.layer < 0 ? 0 : of.layer < of.layers ? of.layer : of.layers - 1;
  for (int64_t block = first / R; block * R < end; ++block) {
    const int64_t page = of.page[slot * of.pages_per_slot + block];
    const int64_t at = (layer * of.pool + (page < 0 ? 0 : page < of.pool ? page : of.pool - 1)) * of.kv_heads + kv_head;
    const int64_t from = first > block * R ? first - block * R : 0;
    const int64_t count = (end - block * R < R ? end - block * R : R) - from;
    const Cell* rows = static_cast<const Cell*>(of.cache) + (at * R + from) * 2 * H;
    const float* scales = of.scale ? of.scale + at * 2 * R + from : nullptr;
    int64_t g = 0;
    for (; g + HEADS <= G; g += HEADS) score_page<HEADS>(q.data() + g * H, rows, count, H, &score[g * score_row], score_row);
    for (; g < G; ++g) score_page<1>(q.data() + g * H, rows, count, H, &score[g * score_row], score_row);
    for (g = 0; g < G; ++g) {
      float* weight = &score[g * score_row];
      if (scales)
        for (int64_t r = 0; r < count; ++r) weight[r] *= scales[r];
      if (of.soft_cap > 0)
        for (int64_t r = 0; r < count; ++r) weight[r] = capped(weight[r], of.soft_cap);
      const float decay = softened(weight, count, m[g], l[g]);
      if (scales)
        for (int64_t r = 0; r < count; ++r) weight[r] *= scales[R + r];
      for (int64_t h = 0; h < H; ++h) acc[g * H + h] *= decay;
    }
    for (g = 0; g + HEADS <= G; g += HEADS) weigh_page<HEADS>(&score[g * score_row], score_row, rows + H, count, H, acc + g * H);
    for (; g < G; ++g) weigh_page<1>(&score[g * score_row], score_row, rows + H, count, H, acc + g * H);
  }
  for (int64_t g = 0; g < G; ++g)
    for (int64_t h = 0; h < H; ++h) acc[g * H + h] /= l[g];
}

static void attend(const Attention& of, int64_t slot, int64_t kv_head) {
  of.scale ? attend_over<int8_t>(of, slot, kv_head) : attend_over<float>(of, slot, kv_head);
}
