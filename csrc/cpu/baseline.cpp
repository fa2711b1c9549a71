#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Instructions that every machine of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define ESPER_LEVEL 1
namespace esper::baseline {
#include "simd.inc"
#include "elements.inc"
#include "cross_entropy.inc"
#include "tiles.inc"
#include "class_sums.inc"
#include "token_logprobs.inc"
#include "grad_stats.inc"
#include "vector_functions.inc"

extern const Kernels kernels{"baseline",     cross_entropy, class_sums,
                             token_logprobs, grad_chunk,    vector_functions};
}  // namespace esper::baseline
