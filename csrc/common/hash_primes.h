// Hash function i of n-grams uses prime i. The primes are those of facebookresearch/blt.
#pragma once

#include <array>
#include <cstdint>

namespace blt {

inline constexpr std::array<uint64_t, 11> kPrimes = {1000000007, 5915587277, 1500450271, 3267000013,
                                                     5754853343, 4093082899, 9576890767, 3628273133,
                                                     2860486313, 5463458053, 3367900313};

}  // namespace blt
