// What a pass over a problem writes, and that it wrote all of that and nothing else.
#pragma once

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cases.h"

namespace shim {

[[noreturn]] inline void wrong(const std::string& what) { throw std::runtime_error(what); }

inline std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.9g", x);
  return text;
}

// What a pass writes; `fill` is what lies there before.
struct Outputs {
  std::vector<std::pair<std::string, Array>> arrays;
  std::vector<std::vector<int64_t>> written;  // of each array, the elements that have to be

  Array& add(const std::string& name, Array array, std::vector<int64_t> elements) {
    arrays.emplace_back(name, std::move(array));
    written.push_back(std::move(elements));
    return arrays.back().second;
  }
  // All of it has to be written.
  Array& add(const std::string& name, Array array) {
    std::vector<int64_t> elements(static_cast<size_t>(array.count()));
    std::iota(elements.begin(), elements.end(), 0);
    return add(name, std::move(array), std::move(elements));
  }
};

inline std::vector<uint8_t> bytes_of(const Array& a) {
  return {a.memory->data(), a.memory->data() + a.memory->size()};
}

// That nothing was written but what has to be.
inline void check_memory(const Outputs& out) {
  std::vector<std::pair<const Guarded*, std::vector<bool>>> memories;
  for (size_t i = 0; i < out.arrays.size(); ++i) {
    const auto& [name, array] = out.arrays[i];
    if (!array.memory->whole()) wrong(name + ": bytes beside it were written");
    auto found = std::find_if(memories.begin(), memories.end(),
                              [&array = array](const auto& m) { return m.first == array.memory.get(); });
    if (found == memories.end())
      found = memories.insert(found, {array.memory.get(), std::vector<bool>(array.memory->size(), false)});
    for (const int64_t e : out.written[i])
      for (int64_t j = 0; j < array.width; ++j)
        found->second[static_cast<size_t>((array.first + e) * array.width + j)] = true;
  }
  for (const auto& [memory, mine] : memories)
    for (size_t i = 0; i < mine.size(); ++i)
      if (!mine[i] && memory->data()[i] != memory->fill()) wrong("a gap between elements was written");
}

// That two runs left the same bits. They began with different ones, so that all were written.
inline void check_equal(const Outputs& a, const Outputs& b, const std::string& how) {
  for (size_t i = 0; i < a.arrays.size(); ++i) {
    const Array &x = a.arrays[i].second, &y = b.arrays[i].second;
    for (const int64_t e : a.written[i]) {
      const int64_t at = e * x.width;
      if (std::memcmp(x.data() + at, y.data() + at, static_cast<size_t>(x.width)) != 0)
        wrong(a.arrays[i].first + "[" + std::to_string(e) + "] is " + number(x.get(e)) + ", and " +
              number(y.get(e)) + " " + how + ": not written, or not the same for every schedule");
    }
  }
}

inline const Array& find(const Outputs& out, const std::string& name) {
  for (const auto& [known, array] : out.arrays)
    if (known == name) return array;
  static const Array none;
  return none;
}

}  // namespace shim
