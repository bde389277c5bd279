// Threads come from the OpenMP runtime that the process already has, normally torch's. Its threads keep spinning for a
// while after each torch operation; threads of our own would have to compete with them for the same cores.
#include "cpu/parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace wandapp {
namespace {

// Scores and weights may be denormal, so the caller's flush-to-zero mode must not reach the kernels.
class KeepDenormals {
#ifdef __x86_64__
 public:
  KeepDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~KeepDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  KeepDenormals() {}
#endif
};

struct Job {
  int64_t tasks;
  void (*call)(void*, int64_t);
  void* body;
  std::atomic<int64_t> next{0};

  void work() {
    KeepDenormals guard;
    for (int64_t task = next++; task < tasks; task = next++) call(body, task);
  }
};

void work_on(void* job) { static_cast<Job*>(job)->work(); }

// The entry point behind `#pragma omp parallel` of gcc, which LLVM's runtime offers too. Found by name and not linked,
// because torch ships its own copy of the library under another file name.
using OpenmpParallel = void (*)(void (*work)(void*), void* data, unsigned threads, unsigned flags);

OpenmpParallel openmp_of_process() {
  static const auto found = reinterpret_cast<OpenmpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

}  // namespace

void run_parallel(int64_t tasks, int threads, void (*call)(void*, int64_t), void* body) {
  Job job{tasks, call, body};
  const int64_t workers = threads < tasks ? threads : tasks;
  if (workers <= 1) return job.work();
  if (OpenmpParallel openmp = openmp_of_process()) return openmp(work_on, &job, unsigned(workers), 0);
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < workers; i++) helpers.emplace_back(work_on, &job);
  job.work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace wandapp
