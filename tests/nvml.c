/* A stand-in for NVIDIA's management library, so that LocalCUDACluster starts without a GPU.

   FAKE_GPUS says how many devices there are. It knows what dask-cuda asks: how many, which, how
   much memory, and which cores are near. It computes nothing. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6 };

typedef struct { int index; } Device;
typedef struct { unsigned long long total, free, used; } Memory;

static Device devices[16];

static int count(void)
{
    const char *text = getenv("FAKE_GPUS");
    int number = text ? atoi(text) : 0;
    return number < 16 ? number : 16;
}

static void name_of(int index, char *text, unsigned length)
{
    snprintf(text, length, "GPU-00000000-0000-0000-0000-%012d", index);
}

int nvmlInitWithFlags(unsigned flags)
{
    for (int i = 0; i < 16; i++)
        devices[i].index = i;
    return SUCCESS;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int code) { return code ? "not in the stand-in" : "success"; }

int nvmlSystemGetDriverVersion(char *text, unsigned length)
{
    snprintf(text, length, "580.00");
    return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned *number)
{
    *number = count();
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Device **device)
{
    if (index >= (unsigned)count())
        return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device)
{
    char text[64];
    for (int i = 0; i < count(); i++) {
        name_of(i, text, sizeof text);
        if (!strcmp(text, uuid))
            return nvmlDeviceGetHandleByIndex_v2(i, device);
    }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(Device *device, char *text, unsigned length)
{
    name_of(device->index, text, length);
    return SUCCESS;
}

int nvmlDeviceGetIndex(Device *device, unsigned *index)
{
    *index = device->index;
    return SUCCESS;
}

int nvmlDeviceGetName(Device *device, char *text, unsigned length)
{
    snprintf(text, length, "stand-in");
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory)
{
    memory->total = 16ULL << 30;
    memory->used = 1ULL << 30;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetCpuAffinity(Device *device, unsigned words, unsigned long *cores)
{
    memset(cores, 0xff, words * sizeof *cores);
    return SUCCESS;
}

int nvmlDeviceGetMigMode(Device *device, unsigned *now, unsigned *later) { return NOT_SUPPORTED; }

int nvmlDeviceIsMigDeviceHandle(Device *device, unsigned *is_mig)
{
    *is_mig = 0;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(Device *device, unsigned *rates)
{
    rates[0] = rates[1] = 0;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v2(Device *device, unsigned *number, void *processes)
{
    *number = 0;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *number, void *processes)
{
    return nvmlDeviceGetComputeRunningProcesses_v2(device, number, processes);
}
