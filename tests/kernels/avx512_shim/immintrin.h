// The AVX-512 instructions that csrc/cpu names, in plain code for a machine that has only AVX2. With this
// folder first in the include path, csrc/cpu/avx512.cpp and avx512bf16.cpp compute what they do on a machine
// with AVX-512.
#pragma once
#if ESPER_LEVEL < 4
#include_next <immintrin.h>  // the other instruction sets are compiled as they always are
#else
#pragma GCC reset_options
#pragma GCC target("arch=x86-64-v3")
#pragma GCC diagnostic ignored "-Wpsabi"
#include_next <immintrin.h>

#include <cstdint>
#include <cstring>

namespace esper_shim {

template <class V, class T>
struct Lanes {
  static constexpr int kCount = sizeof(V) / sizeof(T);
  T lane[kCount];
  explicit Lanes(V x) { std::memcpy(lane, &x, sizeof x); }
  V vector() const {
    V x;
    std::memcpy(&x, lane, sizeof x);
    return x;
  }
};

template <class T, class V, class Mask>
V mask_load(V other, Mask mask, const void* memory) {
  Lanes<V, T> result(other);
  for (int i = 0; i < result.kCount; ++i)
    if (mask >> i & 1) result.lane[i] = static_cast<const T*>(memory)[i];
  return result.vector();
}

template <class T, class V, class Mask>
void mask_store(void* memory, Mask mask, V x) {
  const Lanes<V, T> from(x);
  for (int i = 0; i < from.kCount; ++i)
    if (mask >> i & 1) static_cast<T*>(memory)[i] = from.lane[i];
}

inline __m512 max_ps(__m512 x, __m512 y) {
  Lanes<__m512, float> a(x), b(y);
  for (int i = 0; i < 16; ++i) a.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return a.vector();
}

inline __m512 cvtph_ps(__m256i x) {
  __m256i in = x;
  __m512 out;
  for (int half = 0; half < 2; ++half) {
    const __m256 wide = _mm256_cvtph_ps(half ? _mm256_extracti128_si256(in, 1) : _mm256_castsi256_si128(in));
    std::memcpy(reinterpret_cast<char*>(&out) + 32 * half, &wide, 32);
  }
  return out;
}

inline __m256i cvtps_ph(__m512 x) {
  __m256 halves[2];
  std::memcpy(halves, &x, sizeof x);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], 0), _mm256_cvtps_ph(halves[0], 0));  // to nearest even
}

inline void stream_si512(void* memory, __m512i x) {
  __m256i halves[2];
  std::memcpy(halves, &x, sizeof x);
  _mm256_stream_si256(static_cast<__m256i*>(memory), halves[0]);
  _mm256_stream_si256(static_cast<__m256i*>(memory) + 1, halves[1]);
}

inline __m512i cvtepu16_epi32(__m256i x) {
  __m512i out;
  for (int half = 0; half < 2; ++half) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(half ? _mm256_extracti128_si256(x, 1) : _mm256_castsi256_si128(x));
    std::memcpy(reinterpret_cast<char*>(&out) + 32 * half, &wide, 32);
  }
  return out;
}

inline __m512i slli_epi32(__m512i x, int count) {
  Lanes<__m512i, uint32_t> a(x);
  for (uint32_t& lane : a.lane) lane <<= count;
  return a.vector();
}

// The classes that csrc/cpu asks for together: denormals and NaN.
inline uint16_t is_denormal_or_nan(__m512 x) {
  const Lanes<__m512, uint32_t> a(x);
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = a.lane[i] & 0x7fffffff;
    mask |= (magnitude > 0x7f800000 || (magnitude - 1) < 0x7fffff) << i;
  }
  return mask;
}

inline uint16_t cvtneps_pbh(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return bits >> 16 | 0x40;
  if (magnitude < 0x800000) return bits >> 16 & 0x8000;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline __m256i cvtneps_pbh(__m512 x) {
  const Lanes<__m512, uint32_t> a(x);
  Lanes<__m256i, uint16_t> out{__m256i{}};
  for (int i = 0; i < 16; ++i) out.lane[i] = cvtneps_pbh(a.lane[i]);
  return out.vector();
}

inline __m512i cvtne2ps_pbh(__m512 upper, __m512 lower) {
  const __m256i halves[2] = {cvtneps_pbh(lower), cvtneps_pbh(upper)};
  __m512i out;
  std::memcpy(&out, halves, sizeof out);
  return out;
}

}  // namespace esper_shim

#define _mm512_max_ps esper_shim::max_ps
#define _mm512_cvtepu16_epi32 esper_shim::cvtepu16_epi32
#define _mm512_slli_epi32 esper_shim::slli_epi32
#define _mm512_fpclass_ps_mask(x, classes) esper_shim::is_denormal_or_nan(x)
#define _mm512_kortestz(a, b) (((a) | (b)) == 0)
#define _mm512_cvtneps_pbh esper_shim::cvtneps_pbh
#define _mm512_cvtne2ps_pbh esper_shim::cvtne2ps_pbh
#define _mm512_cvtph_ps esper_shim::cvtph_ps
#define _mm512_cvtps_ph(x, rounding) esper_shim::cvtps_ph(x)
#define _mm512_stream_si512 esper_shim::stream_si512
#define _mm512_mask_loadu_ps esper_shim::mask_load<float>
#define _mm256_mask_loadu_epi16 esper_shim::mask_load<uint16_t>
#define _mm512_mask_storeu_ps esper_shim::mask_store<float>
#define _mm256_mask_storeu_epi16 esper_shim::mask_store<uint16_t>
#endif
