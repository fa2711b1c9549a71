// Runs the blocks and threads of a launch, see cuda/simt.h. It ends the process where threads wait for others
// that have left, and gives blocks no more shared memory than they asked for, filled with garbage.
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/simt.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr int kAlwaysShared = 48 << 10;  // bytes that a block may have on every GPU, without asking

struct Fiber;

struct Barrier {
  int size = 0, arrived = 0;
  std::vector<Fiber*> waiting{};
};

struct Warp {
  Barrier barrier;
  uint64_t held_out[2][32];
};

struct Block {
  unsigned index;
  std::unique_ptr<unsigned char[]> shared;
  Barrier barrier;
  std::vector<Warp> warps;
  int running;  // threads
};

struct Context {
  ucontext_t first;
  void* later[5];
  bool started = false;
};

struct Fiber {
  Context context;
  void* stack;
  Block* block;
  unsigned thread;
  bool waiting = false, done = false;
  int turn = 0;
};

// What runs now.
Fiber* current = nullptr;
Context scheduler;
const std::function<void()>* body = nullptr;
std::vector<Block> blocks;  // of the cluster
Barrier cluster_barrier;
std::vector<std::pair<esper::cuda::Arrivals*, Fiber*>> readers;  // that wait for messages
std::vector<void*> stacks;                                       // kept for the next launch

// What tests set.
int multiprocessors = 3, shared_bytes = 227 << 10, architecture = 9;
bool backwards = false, launches = true;
int64_t launched = 0;

// From one stack to another. Address sanitizer wants to be told; swapcontext, which it knows, asks the system
// each time, so without it only the first switch to a stack does.
#if defined(__SANITIZE_ADDRESS__)
void switch_to(Context& from, Context& to, const void* stack, size_t size, bool leaves) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(leaves ? nullptr : &fake, stack, size);
  swapcontext(&from.first, &to.first);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}
#else
void switch_to(Context& from, Context& to, const void*, size_t, bool) {
  from.started = true;
  if (__builtin_setjmp(from.later)) return;
  if (to.started) __builtin_longjmp(to.later, 1);
  setcontext(&to.first);
}
#endif

const void* main_stack = nullptr;  // where the scheduler runs
size_t main_size = 0;

void leave(bool for_good) { switch_to(current->context, scheduler, main_stack, main_size, for_good); }

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_size);
#endif
  (*body)();
  current->done = true;
  leave(true);
}

void wait(Barrier& barrier) {
  if (++barrier.arrived < barrier.size) {
    current->waiting = true;
    barrier.waiting.push_back(current);
    return leave(false);
  }
  for (Fiber* fiber : barrier.waiting) fiber->waiting = false;
  barrier.waiting.clear();
  barrier.arrived = 0;
}

void run(Fiber& fiber, int threads) {
  current = &fiber;
  threadIdx.x = fiber.thread;
  blockIdx.x = fiber.block->index;
  blockDim.x = threads;
  switch_to(scheduler, fiber.context, fiber.stack, kStack, false);
}

void run_cluster(int first_block, const esper::cuda::Grid& grid) {
  blocks.clear();
  cluster_barrier = {grid.cluster * grid.threads};
  for (int b = 0; b < grid.cluster; ++b) {
    blocks.push_back({static_cast<unsigned>(first_block + b),
                      std::unique_ptr<unsigned char[]>(new unsigned char[grid.shared_bytes]),
                      {grid.threads},
                      {},
                      grid.threads});
    std::memset(blocks[b].shared.get(), 0xA5, grid.shared_bytes);
    for (int w = 0; w < grid.threads / 32; ++w) blocks[b].warps.push_back({{32}, {}});
  }
  std::vector<Fiber> fibers(grid.cluster * grid.threads);
  for (size_t i = 0; i < fibers.size(); ++i) {
    if (i == stacks.size())
      stacks.push_back(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks[i], kStack);
#endif
    fibers[i].stack = stacks[i];
    fibers[i].block = &blocks[i / grid.threads];
    fibers[i].thread = i % grid.threads;
    getcontext(&fibers[i].context.first);
    fibers[i].context.first.uc_stack.ss_sp = stacks[i];
    fibers[i].context.first.uc_stack.ss_size = kStack;
    fibers[i].context.first.uc_link = nullptr;
    makecontext(&fibers[i].context.first, enter, 0);
  }
  // The first warp that can go on does, as far as it can: what is safe only by luck goes wrong.
  const int warps = fibers.size() / 32;
  for (size_t left = fibers.size(); left > 0;) {
    bool moved = false;
    for (int w = 0; w < warps && !moved; ++w) {
      Fiber* lanes = &fibers[(backwards ? warps - 1 - w : w) * 32];
      for (bool again = true; again;) {
        again = false;
        for (int i = 0; i < 32; ++i) {
          Fiber& fiber = lanes[backwards ? 31 - i : i];
          if (fiber.waiting || fiber.done) continue;
          run(fiber, grid.threads);
          left -= fiber.done;
          if (fiber.done && --fiber.block->running == 0)  // its shared memory is gone, also for its cluster
            std::memset(fiber.block->shared.get(), 0xA5, grid.shared_bytes);
          again = moved = true;
        }
      }
    }
    if (moved) continue;
    std::fprintf(stderr, "cuda_shim: threads wait at a barrier or shuffle that others do not come to\n");
    std::abort();
  }
}

}  // namespace

void __syncthreads() { wait(current->block->barrier); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  const int values[] = {multiprocessors, shared_bytes, shared_bytes, architecture};
  return *value = values[which], cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

namespace esper::cuda {

uint64_t exchange(uint64_t mine, int distance) {
  Warp& warp = current->block->warps[current->thread / 32];
  const int lane = current->thread % 32, turn = current->turn ^= 1;  // the other half may still be read
  warp.held_out[turn][lane] = mine;
  wait(warp.barrier);
  return warp.held_out[turn][lane ^ distance];
}

unsigned char* shared_memory() { return current->block->shared.get(); }
int Cluster::num_blocks() const { return static_cast<int>(blocks.size()); }
int Cluster::block_rank() const { return static_cast<int>(current->block - blocks.data()); }
void Cluster::sync() const { wait(cluster_barrier); }

namespace {

template <class T>
T* in_block(T* mine, int rank) {
  const auto offset = reinterpret_cast<unsigned char*>(mine) - shared_memory();
  return reinterpret_cast<T*>(blocks[rank].shared.get() + offset);
}

void end_round_if_all_came(Arrivals* arrivals) {
  if (arrivals->expecting || arrivals->bytes != 0) return;
  arrivals->expecting = 1;
  arrivals->round += 1;
  for (auto& [inbox, fiber] : readers)
    if (inbox == arrivals) fiber->waiting = false;
  std::erase_if(readers, [&](const auto& reader) { return reader.first == arrivals; });
}

}  // namespace

void open_inbox(Arrivals* arrivals) { *arrivals = {0, 1, 0}; }
void expect_messages(Arrivals* arrivals, int bytes) {
  arrivals->bytes += bytes;
  arrivals->expecting = 0;
  end_round_if_all_came(arrivals);
}
void send_message(void* to, Arrivals* arrivals, int rank, const Words& message) {
  std::memcpy(in_block(static_cast<unsigned char*>(to), rank), &message, sizeof(message));
  in_block(arrivals, rank)->bytes -= sizeof(message);
  end_round_if_all_came(in_block(arrivals, rank));
}
void wait_for_messages(Arrivals* arrivals, int parity) {
  if (arrivals->round % 2 != parity) return;
  current->waiting = true;
  readers.push_back({arrivals, current});
  leave(false);
}

int resident_clusters_of(const Grid& grid) { return std::max(1, multiprocessors / grid.cluster); }

cudaError_t run_grid(const Grid& grid, const std::function<void()>& thread) {
  if (grid.threads % 32 || grid.threads > 1024 || grid.blocks < 1 || grid.blocks % grid.cluster ||
      grid.shared_bytes > std::max(shared_bytes, kAlwaysShared) || (grid.cluster > 1 && architecture < 9))
    return cudaErrorInvalidValue;
  ++launched;
  if (!launches) return cudaSuccess;
  body = &thread;
  gridDim.x = grid.blocks;
  for (int b = 0; b < grid.blocks; b += grid.cluster)
    run_cluster(backwards ? grid.blocks - grid.cluster - b : b, grid);
  return cudaSuccess;
}

}  // namespace esper::cuda

// For tests: the make-believe device, and whether blocks and threads run from the last to the first.
extern "C" __attribute__((visibility("default"))) void esper_shim_device(int processors, int shared,
                                                                         int major, bool last_first) {
  multiprocessors = processors, shared_bytes = shared, architecture = major, backwards = last_first;
}

// How many kernels were launched so far.
extern "C" __attribute__((visibility("default"))) int64_t esper_shim_launched() { return launched; }

// For the benchmark of host time: a launch that is checked and does nothing.
extern "C" __attribute__((visibility("default"))) void esper_shim_launches(bool run) { launches = run; }
