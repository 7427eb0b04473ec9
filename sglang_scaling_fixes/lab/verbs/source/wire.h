/* What the library and its NIC say to each other, and one NIC to another.
 *
 *   application                                      another machine, or this one
 *   +------------------+   orders (socket)   +---------+   frames (TCP)   +---------+
 *   | libibverbs.so.1  | ------------------> | softnic | ---------------> | softnic |
 *   | completion rings | <---- (memfd) ----- |         |                  |         |
 *   | memory           | <- process_vm_* --- |         |                  |         |
 *   +------------------+                     +---------+                  +---------+
 *
 * The NIC is a process of its own, because a real one is: it goes on writing while the
 * application is stopped. All numbers are in the byte order of the machine.
 */
#ifndef SOFTVERBS_WIRE_H
#define SOFTVERBS_WIRE_H

#include <stdatomic.h>
#include <stdint.h>

enum { MAX_PIECES = 4, CONTROL_FD = 3, MAX_QUEUE = 8192, RING_ENTRIES = 1 << 16 };

/* ---- orders: one SOCK_SEQPACKET message each ---------------------------------------- */

enum order_kind {
    ORDER_OPEN = 1,   /* fds: the end of the pipe to write asynchronous events to */
    ORDER_CLOSE,      /* number: what ORDER_OPEN answered */
    ORDER_REGISTER,   /* answers the key, local and remote alike */
    ORDER_DEREGISTER, /* number: a key; no byte lands under it after the answer */
    ORDER_CQ,         /* fds: the ring's memory, the end of the pipe of events; answers a number */
    ORDER_DESTROY_CQ,
    ORDER_QP, /* answers the queue pair number */
    ORDER_MODIFY,
    ORDER_DESTROY_QP, /* no completion comes, and no byte lands, after the answer */
    ORDER_SEND,       /* not answered, nor is ORDER_RECEIVE */
    ORDER_RECEIVE,
};

struct piece {
    uint64_t address;
    uint32_t length;
    uint32_t key;
};

struct work {
    uint64_t id;     /* the caller's wr_id */
    uint64_t remote; /* address of a read or a write */
    uint32_t key;    /* the remote one */
    uint32_t opcode; /* an enum ibv_wr_opcode */
    uint32_t signaled;
    uint32_t pieces;
    struct piece piece[MAX_PIECES];
};

struct order {
    uint32_t kind;
    uint32_t number;
    union {
        struct {
            uint32_t address; /* IPv4, network order: the device's GID */
        } open;
        struct {
            uint64_t address, length;
            uint32_t domain, access;
        } region;
        struct {
            uint64_t cookie; /* comes back in events */
            uint32_t entries;
        } cq;
        struct {
            uint64_t cookie;
            uint32_t context, domain, send_cq, receive_cq, signal_all;
        } pair;
        struct {
            uint32_t mask; /* which of these are said: an enum ibv_qp_attr_mask */
            uint32_t state, access, peer, peer_address, expected, first, timeout, retries;
        } modify;
        struct work work;
    };
};

struct reply {
    int32_t error; /* an errno; 0: done */
    uint32_t value;
};

struct event {
    uint32_t type;   /* an enum ibv_event_type */
    uint32_t number; /* of a queue pair; no number is given twice */
};

/* ---- completion ring: written by the NIC at `tail`, read by the library at `head` ----- */

struct completion {
    uint64_t id;
    uint64_t cookie; /* of the queue pair; 0: withdrawn, since that was destroyed */
    uint32_t status, opcode, bytes, number;
    uint32_t is_send;
    uint32_t sends_done; /* work requests of the send queue that ended so far, this one too */
};

struct ring {
    _Atomic uint32_t head, tail; /* count on; an entry's place is the count modulo the size */
    _Atomic uint32_t armed;      /* the next completion is an event, too */
    uint32_t padding;
    struct completion entry[RING_ENTRIES];
};

/* ---- frames: between two NICs, the payload behind them -------------------------------- */

enum { PACKET = 16 * 1024, FRAME_MAGIC = 0x53564232 };

enum frame_kind {
    FRAME_HELLO = 1, /* requester: I am queue pair `source`, yours is `target` */
    FRAME_WELCOME,   /* responder: go on */
    FRAME_WRITE,
    FRAME_SEND,
    FRAME_READ, /* asks for `length` bytes; they come as FRAME_DATA */
    FRAME_DATA,
    FRAME_ACK, /* everything up to `sequence` has landed */
    FRAME_NAK, /* `sequence` was refused with `status`, and what follows it is lost */
};

struct frame {
    uint32_t magic;
    uint8_t kind;
    uint8_t last; /* of its work request */
    uint16_t status;
    uint32_t sequence; /* of the packet */
    uint32_t length;   /* of the payload; of a read, of what is asked for */
    uint64_t address;  /* remote address; of FRAME_DATA, the offset in the request */
    uint32_t key;
    uint32_t source, target;
    uint32_t total; /* of the request, in its first packet; 0 in the others */
};

_Static_assert(sizeof(struct frame) == 40, "the frame has no holes");

#endif
