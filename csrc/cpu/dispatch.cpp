#include <cstring>
#if defined(__linux__)
#include <unistd.h>
#endif

#include "kernels.h"

namespace esper {
#if defined(__x86_64__)
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace baseline {
extern const Kernels kernels;
}

const Kernels* const* available_kernels() {
  static const Kernels* sets[5] = {};
  [[maybe_unused]] static const bool filled = [] {
    const Kernels** next = sets;
#if defined(__x86_64__)
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (v3 && v4 && __builtin_cpu_supports("avx512bf16")) *next++ = &avx512bf16::kernels;
    if (v3 && v4) *next++ = &avx512::kernels;
    if (v3) *next++ = &avx2::kernels;
#endif
    *next = &baseline::kernels;
    return true;
  }();
  return sets;
}

int64_t second_level_cache() {
  constexpr int64_t kUsual = 512 << 10;  // where the system does not say
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = sysconf(_SC_LEVEL2_CACHE_SIZE);  // once: it may ask the processor
  if (size > 0) return size;
#endif
  return kUsual;
}

const Kernels* find_kernels(const char* name) {
  const Kernels* const* sets = available_kernels();
  if (std::strcmp(name, "auto") == 0) return *sets;
  while (*sets && std::strcmp((*sets)->name, name) != 0) ++sets;
  return *sets;
}

}  // namespace esper
