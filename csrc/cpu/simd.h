// Vectors of the widest registers of the instruction set this is compiled for, by the compiler's vector
// extensions. Included inside each instruction set's namespace, after that set was switched on: nothing
// inline of the standard library may be used below, or the linker could keep a copy that other machines
// cannot run.

#if ESPER_LEVEL == 4
constexpr int kBytes = 64;
#elif ESPER_LEVEL == 3
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / 4;

typedef float Vec __attribute__((vector_size(kBytes)));
typedef int32_t IVec __attribute__((vector_size(kBytes)));
typedef uint32_t UVec __attribute__((vector_size(kBytes)));
typedef double DVec __attribute__((vector_size(kBytes)));
typedef uint16_t HVec __attribute__((vector_size(kBytes / 2)));

#define INLINE inline __attribute__((always_inline))

INLINE Vec splat(float x) { return x - Vec{}; }
INLINE IVec splat(int32_t x) { return x - IVec{}; }

template <class V, class T>
INLINE V load(const T* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class V, class T>
INLINE void store(T* p, V x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// Past the caches; p is aligned to the vector.
template <class V, class T>
INLINE void stream(T* p, V x) {
#if ESPER_LEVEL == 4
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)x);
#endif
#if ESPER_LEVEL >= 3
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)x);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, (__m128i)x);
#endif
  store(p, x);
}

// a > b ? a : b, so b where either is NaN.
INLINE Vec max(Vec a, Vec b) {
#if ESPER_LEVEL == 4
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif ESPER_LEVEL == 3
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

template <int n>
using Indices = std::make_integer_sequence<int, n>;  // types only: no code of the library

template <int step, class V, int... i>
INLINE V swapped(V x, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(x, x, (i ^ step)...);
}

// f over the lanes, halves first: a fixed order and a short chain.
template <class V, class F, int step = sizeof(V) / sizeof(V{}[0]) / 2>
INLINE auto reduce(V x, const F& f) {
  x = f(x, swapped<step>(x, Indices<sizeof(V) / sizeof(V{}[0])>{}));
  if constexpr (step > 1)
    return reduce<V, F, step / 2>(x, f);
  else
    return x[0];
}

struct Larger {
  INLINE Vec operator()(Vec a, Vec b) const { return max(a, b); }
  INLINE UVec operator()(UVec a, UVec b) const { return a > b ? a : b; }
};

struct Plus {
  template <class V>
  INLINE V operator()(V a, V b) const {
    return a + b;
  }
};

INLINE float max_lane(Vec x) { return reduce(x, Larger{}); }

template <class V>
INLINE auto sum_lanes(V x) {
  return reduce(x, Plus{});
}

// Lanes first to first + kLanes / 2 of x, in double.
template <int first, int... i>
INLINE DVec half(Vec x, std::integer_sequence<int, i...>) {
  return __builtin_convertvector(__builtin_shufflevector(x, x, (first + i)...), DVec);
}

INLINE double sum_in_double(Vec x) {
  return sum_lanes(half<0>(x, Indices<kLanes / 2>{}) + half<kLanes / 2>(x, Indices<kLanes / 2>{}));
}

INLINE int32_t count_lanes(IVec mask) { return -sum_lanes(mask); }

// --- element types: from stored lanes to float32 and back, rounding to nearest even ---

struct Float32 {
  typedef float Raw;
  typedef Vec Lanes;
  static INLINE Vec widen(Lanes x) { return x; }
  static INLINE Lanes narrow(Vec x) { return x; }
};

struct BFloat16 {
  typedef uint16_t Raw;
  typedef HVec Lanes;
  static INLINE Vec widen(Lanes x) { return (Vec)(__builtin_convertvector(x, UVec) << 16); }
  static INLINE Lanes narrow(Vec x) {
    const UVec bits = (UVec)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(x != x ? (UVec)splat(0x7fc0) : rounded, HVec);
  }
};

struct Float16 {
  typedef uint16_t Raw;
  typedef HVec Lanes;
#if ESPER_LEVEL == 4
  static INLINE Vec widen(Lanes x) { return (Vec)_mm512_cvtph_ps((__m256i)x); }
  static INLINE Lanes narrow(Vec x) { return (HVec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif ESPER_LEVEL == 3
  static INLINE Vec widen(Lanes x) { return (Vec)_mm256_cvtph_ps((__m128i)x); }
  static INLINE Lanes narrow(Vec x) { return (HVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else  // in integers: the exponent is moved by 112; 2^-14 and 2^16 bound float16's normal numbers
  static INLINE Vec widen(Lanes x) {
    const UVec wide = __builtin_convertvector(x, UVec), magnitude = (wide & 0x7fff) << 13;
    const UVec normal = magnitude + (112u << 23);
    const UVec small = (UVec)((Vec)(normal + (1u << 23)) - (Vec)(UVec)splat(113 << 23));
    const UVec number = magnitude < (1u << 23) ? small : normal;
    return (Vec)((wide & 0x8000) << 16 | (magnitude >= (31u << 23) ? normal + (112u << 23) : number));
  }
  static INLINE Lanes narrow(Vec x) {
    const UVec bits = (UVec)x & 0x7fffffff, half = (UVec)splat(0x3f000000);
    const UVec small = (UVec)((Vec)bits + (Vec)half) - half;  // adding 0.5 rounds to multiples of 2^-24
    const UVec normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    const UVec special = bits > 0x7f800000 ? (UVec)splat(0x7e00) : (UVec)splat(0x7c00);
    const UVec number = bits < (113u << 23) ? small : bits >= (143u << 23) ? special : normal;
    return __builtin_convertvector((((UVec)x >> 16) & 0x8000) | number, HVec);
  }
#endif
};

INLINE IVec lanes_below(int32_t n) {
  IVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < n;
}

// The first n lanes, n < kLanes; the others are `rest`.
template <class T>
INLINE Vec load_some(const typename T::Raw* p, int64_t n, float rest) {
  typename T::Lanes x = T::narrow(splat(rest));
#if ESPER_LEVEL == 4
  const uint16_t mask = (1u << n) - 1;
  if constexpr (sizeof *p == 4)
    x = (typename T::Lanes)_mm512_mask_loadu_ps((__m512)x, mask, p);
  else
    x = (typename T::Lanes)_mm256_mask_loadu_epi16((__m256i)x, mask, p);
#else
  for (int i = 0; i < n; ++i) x[i] = p[i];
#endif
  return T::widen(x);
}

template <class T>
INLINE void store_some(typename T::Raw* p, int64_t n, Vec x) {
  const typename T::Lanes lanes = T::narrow(x);
#if ESPER_LEVEL == 4
  const uint16_t mask = (1u << n) - 1;
  if constexpr (sizeof *p == 4)
    _mm512_mask_storeu_ps(p, mask, (__m512)lanes);
  else
    _mm256_mask_storeu_epi16(p, mask, (__m256i)lanes);
#else
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// Lanes c to c + kLanes of n.
template <class T>
INLINE Vec load_at(const typename T::Raw* p, int64_t c, int64_t n, float rest) {
  return n - c >= kLanes ? T::widen(load<typename T::Lanes>(p + c)) : load_some<T>(p + c, n - c, rest);
}

// Lane i with bit `step` set and lane i - step change places between a and b.
template <int step, int... i>
INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, i...>) {
  const Vec low = __builtin_shufflevector(a, b, (i & step ? kLanes + i - step : i)...);
  b = __builtin_shufflevector(a, b, (i & step ? kLanes + i : i + step)...);
  a = low;
}

// Lane j of x[i] and lane i of x[j] change places.
template <int step = kLanes / 2>
INLINE void transpose(Vec* x) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & step)) exchange<step>(x[i], x[i + step], Indices<kLanes>{});
  if constexpr (step > 1) transpose<step / 2>(x);
}

// --- functions ---

// exp(x) for x of at most about 0; 0 below -86; NaN for NaN. Relative error 2e-7 of exp(x rounded).
INLINE Vec exp(Vec x) {
  const float log2e = 1.44269504f, low = -86.0f;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  const Vec bounded = max(splat(low), x);
  const Vec shifted = bounded * log2e + shift;
  const Vec f =
      bounded * log2e - (shifted - shift);  // in [-1/2, 1/2]; below, 2^f fitted with 2^0 = 1 exactly
  const Vec p =
      1.0f + f * (0.6931470036506653f +
                  f * (0.24022242426872253f +
                       f * (0.05550733581185341f + f * (0.009671512991189957f + f * 0.001326472731307149f))));
#if ESPER_LEVEL == 4
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)(shifted - shift));
#endif
  const UVec scaled = (UVec)p + ((UVec)shifted << 23);
  const Vec number = x == x ? (Vec)scaled : x;  // the shift would make a number of a NaN with low bits set
  return x < low ? Vec{} : number;
}

// log(x) for normal x >= 1/2; NaN for NaN. The mantissa in [sqrt(1/2), sqrt(2)) by a polynomial.
INLINE Vec log(Vec x) {
  const IVec bits = (IVec)x - 0x3f3504f3;  // sqrt(1/2)
  const Vec e = __builtin_convertvector(bits >> 23, Vec);
  const Vec f = (Vec)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f, z = f * f;
  Vec p = splat(7.0376836292e-2f);
  const float c[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                     -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f};
  for (float k : c) p = p * f + k;
  const Vec result = (p * f * z + e * -2.12194440e-4f - 0.5f * z) + f + e * 0.693359375f;
  return x == x ? result : x;
}

INLINE Vec tanh(Vec x) {
  const Vec magnitude = (Vec)((IVec)x & 0x7fffffff), s = exp(-2.0f * magnitude), z = x * x;
  const Vec large = (1.0f - s) / (1.0f + s);
  Vec p = splat(-5.70498872745e-3f);
  const float c[] = {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f};
  for (float k : c) p = p * z + k;
  return magnitude < 0.625f ? p * z * x + x : (Vec)((IVec)large | ((IVec)x & (int32_t)0x80000000));
}
