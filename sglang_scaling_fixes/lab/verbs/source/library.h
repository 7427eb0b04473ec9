/* What the files of the library share: libibverbs.c (devices, memory), queues.c (completions, queue
 * pairs), orders.c (the NIC). */
#ifndef SOFTVERBS_LIBRARY_H
#define SOFTVERBS_LIBRARY_H

#include <infiniband/verbs.h>
#undef ibv_get_device_list
#undef ibv_query_port
#undef ibv_reg_mr

#include <pthread.h>
#include <stdbool.h>

#include "wire.h"

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

/* orders.c. One order at a time; to post is one as well, and waits for no answer. */
extern pthread_mutex_t order_lock;
int nic_start(void); /* under the lock, unless there is one; an errno */
bool nic_there(void); /* looked at before any lock: in a forked child nobody lets go of it */
void nic_tell(const struct order *order, const int *fds, int count); /* under the lock */
int nic_ask(const struct order *order, uint32_t *value); /* an errno */
int nic_ask_with(const struct order *order, const int *fds, int count, uint32_t *value);

/* queues.c: what is reached through a context's operations */
int poll_cq(struct ibv_cq *cq, int room, struct ibv_wc *found);
int request_event(struct ibv_cq *cq, int solicited_only);
int post_send(struct ibv_qp *qp, struct ibv_send_wr *work, struct ibv_send_wr **bad);
int post_receive(struct ibv_qp *qp, struct ibv_recv_wr *work, struct ibv_recv_wr **bad);

#endif
