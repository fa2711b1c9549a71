#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#define ESPER_LEVEL 4  // GCC 12 has read the whole file before it sees the pragma: no __AVX512F__
#pragma GCC target("arch=x86-64-v4")
#include <immintrin.h>

namespace esper::avx512 {
#include "simd.h"
#include "cross_entropy.h"
#include "grad_stats.h"

extern const Kernels kernels{"avx512", cross_entropy, grad_chunk};
}  // namespace esper::avx512
#endif
