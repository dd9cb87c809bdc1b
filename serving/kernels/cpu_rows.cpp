// The row-wise ops of the normal form on CPU: all ops of a batch at one module in one call.
//
// A decode step has few tokens per delta, so its time is that of reading the deltas' weights once. Weights are fp32 and
// stream through contiguous rows; activations are fp32 or bf16, computed in fp32 and rounded once.
// The structs mirror OP_DTYPE and SEGMENT_DTYPE of cpu.py, which builds them. Semantics: kernels/ops.py.

#include <algorithm>
#include <atomic>
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

constexpr int32_t GROUP = 4;                // rows of a factor that are read side by side
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

// Weights are read once and in pieces too short for hardware prefetchers, so each loop asks for what is read after it,
// a little at a time: memory is never idle, and never asked for more than it can have under way.
struct Ahead {
  const float* next;
  int64_t size;
};

// What an op reads first.
Ahead beginning(const Op& op) {
  switch (op.kind) {
    case AFFINE: return {op.a, op.a ? op.stop - op.start : 0};
    case BLOCKS: return {op.a, std::min<int64_t>(op.shared ? 1 : op.rank, GROUP) * op.block * op.block};
    default: return {op.a, int64_t(std::min(op.rank, GROUP)) * op.width};
  }
}

// What is read when row r of `rows`, of `size` floats each, is next; `after` where there is none left.
Ahead following(const float* base, int32_t r, int32_t rows, int64_t size, Ahead after) {
  return r < rows ? Ahead{base + r * size, std::min(GROUP, rows - r) * size} : after;
}

// Calls body(i) for every whole vector of `size` floats while asking for `ahead`; returns where the rest begins.
template <int LINES, typename Body>
inline int64_t each_vector(int64_t size, Ahead ahead, const Body& body) {
  const int64_t asked = std::min(size, ahead.size / LINES);
  int64_t i = 0;
  for (; i + LANES <= asked; i += LANES) {
    for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead.next + LINES * i + line * LANES);
    body(i);
  }
  for (; i + LANES <= size; i += LANES) body(i);
  return i;
}

// hidden[t, r] = x[t] . A[r] for N rows of A, each read from memory once for all tokens
template <int N>
void shrink_rows(const Op& op, const Rows& x, int32_t count, float* hidden, int32_t r, Ahead ahead) {
  const int64_t width = op.width;
  const float* a = op.a + r * width;
  for (int32_t t = 0; t < count; ++t) {
    const float* row = x.row(t);
    Vector sums[N] = {};
    const int64_t rest = each_vector<N>(width, t == 0 ? ahead : Ahead{}, [&](int64_t i) {
      const Vector v = load_vector(row + i);
      for (int n = 0; n < N; ++n) sums[n] += v * load_vector(a + n * width + i);
    });
    for (int n = 0; n < N; ++n) {
      float sum = sum_of(sums[n]);
      for (int64_t i = rest; i < width; ++i) sum += row[i] * a[n * width + i];
      hidden[int64_t(t) * op.rank + r + n] = sum;
    }
  }
}

void shrink(const Op& op, const Rows& x, int32_t count, float* hidden) {
  const int64_t columns = op.stop - op.start;
  const Ahead b = {op.b, std::min(op.rank, GROUP) * columns};
  int32_t r = 0;
  for (; r + GROUP <= op.rank; r += GROUP)
    shrink_rows<GROUP>(op, x, count, hidden, r, following(op.a, r + GROUP, op.rank, op.width, b));
  for (; r < op.rank; ++r) shrink_rows<1>(op, x, count, hidden, r, {});
}

// y[t, start:stop] += hidden[t] @ B for N rows of B, hidden scaled before
template <int N>
void expand_rows(const Op& op, const Rows& y, int32_t count, const float* hidden, int32_t r, Ahead ahead) {
  const int64_t columns = op.stop - op.start;
  const float* b = op.b + r * columns;
  for (int32_t t = 0; t < count; ++t) {
    float* out = y.row(t) + op.start;
    float h[N];
    for (int n = 0; n < N; ++n) h[n] = hidden[int64_t(t) * op.rank + r + n];
    const int64_t rest = each_vector<N>(columns, t == 0 ? ahead : Ahead{}, [&](int64_t c) {
      Vector sum = load_vector(out + c);
      for (int n = 0; n < N; ++n) sum += h[n] * load_vector(b + n * columns + c);
      store_vector(out + c, sum);
    });
    for (int64_t c = rest; c < columns; ++c)
      for (int n = 0; n < N; ++n) out[c] += h[n] * b[n * columns + c];
  }
}

void expand(const Op& op, const Rows& y, int32_t count, const float* hidden, Ahead after) {
  const int64_t columns = op.stop - op.start;
  int32_t r = 0;
  for (; r + GROUP <= op.rank; r += GROUP)
    expand_rows<GROUP>(op, y, count, hidden, r, following(op.b, r + GROUP, op.rank, columns, after));
  for (; r < op.rank; ++r) expand_rows<1>(op, y, count, hidden, r, {});
}

void low_rank(const Op& op, const Rows& y, const Rows& x, int32_t count, std::vector<float>& scratch, Ahead after) {
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
  expand(op, y, count, hidden, after);
  if (!op.b_bias) return;
  for (int32_t t = 0; t < count; ++t) {
    float* out = y.row(t) + op.start;
    for (int32_t c = 0; c < op.stop - op.start; ++c) out[c] += op.scaling * op.b_bias[c];
  }
}

void affine(const Op& op, const Rows& y, int32_t count, Ahead after) {
  const int64_t columns = op.stop - op.start;
  for (int32_t t = 0; t < count; ++t) {
    float* out = y.row(t) + op.start;
    const int64_t rest = each_vector<GROUP>(columns, t == 0 ? after : Ahead{}, [&](int64_t c) {
      Vector v = load_vector(out + c);
      if (op.a) v *= load_vector(op.a + c);
      if (op.b) v += load_vector(op.b + c);
      store_vector(out + c, v);
    });
    for (int64_t c = rest; c < columns; ++c) {
      const float scaled = op.a ? out[c] * op.a[c] : out[c];
      out[c] = op.b ? scaled + op.b[c] : scaled;
    }
  }
}

// sum = z @ matrix [block, block], block a multiple of N vectors; unrolled for a SIZE known at compile time
template <int N, int64_t SIZE = 0>
inline void turn_vectors(const float* z, const float* matrix, int64_t block, float* sum) {
  constexpr int CHAINS = 4 / N > 1 ? 4 / N : 2;  // sums of their own, since each waits for its last addition
  const int64_t size = SIZE ? SIZE : block;
  for (int64_t j = 0; j < size; j += N * LANES) {
    Vector sums[CHAINS][N] = {};
    for (int64_t k = 0; k < size; k += CHAINS)
      for (int chain = 0; chain < CHAINS; ++chain) {
        const int64_t at = (k + chain) * size + j;
        for (int n = 0; n < N; ++n) sums[chain][n] += z[k + chain] * load_vector(matrix + at + n * LANES);
      }
    for (int n = 0; n < N; ++n) {
      Vector total = sums[0][n] + sums[1][n];
      for (int chain = 2; chain < CHAINS; chain += 2) total += sums[chain][n] + sums[chain + 1][n];
      store_vector(sum + j + n * LANES, total);
    }
  }
}

// the same for blocks of 8
inline void turn_eights(const float* z, const float* matrix, int64_t, float* sum) {
  Half chains[4] = {};
  for (int k = 0; k < 8; ++k) chains[k % 4] += z[k] * *reinterpret_cast<const Half*>(matrix + 8 * k);
  *reinterpret_cast<Half*>(sum) = (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// the same for any block; a size known at compile time is unrolled
template <int64_t SIZE>
inline void turn(const float* z, const float* matrix, int64_t block, float* sum) {
  const int64_t size = SIZE ? SIZE : block;
  std::memset(sum, 0, size * sizeof(float));
  for (int64_t k = 0; k < size; ++k)
    for (int64_t j = 0; j < size; ++j) sum[j] += z[k] * matrix[k * size + j];
}

using Turn = void (*)(const float*, const float*, int64_t, float*);

// every stage: z = y[t, order] in runs of `block`; z_i = z_i @ blocks_i; y[t, order] = z
template <Turn TURN>
void turn_runs(const Op& op, const Rows& y, int32_t count, std::vector<float>& scratch, Ahead after) {
  const int64_t columns = op.stop - op.start, block = op.block, area = block * block, runs = op.rank;
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
      const bool last = stage + 1 == op.stages && t + 1 == count;
      for (int64_t run = 0; run < runs; ++run) {
        const float *matrix = matrices + (op.shared ? 0 : run * area), *z = turned + run * block;
        if (last && run * LANES < after.size) __builtin_prefetch(after.next + run * LANES);
        TURN(z, matrix, block, order ? sum : out + run * block);
        if (order)
          for (int64_t j = 0; j < block; ++j) out[order[run * block + j]] = sum[j];
      }
    }
  }
}

void blocks(const Op& op, const Rows& y, int32_t count, std::vector<float>& scratch, Ahead after) {
  const auto with = [&](auto run) { run(op, y, count, scratch, after); };
  switch (op.block) {
    case 2: return with(turn_runs<turn<2>>);
    case 4: return with(turn_runs<turn<4>>);
    case 8: return with(turn_runs<turn_eights>);
    case 16: return with(turn_runs<turn_vectors<1, 16>>);
    case 32: return with(turn_runs<turn_vectors<2, 32>>);
    case 64: return with(turn_runs<turn_vectors<4, 64>>);
  }
  if (op.block % (4 * LANES) == 0) return with(turn_runs<turn_vectors<4>>);
  if (op.block % (2 * LANES) == 0) return with(turn_runs<turn_vectors<2>>);
  if (op.block % LANES == 0) return with(turn_runs<turn_vectors<1>>);
  with(turn_runs<turn<0>>);
}

// for one token, which is also the number of weights that are read
int64_t multiply_adds(const Op& op) {
  const int64_t columns = op.stop - op.start;
  if (op.kind == AFFINE) return 2 * columns;
  if (op.kind == BLOCKS) return int64_t(op.stages) * columns * op.block;
  return op.rank * (op.width + columns);
}

// `after`: what this thread reads next
void run_segment(const Segment& segment, int32_t module, const Matrix& y, const Matrix& x, const Matrix* taps,
                 Ahead after) {
  const int32_t first = segment.offsets[module], last = segment.offsets[module + 1];
  if (first == last) return;
  const int32_t count = segment.stop - segment.start;
  thread_local std::vector<float> scratch;
  const Rows out(y, segment.start, segment.stop);
  for (const Op* op = segment.ops + first; op != segment.ops + last; ++op) {
    const Ahead then = op + 1 == segment.ops + last ? after : beginning(op[1]);
    switch (op->kind) {
      case ADD_FROM_INPUT: low_rank(*op, out, Rows(x, segment.start, segment.stop), count, scratch, then); break;
      case ADD_FROM_TAP:
        low_rank(*op, out, Rows(taps[op->tap], segment.start, segment.stop), count, scratch, then);
        break;
      case ADD_FROM_OUTPUT: low_rank(*op, out, out, count, scratch, then); break;
      case AFFINE: affine(*op, out, count, then); break;
      case BLOCKS: blocks(*op, out, count, scratch, then); break;
    }
  }
  out.store();
}

}  // namespace

// Run every segment's ops at `module` on y [T, O] in place. x [T, I] is the module's input, `taps[i]` that of module i.
extern "C" void deltamux_run_rows(const Segment* segments, int32_t num_segments, int32_t module, void* y_data,
                                  int64_t y_width, int32_t y_dtype, void* x_data, int64_t x_width, int32_t x_dtype,
                                  const Matrix* taps, int32_t num_threads) {
  const Matrix y = {y_data, y_width, y_dtype, 0}, x = {x_data, x_width, x_dtype, 0};
  std::vector<int32_t> busy;  // segments with something to do
  int64_t work = 0;
  for (int32_t s = 0; s < num_segments; ++s) {
    const Segment& segment = segments[s];
    if (segment.offsets[module] == segment.offsets[module + 1]) continue;
    busy.push_back(s);
    for (int32_t i = segment.offsets[module]; i < segment.offsets[module + 1]; ++i)
      work += multiply_adds(segment.ops[i]) * (segment.stop - segment.start);
  }
  const int32_t num_busy = int32_t(busy.size());
  const auto run = [&](int32_t i, int32_t next) {
    Ahead after = {};
    if (next < num_busy) after = beginning(segments[busy[next]].ops[segments[busy[next]].offsets[module]]);
    run_segment(segments[busy[i]], module, y, x, taps, after);
  };
  if (num_threads == 1 || num_busy == 1 || work < PARALLEL_FROM) {
    for (int32_t i = 0; i < num_busy; ++i) run(i, i + 1);
    return;
  }
  // Whoever is free takes the next one, since a thread may wake late; each knows one ahead what it will read.
  std::atomic<int32_t> taken{0};
#pragma omp parallel num_threads(num_threads)
  for (int32_t i = taken++; i < num_busy;) {
    const int32_t next = taken++;
    run(i, next);
    i = next;
  }
}

// Sizes of the structs, for the check that both sides agree.
extern "C" int32_t deltamux_struct_size(int32_t which) {
  const int32_t sizes[] = {sizeof(Op), sizeof(Segment), sizeof(Matrix)};
  return sizes[which];
}
