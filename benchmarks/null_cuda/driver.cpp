// CUDA's driver (libcuda), as far as Triton and Inductor call it themselves; see runtime.cpp.
#define __CUDA_API_VERSION_INTERNAL
#include <cuda.h>

#include <cstring>
#include <dlfcn.h>

namespace {

struct Size { unsigned x, y, z; };
CUcontext const CONTEXT = reinterpret_cast<CUcontext>(0x10);
CUmodule const MODULE = reinterpret_cast<CUmodule>(0x20);
CUfunction const FUNCTION = reinterpret_cast<CUfunction>(0x30);

void *of_runtime(const char *name) {
  static void *runtime = dlopen("libcudart.so.13", RTLD_NOW | RTLD_GLOBAL);
  return dlsym(runtime, name);
}

CUresult launch(CUfunction function, Size grid, Size block, size_t shared, CUstream stream) {
  using Launch = int (*)(const void *, Size, Size, void **, size_t, void *);
  static auto run = reinterpret_cast<Launch>(of_runtime("cudaLaunchKernel"));
  if (function != FUNCTION) return CUDA_ERROR_INVALID_HANDLE;
  return static_cast<CUresult>(run(nullptr, grid, block, nullptr, shared, stream));
}

}  // namespace

extern "C" {

CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGetName(char *name, int length, CUdevice) { strncpy(name, "null_cuda", length); return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute asked, CUdevice device) {
  using Get = int (*)(int *, int, int);
  static auto get = reinterpret_cast<Get>(of_runtime("cudaDeviceGetAttribute"));
  return static_cast<CUresult>(get(value, static_cast<int>(asked), device));
}
CUresult cuCtxGetCurrent(CUcontext *context) { *context = CONTEXT; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice) { *context = CONTEXT; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoad(CUmodule *module, const char *) { *module = MODULE; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *) { *module = MODULE; return CUDA_SUCCESS; }
CUresult cuModuleLoadDataEx(CUmodule *module, const void *, unsigned, CUjit_option *, void **) {
  *module = MODULE;
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule, const char *) { *function = FUNCTION; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute asked, CUfunction) {
  *value = asked == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : asked == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char **text) { *text = "see what null_cuda printed"; return CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char **text) { *text = "null_cuda"; return CUDA_SUCCESS; }
CUresult cuLaunchKernel(
    CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned x, unsigned y, unsigned z,
    unsigned shared, CUstream stream, void **, void **) {
  return launch(function, {grid_x, grid_y, grid_z}, {x, y, z}, shared, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **, void **) {
  Size grid = {c->gridDimX, c->gridDimY, c->gridDimZ}, block = {c->blockDimX, c->blockDimY, c->blockDimZ};
  return launch(function, grid, block, c->sharedMemBytes, c->hStream);
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute asked, CUdeviceptr pointer) {
  if (asked == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *static_cast<CUdeviceptr *>(value) = pointer;
  else *static_cast<int *>(value) = CU_MEMORYTYPE_DEVICE;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction, const CUlaunchConfig *) { *count = 66; return CUDA_SUCCESS; }

}  // extern "C"
