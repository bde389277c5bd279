// parallel(tasks, threads, body): body(task) for every task in [0, tasks), on at most `threads` threads.
#pragma once
#include <cstdint>

namespace wandapp {

// Tasks are handed out one by one, so that a thread that another process holds up takes fewer.
void run_parallel(int64_t tasks, int threads, void (*call)(void*, int64_t), void* body);

template <class Body>
void parallel(int64_t tasks, int threads, Body body) {
  run_parallel(tasks, threads, [](void* self, int64_t task) { (*static_cast<Body*>(self))(task); }, &body);
}

}  // namespace wandapp
