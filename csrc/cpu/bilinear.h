// Bilinear interpolation along one axis as torch.nn.functional.interpolate has it, the scale taken from the sizes.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#if SEGOPS_X86_ISAS
#include <immintrin.h>  // gathers
#endif

namespace segops {

// Interval q in 0 .. in lies between source pixels q - 1 and q, of which those outside repeat the border. Positions are
// exact fractions, so the weights of an interval's output pixels rise by `step` from one to the next.
struct Axis {
  int64_t in = 0, out = 0;
  double step = 0;
  std::vector<int32_t> interval, first;  // [out] of each output pixel; [in + 2] first output pixel of each interval
  std::vector<double> weight;            // [out] of source pixel q; q - 1 has the rest
  int64_t longest = 1;                   // output pixels of an interval, at most

  Axis() = default;
  Axis(int64_t in, int64_t out, bool align_corners) : in(in), out(out), interval(out), first(in + 2), weight(out) {
    const int64_t parts = align_corners ? (out > 1 ? out - 1 : 1) : 2 * out;
    step = align_corners ? double(out > 1 ? in - 1 : 0) / double(parts) : double(in) / double(out);
    for (int64_t x = 0; x < out; ++x) {
      const int64_t at = align_corners ? (out > 1 ? x * (in - 1) : 0) : (2 * x + 1) * in - out;
      interval[x] = at < 0 ? 0 : static_cast<int32_t>(at / parts + 1);
      weight[x] = at < 0 ? 0 : double(at % parts) / double(parts);
      ++first[interval[x] + 1];
    }
    for (int64_t q = 0; q <= in; ++q) {
      longest = first[q + 1] > longest ? first[q + 1] : longest;
      first[q + 1] += first[q];
    }
  }
};

// The same as plain pointers: kernel bodies use no std:: template.
struct Line {
  int64_t in, out, longest;
  double step;
  const int32_t *interval, *first;
  const double* weight;
  explicit Line(const Axis& a)
      : in(a.in), out(a.out), longest(a.longest), step(a.step), interval(a.interval.data()), first(a.first.data()),
        weight(a.weight.data()) {}
};

}  // namespace segops
