// How torch holds a node of its autograd graph: by a pointer of its own from 2.13 on.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <memory>

namespace vk {

#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
template <class Node>
std::shared_ptr<Node> new_node() {
  return std::shared_ptr<Node>(new Node(), torch::autograd::deleteNode);
}
#else
template <class Node>
c10::intrusive_ptr<Node> new_node() {
  return c10::make_intrusive<Node>();
}
#endif

}  // namespace vk
