// The table of kernels of one instruction set. Plain memory, no torch.
#pragma once
#include <cstdint>

#include "../call.h"

namespace esper {

// The statistics of a chunk of a gradient.
struct GradChunk {
  double sum_of_squares, max_abs;
  int64_t zeros, nans, infs;
};

// A call as the CPU kernels see it: LossRows with the options that the driver has read.
struct CrossEntropy : LossRows {
  float weight_sum;  // sum of weight, or classes
  float smoothing, z_loss;
  float softcap;  // 0: none
  const int64_t* topk;
  // The gradient of the sum of row losses is multiplied by scale, and by scale_of_row if that is given.
  float scale;
  bool zero;     // write a gradient of 0, even for rows that are not finite
  bool stream;   // store the gradient past the caches
  int64_t kept;  // the exponentials of so many classes of a row fit the scratch; a multiple of kLargestChunk
};

// Likewise a call of class_sums.
struct ClassSums : CrossEntropy {
  const float* target_logits;  // [rows] or null
  bool measured;               // whether the sums of measures are wanted
  double* sums;                // [kNumClassSums, rows]; if measured, [kNumMeasuredSums, rows]
};

// Likewise a call of token_logprobs.
struct TokenLogprobs : LogprobRows {
  bool stream;
};

// Rows [begin, end), and the row that the same thread reads after them.
struct RowRange {
  int64_t begin, end, next;
};

constexpr int64_t kSmallestChunk = 1024, kLargestChunk = 4096;  // classes per chunk, on any instruction set

// How many exponentials of a row a thread keeps in its scratch, in floats, where its second-level cache holds
// `cache_bytes`: those of a whole row where they take at most half of that, so that the row and its gradient
// have room too. Of a longer row those of the first classes, in at most 256 KiB, which bounds what a call
// allocates; the others are computed twice. It changes no bit of a result.
inline int64_t kept_classes(int64_t classes, int64_t cache_bytes) {
  constexpr int64_t kOfLongRows = 65536;
  const int64_t room = cache_bytes / 2 / static_cast<int64_t>(sizeof(float)) / kLargestChunk * kLargestChunk;
  return classes > room && room > kOfLongRows ? kOfLongRows : room;
}

// The functions that kernels are made of, on arrays: n elements from x to y. Half-precision numbers are given
// as their bits.
struct VectorFunctions {
  void (*exp)(const float* x, float* y, int64_t n);
  void (*log)(const float* x, float* y, int64_t n);
  void (*tanh)(const float* x, float* y, int64_t n);
  void (*widen_bfloat16)(const uint16_t* x, float* y, int64_t n);
  void (*widen_float16)(const uint16_t* x, float* y, int64_t n);
  void (*narrow_bfloat16)(const float* x, uint16_t* y, int64_t n);
  void (*narrow_float16)(const float* x, uint16_t* y, int64_t n);
};

struct Kernels {
  const char* name;
  // scratch: scratch_size floats. counts: rows that are not finite, then correct@k for each k of topk.
  void (*cross_entropy)(const CrossEntropy&, const RowRange&, float* scratch, double* loss, int64_t* counts);
  void (*class_sums)(const ClassSums&, const RowRange&, float* scratch);  // likewise
  void (*token_logprobs)(const TokenLogprobs&, const RowRange&);
  // n contiguous elements, each multiplied by inv_scale.
  GradChunk (*grad_chunk)(const void*, Dtype, int64_t n, double inv_scale);
  const VectorFunctions* vector_functions;  // null, except in the build for tests
};

// Floats of scratch: kept exponentials, and the maximum of each chunk of a row.
inline int64_t scratch_size(int64_t classes, int64_t kept) {
  return (classes < kept ? classes : kept) + classes / kSmallestChunk + 64;
}

// Rows per unit of work: fixed by the shape, so that sums do not depend on the number of threads.
inline int64_t rows_per_block(int64_t classes) {
  const int64_t rows = 32768 / classes / 16 * 16;
  return rows > 0 ? rows : 1;
}

// Whether rows are copied into tiles, because their classes are not next to each other in memory.
inline bool is_tiled(const LossRows& p) { return p.class_stride != 1 || (p.out && p.out_class_stride != 1); }
// Rows per tile: at least as many as float32 numbers in a cache line, since those are often neighbours.
inline int64_t rows_per_tile(int64_t classes) {
  const int64_t rows = rows_per_block(classes);
  return rows > 16 ? rows : 16;
}
// Floats from a row of a tile to the next: room for whole vectors, and no power of 2, which would put the
// rows into the same few places of the cache.
inline int64_t tile_width(int64_t classes) { return classes / 16 * 16 + 32; }

// The sets built into this binary that this machine can run, best first; ends with null.
const Kernels* const* available_kernels();
// The named one, the best for "auto", or null.
const Kernels* find_kernels(const char* name);
// Bytes of the second-level cache of a core.
int64_t second_level_cache();

}  // namespace esper
