// A small pool of threads that lives as long as the process. Starting threads per call would cost more than a small
// matrix-vector product takes.
#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

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

inline void pause_briefly() {
#ifdef __x86_64__
  _mm_pause();
#endif
}

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

class Pool {
 public:
  void run(Job& job, int helpers) {
    std::lock_guard<std::mutex> one_caller(calls_);
    {
      std::lock_guard<std::mutex> lock(state_);
      while (started_ < helpers) {
        std::thread(&Pool::help, this, generation_.load()).detach();
        started_++;
      }
      job_ = &job;
      seats_ = helpers;
      generation_++;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(state_);
    job_ = nullptr;  // helpers that have not sat down yet stay away
    idle_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void help(uint64_t seen) {
    for (;;) {
      // A decode loop calls again within microseconds: look for that long before sleeping.
      for (int spin = 0; spin < 2000 && generation_.load(std::memory_order_acquire) == seen; spin++) pause_briefly();
      std::unique_lock<std::mutex> lock(state_);
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (job_ == nullptr || seats_ == 0) continue;
      Job* job = job_;
      seats_--;
      busy_++;
      lock.unlock();
      job->work();
      lock.lock();
      if (--busy_ == 0) idle_.notify_one();
    }
  }

  std::mutex calls_, state_;
  std::condition_variable wake_, idle_;
  std::atomic<uint64_t> generation_{0};
  Job* job_ = nullptr;
  int started_ = 0, seats_ = 0, busy_ = 0;
};

// Never deleted: detached helpers still wait in it when the process ends.
Pool* pool = nullptr;

Pool& shared_pool() {
  static bool made = [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });  // threads do not survive a fork
    return true;
  }();
  (void)made;
  return *pool;
}

}  // namespace

void run_parallel(int64_t tasks, int threads, void (*call)(void*, int64_t), void* body) {
  if (tasks <= 0) return;
  Job job{tasks, call, body};
  int64_t helpers = (threads < tasks ? threads : tasks) - 1;
  if (helpers <= 0) return job.work();
  shared_pool().run(job, int(helpers));
}

}  // namespace wandapp
