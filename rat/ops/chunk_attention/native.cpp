// What chunk attention does between its matrix products on a CPU: one pass over a block's rows each.
//
// A block is some tokens of every row of the batch. Token-major tensors are (B, T, heads, d); those that meet a matrix
// product are head-major, (B, H, R, d) for the R tokens of the block, and logits belong to one head at a time, (R,
// ends seen). Head h asks with query group h mod G.
#include <algorithm>
#include <cmath>
#include <vector>

#include "native.h"

namespace {

struct Tokens {  // (B, T, heads, d): element (b, t, i) at data + b * batch + t * token + i
  void* data;
  int64_t batch, token;

  template <class T>
  T* row(int64_t b, int64_t t) const {
    return static_cast<T*>(data) + b * batch + t * token;
  }
};

struct Block {
  int64_t batch, heads, groups, width;  // B, H, G, d
  int64_t start, rows, seen;            // first token, tokens, chunk ends that some of them see
  int64_t length;                       // T
  int64_t num_threads;
  float scale;
  const int32_t *first, *last;  // (B, T): the span of ends that a token sees
  const int32_t* place;         // (B, T): its chunk, the row of the tables
  const float *cos, *sin;       // (chunks, d / 2), or null
  Tokens q, k, v, out, grad, grad_q, grad_k, grad_v;
  float* log_sum_exp;  // (B, H, T)
  float* own;          // (B, H, R): logits of the tokens themselves, later their probabilities
  float* delta;        // (B, H, R): sum of out * grad
  void *queries, *block_out, *block_grad;  // (B, H, R, d)
  void *logits, *grad_logits;              // (R, seen)

  template <class T>
  T* at(void* data, int64_t b, int64_t h, int64_t r) const {
    return static_cast<T*>(data) + ((b * heads + h) * rows + r) * width;
  }
  int64_t index(int64_t b, int64_t h, int64_t r) const { return (b * heads + h) * rows + r; }
};

template <class T>
float dot(int64_t n, const T* __restrict x, const T* __restrict y) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i++) sum += load(x[i]) * load(y[i]);
  return sum;
}

// Rotary embedding: pairs (x_i, x_{i + half}) by the angles of the row, times `scale`.
template <class From, class To>
void turn(int64_t half, const From* __restrict x, const float* __restrict cos, const float* __restrict sin, float sign,
          float scale, To* __restrict to) {
  for (int64_t i = 0; i < half; i++) {
    const float left = load(x[i]), right = load(x[half + i]);
    store(to[i], scale * (left * cos[i] - sign * right * sin[i]));
    store(to[half + i], scale * (right * cos[i] + sign * left * sin[i]));
  }
}

// The queries of a block, rotated and scaled, for every head; and the logits of the tokens themselves.
template <class T>
void ask(const Block& block, int64_t b, int64_t r) {
  const int64_t t = block.start + r, d = block.width, half = d / 2;
  const int64_t angle = block.place[b * block.length + t] * half;
  for (int64_t h = 0; h < block.heads; h++) {
    const T* q = block.q.row<T>(b, t) + h % block.groups * d;
    T* query = block.at<T>(block.queries, b, h, r);
    block.own[block.index(b, h, r)] = block.scale * dot(d, q, block.k.row<T>(b, t) + h * d);
    if (h >= block.groups)
      std::copy_n(block.at<T>(block.queries, b, h % block.groups, r), d, query);
    else if (block.cos)
      turn(half, q, block.cos + angle, block.sin + angle, 1.0f, block.scale, query);
    else
      for (int64_t i = 0; i < d; i++) store(query[i], block.scale * load(q[i]));
  }
}

template <class T>
float largest(int64_t n, const T* x) {
  float most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) most = std::max(most, load(x[i]));
  return most;
}

template <class T>
float exponentials(int64_t n, float shift, T* x) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; i++) {
    const float e = exponential(load(x[i]) - shift);
    store(x[i], e);
    sum += e;
  }
  return sum;
}

// Logits of a head become exponentials, without the division: that comes with the values (`answer`).
template <class T>
void softmax(const Block& block, int64_t b, int64_t h, int64_t r) {
  const int64_t t = block.start + r, first = block.first[b * block.length + t], last = block.last[b * block.length + t];
  T* row = static_cast<T*>(block.logits) + r * block.seen;
  float& own = block.own[block.index(b, h, r)];
  const float shift = std::max(own, largest(last - first, row + first));
  std::fill(row, row + first, T{});
  std::fill(row + last, row + block.seen, T{});
  own = std::exp(own - shift);
  const float sum = own + exponentials(last - first, shift, row + first);
  block.delta[block.index(b, h, r)] = 1.0f / sum;
  block.log_sum_exp[(b * block.heads + h) * block.length + t] = shift + std::log(sum);
}

// out = (weights * end values + own weight * v) / sum.
template <class T>
void answer(const Block& block, int64_t b, int64_t r) {
  const int64_t t = block.start + r, d = block.width;
  for (int64_t h = 0; h < block.heads; h++) {
    const float share = block.delta[block.index(b, h, r)], own = block.own[block.index(b, h, r)] * share;
    const T *__restrict ends = block.at<T>(block.block_out, b, h, r), *__restrict v = block.v.row<T>(b, t) + h * d;
    T* __restrict out = block.out.row<T>(b, t) + h * d;
    for (int64_t i = 0; i < d; i++) store(out[i], share * load(ends[i]) + own * load(v[i]));
  }
}

template <class T>
void own_gradients(int64_t n, const T* __restrict q, const T* __restrict k, const T* __restrict grad, float p, float s,
                   float* __restrict grad_q, T* __restrict grad_k, T* __restrict grad_v) {
  for (int64_t i = 0; i < n; i++) {
    grad_q[i] += s * load(k[i]);
    store(grad_k[i], s * load(q[i]));
    store(grad_v[i], p * load(grad[i]));
  }
}

// `ask` again, the gradients through the own term, and what the gradients of the logits need.
template <class T>
void ask_back(const Block& block, int64_t b, int64_t r) {
  ask<T>(block, b, r);
  const int64_t t = block.start + r, d = block.width;
  std::vector<float> grad_q(block.groups * d, 0.0f);
  for (int64_t h = 0; h < block.heads; h++) {
    const int64_t at = block.index(b, h, r), group = h % block.groups * d;
    const T* grad = block.grad.row<T>(b, t) + h * d;
    std::copy_n(grad, d, block.at<T>(block.block_grad, b, h, r));
    block.delta[at] = dot(d, grad, block.out.row<T>(b, t) + h * d);
    const float p = std::exp(block.own[at] - block.log_sum_exp[(b * block.heads + h) * block.length + t]);
    const float s = p * (dot(d, grad, block.v.row<T>(b, t) + h * d) - block.delta[at]) * block.scale;
    own_gradients(d, block.q.row<T>(b, t) + group, block.k.row<T>(b, t) + h * d, grad, p, s, &grad_q[group],
                  block.grad_k.row<T>(b, t) + h * d, block.grad_v.row<T>(b, t) + h * d);
  }
  store_all(block.groups * d, grad_q.data(), block.grad_q.row<T>(b, t));
}

template <class T>
void softmax_gradients(int64_t n, float log_sum_exp, float delta, T* __restrict s, T* __restrict grad) {
  for (int64_t i = 0; i < n; i++) {
    const float p = exponential(load(s[i]) - log_sum_exp);
    store(s[i], p);
    store(grad[i], p * (load(grad[i]) - delta));
  }
}

// Logits of a head become probabilities; the gradients of probabilities become those of the logits.
template <class T>
void softmax_back(const Block& block, int64_t b, int64_t h, int64_t r) {
  const int64_t t = block.start + r, first = block.first[b * block.length + t], last = block.last[b * block.length + t];
  T* row = static_cast<T*>(block.logits) + r * block.seen;
  T* grad = static_cast<T*>(block.grad_logits) + r * block.seen;
  for (T* x : {row, grad}) {
    std::fill(x, x + first, T{});
    std::fill(x + last, x + block.seen, T{});
  }
  softmax_gradients(last - first, block.log_sum_exp[(b * block.heads + h) * block.length + t],
                    block.delta[block.index(b, h, r)], row + first, grad + first);
}

// The gradients of the rotated queries (in `block_out`) are summed over the heads of a group and turned back.
template <class T>
void answer_back(const Block& block, int64_t b, int64_t r) {
  const int64_t t = block.start + r, d = block.width, half = d / 2;
  const int64_t angle = block.place[b * block.length + t] * half;
  std::vector<float> memory(2 * d);
  float *sum = memory.data(), *turned = sum + d;
  for (int64_t g = 0; g < block.groups; g++) {
    std::fill_n(sum, d, 0.0f);
    for (int64_t h = g; h < block.heads; h += block.groups) {
      const T* grad = block.at<T>(block.block_out, b, h, r);
      for (int64_t i = 0; i < d; i++) sum[i] += load(grad[i]);
    }
    if (block.cos) turn(half, sum, block.cos + angle, block.sin + angle, -1.0f, 1.0f, turned);
    const float* back = block.cos ? turned : sum;
    T* grad_q = block.grad_q.row<T>(b, t) + g * d;
    for (int64_t i = 0; i < d; i++) store(grad_q[i], load(grad_q[i]) + block.scale * back[i]);
  }
}

template <class F>
void for_tokens(const Block& block, F f) {
#pragma omp parallel for collapse(2) schedule(static) num_threads(block.num_threads)
  for (int64_t b = 0; b < block.batch; b++)
    for (int64_t r = 0; r < block.rows; r++) f(b, r);
}

template <class F>
void for_rows(const Block& block, F f) {
#pragma omp parallel for schedule(static) num_threads(block.num_threads)
  for (int64_t r = 0; r < block.rows; r++) f(r);
}

}  // namespace

#define RAT_ALL_HEADS(name, T)                                                 \
  void rat_chunk_##name##_##T(const Block* block) {                            \
    for_tokens(*block, [&](int64_t b, int64_t r) { name<T>(*block, b, r); });  \
  }
#define RAT_ONE_HEAD(name, T)                                                  \
  void rat_chunk_##name##_##T(const Block* block, int64_t b, int64_t h) {      \
    for_rows(*block, [&](int64_t r) { name<T>(*block, b, h, r); });            \
  }
#define RAT_KERNELS(T)            \
  RAT_ALL_HEADS(ask, T)           \
  RAT_ONE_HEAD(softmax, T)        \
  RAT_ALL_HEADS(answer, T)        \
  RAT_ALL_HEADS(ask_back, T)      \
  RAT_ONE_HEAD(softmax_back, T)   \
  RAT_ALL_HEADS(answer_back, T)

extern "C" {
RAT_KERNELS(float)
RAT_KERNELS(bfloat16)
}
