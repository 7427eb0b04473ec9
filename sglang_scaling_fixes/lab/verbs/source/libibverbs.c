/* A libibverbs.so.1 for machines without an RDMA device: every call becomes an order to a NIC in
 * software (wire.h), one for each process. It has what Mooncake's transfer engine asks for, and
 * nothing else.
 *
 * SOFTVERBS_DEVICES  its devices and their addresses: rdma0=10.0.0.1,rdma1=10.0.1.1
 * SOFTVERBS_LOG      the beginning of the name of a log for each NIC
 *
 * What it does is what the manual pages of rdma-core say of each call. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "library.h"

enum { MAX_DEVICES = 8, MAX_QPS = 1 << 16 };

static struct device devices[MAX_DEVICES]; /* these under the orders' lock */
static int device_count = -1;
static uint32_t domains;

/* ---- devices ------------------------------------------------------------------------------- */

static void read_devices(void) {
    const char *said = getenv("SOFTVERBS_DEVICES");
    char *copy = strdup(said ? said : ""), *rest = NULL;
    device_count = 0;
    for (char *one = strtok_r(copy, ",", &rest); one && device_count < MAX_DEVICES;
         one = strtok_r(NULL, ",", &rest)) {
        struct device *device = &devices[device_count];
        char *address = strchr(one, '=');
        if (!address || inet_pton(AF_INET, address + 1, &device->address) != 1) {
            fprintf(stderr, "softverbs: SOFTVERBS_DEVICES=%s: %s is not NAME=ADDRESS\n", said, one);
            continue;
        }
        *address = 0;
        device->base.node_type = IBV_NODE_CA;
        device->base.transport_type = IBV_TRANSPORT_IB;
        snprintf(device->base.name, sizeof device->base.name, "%s", one);
        snprintf(device->base.dev_name, sizeof device->base.dev_name, "uverbs%d", device_count);
        snprintf(device->base.ibdev_path, sizeof device->base.ibdev_path,
                 "/sys/class/infiniband/%s", one);
        device_count++;
    }
    free(copy);
}

int ibv_fork_init(void) { return 0; }

struct ibv_device **ibv_get_device_list(int *count) {
    pthread_mutex_lock(&order_lock);
    if (device_count < 0) read_devices();
    pthread_mutex_unlock(&order_lock);
    struct ibv_device **list = calloc(device_count + 1, sizeof *list);
    for (int i = 0; i < device_count; i++) list[i] = &devices[i].base;
    if (count) *count = device_count;
    return list;
}

void ibv_free_device_list(struct ibv_device **list) { free(list); }

const char *ibv_get_device_name(struct ibv_device *device) { return device->name; }

struct ibv_context *ibv_open_device(struct ibv_device *base) {
    struct context *context = calloc(1, sizeof *context);
    char path[128];
    int ends[2];
    pthread_mutex_lock(&order_lock);
    int error = nic_there() ? 0 : nic_start();
    pthread_mutex_unlock(&order_lock);
    if (!error && pipe2(ends, O_CLOEXEC)) error = errno;
    if (error) {
        free(context);
        errno = error;
        return NULL;
    }
    context->device = (struct device *)base;
    struct order order = {.kind = ORDER_OPEN, .open.address = context->device->address};
    fcntl(ends[1], F_SETFL, O_NONBLOCK); /* nobody may wait for who does not read events */
    error = nic_ask_with(&order, &ends[1], 1, &context->number);
    close(ends[1]);
    if (error) {
        close(ends[0]);
        free(context);
        errno = error;
        return NULL;
    }
    snprintf(path, sizeof path, "/dev/infiniband/%s", base->dev_name);
    context->base.device = base;
    context->base.async_fd = ends[0];
    context->base.cmd_fd = open(path, O_RDWR | O_CLOEXEC); /* as an open device shows in /proc */
    context->base.num_comp_vectors = 1;
    pthread_mutex_init(&context->base.mutex, NULL);
    context->base.ops.poll_cq = poll_cq;
    context->base.ops.req_notify_cq = request_event;
    context->base.ops.post_send = post_send;
    context->base.ops.post_recv = post_receive;
    return &context->base;
}

int ibv_close_device(struct ibv_context *base) {
    struct context *context = (struct context *)base;
    struct order order = {.kind = ORDER_CLOSE, .number = context->number};
    int error = nic_ask(&order, NULL);
    if (error) {
        errno = error;
        return -1;
    }
    close(base->async_fd);
    if (base->cmd_fd >= 0) close(base->cmd_fd);
    free(context);
    return 0;
}

int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *found) {
    (void)context;
    *found = (struct ibv_device_attr){
        .fw_ver = "softverbs",
        .max_mr_size = 1ull << 40,
        .page_size_cap = ~0ull,
        .max_qp = MAX_QPS,
        .max_qp_wr = MAX_QUEUE,
        .max_sge = MAX_PIECES,
        .max_cq = 1024,
        .max_cqe = RING_ENTRIES,
        .max_mr = 1 << 20,
        .max_pd = 1 << 20,
        .max_qp_rd_atom = 16,
        .max_qp_init_rd_atom = 16,
        .max_pkeys = 1,
        .phys_port_cnt = 1,
    };
    return 0;
}

int ibv_query_port(struct ibv_context *context, uint8_t port, struct _compat_ibv_port_attr *into) {
    (void)context;
    struct ibv_port_attr *found = (struct ibv_port_attr *)into;
    if (port != 1) return EINVAL;
    found->state = IBV_PORT_ACTIVE;
    found->max_mtu = found->active_mtu = IBV_MTU_4096;
    found->gid_tbl_len = found->pkey_tbl_len = 1;
    found->max_msg_sz = 1u << 30;
    found->active_width = 2;  /* 4X */
    found->active_speed = 32; /* EDR */
    found->phys_state = 5;    /* LinkUp */
    found->link_layer = IBV_LINK_LAYER_ETHERNET;
    return 0;
}

int ibv_query_gid(struct ibv_context *context, uint8_t port, int index, union ibv_gid *gid) {
    if (port != 1 || index) {
        errno = EINVAL;
        return -1;
    }
    *gid = (union ibv_gid){.raw = {[10] = 0xff, [11] = 0xff}}; /* an IPv4 address in IPv6 */
    memcpy(gid->raw + 12, &((struct context *)context)->device->address, 4);
    return 0;
}

int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port, uint32_t index,
                      struct ibv_gid_entry *entry, uint32_t flags, size_t size) {
    (void)flags;
    if (port != 1 || index) return ENODATA;
    memset(entry, 0, size);
    entry->port_num = port;
    entry->gid_type = IBV_GID_TYPE_ROCE_V2;
    entry->ndev_ifindex = 1;
    return ibv_query_gid(context, port, index, &entry->gid);
}

/* ---- memory -------------------------------------------------------------------------------- */

struct ibv_pd *ibv_alloc_pd(struct ibv_context *context) {
    struct domain *domain = calloc(1, sizeof *domain);
    domain->base.context = context;
    pthread_mutex_lock(&order_lock);
    domain->number = ++domains;
    pthread_mutex_unlock(&order_lock);
    return &domain->base;
}

int ibv_dealloc_pd(struct ibv_pd *domain) {
    free(domain);
    return 0;
}

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *domain, void *address, size_t length, uint64_t iova,
                                unsigned access) {
    struct ibv_mr *region = calloc(1, sizeof *region);
    struct order order = {
        .kind = ORDER_REGISTER,
        .region = {(uintptr_t)address, length, ((struct domain *)domain)->number, access},
    };
    bool writes = access & IBV_ACCESS_REMOTE_WRITE && !(access & IBV_ACCESS_LOCAL_WRITE);
    int error = writes ? EINVAL : EOPNOTSUPP;
    if (!writes && iova == (uintptr_t)address) error = nic_ask(&order, &region->rkey);
    if (error) {
        free(region);
        errno = error;
        return NULL;
    }
    region->context = domain->context;
    region->pd = domain;
    region->addr = address;
    region->length = length;
    region->lkey = region->rkey;
    return region;
}

struct ibv_mr *ibv_reg_mr(struct ibv_pd *domain, void *address, size_t length, int access) {
    return ibv_reg_mr_iova2(domain, address, length, (uintptr_t)address, access);
}

int ibv_dereg_mr(struct ibv_mr *region) {
    struct order order = {.kind = ORDER_DEREGISTER, .number = region->rkey};
    int error = nic_ask(&order, NULL);
    if (!error) free(region);
    return error;
}

/* ---- names --------------------------------------------------------------------------------- */

const char *ibv_event_type_str(enum ibv_event_type type) {
    switch (type) {
    case IBV_EVENT_CQ_ERR:
        return "completion queue full";
    case IBV_EVENT_QP_REQ_ERR:
        return "queue pair got an invalid request";
    case IBV_EVENT_QP_ACCESS_ERR:
        return "queue pair got a request for memory that is not open to it";
    default:
        return "event";
    }
}

const char *ibv_wc_status_str(enum ibv_wc_status status) {
    switch (status) {
    case IBV_WC_SUCCESS:
        return "success";
    case IBV_WC_LOC_PROT_ERR:
        return "own key not valid";
    case IBV_WC_WR_FLUSH_ERR:
        return "flushed";
    case IBV_WC_REM_INV_REQ_ERR:
        return "peer: invalid request";
    case IBV_WC_REM_ACCESS_ERR:
        return "peer: key not valid";
    case IBV_WC_REM_OP_ERR:
        return "peer: could not carry it out";
    case IBV_WC_RETRY_EXC_ERR:
        return "no answer from the peer";
    case IBV_WC_RNR_RETRY_EXC_ERR:
        return "peer: no receive posted";
    default:
        return "error";
    }
}
