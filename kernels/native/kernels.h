// The native CPU kernels: what they take, and the levels of vector instructions that they are compiled for.
//
// Axes as in cache_manager/layout.py; of a product R rows, I inputs, O outputs, P panels of PANEL outputs.
#pragma once

#include <cstdint>

namespace slipstream {

constexpr int PANEL = 32;

// How a panel's weights are stored. All are read in the order of memory, an input's 32 outputs (or two inputs') at once.
// bfloat16 has an even number of inputs, and two inputs of an output are neighbours, as dot products take them. In blocks
// a weight is code * scale + offset, rounded once where the level multiplies and adds at once, or where the product is
// exact: scales in half precision times any code here are.
enum class Stored {
  kF32,      // float [P, I, 32]
  kBF16,     // bfloat16 [P, I / 2, 32, 2]
  kF16,      // half precision [P, I, 32]
  kInt8,     // int8 [P, I, 32], scale [P, 32] of whole sums
  kBlocks8,  // int8 [P, I, 32]; scale, offset [P, Q, 32]
  kBlocks4,  // 0 ... 15, [P, I / 2, 32] bytes, input 2 i in the low half and 2 i + 1 in the high one; scale, offset as above
  kTable4,   // the same, that stand for a table's values, without offset
  kFloat8,   // float8_e4m3fn [P, I, 32]; scale [P, Q, 32]
};

struct Panels {
  Stored stored;
  const void* code;
  const void* scale;   // float, or in blocks what `grid_is_f16` says
  const void* offset;  // as scale, of blocks alone; or null
  int64_t inputs;
  int64_t outputs;   // the last panel may have fewer than 32
  int64_t blocks;    // Q, blocks of inputs that share a scale
  bool grid_is_f16;  // scale and offset in half precision
  const int8_t* table = nullptr;  // [16]
};

// What attention of both kinds reads besides its own tokens, and how.
struct Cached {
  const void* cache;    // [L, P, K, R, 2 H], float, or int8 where there are scales
  const float* scale;   // [L, P, K, 2, R], or null
  const int32_t* page;  // [B, J]
  int64_t heads, kv_heads, head_dim;
  int64_t layers, pool, page_rows, pages_per_text;
  int32_t layer;
  int32_t window;     // tokens that a query sees, itself included; 0 is no window
  float soft_cap;     // 0 is none
  const float* sink;  // [N], scores without keys and values, or null
};

// Slots whose texts begin with the same pages, which all their tokens see. They are read once for all of them.
struct Group {
  int64_t first, count;  // of the slots' places in the step's order
  int64_t pages;
};

// Of a step's tokens.
struct Attention : Cached {
  const float* q;         // [B, W, N, H]
  const float* fresh;     // [B, W, K, 2 H], the step's own k and v
  const int32_t* length;  // [B]
  float* out;             // [B, W, N, H]
  int64_t slots, tokens;
  const int32_t* order;   // [B], all slots, group behind group; see groups.h
  const Group* groups;
};

// Of pieces of B texts, T tokens each, padding included.
struct Chunk : Cached {
  const float* q;        // [B, T, N, H]
  const float *k, *v;    // [B, T, K, H]
  const int32_t* start;  // [B], cached rows
  const int32_t* count;  // [B], tokens; what the padding behind them gives is zeros
  float* out;            // [B, T, N, H]
  int64_t texts, tokens;
};

// One level's kernels. Each computes a part of an op's result, which the parts share among threads.
struct Kernels {
  const char* name;
  // out[rows, outputs] of the panels [first, last) and these rows; `out` and `x` begin at the first row.
  void (*panels)(const float* x, const Panels& weight, float* out, int64_t rows, int64_t first, int64_t last);
  // The same of activations in bfloat16, an even number of inputs, and weights in bfloat16 or int8. Null where the level
  // has no such instructions: then `panels` makes the same products of activations that were widened.
  void (*dots)(const uint16_t* x, const Panels& weight, float* out, int64_t rows, int64_t first, int64_t last);
  // All tokens' query heads of the kv heads [first, last), counted over all groups: group * kv_heads + kv_head.
  void (*attend)(const Attention& of, int64_t first, int64_t last);
  // The parts [first, last) of a chunk, of which there are `parts_of` it. Each half's first ones take longest.
  void (*attend_chunk)(const Chunk& of, int64_t first, int64_t last);
  // Each row over its root mean square, times the weight.
  void (*rms_norm)(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps);
};

// A part of a chunk's attention is one kv head's query heads of PANEL tokens at most.
inline int64_t parts_of(const Chunk& of) { return of.texts * of.kv_heads * ((of.tokens + PANEL - 1) / PANEL); }

// Null where the compiler's target has no such instructions.
const Kernels* amx();
const Kernels* avx512_bf16();
const Kernels* avx512();
const Kernels* avx2();
const Kernels* generic();

// The best that this CPU runs, or the one that `use_level` chose.
const Kernels& kernels();
// Whether there is a level of this name and this CPU runs it; then `kernels` are its own from now on.
bool use_level(const char* name);

}  // namespace slipstream
