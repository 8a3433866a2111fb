// A CUDA runtime and driver with two GPUs that compute nothing. It is loaded before the real ones
// (LD_PRELOAD), so that an unchanged torch and the host code of vaekernels can be tested on a machine without
// a GPU.
//
// Device memory is host memory. Launches of kernels are recorded and do nothing; copies are made at once.
// Streams, events and graphs keep what the rules of CUDA need: their device, and what is being captured. What
// a program may not do is an error here as there. Functions that are missing here are those of the real
// library, which says that it finds no driver.
//
// Signatures are those of CUDA 13. null_cuda.py reads the records.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kDevices = 2;
constexpr size_t kMemory = size_t{8} << 30;  // of a device; what is never touched takes none of the host's
constexpr int kMultiprocessors = 132, kMajor = 9, kMinor = 0;
// Of a block, and of one whose kernel asks for more by an attribute.
constexpr size_t kSharedMemory = 48 << 10, kMostSharedMemory = 227 << 10;

// What a stream is given to do, or the host waits for.
struct Operation {
  const char* kind = "kernel";  // "kernel", "copy", "set"; "wait": the host waits
  const char* name = "";        // of a kernel: mangled
  dim3 grid{0, 0, 0}, block{0, 0, 0};
  size_t shared = 0;
  int device = 0;
  void* stream = nullptr;
  unsigned long long capture = 0;  // 0: not while capturing
  unsigned long long graph = 0;    // 0: not by the launch of a graph
  std::function<void()> work;
};

struct Graph {
  unsigned long long id;
  std::vector<Operation> nodes;
};

struct Stream;
struct Capture {
  unsigned long long id;
  Graph* graph;
  Stream* origin;
  cudaStreamCaptureMode mode;
  bool invalid = false;
};

struct Stream {
  int device;
  int priority = 0;
  std::shared_ptr<Capture> capture;
};

struct Event {
  int device;
  bool recorded = false;
  std::shared_ptr<Capture> capture;  // in which it was recorded last
};

struct Block {
  size_t bytes;
  int device;
  bool host;
};

// Never destroyed: torch makes calls while the process ends.
struct State {
  std::recursive_mutex mutex;
  std::vector<Operation> records;
  std::unordered_map<const void*, const char*> kernels;  // mangled names by the address of the host's stub
  std::unordered_map<const void*, size_t> shared;        // bytes of a block that a kernel's attribute allows
  std::unordered_map<const void*, size_t> variables;  // bytes of __device__ variables, by the host's address
  std::map<std::pair<const void*, int>, void*> variable_memory;
  std::map<uintptr_t, Block> blocks;
  size_t allocated[kDevices] = {};
  std::set<Stream*> streams;
  Stream legacy[kDevices];
  unsigned long long next = 1;  // number of a graph or a capture
};

State& state() {
  static State* made = [] {
    auto* s = new State();
    for (int i = 0; i < kDevices; ++i) s->legacy[i].device = i;
    return s;
  }();
  return *made;
}

using Lock = std::lock_guard<std::recursive_mutex>;
thread_local int device = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local std::set<unsigned long long> begun;  // captures of this thread

cudaError_t fail(cudaError_t error) { return last = error; }

// Null where there is no such stream any more.
Stream* find(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return &state().legacy[device];
  auto* stream = reinterpret_cast<Stream*>(handle);
  return state().streams.count(stream) != 0 ? stream : nullptr;
}

std::vector<Stream*> all_streams() { return {state().streams.begin(), state().streams.end()}; }

// A call that no capture can hold: it is refused and what was captured is lost.
cudaError_t refuse(Capture& capture, cudaError_t error = cudaErrorStreamCaptureUnsupported) {
  capture.invalid = true;
  return fail(error);
}

// Calls that are unsafe while something captures, such as allocations.
cudaError_t check_unsafe() {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Stream* s : all_streams()) {
    if (!s->capture || s->capture->mode == cudaStreamCaptureModeRelaxed) continue;
    const bool others =
        thread_mode == cudaStreamCaptureModeGlobal && s->capture->mode == cudaStreamCaptureModeGlobal;
    if (others || begun.count(s->capture->id) != 0) return refuse(*s->capture);
  }
  return cudaSuccess;
}

cudaError_t enqueue(cudaStream_t handle, Operation operation) {
  Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  operation.stream = handle;
  if (operation.kind != std::string("kernel")) operation.device = stream->device;
  if (stream->capture) {
    if (stream->capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    operation.capture = stream->capture->id;
    stream->capture->graph->nodes.push_back(operation);
  } else if (operation.work) {
    operation.work();
  }
  state().records.push_back(std::move(operation));
  return cudaSuccess;
}

cudaError_t wait(const char* function, void* stream) {
  Operation operation;
  operation.kind = "wait";
  operation.name = function;
  operation.device = device;
  operation.stream = stream;
  state().records.push_back(operation);
  return cudaSuccess;
}

size_t shared_limit(const void* stub) {
  const auto asked = state().shared.find(stub);
  return asked != state().shared.end() ? asked->second : kSharedMemory;
}

cudaError_t launch(const void* stub, dim3 grid, dim3 block, size_t shared, cudaStream_t handle) {
  const Lock lock(state().mutex);
  const auto kernel = state().kernels.find(stub);
  if (kernel == state().kernels.end()) return fail(cudaErrorInvalidDeviceFunction);
  const Stream* stream = find(handle);
  if (stream == nullptr || stream->device != device) return fail(cudaErrorInvalidResourceHandle);
  const auto threads = static_cast<unsigned long long>(block.x) * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024 || block.z > 64 || shared > shared_limit(stub))
    return fail(cudaErrorInvalidConfiguration);
  Operation operation;
  operation.name = kernel->second;
  operation.grid = grid;
  operation.block = block;
  operation.shared = shared;
  operation.device = device;
  return enqueue(handle, std::move(operation));
}

// ---- memory

// Pages of their own: zero, and no longer there once given back.
void* take(size_t bytes, bool host) {
  void* memory = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  state().blocks[reinterpret_cast<uintptr_t>(memory)] = {bytes, device, host};
  return memory;
}

const Block* block_of(const void* memory) {
  auto it = state().blocks.upper_bound(reinterpret_cast<uintptr_t>(memory));
  if (it == state().blocks.begin()) return nullptr;
  --it;
  return reinterpret_cast<uintptr_t>(memory) < it->first + it->second.bytes ? &it->second : nullptr;
}

cudaError_t give(void* memory) {
  if (memory == nullptr) return cudaSuccess;
  const auto it = state().blocks.find(reinterpret_cast<uintptr_t>(memory));
  if (it == state().blocks.end()) return fail(cudaErrorInvalidValue);
  if (!it->second.host) state().allocated[it->second.device] -= it->second.bytes;
  munmap(memory, std::max<size_t>(it->second.bytes, 1));
  state().blocks.erase(it);
  return cudaSuccess;
}

std::string plain(const char* mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? text : mangled;
  free(text);
  return name;
}

std::string triple(dim3 d) {
  return '[' + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ']';
}

}  // namespace

// ---- for the tests

API void null_cuda_clear() {
  const Lock lock(state().mutex);
  state().records.clear();
}

// What was done since null_cuda_clear, as JSON; valid until the next call of the same thread.
API const char* null_cuda_records() {
  static thread_local std::string text;
  const Lock lock(state().mutex);
  text = "[";
  for (const Operation& o : state().records) {
    if (text.size() > 1) text += ",\n";
    text += R"({"kind": ")" + std::string(o.kind) + R"(", "name": ")" + plain(o.name) + R"(", "grid": )" +
            triple(o.grid) + R"(, "block": )" + triple(o.block) + R"(, "shared": )" +
            std::to_string(o.shared) + R"(, "device": )" + std::to_string(o.device) + R"(, "stream": )" +
            std::to_string(reinterpret_cast<uintptr_t>(o.stream)) + R"(, "capture": )" +
            std::to_string(o.capture) + R"(, "graph": )" + std::to_string(o.graph) + '}';
  }
  text += ']';
  return text.c_str();
}

// ---- devices

API cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

API cudaError_t cudaGetDevice(int* out) {
  *out = device;
  return cudaSuccess;
}

API cudaError_t cudaSetDevice(int index) {
  if (index < 0 || index >= kDevices) return fail(cudaErrorInvalidDevice);
  device = index;
  return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int index) {
  if (index < 0 || index >= kDevices) return fail(cudaErrorInvalidDevice);
  *p = {};
  snprintf(p->name, sizeof(p->name), "null device");
  p->uuid.bytes[0] = static_cast<char>(index + 1);
  p->major = kMajor;
  p->minor = kMinor;
  p->multiProcessorCount = kMultiprocessors;
  p->totalGlobalMem = kMemory;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7FFFFFFF;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = kSharedMemory;
  p->sharedMemPerBlockOptin = kMostSharedMemory;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->l2CacheSize = 50 << 20;
  p->pciBusID = index + 1;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = kMajor;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kMinor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kSharedMemory;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kMostSharedMemory;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    default:
      *value = 0;
  }
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int index) {
  snprintf(text, static_cast<size_t>(size), "0000:%02d:00.0", index + 1);
  return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize() {
  const Lock lock(state().mutex);
  for (Stream* s : all_streams())
    if (s->capture && s->device == device) return refuse(*s->capture);
  return wait("cudaDeviceSynchronize", nullptr);
}

API cudaError_t cudaGetLastError() { return std::exchange(last, cudaSuccess); }
API cudaError_t cudaPeekAtLastError() { return last; }

// ---- streams

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned, int priority) {
  const Lock lock(state().mutex);
  auto* stream = new Stream{device, priority, nullptr};
  state().streams.insert(stream);
  *out = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned flags) {
  return cudaStreamCreateWithPriority(out, flags, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t* out) { return cudaStreamCreateWithPriority(out, 0, 0); }

API cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(state().mutex);
  Stream* stream = find(handle);
  if (stream == nullptr || stream == &state().legacy[device]) return fail(cudaErrorInvalidResourceHandle);
  if (stream->capture) stream->capture->invalid = true;
  state().streams.erase(stream);  // its memory stays, so that no later stream has this handle
  return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  const Lock lock(state().mutex);
  const Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  *priority = stream->priority;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* out) {
  const Lock lock(state().mutex);
  const Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  *out = stream->device;
  return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Lock lock(state().mutex);
  Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  return stream->capture ? refuse(*stream->capture) : cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const Lock lock(state().mutex);
  Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  return stream->capture ? refuse(*stream->capture) : wait("cudaStreamSynchronize", handle);
}

// Everything runs at once, so only a capture has to learn of it.
API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  const Lock lock(state().mutex);
  Stream* stream = find(handle);
  const auto* event = reinterpret_cast<Event*>(event_handle);
  if (stream == nullptr || event == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (event->capture && event->capture->graph != nullptr) {
    if (stream == &state().legacy[device]) return refuse(*event->capture, cudaErrorStreamCaptureImplicit);
    if (stream->capture && stream->capture != event->capture)
      return refuse(*stream->capture, cudaErrorStreamCaptureMerge);
    stream->capture = event->capture;
    return cudaSuccess;
  }
  if (stream->capture && event->recorded) return refuse(*stream->capture, cudaErrorStreamCaptureIsolation);
  return cudaSuccess;
}

// ---- capture and graphs

namespace {

cudaStreamCaptureStatus status_of(const Stream& stream) {
  if (!stream.capture) return cudaStreamCaptureStatusNone;
  return stream.capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
}

Graph* new_graph() { return new Graph{state().next++, {}}; }

}  // namespace

API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock(state().mutex);
  const Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  *status = status_of(*stream);
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* graph,
                                         const cudaGraphNode_t** dependencies,
                                         const cudaGraphEdgeData** edges, size_t* count) {
  const Lock lock(state().mutex);
  const Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  const Capture* capture = stream->capture.get();
  *status = status_of(*stream);
  if (id != nullptr) *id = capture != nullptr ? capture->id : 0;
  if (graph != nullptr) *graph = capture != nullptr ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t handle, cudaGraph_t graph, const cudaGraphNode_t*,
                                              const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode mode) {
  const Lock lock(state().mutex);
  Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  if (stream == &state().legacy[device]) return fail(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fail(cudaErrorIllegalState);
  stream->capture = std::make_shared<Capture>(
      Capture{state().next++, reinterpret_cast<Graph*>(graph), stream, mode, false});
  begun.insert(stream->capture->id);
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Lock lock(state().mutex);
  return cudaStreamBeginCaptureToGraph(handle, reinterpret_cast<cudaGraph_t>(new_graph()), nullptr, nullptr,
                                       0, mode);
}

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Lock lock(state().mutex);
  Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  const std::shared_ptr<Capture> capture = stream->capture;
  if (!capture) return fail(cudaErrorIllegalState);
  if (capture->origin != stream) return refuse(*capture, cudaErrorStreamCaptureUnmatched);
  for (Stream* s : all_streams())
    if (s->capture == capture) s->capture = nullptr;
  begun.erase(capture->id);
  *graph = capture->invalid ? nullptr : reinterpret_cast<cudaGraph_t>(capture->graph);
  capture->graph = nullptr;  // events that were recorded in it are no longer of a capture
  return capture->invalid ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

API cudaError_t cudaGraphCreate(cudaGraph_t* graph, unsigned) {
  const Lock lock(state().mutex);
  *graph = reinterpret_cast<cudaGraph_t>(new_graph());
  return cudaSuccess;
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t* out, size_t* count) {
  auto* graph = reinterpret_cast<Graph*>(handle);
  if (out != nullptr)
    for (size_t i = 0; i < std::min(*count, graph->nodes.size()); ++i)
      out[i] = reinterpret_cast<cudaGraphNode_t>(&graph->nodes[i]);
  *count = graph->nodes.size();
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  *out = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(out, graph, flags);
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t handle, cudaStream_t stream) {
  const Lock lock(state().mutex);
  const auto* graph = reinterpret_cast<Graph*>(handle);
  for (Operation operation : graph->nodes) {
    operation.capture = 0;
    operation.graph = graph->id;
    if (const cudaError_t error = enqueue(stream, std::move(operation))) return error;
  }
  return cudaSuccess;
}

API cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

// What a graph keeps alive is kept for ever.
API cudaError_t cudaUserObjectCreate(cudaUserObject_t* out, void*, cudaHostFn_t, unsigned, unsigned) {
  *out = nullptr;
  return cudaSuccess;
}
API cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
API cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) {
  return cudaSuccess;
}

// ---- events

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* out, unsigned) {
  *out = reinterpret_cast<cudaEvent_t>(new Event{device, false, nullptr});
  return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t* out) { return cudaEventCreateWithFlags(out, 0); }

API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  const Lock lock(state().mutex);
  auto* event = reinterpret_cast<Event*>(handle);
  const Stream* stream = find(stream_handle);
  if (stream == nullptr || stream->device != event->device) return fail(cudaErrorInvalidResourceHandle);
  event->capture = stream->capture;
  event->recorded = true;
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

API cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const Lock lock(state().mutex);
  const auto* event = reinterpret_cast<Event*>(handle);
  if (event->capture && event->capture->graph != nullptr)
    return refuse(*event->capture, cudaErrorCapturedEvent);
  return cudaSuccess;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Lock lock(state().mutex);
  const cudaError_t error = cudaEventQuery(handle);
  return error != cudaSuccess ? error : wait("cudaEventSynchronize", nullptr);
}

API cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1;
  return cudaSuccess;
}

API cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

// ---- memory

API cudaError_t cudaMalloc(void** out, size_t bytes) {
  const Lock lock(state().mutex);
  if (const cudaError_t error = check_unsafe()) return error;
  if (state().allocated[device] + bytes > kMemory || (*out = take(bytes, false)) == nullptr)
    return fail(cudaErrorMemoryAllocation);
  state().allocated[device] += bytes;
  return cudaSuccess;
}

API cudaError_t cudaFree(void* memory) {
  const Lock lock(state().mutex);
  if (const cudaError_t error = check_unsafe()) return error;
  return give(memory);
}

API cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned) {
  const Lock lock(state().mutex);
  if (const cudaError_t error = check_unsafe()) return error;
  return (*out = take(bytes, true)) == nullptr ? fail(cudaErrorMemoryAllocation) : cudaSuccess;
}

API cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }

API cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  const Lock lock(state().mutex);
  *total = kMemory;
  *unused = kMemory - state().allocated[device];
  return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* out, const void* memory) {
  const Lock lock(state().mutex);
  const Block* block = block_of(memory);
  *out = {};
  out->hostPointer = const_cast<void*>(memory);
  out->device = block != nullptr ? block->device : cudaInvalidDeviceId;
  if (block != nullptr) {
    out->type = block->host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    out->devicePointer = const_cast<void*>(memory);
  }
  return cudaSuccess;
}

namespace {

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  Operation operation;
  operation.kind = "copy";
  operation.name = "cudaMemcpyAsync";
  operation.work = [=] { memmove(to, from, bytes); };
  return enqueue(stream, std::move(operation));
}

}  // namespace

API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                cudaStream_t handle) {
  const Lock lock(state().mutex);
  Stream* stream = find(handle);
  if (stream == nullptr) return fail(cudaErrorInvalidResourceHandle);
  const bool pageable = block_of(to) == nullptr || block_of(from) == nullptr;
  if (pageable && stream->capture) return refuse(*stream->capture);
  return copy(to, from, bytes, handle);
}

API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  const Lock lock(state().mutex);
  return copy(to, from, bytes, stream);
}

API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  const Lock lock(state().mutex);
  if (const cudaError_t error = check_unsafe()) return error;
  memmove(to, from, bytes);
  return wait("cudaMemcpy", nullptr);
}

API cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(state().mutex);
  Operation operation;
  operation.kind = "set";
  operation.name = "cudaMemsetAsync";
  operation.work = [=] { memset(to, value, bytes); };
  return enqueue(stream, std::move(operation));
}

API cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const Lock lock(state().mutex);
  if (const cudaError_t error = check_unsafe()) return error;
  return cudaMemsetAsync(to, value, bytes, nullptr);
}

// Of a __device__ variable every device has one of its own.
API cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
  const Lock lock(state().mutex);
  const auto variable = state().variables.find(symbol);
  if (variable == state().variables.end()) return fail(cudaErrorInvalidSymbol);
  void*& memory = state().variable_memory[{symbol, device}];
  if (memory == nullptr) memory = take(variable->second, false);
  *out = memory;
  return cudaSuccess;
}

API cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset,
                                   cudaMemcpyKind kind) {
  void* memory = nullptr;
  if (const cudaError_t error = cudaGetSymbolAddress(&memory, symbol)) return error;
  return cudaMemcpy(static_cast<char*>(memory) + offset, from, bytes, kind);
}

// ---- kernels

API void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API char __cudaInitModule(void**) { return 1; }

API void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*,
                                dim3*, int*) {
  const Lock lock(state().mutex);
  state().kernels[stub] = name;
}

API void __cudaRegisterVar(void**, char* variable, char*, const char*, int, size_t bytes, int, int) {
  const Lock lock(state().mutex);
  state().variables[variable] = bytes;
}

namespace {

// What <<<>>> hands from the place of a launch to the stub of its kernel.
struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local Configuration configuration;

}  // namespace

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

API cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                                   cudaStream_t stream) {
  return launch(reinterpret_cast<const void*>(kernel), grid, block, shared, stream);
}

API cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void**, size_t shared,
                                 cudaStream_t stream) {
  return launch(stub, grid, block, shared, stream);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* stub, void**) {
  return launch(stub, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}

API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void*) {
  *out = {};
  out->maxThreadsPerBlock = 1024;
  out->ptxVersion = out->binaryVersion = 10 * kMajor + kMinor;
  return cudaSuccess;
}

API cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const Lock lock(state().mutex);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kMostSharedMemory) return fail(cudaErrorInvalidValue);
  state().shared[stub] = static_cast<size_t>(value);
  return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t,
                                                                       unsigned) {
  *blocks = 4;
  return cudaSuccess;
}

// ---- the driver: what torch asks it, and the modules of Triton's kernels

namespace {

CUcontext context_of(int index) { return reinterpret_cast<CUcontext>(&state().legacy[index]); }

CUresult driver(cudaError_t error) { return static_cast<CUresult>(error); }  // the numbers are the same

}  // namespace

API CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

API CUresult cuDriverGetVersion(int* version) { return driver(cudaDriverGetVersion(version)); }

API CUresult cuDeviceGetCount(int* count) { return driver(cudaGetDeviceCount(count)); }

API CUresult cuDeviceGet(CUdevice* out, int index) {
  *out = index;
  return index < 0 || index >= kDevices ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice index) {
  return driver(cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), index));
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRetain(CUcontext* out, CUdevice index) {
  *out = context_of(index);
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext* out) {
  *out = context_of(device);
  return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice* out) { return driver(cudaGetDevice(out)); }

API CUresult cuCtxSetCurrent(CUcontext context) {
  for (int i = 0; i < kDevices; ++i)
    if (context == context_of(i)) device = i;
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoad(CUmodule* out, const char*) {
  *out = reinterpret_cast<CUmodule>(&state());
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule* out, const void*) { return cuModuleLoad(out, nullptr); }

API CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

API CUresult cuModuleGetFunction(CUfunction* out, CUmodule, const char* name) {
  const Lock lock(state().mutex);
  const char* kept = strdup(name);
  state().kernels[kept] = kept;
  *out = reinterpret_cast<CUfunction>(const_cast<char*>(kept));
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  return driver(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, value));
}

API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

API CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                            unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                            CUstream stream, void**, void**) {
  return driver(
      launch(function, dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z), shared, stream));
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void**, void**) {
  return cuLaunchKernel(function, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY,
                        c->blockDimZ, c->sharedMemBytes, c->hStream, nullptr, nullptr);
}

API CUresult cuPointerGetAttribute(void* out, CUpointer_attribute attribute, CUdeviceptr memory) {
  const Lock lock(state().mutex);
  if (block_of(reinterpret_cast<void*>(memory)) == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_NOT_SUPPORTED;
  *static_cast<CUdeviceptr*>(out) = memory;
  return CUDA_SUCCESS;
}

API CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}

// Libraries that name these are loaded only where all are found. Nothing here calls them.
API CUresult null_cuda_not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }
#define NOT_SUPPORTED(name) asm(".globl " #name "\n.set " #name ", null_cuda_not_supported");
NOT_SUPPORTED(cuCtxGetLimit)
NOT_SUPPORTED(cuCtxSetLimit)
NOT_SUPPORTED(cuLaunchCooperativeKernel)
NOT_SUPPORTED(cuLinkAddData_v2)
NOT_SUPPORTED(cuLinkComplete)
NOT_SUPPORTED(cuLinkCreate_v2)
NOT_SUPPORTED(cuModuleLoadDataEx)
NOT_SUPPORTED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
NOT_SUPPORTED(cuTensorMapEncodeTiled)
