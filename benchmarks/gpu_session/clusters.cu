// How many clusters of blocks a GPU can have resident at once, by shared memory and blocks: what
// launch plans of the CUDA kernels have to reckon with.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void occupy() {
  extern __shared__ char memory[];
  memory[threadIdx.x] = 0;
}

int main() {
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  for (const int kib : {33, 65, 100, 130}) {
    for (const int blocks : {1, 2, 4, 8}) {
      cudaLaunchAttribute cluster{};
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
      cudaLaunchConfig_t config{};
      config.gridDim = 1024 * blocks;
      config.blockDim = 256;
      config.dynamicSmemBytes = static_cast<size_t>(kib) << 10;
      config.attrs = &cluster;
      config.numAttrs = 1;
      int clusters = 0;
      cudaError_t error = cudaFuncSetAttribute(occupy, attribute, kib << 10);
      if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, occupy, &config);
      if (error != cudaSuccess) {
        std::printf("%d KiB, clusters of %d: %s\n", kib, blocks, cudaGetErrorString(error));
        return 1;
      }
      std::printf("%d KiB, clusters of %d: %d at once\n", kib, blocks, clusters);
    }
  }
}
