// The CUDA words that the kernels use, on a CPU: blocks one after the other, a fiber per thread, barriers and shuffles
// as points where a fiber yields. Made so that a wrong kernel shows: threads and blocks run in a chosen order, shared
// memory starts as NaN in every block, a barrier that some threads do not reach is an error, so is a write past shared
// memory, and any one barrier can be taken out.
//
// Not for inline PTX, asynchronous copies or tensor cores.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
using std::isinf;

namespace segops::emulator {

enum class Order { forward, reverse, shuffled };

struct Schedule {
  Order threads = Order::forward;
  unsigned seed = 0;
  bool reverse_blocks = false;
  int dropped_barrier = 0;  // line of the __syncthreads() that does nothing
  bool dry = false;         // launches are noted, not run
};
inline Schedule schedule;

struct Launched {
  uint64_t blocks;
  int threads;
  std::size_t shared;
};
inline std::vector<Launched> launched;  // since the schedule became dry

enum class State { ready, at_barrier, at_shuffle, done };

#if defined(__x86_64__)
// Twenty times faster than swapcontext, which asks the kernel for the signal mask twice per switch.
using Context = void*;  // a stack pointer; the registers a call preserves are on that stack
[[gnu::naked, gnu::noinline]] inline void switch_context(Context* from, Context* to) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n\t"
      "mov %rsp, (%rdi)\n\t"
      "mov (%rsi), %rsp\n\t"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\n\t"
      "ret");
}
inline void make_context(Context* context, char* stack, std::size_t bytes, void (*entry)()) {
  // Six registers, the address that `ret` takes, and a return address that keeps the stack aligned as after a call.
  auto** top = reinterpret_cast<void**>(stack + bytes) - 8;
  std::fill_n(top, 8, nullptr);
  top[6] = reinterpret_cast<void*>(entry);
  *context = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void make_context(Context* context, char* stack, std::size_t bytes, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

struct Fiber {
  Context context;
  char* stack = nullptr;
  uint3 index;
  State state;
  int line;      // of the barrier it waits at
  int exchanges; // shuffles so far
  alignas(8) unsigned char slots[2][8];
};

inline constexpr std::size_t stack_bytes = 128 << 10, page = 4096, red_zone = 4096;
inline constexpr unsigned char poison = 0xff;  // every float of these bytes is NaN

inline std::mutex one_launch;
inline std::vector<Fiber> fibers;
inline Context scheduler;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;
inline std::exception_ptr failure;
inline std::vector<unsigned char> arena;

inline char* shared_memory() {
  const auto at = reinterpret_cast<std::uintptr_t>(arena.data());
  return reinterpret_cast<char*>((at + 15) / 16 * 16);
}

inline void yield(State state) {
  current->state = state;
  switch_context(&current->context, &scheduler);
}

inline void enter() {
  try {
    (*body)();
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  yield(State::done);
}

inline void syncthreads(int line) {
  if (line == schedule.dropped_barrier) return;
  current->line = line;
  yield(State::at_barrier);
}

// A lane is at most one exchange ahead of another of its warp, so two slots suffice.
template <typename T>
T shuffle_xor(unsigned mask, T value, int lane_mask) {
  STD_TORCH_CHECK(mask == 0xffffffffu, "emulation: a shuffle of part of a warp");
  const auto self = current - fibers.data();
  const int slot = current->exchanges++ % 2;
  std::memcpy(current->slots[slot], &value, sizeof(T));
  yield(State::at_shuffle);
  std::memcpy(&value, fibers[self ^ lane_mask].slots[slot], sizeof(T));
  return value;
}

inline void start(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(memory != MAP_FAILED && mprotect(memory, page, PROT_NONE) == 0, "emulation: no stack for a fiber");
    fiber.stack = static_cast<char*>(memory) + page;
  }
  make_context(&fiber.context, fiber.stack, stack_bytes, enter);
  fiber.state = State::ready;
  fiber.exchanges = 0;
}

// Lets those go on that all wait for each other; false if there are none.
inline bool release(int threads) {
  bool released = false, together = true;
  for (int t = 0; t < threads; ++t)
    together &= fibers[t].state == State::at_barrier && fibers[t].line == fibers[0].line;
  for (int warp = 0; warp < threads; warp += 32) {
    bool whole = true;
    for (int t = warp; t < warp + 32; ++t) whole &= fibers[t].state == State::at_shuffle;
    if (together || whole) {
      for (int t = warp; t < warp + 32; ++t) fibers[t].state = State::ready;
      released = true;
    }
  }
  return released;
}

inline void run_block(int threads, std::mt19937& random) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.threads == Order::reverse) std::reverse(order.begin(), order.end());
  for (int t = 0; t < threads; ++t) {
    fibers[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    start(fibers[t]);
  }
  int done = 0;
  while (done < threads) {
    if (schedule.threads == Order::shuffled)
      for (int t = threads - 1; t > 0; --t) std::swap(order[t], order[random() % (t + 1)]);
    for (const int t : order) {
      if (fibers[t].state != State::ready) continue;
      current = &fibers[t];
      threadIdx = current->index;
      switch_context(&scheduler, &current->context);
      done += current->state == State::done;
      if (failure) return;
    }
    STD_TORCH_CHECK(done == threads || release(threads), "emulation: a barrier that not all threads reach");
  }
}

template <typename Body>
void run(dim3 grid, dim3 block, std::size_t shared, Body kernel) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const std::function<void()> function = kernel;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (schedule.dry) return launched.push_back({blocks, threads, shared});
  if (fibers.size() < static_cast<std::size_t>(threads)) fibers.resize(threads);
  body = &function;
  gridDim = grid, blockDim = block;
  std::mt19937 random(schedule.seed);
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t b = schedule.reverse_blocks ? blocks - 1 - i : i;
    blockIdx = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    arena.assign(shared + red_zone + 16, poison);
    failure = nullptr;
    run_block(threads, random);
    if (failure) std::rethrow_exception(failure);
    const auto* end = reinterpret_cast<const unsigned char*>(shared_memory()) + shared;
    for (std::size_t e = 0; e < red_zone; ++e)
      STD_TORCH_CHECK(end[e] == poison, "emulation: a write ", e, " bytes past shared memory");
  }
}

}  // namespace segops::emulator

#define __launch_bounds__(...)
#define __syncthreads() segops::emulator::syncthreads(__LINE__)
#define __shfl_xor_sync segops::emulator::shuffle_xor
