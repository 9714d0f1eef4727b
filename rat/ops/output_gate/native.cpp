// The output gate on a CPU: one pass forward, one backward.
#include "native.h"

namespace {

template <class T>
void forward(int64_t n, const T* __restrict z, const T* __restrict x, T* __restrict out) {
  for (int64_t i = 0; i < n; i++) store(out[i], sigmoid(load(z[i])) * load(x[i]));
}

template <class T>
void backward(int64_t n, const T* __restrict grad, const T* __restrict z, const T* __restrict x, T* __restrict grad_z,
              T* __restrict grad_x) {
  for (int64_t i = 0; i < n; i++) {
    const float gate = sigmoid(load(z[i])), part = load(grad[i]) * gate;
    store(grad_x[i], part);
    store(grad_z[i], part * (1.0f - gate) * load(x[i]));
  }
}

}  // namespace

// Rows of `width` numbers; z has its own distance between rows, the others lie in one piece.
#define RAT_KERNELS(T)                                                                                              \
  void rat_output_gate_##T(int64_t rows, int64_t width, int64_t threads, const T* z, int64_t z_row, const T* x,     \
                           T* out) {                                                                                \
    _Pragma("omp parallel for num_threads(threads)") for (int64_t r = 0; r < rows; r++)                             \
        forward(width, z + r * z_row, x + r * width, out + r * width);                                              \
  }                                                                                                                 \
  void rat_output_gate_backward_##T(int64_t rows, int64_t width, int64_t threads, const T* grad, const T* z,        \
                                    int64_t z_row, const T* x, T* grad_z, T* grad_x) {                              \
    _Pragma("omp parallel for num_threads(threads)") for (int64_t r = 0; r < rows; r++)                             \
        backward(width, grad + r * width, z + r * z_row, x + r * width, grad_z + r * width, grad_x + r * width);    \
  }

extern "C" {
RAT_KERNELS(float)
RAT_KERNELS(bfloat16)
}
