// Typed calls of the operators through the dispatcher, one place for their C++ signatures.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "plan.h"

namespace vk {

// Every operator: X(name, result, (declaration), (call)).
#define VK_OPERATORS(X)                                                                                \
  X(reparameterize, Tensor, (VK_TARGET_ARGS, const Tensor& rng, OptSymInt num_samples, VK_PARAM_ARGS), \
    (VK_TARGET_PASS, rng, num_samples, VK_PARAM_PASS))                                                 \
  X(reparameterize_draw, Tensors2,                                                                     \
    (VK_TARGET_ARGS, const OptGenerator& generator, OptSymInt num_samples, VK_PARAM_ARGS),             \
    (VK_TARGET_PASS, generator, num_samples, VK_PARAM_PASS))                                           \
  X(reparameterize_packed, Tensor,                                                                     \
    (VK_PACKED_ARGS, const Tensor& rng, OptSymInt num_samples, VK_PARAM_ARGS),                         \
    (VK_PACKED_PASS, rng, num_samples, VK_PARAM_PASS))                                                 \
  X(reparameterize_packed_draw, Tensors2,                                                              \
    (VK_PACKED_ARGS, const OptGenerator& generator, OptSymInt num_samples, VK_PARAM_ARGS),             \
    (VK_PACKED_PASS, generator, num_samples, VK_PARAM_PASS))                                           \
  X(gaussian_kl, Tensors4, (VK_TARGET_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS),                                \
    (VK_TARGET_PASS, VK_PRIOR_PASS, VK_KL_PASS))                                                       \
  X(gaussian_kl_packed, Tensors4, (VK_PACKED_ARGS, VK_PRIOR_ARGS, VK_KL_ARGS),                         \
    (VK_PACKED_PASS, VK_PRIOR_PASS, VK_KL_PASS))                                                       \
  X(sample_kl, Tensors5,                                                                               \
    (VK_TARGET_ARGS, const Tensor& rng, VK_PRIOR_ARGS, OptSymInt num_samples, VK_KL_ARGS),             \
    (VK_TARGET_PASS, rng, VK_PRIOR_PASS, num_samples, VK_KL_PASS))                                     \
  X(sample_kl_draw, Tensors6,                                                                          \
    (VK_TARGET_ARGS, VK_PRIOR_ARGS, const OptGenerator& generator, OptSymInt num_samples, VK_KL_ARGS), \
    (VK_TARGET_PASS, VK_PRIOR_PASS, generator, num_samples, VK_KL_PASS))                               \
  X(sample_kl_packed, Tensors5,                                                                        \
    (VK_PACKED_ARGS, const Tensor& rng, VK_PRIOR_ARGS, OptSymInt num_samples, VK_KL_ARGS),             \
    (VK_PACKED_PASS, rng, VK_PRIOR_PASS, num_samples, VK_KL_PASS))                                     \
  X(sample_kl_packed_draw, Tensors6,                                                                   \
    (VK_PACKED_ARGS, VK_PRIOR_ARGS, const OptGenerator& generator, OptSymInt num_samples, VK_KL_ARGS), \
    (VK_PACKED_PASS, VK_PRIOR_PASS, generator, num_samples, VK_KL_PASS))                               \
  X(latent_backward, Tensors4, (VK_GRAD_ARGS, VK_TARGET_ARGS, VK_SAVED_ARGS),                          \
    (VK_GRAD_PASS, VK_TARGET_PASS, VK_SAVED_PASS))                                                     \
  X(latent_backward_packed, Tensors3, (VK_GRAD_ARGS, VK_PACKED_ARGS, VK_SAVED_ARGS),                   \
    (VK_GRAD_PASS, VK_PACKED_PASS, VK_SAVED_PASS))                                                     \
  X(latent_backward_reference, Tensors4, (VK_GRAD_ARGS, VK_TARGET_ARGS, VK_SAVED_ARGS),                \
    (VK_GRAD_PASS, VK_TARGET_PASS, VK_SAVED_PASS))                                                     \
  X(latent_backward_packed_reference, Tensors3, (VK_GRAD_ARGS, VK_PACKED_ARGS, VK_SAVED_ARGS),         \
    (VK_GRAD_PASS, VK_PACKED_PASS, VK_SAVED_PASS))                                                     \
  X(_rng_state, Tensor, (const Tensor& like, const OptGenerator& generator), (like, generator))        \
  X(_philox_words, Tensor, (const Tensor& rng, int64_t n, int64_t first_quad), (rng, n, first_quad))

#define VK_CALL(name, result, declaration, pass)                            \
  inline result name declaration {                                          \
    static const auto op = c10::Dispatcher::singleton()                     \
                               .findSchemaOrThrow("vaekernels::" #name, "") \
                               .typed<result declaration>();                \
    return op.call pass;                                                    \
  }
namespace call {
VK_OPERATORS(VK_CALL)
}  // namespace call
#undef VK_CALL

}  // namespace vk
