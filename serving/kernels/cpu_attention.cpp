// Decode attention on CPU over contiguous KV slots: one query token a row, rows of any length, in one call.
//
// Appends the token's key and value to its slot, then attends to the slot's visible entries: fp32 throughout, nothing
// outside the row's own entries is read. Semantics: serving/model/kv_cache.py, SlotAttention.attend.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_types.h"

namespace {

struct Heads {  // element [token, head, :] lies at data + token * token_stride + head * head_stride
  void* data;
  int64_t token_stride, head_stride;
};

struct Decode {
  Heads query, key, value, out;    // of the batch's tokens, all of `dtype`
  void *keys, *values;             // pools [slots, kv_heads, max_len, width] of `pool_dtype`
  const int64_t *tokens, *slots;   // per row
  const int64_t *past;             // per row: entries in the slot before this token
  int64_t num_rows, num_heads, num_kv_heads, width, max_len;
  int64_t window;                  // 0: all entries are visible
  float scaling, softcap;          // softcap 0: none
  int32_t dtype, pool_dtype;
};

constexpr int64_t PARALLEL_FROM = 1 << 20;  // cache elements read: below, waking a sleeping thread costs what it saves

// e^x for x <= 0 to 2 ulp, in a form that compilers vectorise: 2^n * 2^f, f in [-0.5, 0.5], by a polynomial
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float scaled = x * 1.44269504088896341f, n = std::nearbyint(scaled);
  const float f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

// scores[g, k] = query[g] . keys[k] for G queries and K keys side by side: each value is loaded once for all
template <int G, int K, typename P>
void score_block(const float* query, const P* keys, int64_t width, float* scores, int64_t stride) {
  Vector sums[G][K] = {};
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    Vector q[G];
    for (int g = 0; g < G; ++g) q[g] = load_vector(query + g * width + i);
    for (int k = 0; k < K; ++k) {
      const Vector key = load_vector(keys + k * width + i);
      for (int g = 0; g < G; ++g) sums[g][k] += q[g] * key;
    }
  }
  for (int g = 0; g < G; ++g)
    for (int k = 0; k < K; ++k) {
      float sum = sum_of(sums[g][k]);
      for (int64_t j = i; j < width; ++j) sum += query[g * width + j] * load(keys + k * width, j);
      scores[g * stride + k] = sum;
    }
}

// `next` is what is read after the keys: asked for while they are computed with
template <int G, typename P>
void score(const float* query, const P* keys, int64_t width, float* scores, int64_t count, const P* next) {
  int64_t k = 0;
  for (; k + 4 <= count; k += 4) {
    for (int64_t i = 0; i < 4 * width; i += 64 / sizeof(P)) __builtin_prefetch(next + k * width + i);
    for (int64_t i = 0; i < 4 * width; i += 64 / sizeof(P)) __builtin_prefetch(keys + (k + 16) * width + i);
    score_block<G, 4>(query, keys + k * width, width, scores + k, count);
  }
  for (; k < count; ++k) score_block<G, 1>(query, keys + k * width, width, scores + k, count);
}

// out[g, i:i+B*LANES] = sum over k of weights[g, k] * values[k], in registers
template <int G, int B, typename P>
void mix_block(const float* weights, const P* values, int64_t width, int64_t count, float* out) {
  Vector sums[G][B] = {};
  for (int64_t k = 0; k < count; ++k)
    for (int b = 0; b < B; ++b) {
      const Vector value = load_vector(values + k * width + b * LANES);
      for (int g = 0; g < G; ++g) sums[g][b] += weights[g * count + k] * value;
    }
  for (int g = 0; g < G; ++g)
    for (int b = 0; b < B; ++b) store_vector(out + g * width + b * LANES, sums[g][b]);
}

template <int G, typename P>
void mix(const float* weights, const P* values, int64_t width, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) mix_block<G, 4>(weights, values + i, width, count, out + i);
  for (; i + LANES <= width; i += LANES) mix_block<G, 1>(weights, values + i, width, count, out + i);
  for (; i < width; ++i)
    for (int g = 0; g < G; ++g) {
      float sum = 0;
      for (int64_t k = 0; k < count; ++k) sum += weights[g * count + k] * load(values + k * width, i);
      out[g * width + i] = sum;
    }
}

// scores -> weights that sum to 1, in place
void softmax(float* scores, int64_t count, float softcap) {
  if (softcap > 0)
    for (int64_t k = 0; k < count; ++k) scores[k] = softcap * std::tanh(scores[k] / softcap);
  float most = -INFINITY, total = 0;  // a NaN may be lost here but reaches the output through the sum below
#pragma omp simd reduction(max : most)
  for (int64_t k = 0; k < count; ++k) most = std::max(most, scores[k]);
#pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < count; ++k) {
    const float shifted = scores[k] - most;
    const float power = shifted == shifted ? exp_negative(shifted) : shifted;
    scores[k] = power;
    total += power;
  }
  const float share = 1.0f / total;
  for (int64_t k = 0; k < count; ++k) scores[k] *= share;
}

template <typename T, typename P>
void attend(const Decode& d, int64_t row, int64_t kv_head, std::vector<float>& scratch) {
  const int64_t token = d.tokens[row], width = d.width, past = d.past[row], end = past + 1;
  const int64_t begin = d.window > 0 ? std::max<int64_t>(0, end - d.window) : 0;
  const int64_t count = end - begin, groups = d.num_heads / d.num_kv_heads;
  const int64_t base = (d.slots[row] * d.num_kv_heads + kv_head) * d.max_len;
  P* keys = static_cast<P*>(d.keys) + base * width;
  P* values = static_cast<P*>(d.values) + base * width;
  const T* new_key = static_cast<T*>(d.key.data) + token * d.key.token_stride + kv_head * d.key.head_stride;
  const T* new_value = static_cast<T*>(d.value.data) + token * d.value.token_stride + kv_head * d.value.head_stride;
  for (int64_t i = 0; i < width; ++i) {
    store(keys, past * width + i, load(new_key, i));
    store(values, past * width + i, load(new_value, i));
  }

  scratch.resize(groups * (count + 2 * width));
  float *query = scratch.data(), *out = query + groups * width, *scores = out + groups * width;
  for (int64_t g = 0; g < groups; ++g) {
    const T* q = static_cast<T*>(d.query.data) + token * d.query.token_stride +
                 (kv_head * groups + g) * d.query.head_stride;
    for (int64_t i = 0; i < width; ++i) query[g * width + i] = d.scaling * load(q, i);
  }
  const P *visible_keys = keys + begin * width, *visible_values = values + begin * width;
  int64_t g = 0;
  for (; g + 2 <= groups; g += 2) score<2>(query + g * width, visible_keys, width, scores + g * count, count, visible_values);
  for (; g < groups; ++g) score<1>(query + g * width, visible_keys, width, scores + g * count, count, visible_values);
  for (g = 0; g < groups; ++g) softmax(scores + g * count, count, d.softcap);
  for (g = 0; g + 2 <= groups; g += 2) mix<2>(scores + g * count, visible_values, width, count, out + g * width);
  for (; g < groups; ++g) mix<1>(scores + g * count, visible_values, width, count, out + g * width);
  for (g = 0; g < groups; ++g) {
    T* target = static_cast<T*>(d.out.data) + token * d.out.token_stride + (kv_head * groups + g) * d.out.head_stride;
    for (int64_t i = 0; i < width; ++i) store(target, i, out[g * width + i]);
  }
}

template <typename T, typename P>
void attend_all(const Decode& d, int32_t num_threads) {
  int64_t work = 0;
  for (int64_t row = 0; row < d.num_rows; ++row) work += 2 * d.past[row] * d.num_kv_heads * d.width;
  const int64_t items = d.num_rows * d.num_kv_heads;
  if (num_threads == 1 || work < PARALLEL_FROM) {
    std::vector<float> scratch;
    for (int64_t i = 0; i < items; ++i) attend<T, P>(d, i / d.num_kv_heads, i % d.num_kv_heads, scratch);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    std::vector<float> scratch;
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < items; ++i) attend<T, P>(d, i / d.num_kv_heads, i % d.num_kv_heads, scratch);
  }
}

}  // namespace

extern "C" void deltamux_decode_attention(const Decode* d, int32_t num_threads) {
  if (d->dtype == FLOAT32 && d->pool_dtype == FLOAT32) attend_all<float, float>(*d, num_threads);
  if (d->dtype == FLOAT32 && d->pool_dtype == BFLOAT16) attend_all<float, uint16_t>(*d, num_threads);
  if (d->dtype == BFLOAT16 && d->pool_dtype == FLOAT32) attend_all<uint16_t, float>(*d, num_threads);
  if (d->dtype == BFLOAT16 && d->pool_dtype == BFLOAT16) attend_all<uint16_t, uint16_t>(*d, num_threads);
}

extern "C" int32_t deltamux_decode_size() { return sizeof(Decode); }
