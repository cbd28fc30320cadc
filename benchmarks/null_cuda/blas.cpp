// cuBLAS: handles that are not null. Nothing is multiplied; see runtime.cpp.
extern "C" {
int cublasCreate_v2(void **handle) { *handle = reinterpret_cast<void *>(0x40); return 0; }
int cublasGetMathMode(void *, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *, int *mode) { *mode = 0; return 0; }
}
