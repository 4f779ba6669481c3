// Clones that continue in threads of their own (`make tsan` runs this test too): each writes what it alone sees.
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "script_case.h"

namespace kv4 {
namespace {

using namespace saved;

TEST(Clones, GoOnInThreadsOfTheirOwn) {
  for (const Case& c : scripts::script_cases("cpu")) {
    SCOPED_TRACE(c.name);
    for (const std::int64_t prompt : {20, 90, 200}) {
      const std::unique_ptr<Cache> origin = create(c.config);
      scripts::Writer begin(c, 1);
      begin.append(prompt);
      begin.attend(std::min<std::int64_t>(prompt, 64));
      scripts::Output out;
      for (const scripts::Call& call : begin.take()) {
        out.resize(call.outputs);
        ASSERT_TRUE(call.run(*origin, &out).ok());
      }
      constexpr int kThreads = 4;
      // Each thread's work and its results, first run alone.
      std::vector<std::vector<scripts::Call>> scripts;
      std::vector<Bytes> want;
      for (int i = 0; i < kThreads; ++i) {
        scripts::Writer w(c, 1);
        w.append(prompt);
        static_cast<void>(w.take());
        for (int n = 0; n < 20; ++n) {
          w.append(1 + (n + i) % 3);
          w.attend(1);
          if (n % 5 == i) w.crop(w.length() - 1);
          if (n % 7 == i) w.fork();
        }
        w.append(70);
        w.attend(9);
        scripts.push_back(w.take());
        const std::unique_ptr<Cache> alone = reloaded(*origin);
        for (const scripts::Call& call : scripts.back()) {
          out.resize(call.outputs);
          const Status status = call.run(*alone, &out);
          ASSERT_TRUE(status.ok()) << call.name << ": " << status.message();
        }
        want.push_back(save(*alone));
      }
      std::vector<std::unique_ptr<Cache>> clones;
      for (int i = 0; i < kThreads; ++i) clones.push_back(sessions::fork_of(*origin));
      std::vector<std::thread> threads;
      for (int i = 0; i < kThreads; ++i)
        threads.emplace_back([&, i] {
          scripts::Output own;
          for (const scripts::Call& call : scripts[static_cast<std::size_t>(i)]) {
            own.resize(call.outputs);
            ASSERT_TRUE(call.run(*clones[static_cast<std::size_t>(i)], &own).ok());
          }
        });
      for (std::thread& thread : threads) thread.join();
      for (int i = 0; i < kThreads; ++i)
        ASSERT_EQ(save(*clones[static_cast<std::size_t>(i)]), want[static_cast<std::size_t>(i)]) << i;
    }
  }
}

}  // namespace
}  // namespace kv4
