/* A libibverbs.so.1 for machines without an RDMA device: every call becomes an order to a NIC in
 * software (wire.h), one for each process. It has what Mooncake's transfer engine asks for, and
 * nothing else.
 *
 * SOFTVERBS_DEVICES  its devices and their addresses: rdma0=10.0.0.1,rdma1=10.0.1.1
 * SOFTVERBS_LOG      the beginning of the name of a log for each NIC
 *
 * What it does is what the manual pages of rdma-core say of each call. */
#define _GNU_SOURCE
#include <infiniband/verbs.h>
#undef ibv_get_device_list
#undef ibv_query_port
#undef ibv_reg_mr

#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <poll.h>
#include <pthread.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "wire.h"

enum { MAX_DEVICES = 8, MAX_QPS = 1 << 16 };

struct device {
    struct ibv_device base;
    uint32_t address; /* network order */
};

struct context {
    struct ibv_context base;
    struct device *device;
    uint32_t number;
};

struct domain {
    struct ibv_pd base;
    uint32_t number;
};

struct channel {
    struct ibv_comp_channel base;
    int written; /* the end that the NIC writes to */
};

struct queue {
    struct ibv_cq base;
    uint32_t number;
    struct ring *ring;
    pthread_mutex_t lock; /* the head's */
};

struct pair {
    struct ibv_qp base;
    struct ibv_qp_attr attributes;
    struct ibv_qp_cap capacity;
    _Atomic uint32_t sends_posted, sends_done, receives_posted, receives_done;
    struct pair *following;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of all below */
static struct device devices[MAX_DEVICES];
static int device_count = -1;
static int control = -1;
static pid_t owner; /* of `control`: a forked child has no NIC */
static uint32_t domains;
static struct pair *pairs;

/* ---- the NIC ------------------------------------------------------------------------------- */

/* Without its NIC a process would see nothing land, and take that for a proof. */
static void nic_is_gone(void) {
    fprintf(stderr, "softverbs: the NIC of process %d is gone\n", getpid());
    abort();
}

static void *watch_nic(void *unused) {
    struct pollfd end = {.fd = control, .events = POLLRDHUP};
    while (poll(&end, 1, -1) < 0 && errno == EINTR) continue;
    nic_is_gone();
    return unused;
}

static int start_nic(void) {
    Dl_info here;
    char library[PATH_MAX], program[PATH_MAX + 16], pid[16];
    int ends[2], size = 1 << 20, status;
    if (!dladdr((void *)&start_nic, &here) || !realpath(here.dli_fname, library)) return ENOENT;
    snprintf(program, sizeof program, "%s/softnic", dirname(library));
    snprintf(pid, sizeof pid, "%d", getpid());
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) return errno;
    setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    /* Twice: to its own number dup2 keeps the close-on-exec mark. */
    posix_spawn_file_actions_adddup2(&actions, ends[1], CONTROL_FD + 1);
    posix_spawn_file_actions_adddup2(&actions, CONTROL_FD + 1, CONTROL_FD);
    pid_t child;
    int failed = posix_spawn(&child, program, &actions, NULL,
                             (char *[]){"softnic", pid, NULL}, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    struct reply hello;
    if (!failed) waitpid(child, &status, 0);
    if (failed || recv(ends[0], &hello, sizeof hello, 0) != sizeof hello) {
        close(ends[0]);
        return failed ? failed : EIO;
    }
    prctl(PR_SET_PTRACER, hello.value, 0, 0, 0); /* it reads and writes our memory */
    control = ends[0];
    owner = getpid();
    pthread_t watcher;
    if (!pthread_create(&watcher, NULL, watch_nic, NULL)) pthread_detach(watcher);
    return 0;
}

static void tell_nic(const struct order *order, const int *fds, int count) {
    char space[CMSG_SPACE(2 * sizeof(int))] = {0};
    struct iovec part = {(void *)order, sizeof *order};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = space;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *passed = CMSG_FIRSTHDR(&message);
        passed->cmsg_level = SOL_SOCKET;
        passed->cmsg_type = SCM_RIGHTS;
        passed->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(passed), fds, count * sizeof(int));
    }
    ssize_t sent;
    do sent = sendmsg(control, &message, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent != sizeof *order) nic_is_gone();
}

/* Before any lock is taken: in a forked child somebody else may have held it. */
static bool has_nic(void) { return control >= 0 && owner == getpid(); }

static int ask_nic_with(const struct order *order, const int *fds, int count, uint32_t *value) {
    struct reply reply;
    ssize_t got;
    if (!has_nic()) return ENODEV;
    pthread_mutex_lock(&lock);
    tell_nic(order, fds, count);
    do got = recv(control, &reply, sizeof reply, 0);
    while (got < 0 && errno == EINTR);
    if (got != sizeof reply) nic_is_gone();
    pthread_mutex_unlock(&lock);
    if (value) *value = reply.value;
    return reply.error;
}

static int ask_nic(const struct order *order, uint32_t *value) {
    return ask_nic_with(order, NULL, 0, value);
}

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
    pthread_mutex_lock(&lock);
    if (device_count < 0) read_devices();
    pthread_mutex_unlock(&lock);
    struct ibv_device **list = calloc(device_count + 1, sizeof *list);
    for (int i = 0; i < device_count; i++) list[i] = &devices[i].base;
    if (count) *count = device_count;
    return list;
}

void ibv_free_device_list(struct ibv_device **list) { free(list); }

const char *ibv_get_device_name(struct ibv_device *device) { return device->name; }

static int poll_cq(struct ibv_cq *cq, int room, struct ibv_wc *found);
static int request_event(struct ibv_cq *cq, int solicited_only);
static int post_send(struct ibv_qp *qp, struct ibv_send_wr *work, struct ibv_send_wr **bad);
static int post_receive(struct ibv_qp *qp, struct ibv_recv_wr *work, struct ibv_recv_wr **bad);

struct ibv_context *ibv_open_device(struct ibv_device *base) {
    struct context *context = calloc(1, sizeof *context);
    char path[128];
    int ends[2];
    pthread_mutex_lock(&lock);
    int error = has_nic() ? 0 : start_nic();
    pthread_mutex_unlock(&lock);
    if (!error && pipe2(ends, O_CLOEXEC)) error = errno;
    if (error) {
        free(context);
        errno = error;
        return NULL;
    }
    context->device = (struct device *)base;
    struct order order = {.kind = ORDER_OPEN, .open.address = context->device->address};
    fcntl(ends[1], F_SETFL, O_NONBLOCK); /* nobody may wait for who does not read events */
    error = ask_nic_with(&order, &ends[1], 1, &context->number);
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
    int error = ask_nic(&order, NULL);
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
    pthread_mutex_lock(&lock);
    domain->number = ++domains;
    pthread_mutex_unlock(&lock);
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
    if (!writes && iova == (uintptr_t)address) error = ask_nic(&order, &region->rkey);
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
    int error = ask_nic(&order, NULL);
    if (!error) free(region);
    return error;
}

/* ---- completions --------------------------------------------------------------------------- */

struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) return NULL;
    fcntl(ends[1], F_SETFL, O_NONBLOCK);
    struct channel *channel = calloc(1, sizeof *channel);
    channel->base.context = context;
    channel->base.fd = ends[0];
    channel->written = ends[1];
    return &channel->base;
}

int ibv_destroy_comp_channel(struct ibv_comp_channel *base) {
    struct channel *channel = (struct channel *)base;
    close(base->fd);
    close(channel->written);
    free(channel);
    return 0;
}

struct ibv_cq *ibv_create_cq(struct ibv_context *context, int entries, void *cookie,
                             struct ibv_comp_channel *channel, int vector) {
    (void)vector;
    if (entries < 1 || entries > RING_ENTRIES) {
        errno = EINVAL;
        return NULL;
    }
    struct queue *queue = calloc(1, sizeof *queue);
    int fds[2] = {memfd_create("softverbs-completions", MFD_CLOEXEC), -1};
    if (channel) fds[1] = ((struct channel *)channel)->written;
    struct order order = {.kind = ORDER_CQ, .cq = {(uintptr_t)queue, entries}};
    void *ring = MAP_FAILED;
    if (fds[0] >= 0 && !ftruncate(fds[0], sizeof(struct ring)))
        ring = mmap(NULL, sizeof(struct ring), PROT_READ | PROT_WRITE, MAP_SHARED, fds[0], 0);
    int error = ring == MAP_FAILED ? ENOMEM
                                   : ask_nic_with(&order, fds, channel ? 2 : 1, &queue->number);
    if (fds[0] >= 0) close(fds[0]);
    if (error) {
        if (ring != MAP_FAILED) munmap(ring, sizeof(struct ring));
        free(queue);
        errno = error;
        return NULL;
    }
    queue->ring = ring;
    queue->base.context = context;
    queue->base.channel = channel;
    queue->base.cq_context = cookie;
    queue->base.cqe = entries;
    pthread_mutex_init(&queue->base.mutex, NULL);
    pthread_mutex_init(&queue->lock, NULL);
    return &queue->base;
}

int ibv_destroy_cq(struct ibv_cq *base) {
    struct queue *queue = (struct queue *)base;
    struct order order = {.kind = ORDER_DESTROY_CQ, .number = queue->number};
    int error = ask_nic(&order, NULL);
    if (error) return error;
    munmap(queue->ring, sizeof *queue->ring);
    free(queue);
    return 0;
}

static int poll_cq(struct ibv_cq *base, int room, struct ibv_wc *found) {
    struct queue *queue = (struct queue *)base;
    struct ring *ring = queue->ring;
    int count = 0;
    if (atomic_load_explicit(&ring->head, memory_order_relaxed) ==
        atomic_load_explicit(&ring->tail, memory_order_acquire))
        return 0;
    pthread_mutex_lock(&queue->lock);
    uint32_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    uint32_t tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
    for (; count < room && head != tail; head++) {
        const struct completion *done = &ring->entry[head % RING_ENTRIES];
        struct pair *pair = (struct pair *)(uintptr_t)done->cookie;
        if (!pair) continue;
        if (done->is_send)
            pair->sends_done = done->sends_done;
        else
            pair->receives_done++;
        found[count++] = (struct ibv_wc){
            .wr_id = done->id,
            .status = done->status,
            .opcode = done->opcode,
            .byte_len = done->bytes,
            .qp_num = done->number,
        };
    }
    atomic_store_explicit(&ring->head, head, memory_order_release);
    pthread_mutex_unlock(&queue->lock);
    return count;
}

/* Those of a queue pair that is gone are never seen: its memory is gone, too. */
static void withdraw(struct queue *queue, const struct pair *pair) {
    pthread_mutex_lock(&queue->lock);
    uint32_t tail = atomic_load_explicit(&queue->ring->tail, memory_order_acquire);
    for (uint32_t place = queue->ring->head; place != tail; place++) {
        struct completion *done = &queue->ring->entry[place % RING_ENTRIES];
        if (done->cookie == (uintptr_t)pair) done->cookie = 0;
    }
    pthread_mutex_unlock(&queue->lock);
}

static int request_event(struct ibv_cq *base, int solicited_only) {
    (void)solicited_only;
    atomic_store(&((struct queue *)base)->ring->armed, 1);
    return 0;
}

int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **cookie) {
    uint64_t queue;
    if (read(channel->fd, &queue, sizeof queue) != sizeof queue) return -1;
    *cq = (struct ibv_cq *)(uintptr_t)queue;
    *cookie = (*cq)->cq_context;
    return 0;
}

void ibv_ack_cq_events(struct ibv_cq *cq, unsigned int count) {
    (void)cq;
    (void)count;
}

int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *found) {
    struct event event;
    struct pollfd more = {.fd = context->async_fd, .events = POLLIN};
    for (;;) {
        if (read(context->async_fd, &event, sizeof event) != sizeof event) return -1;
        pthread_mutex_lock(&lock);
        struct pair *pair = pairs;
        while (pair && pair->base.qp_num != event.number) pair = pair->following;
        pthread_mutex_unlock(&lock);
        if (!pair) { /* destroyed since */
            if (poll(&more, 1, 0) == 1) continue;
            errno = EAGAIN;
            return -1;
        }
        found->event_type = event.type;
        if (event.type == IBV_EVENT_CQ_ERR)
            found->element.cq = pair->base.send_cq;
        else
            found->element.qp = &pair->base;
        return 0;
    }
}

void ibv_ack_async_event(struct ibv_async_event *event) { (void)event; }

/* ---- queue pairs --------------------------------------------------------------------------- */

struct ibv_qp *ibv_create_qp(struct ibv_pd *domain, struct ibv_qp_init_attr *asked) {
    if (asked->qp_type != IBV_QPT_RC || asked->srq || asked->cap.max_send_wr > MAX_QUEUE ||
        asked->cap.max_recv_wr > MAX_QUEUE || asked->cap.max_send_sge > MAX_PIECES ||
        asked->cap.max_recv_sge > MAX_PIECES) {
        errno = EINVAL;
        return NULL;
    }
    struct pair *pair = calloc(1, sizeof *pair);
    struct order order = {
        .kind = ORDER_QP,
        .pair = {
            .cookie = (uintptr_t)pair,
            .context = ((struct context *)domain->context)->number,
            .domain = ((struct domain *)domain)->number,
            .send_cq = ((struct queue *)asked->send_cq)->number,
            .receive_cq = ((struct queue *)asked->recv_cq)->number,
            .signal_all = asked->sq_sig_all,
        },
    };
    int error = ask_nic(&order, &pair->base.qp_num);
    if (error) {
        free(pair);
        errno = error;
        return NULL;
    }
    pair->capacity = asked->cap;
    pair->base.context = domain->context;
    pair->base.qp_context = asked->qp_context;
    pair->base.pd = domain;
    pair->base.send_cq = asked->send_cq;
    pair->base.recv_cq = asked->recv_cq;
    pair->base.qp_type = asked->qp_type;
    pair->base.state = IBV_QPS_RESET;
    pthread_mutex_init(&pair->base.mutex, NULL);
    pthread_cond_init(&pair->base.cond, NULL);
    pthread_mutex_lock(&lock);
    pair->following = pairs;
    pairs = pair;
    pthread_mutex_unlock(&lock);
    return &pair->base;
}

static void remember(struct ibv_qp_attr *kept, const struct ibv_qp_attr *said, int mask) {
    if (mask & IBV_QP_AV) kept->ah_attr = said->ah_attr;
    if (mask & IBV_QP_DEST_QPN) kept->dest_qp_num = said->dest_qp_num;
    if (mask & IBV_QP_RQ_PSN) kept->rq_psn = said->rq_psn;
    if (mask & IBV_QP_SQ_PSN) kept->sq_psn = said->sq_psn;
    if (mask & IBV_QP_TIMEOUT) kept->timeout = said->timeout;
    if (mask & IBV_QP_RETRY_CNT) kept->retry_cnt = said->retry_cnt;
    if (mask & IBV_QP_PATH_MTU) kept->path_mtu = said->path_mtu;
    if (mask & IBV_QP_ACCESS_FLAGS) kept->qp_access_flags = said->qp_access_flags;
}

int ibv_modify_qp(struct ibv_qp *base, struct ibv_qp_attr *said, int mask) {
    struct pair *pair = (struct pair *)base;
    struct order order = {.kind = ORDER_MODIFY, .number = base->qp_num};
    order.modify.has_state = !!(mask & IBV_QP_STATE);
    order.modify.has_access = !!(mask & IBV_QP_ACCESS_FLAGS);
    order.modify.has_path = !!(mask & IBV_QP_AV);
    order.modify.has_peer = !!(mask & IBV_QP_DEST_QPN);
    order.modify.has_expected = !!(mask & IBV_QP_RQ_PSN);
    order.modify.has_first = !!(mask & IBV_QP_SQ_PSN);
    order.modify.has_timeout = !!(mask & IBV_QP_TIMEOUT);
    order.modify.has_retries = !!(mask & IBV_QP_RETRY_CNT);
    order.modify.state = said->qp_state;
    order.modify.access = said->qp_access_flags;
    memcpy(&order.modify.peer_address, said->ah_attr.grh.dgid.raw + 12, 4);
    order.modify.peer = said->dest_qp_num;
    order.modify.expected = said->rq_psn;
    order.modify.first = said->sq_psn;
    order.modify.timeout = said->timeout;
    order.modify.retries = said->retry_cnt;
    uint32_t state;
    int error = ask_nic(&order, &state);
    if (error) return error;
    remember(&pair->attributes, said, mask);
    base->state = state;
    if (state == IBV_QPS_RESET) {
        withdraw((struct queue *)base->send_cq, pair);
        withdraw((struct queue *)base->recv_cq, pair);
        pair->sends_done = pair->sends_posted;
        pair->receives_done = pair->receives_posted;
    }
    return 0;
}

int ibv_query_qp(struct ibv_qp *base, struct ibv_qp_attr *found, int mask,
                 struct ibv_qp_init_attr *asked) {
    (void)mask;
    struct pair *pair = (struct pair *)base;
    struct order order = {.kind = ORDER_MODIFY, .number = base->qp_num}; /* changes nothing */
    uint32_t state;
    int error = ask_nic(&order, &state);
    if (error) return error;
    base->state = state;
    *found = pair->attributes;
    found->qp_state = found->cur_qp_state = base->state;
    found->cap = pair->capacity;
    *asked = (struct ibv_qp_init_attr){
        .qp_context = base->qp_context,
        .send_cq = base->send_cq,
        .recv_cq = base->recv_cq,
        .cap = pair->capacity,
        .qp_type = base->qp_type,
    };
    return 0;
}

int ibv_destroy_qp(struct ibv_qp *base) {
    struct pair *pair = (struct pair *)base;
    struct order order = {.kind = ORDER_DESTROY_QP, .number = base->qp_num};
    int error = ask_nic(&order, NULL);
    if (error) return error;
    withdraw((struct queue *)base->send_cq, pair);
    withdraw((struct queue *)base->recv_cq, pair);
    pthread_mutex_lock(&lock);
    struct pair **place = &pairs;
    while (*place != pair) place = &(*place)->following;
    *place = pair->following;
    pthread_mutex_unlock(&lock);
    free(pair);
    return 0;
}

static int pieces_of(struct work *work, const struct ibv_sge *pieces, int count) {
    if (count < 0 || count > MAX_PIECES) return EINVAL;
    work->pieces = count;
    for (int i = 0; i < count; i++)
        work->piece[i] = (struct piece){pieces[i].addr, pieces[i].length, pieces[i].lkey};
    return 0;
}

static int post_one_send(struct pair *pair, const struct ibv_send_wr *work) {
    struct order order = {.kind = ORDER_SEND, .number = pair->base.qp_num};
    enum ibv_qp_state state = pair->base.state;
    if (state == IBV_QPS_RESET || state == IBV_QPS_INIT || state == IBV_QPS_RTR) return EINVAL;
    if (pair->sends_posted - pair->sends_done >= pair->capacity.max_send_wr) return ENOMEM;
    if (work->opcode != IBV_WR_RDMA_WRITE && work->opcode != IBV_WR_RDMA_READ &&
        work->opcode != IBV_WR_SEND)
        return EOPNOTSUPP;
    if (work->send_flags & IBV_SEND_INLINE) return EOPNOTSUPP;
    order.work.id = work->wr_id;
    order.work.opcode = work->opcode;
    order.work.signaled = !!(work->send_flags & IBV_SEND_SIGNALED);
    order.work.remote = work->wr.rdma.remote_addr;
    order.work.key = work->wr.rdma.rkey;
    int error = pieces_of(&order.work, work->sg_list, work->num_sge);
    if (error) return error;
    tell_nic(&order, NULL, 0);
    pair->sends_posted++;
    return 0;
}

static int post_one_receive(struct pair *pair, const struct ibv_recv_wr *work) {
    struct order order = {.kind = ORDER_RECEIVE, .number = pair->base.qp_num};
    order.work.id = work->wr_id;
    int error = pieces_of(&order.work, work->sg_list, work->num_sge);
    if (error) return error;
    if (pair->base.state == IBV_QPS_RESET) return EINVAL;
    if (pair->receives_posted - pair->receives_done >= pair->capacity.max_recv_wr) return ENOMEM;
    tell_nic(&order, NULL, 0);
    pair->receives_posted++;
    return 0;
}

static int post_send(struct ibv_qp *qp, struct ibv_send_wr *work, struct ibv_send_wr **bad) {
    int error = 0;
    if (!has_nic()) {
        *bad = work;
        return ENODEV;
    }
    pthread_mutex_lock(&lock);
    while (work && !(error = post_one_send((struct pair *)qp, work))) work = work->next;
    pthread_mutex_unlock(&lock);
    if (error) *bad = work;
    return error;
}

static int post_receive(struct ibv_qp *qp, struct ibv_recv_wr *work, struct ibv_recv_wr **bad) {
    int error = 0;
    if (!has_nic()) {
        *bad = work;
        return ENODEV;
    }
    pthread_mutex_lock(&lock);
    while (work && !(error = post_one_receive((struct pair *)qp, work))) work = work->next;
    pthread_mutex_unlock(&lock);
    if (error) *bad = work;
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
