// Numbers as Python writes them, so that kernels and reference say the same.
#pragma once

#include <charconv>
#include <string>

namespace vk {

inline std::string repr(double x) {
  char digits[32];
  std::string text(digits, std::to_chars(digits, digits + sizeof(digits), x).ptr);
  return text.find_first_not_of("-0123456789") == std::string::npos ? text + ".0" : text;
}

}  // namespace vk
