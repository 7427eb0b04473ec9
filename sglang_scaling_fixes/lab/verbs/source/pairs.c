/* Queue pairs: their states, their queues, and what is told of each work request's end. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nic.h"

static struct pair *pairs;

/* ---- completions ---------------------------------------------------------------------- */

struct cq *cq_add(int memory, int events, uint64_t cookie, uint32_t entries) {
    void *ring = mmap(NULL, sizeof(struct ring), PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    close(memory);
    if (ring == MAP_FAILED) return NULL;
    struct cq *cq = malloc(sizeof *cq);
    *cq = (struct cq){.cookie = cookie, .events = events, .entries = 1, .ring = ring};
    while (cq->entries < entries) cq->entries *= 2; /* as adapters do */
    return cq;
}

void cq_remove(struct cq *cq) {
    munmap(cq->ring, sizeof *cq->ring);
    if (cq->events >= 0) close(cq->events);
    free(cq);
}

static void event(struct pair *pair, uint32_t type) {
    struct event told = {.type = type, .number = pair->number};
    if (write(pair->context->events, &told, sizeof told) != sizeof told)
        note("pair %x: event %u was not told", pair->number, type);
}

/* Nobody looked: the queue is of no use any more, nor are its pairs. */
static void overrun(struct pair *pair, struct cq *cq) {
    cq->overrun = true;
    event(pair, EVENT_CQ_ERROR);
    for (struct pair *one = pairs; one; one = one->following)
        if (one->send_cq == cq || one->receive_cq == cq)
            pair_fail(one, STATUS_FLUSHED, "its completion queue is full");
}

static void complete(struct pair *pair, struct cq *cq, struct completion done) {
    struct ring *ring = cq->ring;
    uint32_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    if (cq->overrun) return;
    if (tail - atomic_load_explicit(&ring->head, memory_order_acquire) == cq->entries) {
        overrun(pair, cq);
        return;
    }
    done.cookie = pair->cookie;
    done.number = pair->number;
    ring->entry[tail % RING_ENTRIES] = done;
    atomic_store_explicit(&ring->tail, tail + 1, memory_order_release);
    if (cq->events >= 0 && atomic_exchange(&ring->armed, 0) &&
        write(cq->events, &cq->cookie, sizeof cq->cookie) < 0)
        note("pair %x: a completion event was not told", pair->number);
}

static void send_ends(struct pair *pair, uint32_t status) {
    struct request *request = &pair->sends[pair->sends_done++ % MAX_QUEUE];
    uint32_t opcode = request->work.opcode;
    if (status == STATUS_SUCCESS && !pair->signal_all && !request->work.signaled) return;
    complete(pair, pair->send_cq,
             (struct completion){
                 .id = request->work.id,
                 .status = status,
                 .opcode = opcode == WORK_READ ? DONE_READ
                           : opcode == WORK_SEND ? DONE_SEND
                                                 : DONE_WRITE,
                 .bytes = request->length,
                 .is_send = 1,
                 .sends_done = pair->sends_done,
             });
}

static void receive_ends(struct pair *pair, uint32_t status, uint32_t length) {
    const struct work *work = &pair->receives[pair->receives_done++ % MAX_QUEUE];
    pair->receive_fill = 0;
    complete(pair, pair->receive_cq,
             (struct completion){
                 .id = work->id, .status = status, .opcode = DONE_RECEIVE, .bytes = length});
}

void pair_received(struct pair *pair, uint32_t status) {
    receive_ends(pair, status, pair->receive_fill);
}

/* ---- queue pairs ---------------------------------------------------------------------- */

struct pair *pair_add(const struct order *order, uint32_t number, struct context *context,
                      struct cq *send_cq, struct cq *receive_cq) {
    struct pair *pair = calloc(1, sizeof *pair);
    pair->number = number;
    pair->cookie = order->pair.cookie;
    pair->domain = order->pair.domain;
    pair->signal_all = order->pair.signal_all;
    pair->context = context;
    pair->send_cq = send_cq;
    pair->receive_cq = receive_cq;
    pair->sends = calloc(MAX_QUEUE, sizeof *pair->sends);
    pair->receives = calloc(MAX_QUEUE, sizeof *pair->receives);
    pair->following = pairs;
    return pairs = pair;
}

static void disconnect(struct pair *pair, const char *why) {
    if (pair->out) link_close(pair->out, why);
    if (pair->in) link_close(pair->in, why);
}

void pair_remove(struct pair *pair) {
    note("pair %x: destroyed, %u requests under way", pair->number,
         pair->sends_posted - pair->sends_done);
    disconnect(pair, "destroyed");
    struct pair **place = &pairs;
    while (*place != pair) place = &(*place)->following;
    *place = pair->following;
    link_number_ended(pair->number);
    free(pair->sends);
    free(pair->receives);
    free(pair);
}

struct pair *pair_first(void) { return pairs; }

struct pair *pair_numbered(uint32_t number) {
    struct pair *pair = pairs;
    while (pair && pair->number != number) pair = pair->following;
    return pair;
}

bool pair_accepts(const struct pair *pair) {
    return pair->state == STATE_RTR || pair->state == STATE_RTS;
}

/* The first unfinished request ends with `status`; those behind it are flushed. */
void pair_fail(struct pair *pair, uint32_t status, const char *why) {
    if (pair->state == STATE_ERROR) return;
    note("pair %x: failed (%s), %u requests under way", pair->number, why,
         pair->sends_posted - pair->sends_done);
    pair->state = STATE_ERROR;
    disconnect(pair, why);
    for (; pair->sends_done != pair->sends_posted; status = STATUS_FLUSHED) send_ends(pair, status);
    while (pair->receives_done != pair->receives_posted) receive_ends(pair, STATUS_FLUSHED, 0);
}

void pair_refused(struct pair *pair, uint32_t type) {
    event(pair, type);
    pair_fail(pair, STATUS_FLUSHED, "refused its peer's packet");
}

static bool may_become(uint32_t from, uint32_t to) {
    switch (to) {
    case STATE_RESET:
    case STATE_ERROR:
        return true;
    case STATE_INIT:
        return from == STATE_RESET || from == STATE_INIT;
    case STATE_RTR:
        return from == STATE_INIT;
    default:
        return to == STATE_RTS && (from == STATE_RTR || from == STATE_RTS);
    }
}

bool pair_modify(struct pair *pair, const struct order *order) {
    uint32_t says = order->modify.mask;
    if (says & SAYS_STATE && !may_become(pair->state, order->modify.state)) return false;
    if (says & SAYS_ACCESS) pair->access = order->modify.access;
    if (says & SAYS_PATH) pair->peer_address = order->modify.peer_address;
    if (says & SAYS_PEER) pair->peer = order->modify.peer;
    if (says & SAYS_EXPECTED) pair->expected = order->modify.expected;
    if (says & SAYS_FIRST) pair->next = pair->sent = pair->acked = order->modify.first;
    if (says & SAYS_TIMEOUT) pair->timeout = order->modify.timeout;
    if (says & SAYS_RETRIES) pair->retries = order->modify.retries;
    if (!(says & SAYS_STATE)) return true;
    if (order->modify.state == STATE_ERROR) {
        pair_fail(pair, STATUS_FLUSHED, "told to");
    } else if (order->modify.state == STATE_RESET) {
        disconnect(pair, "reset");
        pair->sends_done = pair->sends_posted;
        pair->receives_done = pair->receives_posted;
        pair->receive_fill = 0;
        pair->met = false;
    }
    pair->state = order->modify.state;
    note("pair %x: state %u, peer %x", pair->number, pair->state, pair->peer);
    return true;
}

void pair_send(struct pair *pair, const struct work *work) {
    struct request *request = &pair->sends[pair->sends_posted++ % MAX_QUEUE];
    *request = (struct request){.work = *work, .first = pair->next, .packets = 1};
    for (uint32_t i = 0; i < work->pieces; i++) request->length += work->piece[i].length;
    if (work->opcode != WORK_READ && request->length)
        request->packets = (request->length + PACKET - 1) / PACKET;
    pair->next += request->packets;
    if (pair->state == STATE_ERROR) {
        send_ends(pair, STATUS_FLUSHED);
        return;
    }
    if (pair->sends_posted - pair->sends_done == 1) pair->progress_ns = now_ns();
    if (pair->out) link_pump(pair->out);
}

void pair_receive(struct pair *pair, const struct work *work) {
    pair->receives[pair->receives_posted++ % MAX_QUEUE] = *work;
    if (pair->state == STATE_ERROR) receive_ends(pair, STATUS_FLUSHED, 0);
}

struct request *pair_request(struct pair *pair, uint32_t sequence) {
    for (uint32_t i = pair->sends_done; i != pair->sends_posted; i++) {
        struct request *request = &pair->sends[i % MAX_QUEUE];
        if (sequence - request->first < request->packets) return request;
    }
    return NULL;
}

void pair_acked(struct pair *pair, uint32_t up_to) {
    if ((int32_t)(up_to - pair->acked) <= 0) return;
    pair->acked = up_to;
    pair->progress_ns = now_ns();
    while (pair->sends_done != pair->sends_posted) {
        const struct request *request = &pair->sends[pair->sends_done % MAX_QUEUE];
        if ((int32_t)(up_to - (request->first + request->packets)) < 0) break;
        send_ends(pair, STATUS_SUCCESS);
    }
}
