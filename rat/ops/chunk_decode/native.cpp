// A decoding step on a CPU: the recurrence of a row and head, then its keys and its values, each read once and in order.
#include <algorithm>
#include <vector>

#include "native.h"

namespace {

struct Rows {  // (B, ...), all but the first axis in one piece
  void* data;
  int64_t row;

  template <class T>
  T* at(int64_t b, int64_t i) const {
    return static_cast<T*>(data) + b * row + i;
  }
};

struct Cache {  // (B, H, E, d), the last axis in one piece
  void* data;
  int64_t row, head, slot;

  template <class T>
  T* at(int64_t b, int64_t h, int64_t e) const {
    return static_cast<T*>(data) + b * row + h * head + e * slot;
  }
};

struct Call {
  int64_t batch, heads, groups, width;  // B, H, G, d
  int64_t chunk_size, num_threads;
  float scale;
  const int64_t* lengths;  // (B,)
  const float* bias;       // (H * d,), or null
  const float *cos, *sin;  // (B, d / 2) for each row's chunk, or null
  Rows gate_logits, q, k, v, value_state, key_state, out;
  Cache keys, values;
};

// g s + (1 - g) y in the channels of a head; in a chunk that has not begun s is 0.
template <class T>
void recur(int64_t n, bool begun, const T* __restrict logits, const float* __restrict bias, const T* __restrict y,
           float* __restrict state) {
  if (!begun) std::fill_n(state, n, 0.0f);
  for (int64_t i = 0; i < n; i++) {
    const float gate = sigmoid(load(logits[i]) + (bias ? bias[i] : 0.0f)), input = load(y[i]);
    state[i] = input + gate * (state[i] - input);
  }
}

// Rotary embedding: pairs (x_i, x_{i + half}).
void turn(int64_t half, const float* __restrict cos, const float* __restrict sin, float* __restrict x) {
  for (int64_t i = 0; i < half; i++) {
    const float left = x[i], right = x[half + i];
    x[i] = left * cos[i] - right * sin[i];
    x[half + i] = right * cos[i] + left * sin[i];
  }
}

template <class T>
float dot(int64_t n, const float* __restrict x, const T* __restrict y) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i++) sum += x[i] * load(y[i]);
  return sum;
}

template <class T>
void add(int64_t n, float weight, const T* __restrict x, float* __restrict sum) {
  for (int64_t i = 0; i < n; i++) sum[i] += weight * load(x[i]);
}

// Logits become exponentials; returns their sum.
float exponentials(int64_t n, float* x) {
  const float shift = *std::max_element(x, x + n);
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i++) sum += x[i] = exponential(x[i] - shift);
  return sum;
}

// Vectors that are stored and loaded again at once must not straddle lines of the cache: all start at one.
struct alignas(64) Line {
  float numbers[16];
};
constexpr int64_t whole_lines(int64_t n) { return (n + 15) / 16 * 16; }

template <class T>
void decode(const Call& call, int64_t b, int64_t h, std::vector<Line>& memory) {
  const int64_t d = call.width, half = d / 2, chunk = call.lengths[b] / call.chunk_size;
  const int64_t channel = h * d, shared = h % call.groups * d;
  const bool begun = call.lengths[b] % call.chunk_size;
  memory.resize((3 * whole_lines(d) + whole_lines(chunk + 1)) / 16);
  float *query = memory.data()->numbers, *end = query + whole_lines(d), *sum = end + whole_lines(d);
  float* weights = sum + whole_lines(d);

  float *key = call.key_state.at<float>(b, channel), *value = call.value_state.at<float>(b, channel);
  const T* logits = call.gate_logits.at<T>(b, channel);
  const float* bias = call.bias ? call.bias + channel : nullptr;
  recur(d, begun, logits, bias, call.k.at<T>(b, shared), key);
  recur(d, begun, logits, bias, call.v.at<T>(b, channel), value);
  std::copy_n(key, d, end);
  load_all(d, call.q.at<T>(b, shared), query);
  if (call.cos) {
    turn(half, call.cos + b * half, call.sin + b * half, query);
    turn(half, call.cos + b * half, call.sin + b * half, end);
  }

  for (int64_t e = 0; e < chunk; e++) weights[e] = call.scale * dot(d, query, call.keys.at<T>(b, h, e));
  weights[chunk] = call.scale * dot(d, query, end);
  const float share = 1.0f / exponentials(chunk + 1, weights);
  std::fill_n(sum, d, 0.0f);
  for (int64_t e = 0; e < chunk; e++) add(d, weights[e], call.values.at<T>(b, h, e), sum);
  add(d, weights[chunk], value, sum);
  T* out = call.out.at<T>(b, channel);
  for (int64_t i = 0; i < d; i++) store(out[i], share * sum[i]);
  store_all(d, end, call.keys.at<T>(b, h, chunk));
  store_all(d, value, call.values.at<T>(b, h, chunk));
}

template <class T>
void run(const Call& call) {
#pragma omp parallel num_threads(call.num_threads)
  {
    std::vector<Line> memory;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < call.batch * call.heads; i++) decode<T>(call, i / call.heads, i % call.heads, memory);
  }
}

}  // namespace

extern "C" {
void rat_chunk_decode_float(const Call* call) { run<float>(*call); }
void rat_chunk_decode_bfloat16(const Call* call) { run<bfloat16>(*call); }
}
