/* The NIC's own objects. One thread, so no locks: an order is carried out between packets,
 * which makes the end of a key or of a queue pair an exact fence. */
#ifndef SOFTVERBS_NIC_H
#define SOFTVERBS_NIC_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "wire.h"

/* The values of enum ibv_wc_status, ibv_qp_state, ibv_qp_attr_mask, ibv_event_type, ibv_access_flags, ibv_wr_opcode
 * and ibv_wc_opcode that are used here (InfiniBand Architecture Specification, volume 1; the
 * numbers are the ABI of libibverbs). This half is compiled without verbs.h. */
enum {
    STATUS_SUCCESS = 0, STATUS_LOCAL_LENGTH = 1, STATUS_LOCAL_PROTECTION = 4, STATUS_FLUSHED = 5,
    STATUS_REMOTE_INVALID = 9, STATUS_REMOTE_ACCESS = 10, STATUS_REMOTE_OPERATION = 11,
    STATUS_RETRIES_EXCEEDED = 12,
    STATE_RESET = 0, STATE_INIT = 1, STATE_RTR = 2, STATE_RTS = 3, STATE_ERROR = 6,
    SAYS_STATE = 1 << 0, SAYS_ACCESS = 1 << 3, SAYS_PATH = 1 << 7, SAYS_TIMEOUT = 1 << 9,
    SAYS_RETRIES = 1 << 10, SAYS_EXPECTED = 1 << 12, SAYS_FIRST = 1 << 16, SAYS_PEER = 1 << 20,
    EVENT_CQ_ERROR = 0, EVENT_REQUEST_ERROR = 2, EVENT_ACCESS_ERROR = 3,
    ACCESS_LOCAL_WRITE = 1, ACCESS_REMOTE_WRITE = 2, ACCESS_REMOTE_READ = 4,
    WORK_WRITE = 0, WORK_SEND = 2, WORK_READ = 4,
    DONE_SEND = 0, DONE_WRITE = 1, DONE_READ = 2, DONE_RECEIVE = 128,
};

struct context {
    uint32_t address; /* network order */
    int events;       /* write end of a pipe */
};

struct cq {
    uint64_t cookie;
    int events;
    uint32_t entries;
    bool overrun;
    struct ring *ring;
};

struct request { /* in a send queue */
    struct work work;
    uint32_t length;
    uint32_t first, packets; /* sequence numbers of its packets */
};

/* A queue pair. The requester's half counts packets:
 *
 *      acked          sent              next
 *   ----|---------------|-----------------|---->  sequence
 *    landed   in flight    posted, not read yet
 */
struct pair {
    uint32_t number, domain, state, access, peer, signal_all;
    uint32_t peer_address; /* network order */
    uint64_t cookie;
    struct context *context;
    struct cq *send_cq, *receive_cq;
    uint32_t next, sent, acked;
    struct request *sends; /* MAX_QUEUE of them, from `sends_done` on */
    uint32_t sends_posted, sends_done;
    uint32_t expected; /* the responder's half: the next packet */
    struct work *receives;
    uint32_t receives_posted, receives_done;
    uint32_t receive_fill; /* bytes in the first receive */
    struct link *out, *in; /* as requester, as responder */
    bool met;              /* the peer has welcomed us once */
    uint64_t progress_ns, retry_ns, patience_ns, acked_bytes;
    uint32_t timeout, retries;
    struct pair *following;
};

/* memory.c: keys, and the application's memory */
void memory_of(pid_t application);
uint32_t region_add(uint64_t address, uint64_t length, uint32_t domain, uint32_t access);
bool region_remove(uint32_t key);
bool region_covers(uint32_t key, uint32_t domain, uint64_t address, uint64_t length,
                   uint32_t access);
bool memory_read(uint64_t address, void *into, size_t length);
bool memory_write(uint64_t address, const void *from, size_t length);

/* pairs.c: queue pairs and completions */
struct cq *cq_add(int memory, int events, uint64_t cookie, uint32_t entries);
void cq_remove(struct cq *cq);
struct pair *pair_add(const struct order *order, uint32_t number, struct context *context,
                      struct cq *send_cq, struct cq *receive_cq);
void pair_remove(struct pair *pair);
struct pair *pair_numbered(uint32_t number);
struct pair *pair_first(void);
bool pair_modify(struct pair *pair, const struct order *order); /* false: not from this state */
void pair_send(struct pair *pair, const struct work *work);
void pair_receive(struct pair *pair, const struct work *work);
void pair_acked(struct pair *pair, uint32_t up_to); /* packets before `up_to` have landed */
void pair_fail(struct pair *pair, uint32_t status, const char *why);
void pair_refused(struct pair *pair, uint32_t event); /* it refused a packet of its peer */
void pair_received(struct pair *pair, uint32_t status);
struct request *pair_request(struct pair *pair, uint32_t sequence);
bool pair_accepts(const struct pair *pair);

/* listeners.c: where queue pairs are reached */
uint32_t link_number(void); /* a number for a queue pair that can be reached at it; 0: none */
void link_number_ended(uint32_t number);

/* links.c: the network */
void links_start(int epoll);
void link_close(struct link *link, const char *why);
void links_work(uint64_t now); /* time-outs, connections, what is held or waits to be sent */
void link_pump(struct link *link);
void link_ready(void *what, uint32_t events);
void links_forgive(uint64_t ns); /* nobody could make progress for so long: we had no CPU */

/* softnic.c */
uint64_t now_ns(void);
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
