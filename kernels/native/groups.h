// Which slots of a step read their first pages together: those whose texts begin alike, as behind one system prompt.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace slipstream {

// Slots one behind another in `order`, and where each group of them begins there.
struct Groups {
  std::vector<int32_t> order;
  std::vector<Group> groups;
};

// Groups of `most` slots at most. A slot's result does not depend on who is in its group.
inline Groups groups_of(const Attention& of, int64_t most) {
  const auto pages = [&](int32_t slot) { return of.page + slot * of.pages_per_text; };
  // Pages that all of the slot's tokens see whole.
  const auto whole = [&](int32_t slot) -> int64_t {
    const int64_t length = of.length[slot];
    const bool sees_all = of.window <= 0 || length + of.tokens <= of.window;
    return sees_all ? std::clamp<int64_t>(length / of.page_rows, 0, of.pages_per_text) : 0;
  };
  const auto in_common = [&](int32_t a, int32_t b) -> int64_t {
    return std::mismatch(pages(a), pages(a) + std::min(whole(a), whole(b)), pages(b)).first - pages(a);
  };
  Groups found;
  found.order.resize(of.slots);
  std::iota(found.order.begin(), found.order.end(), 0);
  if (most > 1)
    std::sort(found.order.begin(), found.order.end(), [&](int32_t a, int32_t b) {
      return std::lexicographical_compare(pages(a), pages(a) + whole(a), pages(b), pages(b) + whole(b));
    });
  for (int64_t first = 0; first < of.slots; first += found.groups.back().count) {
    Group group{first, 1, 0};
    while (group.count < most && first + group.count < of.slots) {
      const int64_t next = in_common(found.order[first + group.count - 1], found.order[first + group.count]);
      const int64_t common = group.count == 1 ? next : std::min(next, group.pages);
      if (!common || common * group.count < group.pages * (group.count - 1)) break;  // more pages would be read
      group.pages = common, ++group.count;
    }
    found.groups.push_back(group);
  }
  return found;
}

}  // namespace slipstream
