// CHECK(condition) and CHECK_EQUAL(got, expected) for the test programs; failures() is their exit status.
#pragma once

#include <cstdio>
#include <iostream>
#include <string>
#include <vector>

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(...)                                                           \
  do {                                                                       \
    if (!(__VA_ARGS__)) {                                                    \
      ++failures();                                                          \
      std::cout << __FILE__ << ":" << __LINE__ << ": " #__VA_ARGS__ << "\n"; \
    }                                                                        \
  } while (false)

template <class T, class U>
void check_equal(const T& got, const U& expected, const std::string& what, const char* file, int line) {
  if (got == expected) return;
  if (++failures() < 50) {
    std::cout << file << ":" << line << ": " << what << ": expected " << expected << ", got " << got << "\n";
  }
}
#define CHECK_EQUAL(got, expected, what) check_equal(got, expected, what, __FILE__, __LINE__)
