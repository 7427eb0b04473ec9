/* Completion queues and queue pairs: rings that the NIC fills, and orders to it. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "library.h"

static struct pair *pairs; /* under the orders' lock */

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
                                   : nic_ask_with(&order, fds, channel ? 2 : 1, &queue->number);
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
    int error = nic_ask(&order, NULL);
    if (error) return error;
    munmap(queue->ring, sizeof *queue->ring);
    free(queue);
    return 0;
}

int poll_cq(struct ibv_cq *base, int room, struct ibv_wc *found) {
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

static void withdraw_from(struct queue *queue, const struct pair *pair) {
    pthread_mutex_lock(&queue->lock);
    uint32_t tail = atomic_load_explicit(&queue->ring->tail, memory_order_acquire);
    for (uint32_t place = queue->ring->head; place != tail; place++) {
        struct completion *done = &queue->ring->entry[place % RING_ENTRIES];
        if (done->cookie == (uintptr_t)pair) done->cookie = 0;
    }
    pthread_mutex_unlock(&queue->lock);
}

/* Completions of a queue pair that is reset or gone are never seen. */
static void withdraw(const struct pair *pair) {
    withdraw_from((struct queue *)pair->base.send_cq, pair);
    withdraw_from((struct queue *)pair->base.recv_cq, pair);
}

int request_event(struct ibv_cq *base, int solicited_only) {
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
        pthread_mutex_lock(&order_lock);
        struct pair *pair = pairs;
        while (pair && pair->base.qp_num != event.number) pair = pair->following;
        pthread_mutex_unlock(&order_lock);
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
    int error = nic_ask(&order, &pair->base.qp_num);
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
    pthread_mutex_lock(&order_lock);
    pair->following = pairs;
    pairs = pair;
    pthread_mutex_unlock(&order_lock);
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
    order.modify.mask = mask;
    order.modify.state = said->qp_state;
    order.modify.access = said->qp_access_flags;
    memcpy(&order.modify.peer_address, said->ah_attr.grh.dgid.raw + 12, 4);
    order.modify.peer = said->dest_qp_num;
    order.modify.expected = said->rq_psn;
    order.modify.first = said->sq_psn;
    order.modify.timeout = said->timeout;
    order.modify.retries = said->retry_cnt;
    uint32_t state;
    int error = nic_ask(&order, &state);
    if (error) return error;
    remember(&pair->attributes, said, mask);
    base->state = state;
    if (state == IBV_QPS_RESET) {
        withdraw(pair);
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
    int error = nic_ask(&order, &state);
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
    int error = nic_ask(&order, NULL);
    if (error) return error;
    withdraw(pair);
    pthread_mutex_lock(&order_lock);
    struct pair **place = &pairs;
    while (*place != pair) place = &(*place)->following;
    *place = pair->following;
    pthread_mutex_unlock(&order_lock);
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
    nic_tell(&order, NULL, 0);
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
    nic_tell(&order, NULL, 0);
    pair->receives_posted++;
    return 0;
}

int post_send(struct ibv_qp *qp, struct ibv_send_wr *work, struct ibv_send_wr **bad) {
    int error = 0;
    if (!nic_there()) {
        *bad = work;
        return ENODEV;
    }
    pthread_mutex_lock(&order_lock);
    while (work && !(error = post_one_send((struct pair *)qp, work))) work = work->next;
    pthread_mutex_unlock(&order_lock);
    if (error) *bad = work;
    return error;
}

int post_receive(struct ibv_qp *qp, struct ibv_recv_wr *work, struct ibv_recv_wr **bad) {
    int error = 0;
    if (!nic_there()) {
        *bad = work;
        return ENODEV;
    }
    pthread_mutex_lock(&order_lock);
    while (work && !(error = post_one_receive((struct pair *)qp, work))) work = work->next;
    pthread_mutex_unlock(&order_lock);
    if (error) *bad = work;
    return error;
}
