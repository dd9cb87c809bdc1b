// The row-wise ops of the normal form on CPU: all ops of a batch at one module in one call.
//
// A decode step has few tokens per delta, so its time is that of reading the deltas' weights once. Weights are fp32 and
// stream through contiguous rows; activations are fp32 or bf16, computed in fp32 and rounded once.
// The structs mirror OP_DTYPE and SEGMENT_DTYPE of cpu.py, which builds them. Semantics: kernels/ops.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu_types.h"

namespace {

enum Kind : int32_t { ADD_FROM_INPUT, ADD_FROM_TAP, ADD_FROM_OUTPUT, AFFINE, BLOCKS };
enum Activation : int32_t { IDENTITY, RELU, GELU, GELU_NEW, SILU, TANH, LEAKY_RELU, SIGMOID };

struct Op {
  const float* a;        // LowRank: A [rank, width]; affine: scale or null; blocks: [stages, rank or 1, block, block]
  const float* b;        // LowRank: B [rank, stop - start]; affine: shift or null
  const float* a_bias;   // [rank] or null
  const float* b_bias;   // [stop - start] or null
  const int64_t* order;  // blocks: [stages, stop - start] or null
  int32_t kind, activation, rank, width, start, stop, tap, block, stages, shared;
  float scaling;
  int32_t unused;
};

struct Segment {  // tokens [start, stop) run ops[offsets[i]] .. ops[offsets[i + 1]] at module i of a phase
  const Op* ops;
  const int32_t* offsets;
  int32_t start, stop;
};

struct Matrix {  // rows of `width` elements, contiguous
  void* data;
  int64_t width;
  int32_t dtype, unused;
};

constexpr int64_t PARALLEL_FROM = 1 << 19;  // multiply-adds: below, waking a sleeping thread costs what it saves

// Rows [start, stop) as fp32: in place where they are, else through a buffer.
class Rows {
 public:
  Rows(const Matrix& matrix, int32_t start, int32_t stop) : matrix_(matrix), start_(start), count_(stop - start) {
    const int64_t first = start * matrix.width, size = count_ * matrix.width;
    if (matrix.dtype == FLOAT32) {
      data_ = static_cast<float*>(matrix.data) + first;
      return;
    }
    buffer_.resize(size);
    const uint16_t* source = static_cast<const uint16_t*>(matrix.data) + first;
    for (int64_t i = 0; i < size; ++i) buffer_[i] = bf16_to_float(source[i]);
    data_ = buffer_.data();
  }

  float* row(int64_t token) const { return data_ + token * matrix_.width; }

  void store() const {
    if (matrix_.dtype == FLOAT32) return;
    uint16_t* target = static_cast<uint16_t*>(matrix_.data) + start_ * matrix_.width;
    for (int64_t i = 0; i < count_ * matrix_.width; ++i) target[i] = float_to_bf16(buffer_[i]);
  }

 private:
  Matrix matrix_;
  int64_t start_, count_;
  std::vector<float> buffer_;
  float* data_;
};

float activate(float x, int32_t kind) {
  switch (kind) {
    case RELU: return x > 0 ? x : 0;
    case GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case GELU_NEW: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case SILU: return x / (1.0f + std::exp(-x));
    case TANH: return std::tanh(x);
    case LEAKY_RELU: return x > 0 ? x : 0.01f * x;
    case SIGMOID: return 1.0f / (1.0f + std::exp(-x));
    default: return x;
  }
}

// Weights are read once, so hardware prefetchers start too late: ask for `size` floats of what comes next.
inline void prefetch(const float* next, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(next + i);
}

// hidden[t, r] = x[t] . A[r]; four rows of A at a time, each read from memory once for all tokens
void shrink(const Op& op, const Rows& x, int32_t count, float* hidden) {
  const int64_t width = op.width;
  int32_t r = 0;
  for (; r + 4 <= op.rank; r += 4) {
    const float *a0 = op.a + r * width, *a1 = a0 + width, *a2 = a1 + width, *a3 = a2 + width;
    if (r + 8 <= op.rank) {
      prefetch(a0 + 4 * width, 4 * width);
    } else {
      prefetch(op.b, 4 * (op.stop - op.start));
    }
    for (int32_t t = 0; t < count; ++t) {
      const float* row = x.row(t);
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t i = 0; i < width; ++i) {
        s0 += row[i] * a0[i];
        s1 += row[i] * a1[i];
        s2 += row[i] * a2[i];
        s3 += row[i] * a3[i];
      }
      float* out = hidden + int64_t(t) * op.rank + r;
      out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
    }
  }
  for (; r < op.rank; ++r) {
    const float* a0 = op.a + r * width;
    for (int32_t t = 0; t < count; ++t) {
      const float* row = x.row(t);
      float s0 = 0;
#pragma omp simd reduction(+ : s0)
      for (int64_t i = 0; i < width; ++i) s0 += row[i] * a0[i];
      hidden[int64_t(t) * op.rank + r] = s0;
    }
  }
}

// y[t, start:stop] += hidden[t] @ B, hidden scaled before
void expand(const Op& op, const Rows& y, int32_t count, const float* hidden) {
  const int64_t columns = op.stop - op.start;
  int32_t r = 0;
  for (; r + 4 <= op.rank; r += 4) {
    const float *b0 = op.b + r * columns, *b1 = b0 + columns, *b2 = b1 + columns, *b3 = b2 + columns;
    if (r + 8 <= op.rank) prefetch(b0 + 4 * columns, 4 * columns);
    for (int32_t t = 0; t < count; ++t) {
      float* out = y.row(t) + op.start;
      const float* h = hidden + int64_t(t) * op.rank + r;
      const float h0 = h[0], h1 = h[1], h2 = h[2], h3 = h[3];
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) out[c] += h0 * b0[c] + h1 * b1[c] + h2 * b2[c] + h3 * b3[c];
    }
  }
  for (; r < op.rank; ++r) {
    const float* b0 = op.b + r * columns;
    for (int32_t t = 0; t < count; ++t) {
      float* out = y.row(t) + op.start;
      const float h0 = hidden[int64_t(t) * op.rank + r];
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) out[c] += h0 * b0[c];
    }
  }
}

void low_rank(const Op& op, const Rows& y, const Rows& x, int32_t count, std::vector<float>& scratch) {
  scratch.resize(int64_t(count) * op.rank);
  float* hidden = scratch.data();
  shrink(op, x, count, hidden);  // whole, before y changes: x may be y
  for (int32_t t = 0; t < count; ++t) {
    float* h = hidden + int64_t(t) * op.rank;
    for (int32_t r = 0; r < op.rank; ++r) {
      const float sum = op.a_bias ? h[r] + op.a_bias[r] : h[r];
      h[r] = op.scaling * activate(sum, op.activation);
    }
  }
  expand(op, y, count, hidden);
  if (!op.b_bias) return;
  for (int32_t t = 0; t < count; ++t) {
    float* out = y.row(t) + op.start;
    for (int32_t c = 0; c < op.stop - op.start; ++c) out[c] += op.scaling * op.b_bias[c];
  }
}

void affine(const Op& op, const Rows& y, int32_t count) {
  const int32_t columns = op.stop - op.start;
  for (int32_t t = 0; t < count; ++t) {
    float* out = y.row(t) + op.start;
    for (int32_t c = 0; c < columns; ++c) {
      const float scaled = op.a ? out[c] * op.a[c] : out[c];
      out[c] = op.b ? scaled + op.b[c] : scaled;
    }
  }
}

// sum = z @ matrix [block, block], block a multiple of the vector width: sums stay in registers
void turn_vectors(const float* z, const float* matrix, int64_t block, float* sum) {
  for (int64_t j = 0; j < block; j += LANES) {
    Vector even = {}, odd = {};
    for (int64_t k = 0; k < block; k += 2) {
      even += z[k] * load_vector(matrix + k * block + j);
      odd += z[k + 1] * load_vector(matrix + (k + 1) * block + j);
    }
    store_vector(sum + j, even + odd);
  }
}

// the same for any block; a size known at compile time is unrolled
template <int64_t SIZE>
void turn(const float* z, const float* matrix, int64_t block, float* sum) {
  const int64_t size = SIZE ? SIZE : block;
  std::memset(sum, 0, size * sizeof(float));
  for (int64_t k = 0; k < size; ++k)
    for (int64_t j = 0; j < size; ++j) sum[j] += z[k] * matrix[k * size + j];
}

using Turn = void (*)(const float*, const float*, int64_t, float*);

Turn turn_of(int64_t block) {
  if (block % LANES == 0) return turn_vectors;
  if (block == 8) return turn<8>;
  if (block == 4) return turn<4>;
  if (block == 2) return turn<2>;
  return turn<0>;
}

// every stage: z = y[t, order] in runs of `block`; z_i = z_i @ blocks_i; y[t, order] = z
void blocks(const Op& op, const Rows& y, int32_t count, std::vector<float>& scratch) {
  const int64_t columns = op.stop - op.start, block = op.block, area = block * block, runs = op.rank;
  const Turn turn_run = turn_of(block);
  scratch.resize(columns + block);
  float *turned = scratch.data(), *sum = turned + columns;
  for (int32_t stage = 0; stage < op.stages; ++stage) {
    const float* matrices = op.a + stage * (op.shared ? 1 : runs) * area;
    const int64_t* order = op.order ? op.order + stage * columns : nullptr;
    for (int32_t t = 0; t < count; ++t) {
      float* out = y.row(t) + op.start;
      if (order) {
        for (int64_t c = 0; c < columns; ++c) turned[c] = out[order[c]];
      } else {
        std::memcpy(turned, out, columns * sizeof(float));
      }
      for (int64_t run = 0; run < runs; ++run) {
        const float *matrix = matrices + (op.shared ? 0 : run * area), *z = turned + run * block;
        if (t == 0 && !op.shared) prefetch(matrix + 2 * area, area);
        turn_run(z, matrix, block, sum);
        for (int64_t j = 0; j < block; ++j) out[order ? order[run * block + j] : run * block + j] = sum[j];
      }
    }
  }
}

// for one token, which is also the number of weights that are read
int64_t multiply_adds(const Op& op) {
  const int64_t columns = op.stop - op.start;
  if (op.kind == AFFINE) return 2 * columns;
  if (op.kind == BLOCKS) return int64_t(op.stages) * columns * op.block;
  return op.rank * (op.width + columns);
}

void run_segment(const Segment& segment, int32_t module, const Matrix& y, const Matrix* x, const Matrix* taps) {
  const int32_t first = segment.offsets[module], last = segment.offsets[module + 1];
  if (first == last) return;
  const int32_t count = segment.stop - segment.start;
  thread_local std::vector<float> scratch;
  const Rows out(y, segment.start, segment.stop);
  for (const Op* op = segment.ops + first; op != segment.ops + last; ++op) {
    switch (op->kind) {
      case ADD_FROM_INPUT: low_rank(*op, out, Rows(*x, segment.start, segment.stop), count, scratch); break;
      case ADD_FROM_TAP: low_rank(*op, out, Rows(taps[op->tap], segment.start, segment.stop), count, scratch); break;
      case ADD_FROM_OUTPUT: low_rank(*op, out, out, count, scratch); break;
      case AFFINE: affine(*op, out, count); break;
      case BLOCKS: blocks(*op, out, count, scratch); break;
    }
  }
  out.store();
}

}  // namespace

// Run every segment's ops at `module` on y [T, O] in place. `x` is the module's input, `taps[i]` the input of module i.
extern "C" void deltamux_run_rows(const Segment* segments, int32_t num_segments, int32_t module, const Matrix* y,
                                  const Matrix* x, const Matrix* taps, int32_t num_threads) {
  int64_t work = 0;
  for (int32_t s = 0; s < num_segments; ++s)
    for (int32_t i = segments[s].offsets[module]; i < segments[s].offsets[module + 1]; ++i)
      work += multiply_adds(segments[s].ops[i]) * (segments[s].stop - segments[s].start);
  if (num_threads == 1 || num_segments == 1 || work < PARALLEL_FROM) {
    for (int32_t s = 0; s < num_segments; ++s) run_segment(segments[s], module, *y, x, taps);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
  for (int32_t s = 0; s < num_segments; ++s) run_segment(segments[s], module, *y, x, taps);
}

// Sizes of the structs, for the check that both sides agree.
extern "C" int32_t deltamux_struct_size(int32_t which) {
  const int32_t sizes[] = {sizeof(Op), sizeof(Segment), sizeof(Matrix)};
  return sizes[which];
}
