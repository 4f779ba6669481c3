// Kernels compiled with -fsanitize=undefined call these handlers. The sanitizer's own library is not linked, so that
// its reports become findings like all others.
#include "runtime.h"

namespace {
struct Location {
  const char* file;
  uint32_t line, column;
};
void on_undefined(const char* what, const void* data) {
  if (!emu::running()) return;
  const auto* at = static_cast<const Location*>(data);
  const char* base = at->file ? __builtin_strrchr(at->file, '/') : nullptr;
  emu::report("undefined", "%s (%s:%u)", what, base ? base + 1 : at->file ? at->file : "?", at->line);
}
}  // namespace

// Every handler's data begins with the location, whatever follows.
#define EMU_HANDLER(name, what) \
  extern "C" void __ubsan_handle_##name(void* data, uintptr_t, uintptr_t) { on_undefined(what, data); }

EMU_HANDLER(add_overflow, "signed addition overflows")
EMU_HANDLER(sub_overflow, "signed subtraction overflows")
EMU_HANDLER(mul_overflow, "signed multiplication overflows")
EMU_HANDLER(negate_overflow, "negation overflows")
EMU_HANDLER(divrem_overflow, "division by zero or overflow")
EMU_HANDLER(shift_out_of_bounds, "shift by a negative amount or by the width or more")
EMU_HANDLER(out_of_bounds, "index outside the array")
EMU_HANDLER(type_mismatch_v1, "null or misaligned pointer")
EMU_HANDLER(float_cast_overflow, "floating-point value outside the range of the integer type")
EMU_HANDLER(load_invalid_value, "invalid value of a bool or enum")
EMU_HANDLER(pointer_overflow, "pointer arithmetic overflows")
EMU_HANDLER(invalid_builtin, "invalid argument of a builtin")
EMU_HANDLER(vla_bound_not_positive, "array length is not positive")
EMU_HANDLER(nonnull_arg, "null argument")
EMU_HANDLER(builtin_unreachable, "reached what is marked unreachable")
EMU_HANDLER(missing_return, "no return value")
EMU_HANDLER(alignment_assumption, "alignment assumption is wrong")
