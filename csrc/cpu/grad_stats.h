// Gradient statistics of a chunk. Included inside each instruction set's namespace, after simd.h.

typedef float FHalf __attribute__((vector_size(kBytes / 2)));

// kLanes / 2 lanes from `first` on, in double. float32 is read again: converting from memory costs half as
// much.
template <class T, int first>
INLINE DVec half_at(const typename T::Raw* p, Vec x) {
  if constexpr (sizeof *p == 4) return __builtin_convertvector(load<FHalf>(p + first), DVec);
  return half<first>(x, Indices<kLanes / 2>{});
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
  // float32 squares neither overflow nor underflow in double; four chains hide the latency.
  DVec squares[4] = {};
  UVec top{};
  IVec zeros{};
  const auto add = [&](const typename T::Raw* at, DVec* sums) __attribute__((always_inline)) {
    const Vec x = T::widen(load<typename T::Lanes>(at));
    const UVec magnitude = (UVec)x & 0x7fffffff;
    top = magnitude > top ? magnitude : top;
    zeros -= magnitude == 0;  // in integers: denormals are none, however the processor is set
    const DVec low = half_at<T, 0>(at, x), high = half_at<T, kLanes / 2>(at, x);
    sums[0] += low * low;
    sums[1] += high * high;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    __builtin_prefetch(p + i + 1024);  // measured: the arithmetic is long enough to hide what comes after
    __builtin_prefetch(p + i + 1024 + kLanes);
    add(p + i, squares);
    add(p + i + kLanes, squares + 2);
  }
  GradChunk result{};
  for (; i < n; i += kLanes) {
    typename T::Raw rest[kLanes] = {};
    const int64_t lanes = n - i < kLanes ? n - i : kLanes;
    __builtin_memcpy(rest, p + i, lanes * sizeof *p);
    add(rest, squares);
    result.zeros -= kLanes - lanes;  // the padding
  }
  const uint32_t largest = reduce(top, Larger{});
  if (largest >= 0x7f800000) return slow_chunk<T>(p, n, inv_scale);  // Inf or NaN: seldom
  result.zeros += sum_lanes(zeros);
  result.sum_of_squares = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
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
