// Vectors of LANES floats, by the compiler's vector types. Included once for each level, within its namespace, behind
// the pragma that allows its instructions.

#define INLINE inline __attribute__((always_inline))
#define INLINED __attribute__((always_inline))  // of a lambda

typedef float F __attribute__((vector_size(LANES * 4)));
typedef int32_t I32 __attribute__((vector_size(LANES * 4)));
typedef uint32_t U32 __attribute__((vector_size(LANES * 4)));
typedef int8_t I8 __attribute__((vector_size(LANES)));
typedef uint8_t U8 __attribute__((vector_size(LANES)));
typedef int16_t I16 __attribute__((vector_size(LANES * 2)));
typedef uint16_t U16 __attribute__((vector_size(LANES * 2)));
typedef float F4 __attribute__((vector_size(16)));

static INLINE F load(const float* from) {
  F value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

static INLINE U32 load(const uint32_t* from) {
  U32 value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

static INLINE void store(float* to, F value) { __builtin_memcpy(to, &value, sizeof value); }

static INLINE void store(uint32_t* to, U32 value) { __builtin_memcpy(to, &value, sizeof value); }

// int8 to int32, as many as a vector of floats has.
static INLINE I32 widened(const int8_t* from) {
#if LANES == 16
  return (I32)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif LANES == 8
  return (I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  return (I32)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)))));
#else
  I8 codes;
  __builtin_memcpy(&codes, from, sizeof codes);
  return __builtin_convertvector(codes, I32);
#endif
}

// Bytes, likewise.
static INLINE I32 widened(const uint8_t* from) {
#if LANES == 16
  return (I32)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif LANES == 8
  return (I32)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  uint32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  return (I32)vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)))));
#else
  U8 bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, I32);
#endif
}

// The lower 4 bits of each as a number.
static INLINE F low_half(I32 bytes) {
#if LANES == 16
  const F table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (F)_mm512_permutexvar_ps((__m512i)bytes, (__m512)table);
#else
  return __builtin_convertvector(bytes & 15, F);
#endif
}

// The upper 4 bits of bytes, likewise.
static INLINE F high_half(I32 bytes) { return __builtin_convertvector(bytes >> 4, F); }

#if LANES == 16
// What 4 bits stand for: 16 floats.
using Table = F;

static INLINE Table table_of(const int8_t* values) { return __builtin_convertvector(widened(values), F); }

static INLINE F looked_up(const Table& table, I32 code) {
  return (F)_mm512_permutexvar_ps((__m512i)code, (__m512)table);  // by the lowest 4 bits
}
#elif LANES == 8
using Table = __m128i;

static INLINE Table table_of(const int8_t* values) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values)); }

static INLINE F looked_up(const Table& table, I32 code) {
  const __m256i at = (__m256i)((code & 15) | (int32_t)0x80808000);  // the upper bytes are 0
  const __m256i byte = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), at);
  return __builtin_convertvector((I32)byte << 24 >> 24, F);
}
#elif defined(__aarch64__)
using Table = int8x16_t;

static INLINE Table table_of(const int8_t* values) { return vld1q_s8(values); }

static INLINE F looked_up(const Table& table, I32 code) {
  const I32 byte = (I32)vqtbl1q_s8(table, (uint8x16_t)(code & 15 | (int32_t)0xffffff00));  // the upper bytes are 0
  return __builtin_convertvector(byte << 24 >> 24, F);
}
#else
struct Table {
  float value[16];
};

static INLINE Table table_of(const int8_t* values) {
  Table table;
  for (int i = 0; i < 16; ++i) table.value[i] = values[i];
  return table;
}

static INLINE F looked_up(const Table& table, I32 code) {
  F found;
  for (int i = 0; i < LANES; ++i) found[i] = table.value[code[i] & 15];
  return found;
}
#endif

static INLINE F load(const int8_t* from) { return __builtin_convertvector(widened(from), F); }

static INLINE U32 splat(uint32_t value) { return value - U32{}; }

struct Half {
  uint16_t bits;
};

// float8_e4m3fn: a sign, 4 bits of exponent, 3 of mantissa. No weight is NaN, the largest of either sign: to tell it takes
// three instructions more and up to 1.45 of a product's time.
struct Float8 {
  uint8_t bits;
};

// Half precision as floats, exactly. Nothing here is a subnormal float: those may be taken for 0.
static INLINE F of_halves(U16 halves) {
#if LANES == 16
  return (F)_mm512_cvtph_ps((__m256i)halves);
#elif LANES == 8
  return (F)_mm256_cvtph_ps((__m128i)halves);
#elif defined(__aarch64__)
  return (F)vcvt_f32_f16((float16x4_t)halves);
#else
  const U32 bits = __builtin_convertvector(halves, U32), size = (bits & 0x7fff) << 13;
  constexpr uint32_t ONE = 1 << 23, BIAS = 112 * ONE;  // of exponents, and what a float's has more
  const U32 normal = size + (size >= 31 * ONE ? splat(2 * BIAS) : splat(BIAS));  // or infinite, or NaN
  const U32 subnormal = (U32)((F)(size + BIAS + ONE) - (F)splat(BIAS + ONE));
  return (F)((size < ONE ? subnormal : normal) | (bits & 0x8000) << 16);
#endif
}

static INLINE F load(const Half* from) {
  U16 halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return of_halves(halves);
}

// int8 to int16, likewise.
static INLINE I16 halfway_widened(const int8_t* from) {
#if LANES == 16
  return (I16)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif LANES == 8
  return (I16)_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#elif defined(__aarch64__)
  int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  return (I16)vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four))));
#else
  I8 codes;
  __builtin_memcpy(&codes, from, sizeof codes);
  return __builtin_convertvector(codes, I16);
#endif
}

constexpr float OF_FLOAT8 = 256;  // its value over that of the half precision with its bits: exponents' biases are 7 and 15

// Over OF_FLOAT8, exactly.
static INLINE F load(const Float8* from) {
  const I16 half = halfway_widened(reinterpret_cast<const int8_t*>(from)) << 7 & static_cast<int16_t>(0xbf80);
  return of_halves((U16)half);
}

static INLINE F splat(float value) { return value - F{}; }

static INLINE F as_floats(U32 bits) { return (F)bits; }

static INLINE U32 as_bits(F value) { return (U32)value; }

#if DOTS == 1
// sum + the products of each lane's two bfloat16.
static INLINE F dot(F sum, U32 x, U32 w) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w); }
#endif

static INLINE F larger(F a, F b) { return a > b ? a : b; }

static INLINE float largest(F value) {
  float found = value[0];
  for (int i = 1; i < LANES; ++i) found = found > value[i] ? found : value[i];
  return found;
}

// The sum of a vector's lanes as four partial ones.
static INLINE F4 folded(F value) {
  F4 part[LANES / 4];
  __builtin_memcpy(part, &value, sizeof value);
  for (int n = LANES / 8; n; n /= 2)
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  return part[0];
}

static INLINE float sum(F value) {
  const F4 part = folded(value);
  return (part[0] + part[2]) + (part[1] + part[3]);
}

static INLINE void add_up(const F (&values)[1], float* to) { *to = sum(values[0]); }

// The same of four vectors, side by side.
static INLINE void add_up(const F (&values)[4], float* to) {
  const F4 a = folded(values[0]), b = folded(values[1]), c = folded(values[2]), d = folded(values[3]);
  const F4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const F4 cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const F4 sums = __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  __builtin_memcpy(to, &sums, sizeof sums);
}

// exp(x) for x <= 0, with a relative error of 2e-7; what is below 1e-38 may come out as that.
static INLINE F exp_of_negative(F x) {
  x = larger(splat(-87.0f), x);  // NaN stays NaN
  const I32 whole = __builtin_convertvector(x * 1.44269504f - 0.5f, I32);  // rounds towards 0: to the nearest
  const F n = __builtin_convertvector(whole, F);
  const F r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
  F p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + (r + 1.0f);
  return p * as_floats((U32)(whole + 127) << 23);
}

// cap * tanh(score / cap), within 1e-7 of the cap.
static INLINE F capped(F score, float cap) {
  const F twice = score * (2 / cap), e = exp_of_negative(twice > 0 ? -twice : twice), size = cap * (1 - e) / (1 + e);
  return twice > 0 ? size : -size;
}
