// Gradient statistics of a chunk. Included inside each instruction set's namespace, after simd.h.

typedef double DVec __attribute__((vector_size(kBytes)));
template <int n>
using Indices = std::make_integer_sequence<int, n>;  // types only: no code of the library

// kLanes / 2 lanes of x from `first` on, in double.
template <int first, int... i>
INLINE DVec half(Vec x, std::integer_sequence<int, i...>) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, (first + i)...), DVec);
}

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
  DVec squares[4] =
      {};  // float32 squares neither overflow nor underflow in double; four chains hide the latency
  UVec top{};
  IVec zeros{};
  const auto add = [&](Vec x, DVec* sums) __attribute__((always_inline)) {
    const UVec magnitude = (UVec)x & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
    zeros -= magnitude == 0;
    const DVec low = half<0>(x, Indices<kLanes / 2>{}), high = half<kLanes / 2>(x, Indices<kLanes / 2>{});
    sums[0] += low * low;
    sums[1] += high * high;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    __builtin_prefetch(p + i + 1024);  // measured: the arithmetic is long enough to hide what comes after
    __builtin_prefetch(p + i + 1024 + kLanes);
    add(T::widen(load<typename T::Lanes>(p + i)), squares);
    add(T::widen(load<typename T::Lanes>(p + i + kLanes)), squares + 2);
  }
  GradChunk result{};
  for (; i < n; i += kLanes) {
    add(load_at<T>(p, i, n, 0), squares);
    if (n - i < kLanes) result.zeros -= kLanes - (n - i);  // the padding
  }
  uint32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    largest = top[lane] > largest ? top[lane] : largest;
    result.zeros += zeros[lane];
  }
  if (largest >= 0x7f800000) return slow_chunk<T>(p, n, inv_scale);  // Inf or NaN: seldom
  const DVec low = (squares[0] + squares[1]) + (squares[2] + squares[3]);
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
