// Root mean square norms of rows. Included once for each level.

// The sum of squares is that of 16 lanes, however many a vector has.
static float sum_of_squares(const float* x, int64_t count) {
  constexpr int WIDTH = 16, V = WIDTH / LANES;
  F sums[V] = {};
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH)
    for (int v = 0; v < V; ++v) {
      const F value = load(x + i + v * LANES);
      sums[v] += value * value;
    }
  for (int n = V / 2; n; n /= 2)
    for (int v = 0; v < n; ++v) sums[v] += sums[v + n];
  float found = sum(sums[0]);
  for (; i < count; ++i) found += x[i] * x[i];
  return found;
}

static void rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps) {
  for (int64_t r = 0; r < rows; ++r, x += width, out += width) {
    const float factor = 1 / std::sqrt(sum_of_squares(x, width) / width + eps);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) store(out + i, load(weight + i) * (load(x + i) * factor));
    for (; i < width; ++i) out[i] = weight[i] * (x[i] * factor);
  }
}
