/* A libcuda.so.1 that launches nothing and writes down every launch: which code, how large, with which bytes of parameters.
 *
 * It has two devices, of compute capability 9.0 or FAKE_CUDA_ARCH (such as 89), and knows of a parameter's size what the cubin says. A tensor map is filled
 * with the arguments that it was encoded from. fake_take() gives what was written since the last time.
 */
#include <cuda.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 64
#define DEPTH 16

typedef struct { const char *data; size_t size; uint64_t hash; } Image;
typedef struct { Image *image; char name[128]; int count; int sizes[MOST]; } Function;

static char *text; static size_t used, room;
static __thread CUcontext stack[DEPTH]; static __thread int depth;
static int contexts[2];

static void say(const char *format, ...) {
  if (room - used < 65536) text = realloc(text, room += 1 << 20);
  va_list args; va_start(args, format); used += vsnprintf(text + used, room - used, format, args); va_end(args);
}

const char *fake_take(void) { say("%s", ""); text[used] = 0; used = 0; return text; }

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **words) { *words = "a fake error"; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 2; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  const char *given = getenv("FAKE_CUDA_ARCH");
  int arch = given ? atoi(given) : 90;
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? arch / 10
         : attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? arch % 10
         : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
         : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 233472
         : attribute == CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK ? 65536 : 132;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)&contexts[device]; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = depth ? stack[depth - 1] : 0; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { if (!depth) depth = 1; stack[depth - 1] = context; return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext context) { stack[depth++] = context; return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext *context) { *context = stack[--depth]; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 1 << 20; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) { return CUDA_ERROR_NOT_SUPPORTED; }

static int device(void) { return depth && stack[depth - 1] ? (int)((int *)stack[depth - 1] - contexts) : -1; }
CUresult cuCtxGetDevice(CUdevice *current) { *current = device(); return *current < 0 ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = CU_STREAM_CAPTURE_STATUS_NONE; return CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { say("unloaded %016lx\n", ((Image *)module)->hash); return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule *module, const void *data) {
  const Elf64_Ehdr *header = data;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
  if (device() < 0) return CUDA_ERROR_INVALID_CONTEXT;
  Image *image = malloc(sizeof *image);
  image->size = header->e_shoff + header->e_shnum * sizeof(Elf64_Shdr);
  image->data = memcpy(malloc(image->size), data, image->size);
  image->hash = 14695981039346656037u;
  for (size_t i = 0; i < image->size; i++) image->hash = (image->hash ^ (unsigned char)image->data[i]) * 1099511628211u;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

/* The sizes of a function's parameters, from the section .nv.info.<name>: entries of attribute 0x17. */
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Image *image = (Image *)module;
  const Elf64_Ehdr *header = (const void *)image->data;
  const Elf64_Shdr *sections = (const void *)(image->data + header->e_shoff);
  const char *names = image->data + sections[header->e_shstrndx].sh_offset;
  char wanted[160];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < header->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    Function *found = calloc(1, sizeof *found);
    found->image = image;
    snprintf(found->name, sizeof found->name, "%s", name);
    const unsigned char *at = (const unsigned char *)image->data + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at < end) {
      uint16_t size = at[0] == 4 ? *(const uint16_t *)(at + 2) : 0;
      if (at[0] == 4 && at[1] == 0x17) {
        int ordinal = *(const uint16_t *)(at + 8), bytes = *(const uint32_t *)(at + 12) >> 18;
        found->sizes[ordinal] = bytes;
        if (ordinal >= found->count) found->count = ordinal + 1;
      }
      at += 4 + size;
    }
    *function = (CUfunction)found;
    return CUDA_SUCCESS;
  }
  return CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : attribute == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? 1024 : 100;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  say("attribute %d of %s: %d\n", attribute, ((Function *)function)->name, value);
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  say("cache of %s: %d\n", ((Function *)function)->name, config);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *shape,
                                const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
                                CUtensorMapFloatOOBfill fill) {
  if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || rank > 4) return CUDA_ERROR_INVALID_VALUE;
  char *at = memset(map, 0, sizeof *map);
  uint8_t small[8] = {type, rank, interleave, swizzle, l2, fill};
#define PUT(value, size) memcpy(at, value, size), at += size
  PUT(small, 8); PUT(&address, 8); PUT(shape, 8 * rank); PUT(strides, 8 * (rank - 1)); PUT(box, 4 * rank);
  for (cuuint32_t i = 0; i < rank; i++) if (steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
  Function *function = (Function *)handle;
  if (device() < 0 || extra) return CUDA_ERROR_INVALID_CONTEXT;
  say("%s of %016lx on device %d stream %p grid %u %u %u block %u %u %u shared %u attributes", function->name, function->image->hash,
      device(), (void *)config->hStream, config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
      config->blockDimZ, config->sharedMemBytes);
  for (unsigned i = 0; i < config->numAttrs; i++) {
    say(" %d:", config->attrs[i].id);
    for (int b = 0; b < 12; b++) say("%02x", ((unsigned char *)&config->attrs[i].value)[b]);
  }
  for (int i = 0; i < function->count; i++) {
    say(" |");
    for (int b = 0; b < function->sizes[i]; b++) say("%02x", ((unsigned char *)parameters[i])[b]);
  }
  say("\n");
  return CUDA_SUCCESS;
}
