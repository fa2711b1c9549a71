#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// What every machine of the architecture runs: SSE2 on x86-64, NEON on aarch64.
#define ESPER_LEVEL 1
namespace esper::baseline {
#include "simd.h"
#include "cross_entropy.h"
#include "grad_stats.h"

extern const Kernels kernels{"baseline", cross_entropy, grad_chunk};
}  // namespace esper::baseline
