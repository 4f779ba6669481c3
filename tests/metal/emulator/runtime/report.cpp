// Collects findings without duplicates.
#include <cstdarg>
#include <cstdio>
#include <map>
#include <set>
#include <string>

#include "runtime.h"

namespace emu {
namespace {
constexpr size_t kMaxPerKind = 8;
constexpr uint64_t kMaxFindings = 10000;  // a launch with more findings is stopped
std::map<std::string, std::set<std::string>> seen;
std::string text;
uint64_t count;
}  // namespace

void report(const char* kind, const char* format, ...) {
  ++count;
  std::set<std::string>& lines = seen[kind];
  if (lines.size() < kMaxPerKind) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (lines.insert(line).second) text += std::string(kind) + ": " + line + "\n";
  }
  if (count > kMaxFindings && running()) stop_launch();
}
}  // namespace emu

const char* emu_reports(void) { return emu::text.c_str(); }
uint64_t emu_report_count(void) { return emu::count; }
void emu_clear(void) {
  emu::seen.clear();
  emu::text.clear();
  emu::count = 0;
}
