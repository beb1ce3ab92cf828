// One string per native op, and the compile-time check of every C++ signature against it.
//
// The stable ABI passes arguments as untyped words: a schema `int` over a C++ `double` computes garbage without an error.
// SEGOPS_IMPL therefore refuses to compile a function whose parameters are not what its schema says.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

namespace segops::schemas {

// Native ops write into tensors that Python has allocated, so that layouts are decided in one place.
// border: 0 zero, 1 mask, 2 shift. lse is float32, or float64 beside float64 tensors.
inline constexpr std::string_view local_attention =
    "(Tensor(a!) out, Tensor(b!) lse, Tensor query, Tensor key, Tensor value, "
    "int[] kernel_size, int[] dilation, int num_heads, float scale, int border) -> ()";
inline constexpr std::string_view local_attention_backward =
    "(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor grad_out, Tensor? grad_lse, "
    "Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    "int[] kernel_size, int[] dilation, int num_heads, float scale, int border) -> ()";
// combine: 0 compose, 1 sum, 2 joint; axes: 0 height, 1 width, 2 height first, 3 width first. first may be [0]; lse
// [N, heads, softmaxes, H, W] is float32, or float64 beside float64 tensors.
inline constexpr std::string_view axial_attention =
    "(Tensor(a!) out, Tensor(b!) first, Tensor(c!) lse, Tensor query, Tensor key, Tensor value, int num_heads, "
    "float scale, int combine, int axes) -> ()";
inline constexpr std::string_view axial_attention_backward =
    "(Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value, Tensor grad_out, Tensor query, Tensor key, "
    "Tensor value, Tensor out, Tensor first, Tensor lse, int num_heads, float scale, int combine, int axes) -> ()";
// Native ops that read labels return -1, or the flat index in the label map of the first label outside [0, classes) that is
// not ignore_index. Weights are [r * r * classes, channels]; loss, count, lse, class_weight, temperature and confidence are
// float32, or float64 beside float64 tensors.
inline constexpr std::string_view dupsample =
    "(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, Tensor? temperature, int scale_factor) -> ()";
inline constexpr std::string_view dupsample_backward =
    "(Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias, Tensor(d!) grad_temperature, Tensor grad_out, "
    "Tensor x, Tensor weight, Tensor? bias, Tensor? temperature, int scale_factor) -> ()";
// The part of dupsample that is no matrix product: columns [N, r * r * classes, h * w] to out [N, classes, H, W], and back.
inline constexpr std::string_view dupsample_rearrange =
    "(Tensor(a!) out, Tensor columns, Tensor? bias, Tensor? temperature, int scale_factor) -> ()";
inline constexpr std::string_view dupsample_rearrange_backward =
    "(Tensor(a!) grad_columns, Tensor grad_out, Tensor? temperature, int scale_factor) -> ()";
inline constexpr std::string_view dupsample_cross_entropy =
    "(Tensor(a!) loss, Tensor(b!) count, Tensor(c!) lse, Tensor x, Tensor weight, Tensor target, Tensor? bias, "
    "Tensor? temperature, Tensor? class_weight, int scale_factor, int ignore_index, float label_smoothing) -> int";
inline constexpr std::string_view dupsample_cross_entropy_backward =
    "(Tensor(a!) grad_x, Tensor(b!) grad_weight, Tensor(c!) grad_bias, Tensor(d!) grad_temperature, Tensor grad_loss, "
    "Tensor x, Tensor weight, Tensor target, Tensor? bias, Tensor? temperature, Tensor? class_weight, Tensor lse, "
    "int scale_factor, int ignore_index, float label_smoothing) -> ()";
inline constexpr std::string_view dupsample_argmax =
    "(Tensor(a!) labels, Tensor(b!) confidence, Tensor x, Tensor weight, Tensor? bias, Tensor? temperature, "
    "int scale_factor) -> ()";
inline constexpr std::string_view upsample_cross_entropy =
    "(Tensor(a!) loss, Tensor(b!) count, Tensor(c!) lse, Tensor logits, Tensor target, Tensor? class_weight, "
    "bool align_corners, int ignore_index, float label_smoothing) -> int";
inline constexpr std::string_view upsample_cross_entropy_backward =
    "(Tensor(a!) grad_logits, Tensor grad_loss, Tensor logits, Tensor target, Tensor? class_weight, Tensor lse, "
    "bool align_corners, int ignore_index, float label_smoothing) -> ()";
inline constexpr std::string_view upsample_argmax =
    "(Tensor(a!) labels, Tensor(b!) confidence, Tensor[] logits, bool align_corners) -> ()";
inline constexpr std::string_view confusion_matrix =
    "(Tensor(a!) counts, Tensor prediction, Tensor target, int ignore_index) -> int";
// bases, coefficients and history are float32, or float64 beside float64 tensors; the last two may be [0].
inline constexpr std::string_view nmf2d =
    "(Tensor(a!) out, Tensor(b!) coefficients, Tensor(c!) history, Tensor x, Tensor bases, int steps, bool one_step, "
    "float eps) -> ()";
inline constexpr std::string_view nmf2d_backward =
    "(Tensor(a!) grad_x, Tensor(b!) grad_bases, Tensor grad_out, Tensor x, Tensor bases, Tensor coefficients, "
    "Tensor history, bool one_step, float eps) -> ()";
// taps [C, kh kw + 2 sum(k)], biases [C, 1 + 2 pairs]; grad_x also gets the product of scaled and scale.
inline constexpr std::string_view multi_scale_strip_conv =
    "(Tensor(a!) out, Tensor x, Tensor taps, Tensor biases, int[] kernel_size, int[] strip_lengths) -> ()";
inline constexpr std::string_view multi_scale_strip_conv_backward =
    "(Tensor(a!) grad_x, Tensor(b!) grad_taps, Tensor(c!) grad_biases, Tensor grad_out, Tensor x, Tensor taps, "
    "Tensor biases, Tensor? scaled, Tensor? scale, int[] kernel_size, int[] strip_lengths) -> ()";
// sums and grad_sums [classes, C] or [N, classes, C], contiguous, float32, or float64 beside float64 tensors; counts int64.
inline constexpr std::string_view class_centers =
    "(Tensor(a!) sums, Tensor(b!) counts, Tensor features, Tensor labels, int ignore_index) -> int";
inline constexpr std::string_view class_centers_backward =
    "(Tensor(a!) grad_features, Tensor grad_sums, Tensor labels, int ignore_index) -> ()";
// centers like sums; lse and inner [N, h, w], contiguous, and every gradient but that of features in their dtype.
inline constexpr std::string_view car_losses =
    "(Tensor(a!) intra, Tensor(b!) c2p, Tensor(c!) lse, Tensor(d!) inner, Tensor features, Tensor labels, "
    "Tensor centers, int ignore_index, float c2p_threshold, bool mask_ignored_c2p) -> int";
inline constexpr std::string_view car_losses_backward =
    "(Tensor(a!) grad_features, Tensor grad_intra, Tensor grad_c2p, Tensor? grad_sums, Tensor features, Tensor labels, "
    "Tensor centers, Tensor lse, Tensor inner, int ignore_index, float c2p_threshold) -> ()";
// Caps the instruction set of the CPU kernels (0 base, 1 avx2, 2 avx512) and returns the one in force.
inline constexpr std::string_view cpu_isa = "(int cap) -> int";

// ---- the check ----

template <typename T>
inline constexpr std::string_view type_name = "unsupported";
template <> inline constexpr std::string_view type_name<torch::stable::Tensor> = "Tensor";
template <> inline constexpr std::string_view type_name<std::optional<torch::stable::Tensor>> = "Tensor?";
template <> inline constexpr std::string_view type_name<int64_t> = "int";
template <> inline constexpr std::string_view type_name<double> = "float";
template <> inline constexpr std::string_view type_name<bool> = "bool";
template <> inline constexpr std::string_view type_name<std::vector<int64_t>> = "int[]";
template <> inline constexpr std::string_view type_name<std::vector<torch::stable::Tensor>> = "Tensor[]";
template <> inline constexpr std::string_view type_name<void> = "()";

// Does `text` (one parameter, "Tensor(a!) out") have the type `type` ("Tensor")?
constexpr bool parameter_is(std::string_view text, std::string_view type) {
  while (!text.empty() && text.front() == ' ') text.remove_prefix(1);
  if (text.substr(0, type.size()) != type) return false;
  text.remove_prefix(type.size());
  if (!text.empty() && text.front() == '(') text.remove_prefix(text.find(')') + 1);  // alias annotation
  return !text.empty() && text.front() == ' ';
}

template <typename Return, typename... Parameters>
constexpr bool matches(std::string_view schema, Return (*)(Parameters...)) {
  const auto arrow = schema.rfind("->");
  const auto close = schema.rfind(')', arrow);
  if (schema.substr(arrow + 3) != type_name<Return>) return false;
  std::string_view rest = schema.substr(1, close - 1);
  bool good = true;
  const auto next = [&](std::string_view type) {
    if (rest.empty()) return false;
    std::size_t comma = 0;
    for (int depth = 0; comma < rest.size() && !(rest[comma] == ',' && depth == 0); ++comma)
      depth += rest[comma] == '(' ? 1 : rest[comma] == ')' ? -1 : 0;
    const auto parameter = rest.substr(0, comma);
    rest = comma < rest.size() ? rest.substr(comma + 1) : std::string_view{};
    return parameter_is(parameter, type);
  };
  ((good = good && next(type_name<std::remove_cv_t<std::remove_reference_t<Parameters>>>)), ...);
  return good && rest.empty();
}

}  // namespace segops::schemas

// Emulation of the CUDA kernels on a CPU registers the same functions under another namespace and key.
#ifndef SEGOPS_NAMESPACE
#define SEGOPS_NAMESPACE segops_C
#endif
#ifndef SEGOPS_CUDA_KEY
#define SEGOPS_CUDA_KEY CUDA
#endif

// Inside STABLE_TORCH_LIBRARY_FRAGMENT: m.def of the op's schema.
#define SEGOPS_DEF(m, op) (m).def((std::string(#op) + std::string(segops::schemas::op)).c_str())

// Inside STABLE_TORCH_LIBRARY_IMPL: m.impl of `function`, whose signature is checked against the op's schema.
#define SEGOPS_IMPL(m, op, function)                                              \
  static_assert(segops::schemas::matches(segops::schemas::op, &(function)),       \
                "the signature of " #function " differs from schemas::" #op);     \
  (m).impl(#op, TORCH_BOX(&(function)))
