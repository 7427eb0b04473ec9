/* What the files of the network share: links.c (connections), packets.c (what is on them),
 * listeners.c (where they are accepted). */
#ifndef SOFTVERBS_LINK_H
#define SOFTVERBS_LINK_H

#include "nic.h"

enum { SOCKET_BUFFER = 64 * 1024 }; /* what a sender that dies may still have sent */

enum kind { LISTENER = 1, LINK }; /* what epoll tells of; the first member of either */

struct reading { /* a peer's read: what is still to be sent of it */
    uint64_t address;
    uint32_t length, offset, key, sequence;
    struct reading *following;
};

struct link {
    enum kind kind;
    int fd; /* -1: closed */
    bool requester, welcomed, ended, leaving; /* ended by the peer; to be closed when all is sent */
    bool awaits_room, full;
    uint32_t own_address; /* of the device, network order */
    struct pair *pair;
    struct reading *readings, **last_reading;
    uint8_t *received, *sending;
    size_t received_size, received_room, send_from, send_size, send_room;
    struct link *following;
};

/* links.c */
void link_accept(int fd);
void link_put(struct link *link, struct frame frame);
uint8_t *link_room(struct link *link, size_t size); /* where bytes to be sent are written */

/* packets.c */
bool packet_next(struct link *link); /* puts the next one to be sent; false: there is none */
bool packet_must_wait(const struct link *link, const struct frame *frame);
void packet_take(struct link *link, const struct frame *frame, uint8_t *payload);

/* listeners.c */
void listeners_start(int epoll);
void listeners_work(void);
void listener_ready(void *listener);

#endif
