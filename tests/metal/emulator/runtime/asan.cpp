// Adds AddressSanitizer's reports to the findings instead of ending the process (halt_on_error=0).
#include <sanitizer/asan_interface.h>

#include <cstring>
#include <string>

#include "runtime.h"

namespace {
void on_report(const char* text) {
  // "ERROR: AddressSanitizer: stack-buffer-overflow on address ..." and the first frame that has a source line
  const char* what = std::strstr(text, "AddressSanitizer: ");
  std::string kind = what ? what + 18 : text;
  kind = kind.substr(0, kind.find_first_of(" \n"));
  const char* operation = std::strstr(text, "\nWRITE of") ? "write" : "read";
  emu::report("address", "%s, %s", kind.c_str(), operation);
}
[[maybe_unused]] const bool installed = (__asan_set_error_report_callback(on_report), true);
}  // namespace
