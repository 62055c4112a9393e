/* A libcuda without a GPU: device memory is host memory, the stream runs at once, a graph counts its launches.
   Enough of the driver for NVIDIA's own Python bindings to load and for ipa.engines.cuda_device to run on. */
#include <stdlib.h>
#include <string.h>
#include <stdint.h>

#include "../engines/guided_step.cu"

#define EXPORT __attribute__((visibility("default")))
typedef int CUresult;
enum { SUCCESS = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_CONTEXT = 201, CAPTURE_INVALIDATED = 901 };

/* What a fake library wants to run in the stream: at once, or whenever the graph that is being captured is launched. */
typedef void (*Work)(void);
enum { MOST_GRAPHS = 64 };
static Work recorded[MOST_GRAPHS];
static int captured;
static int fails_captures;
static __thread void *current; /* context of the calling thread */
static int initialized, contexts, buffers, graphs, streams, capturing, launches, copies_captured, uploads, modules;
static const size_t LIMIT = (size_t)1 << 30;

EXPORT int fake_count(const char *name) {
    if (!strcmp(name, "contexts")) return contexts;
    if (!strcmp(name, "buffers")) return buffers;
    if (!strcmp(name, "graphs")) return graphs;
    if (!strcmp(name, "streams")) return streams;
    if (!strcmp(name, "launches")) return launches;
    if (!strcmp(name, "copies_captured")) return copies_captured;
    if (!strcmp(name, "uploads")) return uploads;
    if (!strcmp(name, "modules")) return modules;
    return -1;
}

EXPORT CUresult cuInit(unsigned flags) { initialized = 1; return flags ? INVALID : SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
EXPORT CUresult cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
EXPORT CUresult cuDeviceGet(int *device, int ordinal) { *device = 7; return ordinal ? INVALID : SUCCESS; }
EXPORT CUresult cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Fake GPU", length); return SUCCESS; }
EXPORT CUresult cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = LIMIT; return SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxRetain(void **context, int device) {
    if (!initialized) return NOT_INITIALIZED;
    if (device != 7) return INVALID;
    contexts++; *context = (void *)0x1000; return SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(int device) { contexts--; return SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(void *context) {
    if (context != (void *)0x1000) return INVALID;
    current = context; return SUCCESS;
}
EXPORT void fake_fail_captures(int fails) { fails_captures = fails; }
EXPORT CUresult cuStreamCreate(void **stream, unsigned flags) { streams++; *stream = (void *)0x2000; return SUCCESS; }
EXPORT CUresult cuStreamDestroy_v2(void *stream) { streams--; return SUCCESS; }
EXPORT CUresult cuStreamSynchronize(void *stream) { return stream == (void *)0x2000 ? SUCCESS : INVALID; }
EXPORT CUresult cuMemAlloc_v2(unsigned long long *pointer, size_t size) {
    if (size > LIMIT) return OUT_OF_MEMORY;
    buffers++; *pointer = (uintptr_t)malloc(size); return SUCCESS;
}
EXPORT CUresult cuMemFree_v2(unsigned long long pointer) { buffers--; free((void *)(uintptr_t)pointer); return SUCCESS; }
EXPORT CUresult cuMemGetInfo_v2(size_t *available, size_t *total) { *available = LIMIT / 2; *total = LIMIT; return SUCCESS; }
EXPORT CUresult cuMemcpyHtoDAsync_v2(unsigned long long to, const void *from, size_t size, void *stream) {
    if (!current) return NO_CONTEXT;
    if (capturing) { copies_captured++; return SUCCESS; }
    uploads++; memcpy((void *)(uintptr_t)to, from, size); return stream == (void *)0x2000 ? SUCCESS : INVALID;
}
EXPORT CUresult cuMemcpyDtoHAsync_v2(void *to, unsigned long long from, size_t size, void *stream) {
    if (capturing) { copies_captured++; return SUCCESS; }
    memcpy(to, (void *)(uintptr_t)from, size); return stream == (void *)0x2000 ? SUCCESS : INVALID;
}
EXPORT CUresult cuStreamBeginCapture_v2(void *stream, int mode) { capturing = 1; return mode == 1 ? SUCCESS : INVALID; }
EXPORT CUresult cuStreamEndCapture(void *stream, void **graph) {
    if (!capturing) return INVALID;
    if (fails_captures) { capturing = 0; *graph = NULL; return CAPTURE_INVALIDATED; }
    capturing = 0; *graph = (void *)(uintptr_t)(0x3000 + captured); captured = (captured + 1) % MOST_GRAPHS;
    return SUCCESS;
}
EXPORT CUresult cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    if ((uintptr_t)graph < 0x3000) return CAPTURE_INVALIDATED;
    graphs++; *executable = (void *)((uintptr_t)graph + 0x1000); return SUCCESS;
}
EXPORT CUresult cuGraphDestroy(void *graph) { return SUCCESS; }
EXPORT CUresult cuGraphExecDestroy(void *executable) { graphs--; return SUCCESS; }
EXPORT CUresult cuGraphLaunch(void *executable, void *stream) {
    uintptr_t index = (uintptr_t)executable - 0x4000;
    if (index >= MOST_GRAPHS) return INVALID;
    launches++;
    if (recorded[index]) recorded[index]();
    return SUCCESS;
}
EXPORT void fake_enqueue(Work work) {
    if (capturing) recorded[captured] = work; else work();
}
/* The kernels run as C on the host, one thread after the other. */
EXPORT CUresult cuModuleLoadData(void **module, const char *ptx) {
    if (!strstr(ptx, ".entry guided_step") || !strstr(ptx, ".entry write_sample")) return INVALID;
    modules++; *module = (void *)0x5000; return SUCCESS;
}
EXPORT CUresult cuModuleUnload(void *module) { modules--; return SUCCESS; }
EXPORT CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = !strcmp(name, "guided_step") ? (void *)0x6000 : !strcmp(name, "write_sample") ? (void *)0x6001 : NULL;
    return *function ? SUCCESS : INVALID;
}
#define GIVEN(type, place) (*(type *)given[place])
EXPORT CUresult cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                               unsigned bz, unsigned shared, void *stream, void **given, void **extra) {
    if (!current || stream != (void *)0x2000 || gy * gz * by * bz != 1 || shared || extra) return INVALID;
    for (host_index = 0; host_index < gx * bx; host_index++) {
        if (function == (void *)0x6000)
            guided_step(GIVEN(float *, 0), GIVEN(void *, 1), GIVEN(float *, 2), GIVEN(float *, 3), GIVEN(float, 4),
                        GIVEN(int, 5), GIVEN(int, 6), GIVEN(int, 7), GIVEN(int, 8), GIVEN(int, 9));
        else
            write_sample(GIVEN(float *, 0), GIVEN(void *, 1), GIVEN(float, 2), GIVEN(int, 3), GIVEN(int, 4),
                         GIVEN(int, 5));
    }
    return SUCCESS;
}
EXPORT CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = code == INVALID ? "invalid argument" : "another error"; return SUCCESS;
}

static const struct { const char *name; void *function; } TABLE[] = {
#define ENTRY(name, function) {name, (void *)function}
    ENTRY("cuInit", cuInit), ENTRY("cuDriverGetVersion", cuDriverGetVersion), ENTRY("cuDeviceGet", cuDeviceGet),
    ENTRY("cuDeviceGetCount", cuDeviceGetCount), ENTRY("cuDevicePrimaryCtxRetain", cuDevicePrimaryCtxRetain),
    ENTRY("cuDevicePrimaryCtxRelease", cuDevicePrimaryCtxRelease_v2), ENTRY("cuCtxSetCurrent", cuCtxSetCurrent),
    ENTRY("cuStreamCreate", cuStreamCreate), ENTRY("cuStreamDestroy", cuStreamDestroy_v2),
    ENTRY("cuStreamSynchronize", cuStreamSynchronize), ENTRY("cuMemAlloc", cuMemAlloc_v2),
    ENTRY("cuMemFree", cuMemFree_v2), ENTRY("cuMemGetInfo", cuMemGetInfo_v2),
    ENTRY("cuMemcpyHtoDAsync", cuMemcpyHtoDAsync_v2), ENTRY("cuMemcpyDtoHAsync", cuMemcpyDtoHAsync_v2),
    ENTRY("cuStreamBeginCapture", cuStreamBeginCapture_v2), ENTRY("cuStreamEndCapture", cuStreamEndCapture),
    ENTRY("cuGraphInstantiate", cuGraphInstantiateWithFlags),
    ENTRY("cuGraphInstantiateWithFlags", cuGraphInstantiateWithFlags), ENTRY("cuGraphDestroy", cuGraphDestroy),
    ENTRY("cuGraphExecDestroy", cuGraphExecDestroy), ENTRY("cuGraphLaunch", cuGraphLaunch),
    ENTRY("cuModuleLoadData", cuModuleLoadData), ENTRY("cuModuleUnload", cuModuleUnload),
    ENTRY("cuModuleGetFunction", cuModuleGetFunction), ENTRY("cuLaunchKernel", cuLaunchKernel),
    ENTRY("cuGetErrorString", cuGetErrorString),
};

EXPORT CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    *function = NULL;
    for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE; i++)
        if (!strcmp(TABLE[i].name, name)) *function = TABLE[i].function;
    if (status) *status = *function ? 0 : 1;
    return *function ? SUCCESS : 500; /* not found */
}
EXPORT CUresult cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
