// Every operator new of the test program is counted, and can be made to fail (test_allocation.cpp).
#pragma once

namespace kv4::allocations {

long count();
// Allocation number `n` of this thread from now on (1: the next) fails; the ones behind it do not. 0: none does.
void fail_at(long n);
// Whether one did; then none fails any more.
bool failed();

}  // namespace kv4::allocations
