// Findings, each kept once.
#include <cstdarg>
#include <cstdio>
#include <map>
#include <set>
#include <string>

#include "runtime.h"

namespace emu {
namespace {
constexpr size_t kMost = 8;           // of one kind
constexpr uint64_t kTooMany = 10000;  // a launch with more ends: nothing new is to be learnt
std::map<std::string, std::set<std::string>> seen;
std::string text;
uint64_t count;
}  // namespace

void report(const char* kind, const char* format, ...) {
  ++count;
  std::set<std::string>& lines = seen[kind];
  if (lines.size() < kMost) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (lines.insert(line).second) text += std::string(kind) + ": " + line + "\n";
  }
  if (count > kTooMany && running()) stop_launch();
}
}  // namespace emu

const char* emu_reports(void) { return emu::text.c_str(); }
uint64_t emu_report_count(void) { return emu::count; }
void emu_clear(void) {
  emu::seen.clear();
  emu::text.clear();
  emu::count = 0;
}
