// What the CPU kernels share: numbers of either precision, and an exponential that compilers vectorize.
#pragma once
#include <cstdint>
#include <cstring>

template <class To, class From>
inline To same_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct bfloat16 {
  uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) { return same_bits<float>(uint32_t(x.bits) << 16); }

inline void store(float& to, float x) { to = x; }
inline void store(bfloat16& to, float x) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = same_bits<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <class T>
inline void load_all(int64_t n, const T* __restrict from, float* __restrict to) {
  for (int64_t i = 0; i < n; i++) to[i] = load(from[i]);
}

template <class T>
inline void store_all(int64_t n, const float* __restrict from, T* __restrict to) {
  for (int64_t i = 0; i < n; i++) store(to[i], from[i]);
}

template <class T>
inline void add_all(int64_t n, const T* __restrict from, float* __restrict to) {
  for (int64_t i = 0; i < n; i++) to[i] += load(from[i]);
}

// a * b + c, which the compiler leaves in this order; written as a sum it may add up the two parts of ln 2 below.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// e^x within 2 ulp from -87 to 88, and beyond as at the nearer end: 2^n * P(r) with x = n ln 2 + r, |r| <= ln 2 / 2.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float n = __builtin_rintf(x * 1.44269504f);
  const float r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * same_bits<float>((int32_t(n) + 127) << 23);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
