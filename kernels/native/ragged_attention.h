// Decode attention of one kv head's queries, page by page. Included once for each level.
//
// A slot's W new tokens and a kv head's G query heads are X = W G queries, query x being head x % G of token x / G. They
// share each read of a row. The online softmax starts from the slot's own new tokens. Rows outside [first, end), what the
// first token sees, are not read; what a later token's window leaves out of them has weight 0 for that token.
//
// Slots of a group share each read of their common pages, too: a page's queries are those of all of them. Each query's
// result is made by the same operations in the same order as if its slot were alone.

constexpr int TOGETHER = 4;  // rows whose scores are computed together

struct Scratch {
  std::vector<float> q, acc, score, softmax;
};

// What a slot's tokens see of its cached rows: from `first` up to `end`.
struct Reach {
  int64_t first, end;
};

static INLINE Reach reach_of(const Attention& of, int64_t slot) {
  const int64_t all = of.pages_per_text * of.page_rows;
  const int64_t length = of.length[slot] < all ? of.length[slot] : all;
  return {of.window > 0 ? std::max<int64_t>(of.length[slot] - of.window + 1, 0) : 0, of.window == 1 ? 0 : length};
}

// Which page of one kv head a text's block of rows is, counted over layers and heads.
static INLINE int64_t page_at(const Cached& of, int64_t text, int64_t kv_head, int64_t block) {
  const auto clamped = [](int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; };  // as XLA clamps
  const int64_t page = clamped(of.page[text * of.pages_per_text + block], of.pool);
  return (clamped(of.layer, of.layers) * of.pool + page) * of.kv_heads + kv_head;
}

// What a token sees of one page.
template <typename Cell>
struct Seen {
  const Cell* rows;
  int64_t count;
  const float* scales;  // or null
};

template <typename Cell>
static INLINE Seen<Cell> seen(const Attention& of, const Reach& reach, int64_t slot, int64_t kv_head, int64_t block) {
  const int64_t R = of.page_rows, from = reach.first > block * R ? reach.first - block * R : 0;
  const int64_t count = (reach.end - block * R < R ? reach.end - block * R : R) - from;
  const int64_t at = page_at(of, slot, kv_head, block);
  const auto* rows = static_cast<const Cell*>(of.cache) + (at * R + from) * 2 * of.head_dim;
  return {rows, count, of.scale ? of.scale + at * 2 * R + from : nullptr};
}

// Rows of one text.
struct Run {
  int64_t slot;
  Reach reach;
};

// What is read for a group, one behind the other: the pages that its slots have in common, then what each has for itself.
static INLINE Run run_of(const Attention& of, const Group& group, int64_t i) {
  const int64_t common = group.pages * of.page_rows;
  if (i == 0) return {of.order[group.first], {0, common}};
  const int64_t slot = of.order[group.first + i - 1];
  const Reach reach = reach_of(of, slot);
  return {slot, {std::max(reach.first, common), reach.end}};
}

// Fetches rows before they are read, in the order in which they are, LEAD bytes ahead. A page's k and its v are read in
// two passes: memory is to work during both, so each fetches half.
template <typename Cell>
class Ahead {
 public:
  // Of the kv heads [first, last), as Kernels::attend.
  Ahead(const Attention& of, int64_t first, int64_t last) : of_(of), head_(first), last_(last) {
    if (enter() || next()) at_ += LEAD;
  }

  INLINE void fetch(int64_t bytes) {
    if (at_ >= end_ && !next()) return;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at_ + i);  // what is behind the end does no harm
    at_ += bytes;
  }

 private:
  static constexpr int64_t LEAD = 1 << 16;

  bool next() {
    while (head_ < last_) {
      const int64_t over = at_ - end_;
      ++block_;
      if (block_ * of_.page_rows < run_.reach.end ? take() : enter_next()) {
        at_ += over;
        if (at_ < end_) return true;
      }
    }
    return false;
  }

  // The run's first page; whether there is one.
  bool enter() {
    if (head_ >= last_) return false;
    run_ = run_of(of_, of_.groups[head_ / of_.kv_heads], i_), block_ = run_.reach.first / of_.page_rows;
    return block_ * of_.page_rows < run_.reach.end && take();
  }

  bool enter_next() {
    if (++i_ > of_.groups[head_ / of_.kv_heads].count) i_ = 0, ++head_;
    return enter();
  }

  bool take() {
    const auto here = seen<Cell>(of_, run_.reach, run_.slot, head_ % of_.kv_heads, block_);
    at_ = reinterpret_cast<const char*>(here.rows);
    end_ = reinterpret_cast<const char*>(here.rows + here.count * 2 * of_.head_dim);
    return true;
  }

  const Attention& of_;
  int64_t head_, last_, i_ = 0, block_ = 0;
  Run run_{};
  const char *at_ = nullptr, *end_ = nullptr;
};

// score[g, row] = q[g] . k[row] for N queries and TOGETHER rows, or one.
template <int N, int COUNT, typename Cell>
static INLINE void score_rows(const float* q, const Cell* rows, int64_t H, float* score, int64_t score_row) {
  F sums[N][COUNT];
  for (int n = 0; n < N; ++n)
    for (int c = 0; c < COUNT; ++c) sums[n][c] = F{};
  int64_t h = 0;
  for (; h + LANES <= H; h += LANES) {
    F value[N];
    for (int n = 0; n < N; ++n) value[n] = load(q + n * H + h);
    for (int c = 0; c < COUNT; ++c) {
      const F k = load(rows + c * 2 * H + h);
      for (int n = 0; n < N; ++n) sums[n][c] += value[n] * k;
    }
  }
  for (int n = 0; n < N; ++n) {
    add_up(sums[n], score + n * score_row);
    for (int c = 0; c < COUNT; ++c)
      for (int64_t rest = h; rest < H; ++rest)
        score[n * score_row + c] += q[n * H + rest] * static_cast<float>(rows[c * 2 * H + rest]);
  }
}

template <int N, typename Cell>
static void score_page(const float* q, const Cell* rows, int64_t count, int64_t H, float* score, int64_t score_row,
                       Ahead<Cell>* ahead) {
  const int64_t half = TOGETHER * H * sizeof(Cell);  // of the rows
  int64_t r = 0;
  for (; r + TOGETHER <= count; r += TOGETHER) {
    if (ahead) ahead->fetch(half);
    score_rows<N, TOGETHER>(q, rows + r * 2 * H, H, score + r, score_row);
  }
  for (; r < count; ++r) score_rows<N, 1>(q, rows + r * 2 * H, H, score + r, score_row);
}

// As weigh_page, of V vectors of the values.
template <int N, int V, typename Cell>
static INLINE void weigh_vectors(const float* weight, int64_t weight_row, const Cell* rows, int64_t count, int64_t H,
                                 float* acc, Ahead<Cell>* ahead) {
  F sums[N][V];
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < V; ++i) sums[n][i] = load(acc + n * H + i * LANES);
  for (int64_t r = 0; r < count; ++r) {
    if (ahead && r % TOGETHER == 0) ahead->fetch(TOGETHER * H * sizeof(Cell));
    F value[N];
    for (int n = 0; n < N; ++n) value[n] = splat(weight[n * weight_row + r]);
    for (int i = 0; i < V; ++i) {
      const F v = load(rows + r * 2 * H + i * LANES);
      for (int n = 0; n < N; ++n) sums[n][i] += value[n] * v;
    }
  }
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < V; ++i) store(acc + n * H + i * LANES, sums[n][i]);
}

// acc[g] += weight[g, row] v[row] for N queries; `rows` begin at their v.
template <int N, typename Cell>
static void weigh_page(const float* weight, int64_t weight_row, const Cell* rows, int64_t count, int64_t H,
                       float* acc, Ahead<Cell>* ahead) {
  constexpr int V = 5 * N + 1 <= REGISTERS && LANES < 16 ? 4 : 2;
  int64_t h = 0;
  for (; h + V * LANES <= H; h += V * LANES, ahead = nullptr)
    weigh_vectors<N, V>(weight, weight_row, rows + h, count, H, acc + h, ahead);
  for (; h + LANES <= H; h += LANES, ahead = nullptr)
    weigh_vectors<N, 1>(weight, weight_row, rows + h, count, H, acc + h, ahead);
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

// The scores of X queries, N at a time for as long as there are N. The first pass over the rows fetches ahead.
template <int N, typename Cell>
static void score_queries(const float* q, int64_t X, const Cell* rows, int64_t count, int64_t H, float* score,
                          int64_t score_row, Ahead<Cell>* ahead) {
  for (; X >= N; X -= N, q += N * H, score += N * score_row, ahead = nullptr)
    score_page<N>(q, rows, count, H, score, score_row, ahead);
  if constexpr (N > 1)
    if (X) score_queries<N - 1>(q, X, rows, count, H, score, score_row, ahead);
}

// acc[x] += weights times v, likewise.
template <int N, typename Cell>
static void weigh_queries(const float* weight, int64_t X, int64_t weight_row, const Cell* rows, int64_t count, int64_t H,
                          float* acc, Ahead<Cell>* ahead) {
  for (; X >= N; X -= N, weight += N * weight_row, acc += N * H, ahead = nullptr)
    weigh_page<N>(weight, weight_row, rows, count, H, acc, ahead);
  if constexpr (N > 1)
    if (X) weigh_queries<N - 1>(weight, X, weight_row, rows, count, H, acc, ahead);
}

// The softmax over the slot's own tokens, from each token itself on back: scaled queries into q; m, l and acc [X, H].
static void start_from_own(const Attention& of, int64_t slot, int64_t kv_head, float* q, float* m, float* l, float* acc) {
  const int64_t H = of.head_dim, G = of.heads / of.kv_heads, W = of.tokens;
  const float scale = 1.0f / std::sqrt(static_cast<float>(H));
  for (int64_t x = 0; x < W * G; ++x, q += H, acc += H) {
    const int64_t w = x / G, oldest = of.window > 0 && w >= of.window ? w - of.window + 1 : 0;
    const float* query = of.q + ((slot * W + w) * of.heads + kv_head * G + x % G) * H;
    for (int64_t h = 0; h < H; ++h) q[h] = query[h] * scale;
    for (int64_t token = w; token >= oldest; --token) {
      const float* own = of.fresh + ((slot * W + token) * of.kv_heads + kv_head) * 2 * H;
      float dot = 0;
      for (int64_t h = 0; h < H; ++h) dot += q[h] * own[h];
      const float score = capped(dot, of.soft_cap);
      if (token == w) {
        m[x] = score, l[x] = 1;
        for (int64_t h = 0; h < H; ++h) acc[h] = own[H + h];
        continue;
      }
      const float most = score > m[x] ? score : m[x], decay = std::exp(m[x] - most), weight = std::exp(score - most);
      m[x] = most, l[x] = l[x] * decay + weight;
      for (int64_t h = 0; h < H; ++h) acc[h] = acc[h] * decay + weight * own[H + h];
    }
    if (of.sink) {
      const float own = of.sink[kv_head * G + x % G], most = own > m[x] ? own : m[x], decay = std::exp(m[x] - most);
      m[x] = most, l[x] = l[x] * decay + std::exp(own - most);
      for (int64_t h = 0; h < H; ++h) acc[h] *= decay;
    }
  }
}

// The queries of one kv head, of one slot or several, and what was summed for them so far.
struct Queries {
  float *q, *score, *m, *l, *acc;
  int64_t count;

  // Those of the i-th slot, X of them.
  Queries of_slot(int64_t i, int64_t X, int64_t H) const {
    return {q + i * X * H, score, m + i * X, l + i * X, acc + i * X * H, X};
  }
};

// Adds the run's rows, of which several slots' queries see all.
template <typename Cell>
static void add_run(const Attention& of, const Run& run, int64_t kv_head, const Queries& to, Ahead<Cell>& ahead) {
  const int64_t H = of.head_dim, G = of.heads / of.kv_heads, R = of.page_rows, X = of.tokens * G;
  const int64_t score_row = (R + LANES - 1) / LANES * LANES;
  const Reach reach = run.reach;
  for (int64_t block = reach.first / R; block * R < reach.end; ++block) {
    const Seen<Cell> here = seen<Cell>(of, reach, run.slot, kv_head, block);
    score_queries<QUERIES>(to.q, to.count, here.rows, here.count, H, to.score, score_row, &ahead);
    for (int64_t x = 0; x < to.count; ++x) {
      float* weight = to.score + x * score_row;
      if (here.scales)
        for (int64_t r = 0; r < here.count; ++r) weight[r] *= here.scales[r];
      if (of.soft_cap > 0)
        for (int64_t r = 0; r < here.count; ++r) weight[r] = capped(weight[r], of.soft_cap);
      const int64_t oldest = of.window > 0 ? of.length[run.slot] + x % X / G - of.window + 1 : 0;
      const int64_t unseen = oldest - std::max(block * R, reach.first);
      for (int64_t r = 0; r < unseen && r < here.count; ++r) weight[r] = -INFINITY;
      const float decay = softened(weight, here.count, to.m[x], to.l[x]);
      if (here.scales)
        for (int64_t r = 0; r < here.count; ++r) weight[r] *= here.scales[R + r];
      for (int64_t h = 0; h < H; ++h) to.acc[x * H + h] *= decay;
    }
    weigh_queries<QUERIES>(to.score, to.count, score_row, here.rows + H, here.count, H, to.acc, &ahead);
  }
}

template <typename Cell>
static void attend_over(const Attention& of, const Group& group, int64_t kv_head, Ahead<Cell>& ahead) {
  const int64_t H = of.head_dim, G = of.heads / of.kv_heads, R = of.page_rows, X = of.tokens * G, all = group.count * X;
  const int64_t score_row = (R + LANES - 1) / LANES * LANES;

  static thread_local Scratch scratch;
  scratch.q.resize(all * H), scratch.acc.resize(all * H), scratch.score.resize(all * score_row);
  scratch.softmax.resize(2 * all);
  float* m = scratch.softmax.data();
  const Queries together{scratch.q.data(), scratch.score.data(), m, m + all, scratch.acc.data(), all};
  for (int64_t i = 0; i < group.count; ++i) {
    const Queries own = together.of_slot(i, X, H);
    start_from_own(of, of.order[group.first + i], kv_head, own.q, own.m, own.l, own.acc);
  }
  add_run(of, run_of(of, group, 0), kv_head, together, ahead);
  for (int64_t i = 0; i < group.count; ++i) {
    const Run run = run_of(of, group, i + 1);
    const Queries own = together.of_slot(i, X, H);
    add_run(of, run, kv_head, own, ahead);
    for (int64_t x = 0; x < X; ++x) {
      float* out = of.out + ((run.slot * of.tokens + x / G) * of.heads + kv_head * G + x % G) * H;
      for (int64_t h = 0; h < H; ++h) out[h] = own.acc[x * H + h] / own.l[x];
    }
  }
}

template <typename Cell>
static void attend_all(const Attention& of, int64_t first, int64_t last) {
  Ahead<Cell> ahead(of, first, last);
  for (int64_t i = first; i < last; ++i) attend_over<Cell>(of, of.groups[i / of.kv_heads], i % of.kv_heads, ahead);
}

static void attend(const Attention& of, int64_t first, int64_t last) {
  of.scale ? attend_all<int8_t>(of, first, last) : attend_all<float>(of, first, last);
}
