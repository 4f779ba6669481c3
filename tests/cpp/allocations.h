// Counts every operator new of the test program and can make one fail (test_allocation.cpp).
#pragma once

namespace kv4::allocations {

long count();
// Makes this thread's n-th allocation from now on fail (1: the next), and only that one. 0: none.
void fail_at(long n);
// Whether an allocation failed; disarms.
bool failed();

}  // namespace kv4::allocations
