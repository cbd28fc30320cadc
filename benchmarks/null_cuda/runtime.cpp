// CUDA's runtime (libcudart) on a machine without a GPU. The device's memory is the host's, zeros at first; copies
// are done, at once; kernels are counted, and do nothing. CUDA graphs hold a number of nodes. What is not allowed
// while one is recorded, is not: to allocate, or to wait. Whatever is not here returns success (see build.py).
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dlfcn.h>
#include <map>
#include <mutex>
#include <string>

namespace {

struct Block { size_t size; bool on_device; int device; };
struct Stream { bool capturing = false; unsigned long long capture = 0; size_t nodes = 0; };
struct Event { double milliseconds = -1; bool captured = false; };
struct Graph { size_t nodes; };
struct Call { dim3 grid, block; size_t shared; void *stream; };

std::mutex guard;
std::map<uintptr_t, Block> blocks;
std::atomic<long> counts[5];
enum Counted { LAUNCHES, WAITS, REPLAYS, RECORDED, ALLOCATIONS };
Stream default_stream;
std::atomic<int> capturing{0};
std::atomic<unsigned long long> captures{0};
thread_local int current = 0;
thread_local cudaError_t last = cudaSuccess;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local Call pending;

int devices() {
  const char *asked = getenv("NULL_CUDA_DEVICES");
  return asked ? atoi(asked) : 1;
}

Stream *of(cudaStream_t stream) {  // the first handles stand for the default stream
  return reinterpret_cast<uintptr_t>(stream) < 16 ? &default_stream : reinterpret_cast<Stream *>(stream);
}

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1e3 + time.tv_nsec * 1e-6;
}

cudaError_t refuse(cudaError_t error, const char *what) {
  fprintf(stderr, "null_cuda: %s, error %d\n", what, error);
  return last = error;
}

cudaError_t not_in_capture(const char *what) {
  bool bad = capturing > 0 && capture_mode != cudaStreamCaptureModeRelaxed;
  return bad ? refuse(cudaErrorStreamCaptureUnsupported, what) : cudaSuccess;
}

cudaError_t waits(const char *what) {
  if (auto error = not_in_capture(what)) return error;
  counts[WAITS]++;
  return cudaSuccess;
}

cudaError_t allocate(void **pointer, size_t size, bool on_device) {
  *pointer = nullptr;
  if (size == 0) return cudaSuccess;
  size = (size + 511) / 512 * 512;
  void *memory = aligned_alloc(512, size);
  if (!memory) return refuse(cudaErrorMemoryAllocation, "allocation");
  memset(memory, 0, size);
  std::lock_guard<std::mutex> held(guard);
  blocks[reinterpret_cast<uintptr_t>(memory)] = {size, on_device, current};
  counts[ALLOCATIONS]++;
  *pointer = memory;
  return cudaSuccess;
}

cudaError_t release(void *memory) {
  if (!memory) return cudaSuccess;
  std::lock_guard<std::mutex> held(guard);
  if (!blocks.erase(reinterpret_cast<uintptr_t>(memory))) return refuse(cudaErrorInvalidValue, "free");
  free(memory);
  return cudaSuccess;
}

void node(cudaStream_t stream) {
  if (of(stream)->capturing) of(stream)->nodes++;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  counts[LAUNCHES]++;
  node(stream);
  bool empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
  bool large = grid.y > 65535 || grid.z > 65535 || block.x * block.y * block.z > 1024 || shared > 232448;
  return empty || large ? refuse(cudaErrorInvalidConfiguration, "launch") : cudaSuccess;
}

}  // namespace

extern "C" {

// For the program that measures.
long null_cuda_count(int what) { return counts[what]; }

// Memory.
cudaError_t cudaMalloc(void **pointer, size_t size) {
  if (auto error = not_in_capture("cudaMalloc")) return error;
  return allocate(pointer, size, true);
}
cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t) { return allocate(pointer, size, true); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned) {
  if (auto error = not_in_capture("cudaHostAlloc")) return error;
  return allocate(pointer, size, false);
}
cudaError_t cudaFree(void *pointer) { return release(pointer); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return release(pointer); }
cudaError_t cudaFreeHost(void *pointer) { return release(pointer); }
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  *free = 80000000000;
  *total = 85899345920;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *found, const void *pointer) {
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  found->device = -2;
  std::lock_guard<std::mutex> held(guard);
  auto after = blocks.upper_bound(reinterpret_cast<uintptr_t>(pointer));
  if (after == blocks.begin()) return cudaSuccess;
  auto &[start, block] = *--after;
  if (reinterpret_cast<uintptr_t>(pointer) >= start + block.size) return cudaSuccess;
  found->type = block.on_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  found->device = block.device;
  found->devicePointer = const_cast<void *>(pointer);
  found->hostPointer = block.on_device ? nullptr : const_cast<void *>(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
  if (auto error = waits("cudaMemcpy")) return error;
  memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  node(stream);
  memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t size, cudaStream_t) {
  memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) {
  memset(to, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  node(stream);
  memset(to, value, size);
  return cudaSuccess;
}

// Devices: an H100, as far as anybody asks.
cudaError_t cudaGetDeviceCount(int *count) {
  *count = devices();
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
  *device = current;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= devices()) return refuse(cudaErrorInvalidDevice, "cudaSetDevice");
  current = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return waits("cudaDeviceSynchronize"); }
cudaError_t cudaDeviceGetPCIBusId(char *name, int length, int device) {
  snprintf(name, length, "0000:%02d:00.0", device);
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *found, int device) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "null_cuda");
  found->uuid.bytes[0] = static_cast<char>(device + 1);
  found->totalGlobalMem = 85899345920;
  found->sharedMemPerBlock = 49152;
  found->sharedMemPerBlockOptin = 232448;
  found->sharedMemPerMultiprocessor = 233472;
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->warpSize = 32;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->totalConstMem = 65536;
  found->major = 9;
  found->textureAlignment = 512;
  found->multiProcessorCount = 132;
  found->l2CacheSize = 52428800;
  found->memoryBusWidth = 5120;
  found->cooperativeLaunch = found->unifiedAddressing = found->concurrentKernels = 1;
  found->clusterLaunch = found->memoryPoolsSupported = found->canMapHostMemory = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr asked, int) {
  static const std::map<int, int> known = {
      {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
      {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrMultiProcessorCount, 132},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrComputeCapabilityMajor, 9},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrClockRate, 1980000},
      {cudaDevAttrMemoryClockRate, 2619000},
      {cudaDevAttrGlobalMemoryBusWidth, 5120},
      {cudaDevAttrL2CacheSize, 52428800},
  };
  auto found = known.find(asked);
  *value = found == known.end() ? 1 : found->second;
  return cudaSuccess;
}

// Kernels.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *found, const void *) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  found->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int, size_t, unsigned) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3 grid, dim3 block, void **, size_t shared, cudaStream_t stream) {
  return launch(grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *, void **) {
  return launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
  function(data);
  return cudaSuccess;
}
void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
char __cudaInitModule(void **) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<void **>(stream) = pending.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void *>(function));
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *) {
  static char space[1 << 20];
  *pointer = space;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *found) {
  static void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  *function = dlsym(driver, (std::string(name) + "_v2").c_str());
  if (!*function) *function = dlsym(driver, name);
  if (found) *found = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

// Streams, events, graphs.
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) { return not_in_capture("cudaStreamQuery"); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (of(stream)->capturing) return refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
  counts[WAITS]++;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (of(stream) == &default_stream) return refuse(cudaErrorStreamCaptureUnsupported, "capture of the default stream");
  if (of(stream)->capturing) return refuse(cudaErrorIllegalState, "capture in a capture");
  *of(stream) = {true, ++captures, 0};
  capture_mode = mode;
  capturing++;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  if (!of(stream)->capturing) return refuse(cudaErrorIllegalState, "end of no capture");
  of(stream)->capturing = false;
  capturing--;
  counts[RECORDED]++;
  *graph = reinterpret_cast<cudaGraph_t>(new Graph{of(stream)->nodes});
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  *status = of(stream)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *capture, cudaGraph_t *graph,
    const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges, size_t *count) {
  cudaStreamIsCapturing(stream, status);
  if (capture) *capture = of(stream)->capture;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
  std::swap(capture_mode, *mode);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph *>(graph)));
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
  *count = reinterpret_cast<Graph *>(graph)->nodes;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) {
  counts[REPLAYS]++;
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  *reinterpret_cast<Event *>(event) = {now(), of(stream)->capturing};
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (reinterpret_cast<Event *>(event)->captured) return refuse(cudaErrorCapturedEvent, "query of a captured event");
  return not_in_capture("cudaEventQuery");
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (reinterpret_cast<Event *>(event)->captured) return refuse(cudaErrorCapturedEvent, "wait for a captured event");
  return waits("cudaEventSynchronize");
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  double start = reinterpret_cast<Event *>(from)->milliseconds, end = reinterpret_cast<Event *>(to)->milliseconds;
  if (start < 0 || end < 0) return refuse(cudaErrorInvalidResourceHandle, "time of an event that was not recorded");
  *milliseconds = end > start ? static_cast<float>(end - start) : 1e-4f;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  auto error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }
const char *cudaGetErrorString(cudaError_t) { return "see what null_cuda printed"; }
const char *cudaGetErrorName(cudaError_t) { return "null_cuda"; }

}  // extern "C"
