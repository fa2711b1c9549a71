// The measures of a Meter on their way from the rows to its accumulators.
#pragma once
#include <memory>
#include <vector>

#include "../call.h"

namespace esper {

class MeasuredRows {
 public:
  // Memory for the measures of each row, where kernels find it; none without a plan. p: outlives this.
  MeasuredRows(const MeasurePlan& plan, LossRows& p);

  // The rows will be read in blocks of `rows`.
  void expect(int64_t blocks, int64_t rows);
  // Rows begin to end, a block, have been read. Several threads may call it, each for other blocks.
  void add_block(int64_t block, int64_t begin, int64_t end);
  // All rows have been read. sums, counts: where a meter has room for them.
  void add_to_meter(double* sums, int64_t* counts) const;

 private:
  void add_rows(int64_t begin, int64_t end, double* sums, int64_t* counts) const;

  const MeasurePlan plan_;
  const LossRows& p_;
  std::unique_ptr<int32_t[]> predicted_;
  std::unique_ptr<float[]> values_;
  bool in_blocks_ = false;  // whether blocks are added up by themselves, and then with one another
  std::vector<double> block_sums_;
  std::vector<int64_t> block_counts_;
};

}  // namespace esper
