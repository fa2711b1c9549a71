#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#define ESPER_LEVEL \
  4  // GCC 12 reads the whole file before it obeys the pragma, so __AVX512F__ stays undefined
#pragma GCC target("arch=x86-64-v4")
#include <immintrin.h>

namespace esper::avx512 {
#include "simd.inc"
#include "elements.inc"
#include "cross_entropy.inc"
#include "tiles.inc"
#include "class_sums.inc"
#include "token_logprobs.inc"
#include "grad_stats.inc"
#include "vector_functions.inc"

extern const Kernels kernels{"avx512",       cross_entropy, class_sums,
                             token_logprobs, grad_chunk,    vector_functions};
}  // namespace esper::avx512
#endif
