/* Registered memory: which keys are alive, and the application's bytes behind them. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/uio.h>

#include "nic.h"

/* A key is a place in the table and a generation: a key that ended is never given again before
 * its place was used 255 times, as on real adapters. */
struct region {
    uint64_t address, length;
    uint32_t domain, access, key; /* key 0: free */
    uint8_t generation;
};

static struct region *regions;
static uint32_t region_count;
static pid_t application;

void memory_of(pid_t pid) { application = pid; }

uint32_t region_add(uint64_t address, uint64_t length, uint32_t domain, uint32_t access) {
    uint32_t place = 0;
    while (place < region_count && regions[place].key) place++;
    if (place == region_count) {
        regions = reallocarray(regions, ++region_count, sizeof *regions);
        regions[place].generation = 0;
    }
    struct region *region = &regions[place];
    region->address = address;
    region->length = length;
    region->domain = domain;
    region->access = access;
    if (++region->generation == 0) region->generation = 1;
    return region->key = place << 8 | region->generation;
}

static struct region *region_of(uint32_t key) {
    uint32_t place = key >> 8;
    return key && place < region_count && regions[place].key == key ? &regions[place] : NULL;
}

bool region_remove(uint32_t key) {
    struct region *region = region_of(key);
    if (region) region->key = 0;
    return region != NULL;
}

bool region_covers(uint32_t key, uint32_t domain, uint64_t address, uint64_t length,
                   uint32_t access) {
    const struct region *region = region_of(key);
    return region && region->domain == domain && (region->access & access) == access &&
           address >= region->address && length <= region->length &&
           address - region->address <= region->length - length;
}

bool memory_read(uint64_t address, void *into, size_t length) {
    struct iovec local = {into, length}, remote = {(void *)address, length};
    return process_vm_readv(application, &local, 1, &remote, 1, 0) == (ssize_t)length;
}

bool memory_write(uint64_t address, const void *from, size_t length) {
    struct iovec local = {(void *)from, length}, remote = {(void *)address, length};
    return process_vm_writev(application, &local, 1, &remote, 1, 0) == (ssize_t)length;
}
