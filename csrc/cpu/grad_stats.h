// Gradient statistics of a chunk. Included inside each instruction set's namespace, after simd.h.

typedef double DVec __attribute__((vector_size(kBytes)));
typedef float FHalf __attribute__((vector_size(kBytes / 2)));

// One value at a time: for scales that are 0 or not finite, and to count what is not finite.
template <class T>
GradChunk slow_chunk(const typename T::Raw* p, int64_t n, double inv_scale) {
  GradChunk result{};
  for (int64_t i = 0; i < n; ++i) {
    const double x = (double)load_some<T>(p + i, 1, 0)[0] * inv_scale, magnitude = x < 0 ? -x : x;
    result.sum_of_squares += x * x;
    result.zeros += x == 0;
    result.nans += x != x;
    result.infs += magnitude == __builtin_inf();
    if (!(magnitude <= result.max_abs)) result.max_abs = magnitude;
  }
  if (result.nans) result.max_abs = __builtin_nan("");
  return result;
}

template <class T>
GradChunk chunk_of(const typename T::Raw* p, int64_t n, double inv_scale) {
  if (!(inv_scale > 0 && inv_scale < 1e300 && inv_scale > 1e-200)) return slow_chunk<T>(p, n, inv_scale);
  DVec low{}, high{};  // float32 squares neither overflow nor underflow in double
  UVec top{};
  IVec zeros{};
  const auto add = [&](Vec x) __attribute__((always_inline)) {
    const UVec magnitude = (UVec)x & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
    zeros -= magnitude == 0;
    FHalf halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
    const DVec a = __builtin_convertvector(halves[0], DVec), b = __builtin_convertvector(halves[1], DVec);
    low += a * a;
    high += b * b;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(T::widen(load<typename T::Lanes>(p + i)));
  GradChunk result{};
  if (i < n) {
    add(load_some<T>(p + i, n - i, 0));
    result.zeros -= kLanes - (n - i);  // the padding
  }
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    largest = top[lane] > largest ? top[lane] : largest;
    result.zeros += zeros[lane];
  }
  if (largest >= 0x7f800000) return slow_chunk<T>(p, n, inv_scale);  // Inf or NaN: seldom
  low += high;
  for (int lane = 0; lane < kLanes / 2; ++lane) result.sum_of_squares += low[lane];
  result.sum_of_squares *= inv_scale * inv_scale;
  float max_abs;
  __builtin_memcpy(&max_abs, &largest, sizeof max_abs);
  result.max_abs = max_abs * inv_scale;
  return result;
}

GradChunk grad_chunk(const void* p, Dtype dtype, int64_t n, double inv_scale) {
  if (dtype == kFloat32) return chunk_of<Float32>((const float*)p, n, inv_scale);
  if (dtype == kBFloat16) return chunk_of<BFloat16>((const uint16_t*)p, n, inv_scale);
  return chunk_of<Float16>((const uint16_t*)p, n, inv_scale);
}
