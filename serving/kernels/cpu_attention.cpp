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

constexpr int64_t PARALLEL_FROM = 1 << 16;  // cache elements read by the call

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
  for (int64_t k = 0; k < count; ++k) {
    const P* key = keys + (begin + k) * width;
    for (int64_t g = 0; g < groups; ++g) {
      const float* q = query + g * width;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < width; ++i) sum += q[i] * load(key, i);
      scores[g * count + k] = sum;
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    float *row_scores = scores + g * count, most = -INFINITY, total = 0;
    if (d.softcap > 0)
      for (int64_t k = 0; k < count; ++k) row_scores[k] = d.softcap * std::tanh(row_scores[k] / d.softcap);
    // a NaN may be lost here but reaches the output through the sum below
#pragma omp simd reduction(max : most)
    for (int64_t k = 0; k < count; ++k) most = std::max(most, row_scores[k]);
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < count; ++k) {
      const float shifted = row_scores[k] - most;
      const float power = shifted == shifted ? exp_negative(shifted) : shifted;
      row_scores[k] = power;
      total += power;
    }
    const float share = 1.0f / total;
    for (int64_t k = 0; k < count; ++k) row_scores[k] *= share;
  }
  std::fill(out, out + groups * width, 0.0f);
  for (int64_t k = 0; k < count; ++k) {
    const P* value = values + (begin + k) * width;
    for (int64_t g = 0; g < groups; ++g) {
      const float weight = scores[g * count + k];
      float* sum = out + g * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) sum[i] += weight * load(value, i);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
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
