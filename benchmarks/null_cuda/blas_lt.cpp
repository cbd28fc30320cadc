// cuBLASLt: handles that are not null, and one algorithm for everything; see runtime.cpp.
#include <cublasLt.h>

#include <cstring>

namespace {
template <class T> T handle() { return reinterpret_cast<T>(0x50); }
}  // namespace

extern "C" {
cublasStatus_t cublasLtCreate(cublasLtHandle_t *made) { *made = handle<cublasLtHandle_t>(); return {}; }
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t, cudaDataType_t) {
  *made = handle<cublasLtMatmulDesc_t>();
  return {};
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType_t, uint64_t, uint64_t, int64_t) {
  *made = handle<cublasLtMatrixLayout_t>();
  return {};
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
  *made = handle<cublasLtMatmulPreference_t>();
  return {};
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t *found, int *count) {
  memset(found, 0, sizeof *found);
  *count = 1;
  return {};
}
}
