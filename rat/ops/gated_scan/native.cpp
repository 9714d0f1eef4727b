// The gated linear recurrence on a CPU: one pass over the tokens, the gate read once for all streams.
//
// The state of some channels stays in cache while the tokens go by. A stream is as wide as the gate or narrower;
// then channel j of the gate reads channel j mod width, so that the channels are walked as tiles of the narrow width.
#include <algorithm>
#include <vector>

#include "native.h"

namespace {

constexpr int kRestart = 1, kFrozen = 2;  // bits of a token's flags

struct Stream {        // of y, outputs or gradients: element (b, t, channel) at data + b * batch + t * token + channel
  void* data;
  int64_t batch, token;

  template <class T>
  T* row(int64_t b, int64_t t) const {
    return static_cast<T*>(data) + b * batch + t * token;
  }
};

struct Call {
  int64_t batch, length, width;  // B, T, D
  int64_t narrow;                // width of the tiles
  int64_t num_streams;
  int64_t chunk_size;  // above 0: the state starts from zero every so many tokens
  int64_t num_threads;
  const uint8_t* flags;  // (B, T), or null
  const float* bias;     // (D,), or null
  Stream logits, grad_logits;
  const Stream* y;
  const int64_t* y_width;  // D or narrow
  const Stream* out;
  const Stream* grad_out;
  const Stream* grad_y;
  const float* const* initial;     // (B, D) for each stream, or null
  float* const* last;              // (B, D): the states after the last token; backward: gradients of the initial ones
  const float* const* grad_last;   // (B, D)
  float* grad_bias;                // (parts, D)

  bool is_wide(int64_t stream) const { return y_width[stream] == width; }

  int flag(int64_t b, int64_t t) const {
    if (chunk_size) return t % chunk_size == 0 ? kRestart : 0;
    return flags ? flags[b * length + t] : 0;
  }
};

// A share of the work: tokens of one row, and the columns [first, first + columns) of every tile.
struct Part {
  int64_t b, begin, end, first, columns;
};

constexpr int64_t kTokens = 512, kColumns = 64;

// Chunks are independent of each other, so that a part is some whole chunks; else all tokens of some columns, as many
// as leave work for every thread, since memory is read fastest in long rows.
std::vector<Part> parts_of(const Call& call) {
  const bool by_chunks = call.chunk_size && call.chunk_size <= kTokens;
  const int64_t step = by_chunks ? kTokens / call.chunk_size * call.chunk_size : call.length;
  const int64_t threads = (call.num_threads + call.batch - 1) / call.batch;  // for each row of the batch
  const int64_t share = (call.narrow + threads * kColumns - 1) / (threads * kColumns) * kColumns;
  const int64_t columns = by_chunks ? call.narrow : share;
  std::vector<Part> parts;
  for (int64_t b = 0; b < call.batch; b++)
    for (int64_t t = 0; t < call.length; t += step)
      for (int64_t c = 0; c < call.narrow; c += columns)
        parts.push_back({b, t, std::min(t + step, call.length), c, std::min(columns, call.narrow - c)});
  return parts;
}

// The channels of a part, tile by tile: f(place in the part's memory, channel).
template <class F>
void for_tiles(const Call& call, const Part& part, F f) {
  int64_t place = 0;
  for (int64_t tile = 0; tile < call.width; tile += call.narrow, place += part.columns) f(place, tile + part.first);
}

template <class T>
void open_gate(const Call& call, const Part& part, int64_t t, int flag, float* all) {
  for_tiles(call, part, [&](int64_t place, int64_t channel) {
    const T* __restrict logits = call.logits.row<T>(part.b, t) + channel;
    float* __restrict gate = all + place;
    if (flag & kFrozen)
      std::fill_n(gate, part.columns, 1.0f);
    else if (call.bias)
      for (int64_t c = 0; c < part.columns; c++) gate[c] = sigmoid(load(logits[c]) + call.bias[channel + c]);
    else
      for (int64_t c = 0; c < part.columns; c++) gate[c] = sigmoid(load(logits[c]));
  });
}

// A vector per row, (B, D), to the memory of a part or back.
void read_vector(const Call& call, const Part& part, const float* from, float* to) {
  for_tiles(call, part, [&](int64_t place, int64_t channel) {
    std::copy_n(from + part.b * call.width + channel, part.columns, to + place);
  });
}

void write_vector(const Call& call, const Part& part, const float* from, float* to) {
  for_tiles(call, part, [&](int64_t place, int64_t channel) {
    std::copy_n(from + place, part.columns, to + part.b * call.width + channel);
  });
}

template <class T>
void forward_step(int64_t n, const T* __restrict y, const float* __restrict gate, float* __restrict state,
                  T* __restrict out) {
  for (int64_t c = 0; c < n; c++) {
    const float s = gate[c] * state[c] + (1.0f - gate[c]) * load(y[c]);
    state[c] = s;
    store(out[c], s);
  }
}

template <class T>
void forward(const Call& call, const Part& part, std::vector<float>& memory) {
  const int64_t size = call.width / call.narrow * part.columns;
  memory.assign((call.num_streams + 1) * size, 0.0f);
  float *gates = memory.data(), *states = gates + size;
  if (part.begin == 0 && call.initial)
    for (int64_t i = 0; i < call.num_streams; i++) read_vector(call, part, call.initial[i], states + i * size);
  for (int64_t t = part.begin; t < part.end; t++) {
    const int flag = call.flag(part.b, t);
    open_gate<T>(call, part, t, flag, gates);
    for (int64_t i = 0; i < call.num_streams; i++) {
      if (flag == kRestart) std::fill_n(states + i * size, size, 0.0f);
      for_tiles(call, part, [&](int64_t place, int64_t channel) {
        const T* y = call.y[i].row<T>(part.b, t) + (call.is_wide(i) ? channel : part.first);
        T* out = call.out[i].row<T>(part.b, t) + channel;
        float* state = states + i * size + place;
        if (flag & kFrozen)  // y may hold anything, NaN included
          store_all(part.columns, state, out);
        else
          forward_step(part.columns, y, gates + place, state, out);
      });
    }
  }
  if (part.end == call.length)
    for (int64_t i = 0; i < call.num_streams; i++) write_vector(call, part, states + i * size, call.last[i]);
}

// What was in the state before a token: the saved output there. Its rounding is harmless, the gate multiplies it.
template <class T>
void state_before(const Call& call, const Part& part, int64_t i, int64_t t, int flag, float* state) {
  if (flag == kRestart || (t == 0 && !call.initial))
    for_tiles(call, part, [&](int64_t place, int64_t) { std::fill_n(state + place, part.columns, 0.0f); });
  else if (t == 0)
    read_vector(call, part, call.initial[i], state);
  else
    for_tiles(call, part, [&](int64_t place, int64_t channel) {
      load_all(part.columns, call.out[i].row<T>(part.b, t - 1) + channel, state + place);
    });
}

// With a = ds_t + (what the next token hands back): dy = a (1 - g), dlogit = a g (1 - g) (s_{t-1} - y_t).
template <class T>
void backward_step(int64_t n, const T* __restrict grad, const T* __restrict y, const float* __restrict gate,
                   const float* __restrict before, float keep, float* __restrict carry, float* __restrict change,
                   float* __restrict inflow) {
  for (int64_t c = 0; c < n; c++) {
    const float a = load(grad[c]) + carry[c], in = a * (1.0f - gate[c]);
    carry[c] = keep * a * gate[c];
    change[c] += in * gate[c] * (before[c] - load(y[c]));
    inflow[c] += in;
  }
}

template <class T>
void backward(const Call& call, const Part& part, float* grad_bias, std::vector<float>& memory) {
  const int64_t size = call.width / call.narrow * part.columns;
  memory.assign((call.num_streams + 5) * size, 0.0f);
  float *gates = memory.data(), *changes = gates + size, *befores = changes + size, *bias_sums = befores + size;
  float *carries = bias_sums + size, *inflow = carries + call.num_streams * size;
  if (part.end == call.length)
    for (int64_t i = 0; i < call.num_streams; i++) read_vector(call, part, call.grad_last[i], carries + i * size);
  for (int64_t t = part.end - 1; t >= part.begin; t--) {
    const int flag = call.flag(part.b, t);
    const float keep = flag == kRestart ? 0.0f : 1.0f;
    open_gate<T>(call, part, t, flag, gates);
    std::fill_n(changes, size, 0.0f);
    for (int64_t i = 0; i < call.num_streams; i++) {
      state_before<T>(call, part, i, t, flag, befores);
      std::fill_n(inflow, size, 0.0f);
      const bool wide = call.is_wide(i);
      T* grad_y = call.grad_y[i].row<T>(part.b, t);
      for_tiles(call, part, [&](int64_t place, int64_t channel) {
        const T* grad = call.grad_out[i].row<T>(part.b, t) + channel;
        const T* y = call.y[i].row<T>(part.b, t) + (wide ? channel : part.first);
        float* in = wide ? inflow + place : inflow;
        float* carry = carries + i * size + place;
        if (flag & kFrozen)
          add_all(part.columns, grad, carry);
        else
          backward_step(part.columns, grad, y, gates + place, befores + place, keep, carry, changes + place, in);
        if (wide) store_all(part.columns, in, grad_y + channel);
      });
      if (!wide) store_all(part.columns, inflow, grad_y + part.first);
    }
    for_tiles(call, part, [&](int64_t place, int64_t channel) {
      store_all(part.columns, changes + place, call.grad_logits.row<T>(part.b, t) + channel);
      for (int64_t c = place; c < place + part.columns; c++) bias_sums[c] += changes[c];
    });
  }
  for_tiles(call, part, [&](int64_t place, int64_t channel) {
    std::copy_n(bias_sums + place, part.columns, grad_bias + channel);
  });
  if (part.begin == 0)
    for (int64_t i = 0; i < call.num_streams; i++) write_vector(call, part, carries + i * size, call.last[i]);
}

template <class T>
void run(const Call& call, bool is_backward) {
  const std::vector<Part> parts = parts_of(call);
#pragma omp parallel num_threads(call.num_threads)
  {
    std::vector<float> memory;
#pragma omp for schedule(dynamic)
    for (int64_t p = 0; p < int64_t(parts.size()); p++) {
      if (is_backward)
        backward<T>(call, parts[p], call.grad_bias + p * call.width, memory);
      else
        forward<T>(call, parts[p], memory);
    }
  }
}

}  // namespace

extern "C" {

int64_t rat_scan_parts(const Call* call) { return int64_t(parts_of(*call).size()); }
void rat_scan_forward_float(const Call* call) { run<float>(*call, false); }
void rat_scan_forward_bfloat16(const Call* call) { run<bfloat16>(*call, false); }
void rat_scan_backward_float(const Call* call) { run<float>(*call, true); }
void rat_scan_backward_bfloat16(const Call* call) { run<bfloat16>(*call, true); }
}
