// Declares the forward pass of block_causal_attention, for operators that contain it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace blt {

// Takes the arguments of the operator, and returns out and lse.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> block_causal_attention_fwd_cpu(
    torch::stable::Tensor q, torch::stable::Tensor k, torch::stable::Tensor v,
    const std::optional<torch::stable::Tensor>& cu_seqlens_q, const std::optional<torch::stable::Tensor>& cu_seqlens_k,
    std::optional<int64_t> window, bool causal, std::optional<double> scale,
    const std::optional<torch::stable::Tensor>& seqused_k, const std::optional<torch::stable::Tensor>& ranges,
    int64_t num_documents);

}  // namespace blt
