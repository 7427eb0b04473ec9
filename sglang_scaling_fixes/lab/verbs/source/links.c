/* The network: one TCP connection for each direction of a pair of queue pairs.
 *
 *   requester                                 responder
 *   connect, HELLO          ------------->    is that queue pair ready, and is it ours?
 *                           <-------------    WELCOME
 *   WRITE, SEND, READ       ------------->    key alive? lands, then
 *                           <-------------    ACK, DATA or NAK
 *
 * TCP stands for the loss-free order that an adapter makes by its own retries. A queue pair's
 * number holds the port where it is reached (16 bits) and its index there (8 bits).
 *
 * A network can hold packets that their sender has given up. `<device address>.hold` in the
 * folder $SOFTVERBS_FABRIC does so: packets for that device wait, whole, until the file is gone.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "nic.h"

enum {
    SOCKET_BUFFER = 64 * 1024, /* what a sender that dies may still have sent */
    RECEIVED = 256 * 1024,     /* read ahead; held packets may be much more */
    HELD = 256 * 1024 * 1024,
    RETRY_MS = 50,
    LOOK_MS = 100, /* at what TCP knows of a request without an answer */
    NUMBERS = 256, /* of one port */
    TIMEOUT_FACTOR = 4, /* an adapter may take up to four times its nominal time-out */
};

enum kind { LISTENER = 1, LINK };

struct listener {
    enum kind kind;
    int fd;
    uint16_t port;
    bool waits; /* for a file descriptor that somebody closes */
    uint32_t given, ended;
    struct listener *following;
};

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

static int epoll = -1;
static struct listener *listeners;
static struct link *links;

void links_start(int shared) { epoll = shared; }

/* ---- numbers and listeners -------------------------------------------------------------- */

static struct listener *listen_anew(void) {
    struct sockaddr_in here = {.sin_family = AF_INET};
    socklen_t size = sizeof here;
    int buffer = SOCKET_BUFFER;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return NULL;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    if (bind(fd, (struct sockaddr *)&here, size) || listen(fd, 1024) ||
        getsockname(fd, (struct sockaddr *)&here, &size)) {
        close(fd);
        return NULL;
    }
    struct listener *listener = calloc(1, sizeof *listener);
    *listener = (struct listener){
        .kind = LISTENER, .fd = fd, .port = ntohs(here.sin_port), .following = listeners};
    struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = listener};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &wanted);
    return listeners = listener;
}

uint32_t link_number(void) {
    struct listener *listener = listeners;
    if (!listener || listener->given == NUMBERS) listener = listen_anew();
    return listener ? (uint32_t)listener->port << 8 | listener->given++ : 0;
}

void link_number_ended(uint32_t number) {
    struct listener **place = &listeners;
    while (*place && (*place)->port != number >> 8) place = &(*place)->following;
    struct listener *listener = *place;
    if (!listener || ++listener->ended < NUMBERS) return; /* a number is never given twice */
    close(listener->fd); /* and so its port is not needed any more */
    listener->fd = -1;
}

/* ---- links ------------------------------------------------------------------------------ */

static struct link *link_add(int fd, bool requester, uint32_t own_address) {
    struct link *link = calloc(1, sizeof *link);
    int one = 1, buffer = SOCKET_BUFFER;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    link->kind = LINK;
    link->fd = fd;
    link->requester = requester;
    link->own_address = own_address;
    link->last_reading = &link->readings;
    link->awaits_room = requester;
    link->received_room = RECEIVED;
    link->received = malloc(RECEIVED);
    link->following = links;
    struct epoll_event wanted = {.events = EPOLLIN | (requester ? EPOLLOUT : 0), .data.ptr = link};
    epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &wanted);
    return links = link;
}

/* At once: what is not on the network yet never will be. */
void link_close(struct link *link, const char *why) {
    if (link->fd < 0) return;
    note("link of pair %x: closed (%s)", link->pair ? link->pair->number : 0, why);
    struct linger at_once = {1, 0};
    setsockopt(link->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(link->fd);
    link->fd = -1;
    if (!link->pair) return;
    if (link->pair->out == link) link->pair->out = NULL;
    if (link->pair->in == link) link->pair->in = NULL;
    link->pair = NULL;
}

static void link_free(struct link *link) {
    while (link->readings) {
        struct reading *reading = link->readings;
        link->readings = reading->following;
        free(reading);
    }
    free(link->received);
    free(link->sending);
    free(link);
}

static void await(struct link *link, bool room, bool full) {
    if ((link->awaits_room == room && link->full == full) || link->ended) return;
    link->awaits_room = room;
    link->full = full;
    struct epoll_event wanted = {
        .events = (full ? 0 : EPOLLIN) | (room ? EPOLLOUT : 0), .data.ptr = link};
    epoll_ctl(epoll, EPOLL_CTL_MOD, link->fd, &wanted);
}

static uint8_t *room_to_send(struct link *link, size_t size) {
    if (link->send_size + size > link->send_room) {
        link->send_room = (link->send_size + size) * 2;
        link->sending = realloc(link->sending, link->send_room);
    }
    uint8_t *room = link->sending + link->send_size;
    link->send_size += size;
    return room;
}

static void put(struct link *link, struct frame frame) {
    frame.magic = FRAME_MAGIC;
    memcpy(room_to_send(link, sizeof frame), &frame, sizeof frame);
}

static void connect_pair(struct pair *pair, uint64_t now) {
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr.s_addr = pair->context->address};
    struct sockaddr_in there = {
        .sin_family = AF_INET,
        .sin_port = htons(pair->peer >> 8),
        .sin_addr.s_addr = pair->peer_address,
    };
    pair->retry_ns = now + RETRY_MS * 1000000ull;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return;
    if (bind(fd, (struct sockaddr *)&here, sizeof here) ||
        (connect(fd, (struct sockaddr *)&there, sizeof there) && errno != EINPROGRESS)) {
        note("pair %x: cannot connect: %s", pair->number, strerror(errno));
        close(fd);
        return;
    }
    struct link *link = link_add(fd, true, pair->context->address);
    link->pair = pair;
    pair->out = link;
    pair->acked_bytes = 0;
    put(link, (struct frame){.kind = FRAME_HELLO, .source = pair->number, .target = pair->peer});
}

/* ---- sending ---------------------------------------------------------------------------- */

/* Reads a packet of the application's memory, across the request's pieces. */
static bool gather(const struct pair *pair, const struct work *work, uint32_t offset, uint8_t *into,
                   uint32_t length) {
    for (uint32_t i = 0; i < work->pieces && length; i++) {
        const struct piece *piece = &work->piece[i];
        if (offset >= piece->length) {
            offset -= piece->length;
            continue;
        }
        uint32_t part = piece->length - offset < length ? piece->length - offset : length;
        uint64_t address = piece->address + offset;
        if (!region_covers(piece->key, pair->domain, address, part, 0) ||
            !memory_read(address, into, part))
            return false;
        into += part;
        length -= part;
        offset = 0;
    }
    return length == 0;
}

static bool scatter(const struct pair *pair, const struct work *work, uint32_t offset,
                    const uint8_t *from, uint32_t length) {
    for (uint32_t i = 0; i < work->pieces && length; i++) {
        const struct piece *piece = &work->piece[i];
        if (offset >= piece->length) {
            offset -= piece->length;
            continue;
        }
        uint32_t part = piece->length - offset < length ? piece->length - offset : length;
        uint64_t address = piece->address + offset;
        if (!region_covers(piece->key, pair->domain, address, part, ACCESS_LOCAL_WRITE) ||
            !memory_write(address, from, part))
            return false;
        from += part;
        length -= part;
        offset = 0;
    }
    return length == 0;
}

static bool next_request_packet(struct link *link) {
    struct pair *pair = link->pair;
    if (!link->welcomed || pair->state != STATE_RTS || pair->sent == pair->next) return false;
    struct request *request = pair_request(pair, pair->sent);
    if (!request) return false;
    const struct work *work = &request->work;
    uint32_t index = pair->sent - request->first;
    uint32_t offset = index * PACKET;
    struct frame frame = {
        .magic = FRAME_MAGIC,
        .last = index + 1 == request->packets,
        .sequence = pair->sent,
        .total = index == 0 ? request->length : 0,
        .address = work->remote + offset,
        .key = work->key,
    };
    if (work->opcode == WORK_READ) {
        frame.kind = FRAME_READ;
        frame.length = request->length;
        put(link, frame);
    } else {
        frame.kind = work->opcode == WORK_SEND ? FRAME_SEND : FRAME_WRITE;
        frame.length = request->length - offset < PACKET ? request->length - offset : PACKET;
        uint8_t *room = room_to_send(link, sizeof frame + frame.length);
        memcpy(room, &frame, sizeof frame);
        if (!gather(pair, work, offset, room + sizeof frame, frame.length)) {
            pair_acked(pair, request->first);
            pair_fail(pair, STATUS_LOCAL_PROTECTION, "its own key is not alive");
            return false;
        }
    }
    pair->sent++;
    return true;
}

static void refuse(struct link *link, uint32_t sequence, uint32_t status);

static bool next_read_packet(struct link *link) {
    struct reading *reading = link->readings;
    if (!reading) return false;
    uint32_t left = reading->length - reading->offset;
    struct frame frame = {
        .magic = FRAME_MAGIC,
        .kind = FRAME_DATA,
        .sequence = reading->sequence,
        .address = reading->offset,
        .length = left < PACKET ? left : PACKET,
        .last = left <= PACKET,
    };
    uint64_t address = reading->address + reading->offset;
    bool covered = region_covers(reading->key, link->pair->domain, address, frame.length,
                                 ACCESS_REMOTE_READ);
    uint8_t *room = room_to_send(link, sizeof frame + frame.length);
    memcpy(room, &frame, sizeof frame);
    if (!covered || !memory_read(address, room + sizeof frame, frame.length)) {
        link->send_size -= sizeof frame + frame.length;
        refuse(link, reading->sequence, STATUS_REMOTE_ACCESS);
        return false;
    }
    reading->offset += frame.length;
    if (frame.last) {
        link->readings = reading->following;
        if (!link->readings) link->last_reading = &link->readings;
        free(reading);
    }
    return true;
}

void link_pump(struct link *link) {
    while (link->fd >= 0) {
        if (link->send_from < link->send_size) {
            ssize_t sent = send(link->fd, link->sending + link->send_from,
                                link->send_size - link->send_from, MSG_NOSIGNAL);
            if (sent >= 0) {
                link->send_from += sent;
            } else if (errno == EAGAIN || errno == ENOTCONN) {
                await(link, true, link->full);
                return;
            } else {
                link_close(link, strerror(errno));
            }
            continue;
        }
        link->send_from = link->send_size = 0;
        if (link->leaving) {
            shutdown(link->fd, SHUT_WR);
            await(link, false, link->full);
            return;
        }
        bool more = link->pair && (link->requester ? next_request_packet(link)
                                                   : next_read_packet(link));
        if (!more && link->fd >= 0 && link->send_size == 0) {
            await(link, false, link->full);
            return;
        }
    }
}

/* ---- receiving: the responder ------------------------------------------------------------- */

/* The peer learns of it, whatever becomes of the queue pair. */
static void refuse(struct link *link, uint32_t sequence, uint32_t status) {
    struct pair *pair = link->pair;
    put(link, (struct frame){.kind = FRAME_NAK, .sequence = sequence, .status = status});
    link->leaving = true;
    pair->in = NULL;
    link->pair = NULL;
    pair_refused(pair, status == STATUS_REMOTE_ACCESS ? EVENT_ACCESS_ERROR : EVENT_REQUEST_ERROR);
    link_pump(link);
}

static void on_hello(struct link *link, const struct frame *frame) {
    struct pair *pair = pair_numbered(frame->target);
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    if (!pair || !pair_accepts(pair) || pair->peer != frame->source || pair->in ||
        getpeername(link->fd, (struct sockaddr *)&peer, &size) ||
        peer.sin_addr.s_addr != pair->peer_address) {
        note("pair %x: no such queue pair, or not for %x", frame->target, frame->source);
        link_close(link, "refused");
        return;
    }
    link->pair = pair;
    link->own_address = pair->context->address;
    pair->in = link;
    put(link, (struct frame){.kind = FRAME_WELCOME});
}

/* A request is refused by its first packet, before a byte of it; a key may also end in its middle. */
static bool open_to(const struct pair *pair, const struct frame *frame, uint32_t access) {
    uint32_t length = frame->total > frame->length ? frame->total : frame->length;
    return pair->access & access &&
           region_covers(frame->key, pair->domain, frame->address, length, access);
}

static uint32_t land(struct pair *pair, const struct frame *frame, const uint8_t *payload) {
    if (frame->kind == FRAME_WRITE) {
        if (!open_to(pair, frame, ACCESS_REMOTE_WRITE)) return STATUS_REMOTE_ACCESS;
        return memory_write(frame->address, payload, frame->length) ? STATUS_SUCCESS
                                                                    : STATUS_REMOTE_OPERATION;
    }
    const struct work *work = &pair->receives[pair->receives_done % MAX_QUEUE];
    if (!scatter(pair, work, pair->receive_fill, payload, frame->length)) {
        pair_received(pair, STATUS_LOCAL_LENGTH);
        return STATUS_REMOTE_INVALID;
    }
    pair->receive_fill += frame->length;
    if (frame->last) pair_received(pair, STATUS_SUCCESS);
    return STATUS_SUCCESS;
}

/* What comes behind a read that is being answered waits, so that answers come in order; a message
 * waits for its receive. */
static bool must_wait(const struct link *link, const struct frame *frame) {
    const struct pair *pair = link->pair;
    return !link->requester && pair &&
           (link->readings || (frame->kind == FRAME_SEND &&
                               pair->receives_done == pair->receives_posted));
}

static void on_request(struct link *link, const struct frame *frame, const uint8_t *payload) {
    struct pair *pair = link->pair;
    if (!pair_accepts(pair) || frame->sequence != pair->expected) {
        link_close(link, "a packet out of order");
        return;
    }
    if (frame->kind == FRAME_READ) {
        if (!open_to(pair, frame, ACCESS_REMOTE_READ)) {
            refuse(link, frame->sequence, STATUS_REMOTE_ACCESS);
            return;
        }
        struct reading *reading = malloc(sizeof *reading);
        *reading = (struct reading){frame->address, frame->length, 0, frame->key,
                                    frame->sequence, NULL};
        *link->last_reading = reading;
        link->last_reading = &reading->following;
    } else {
        uint32_t status = land(pair, frame, payload);
        if (status != STATUS_SUCCESS) {
            refuse(link, frame->sequence, status);
            return;
        }
        if (frame->last)
            put(link, (struct frame){.kind = FRAME_ACK, .sequence = frame->sequence});
    }
    pair->expected++;
}

/* ---- receiving: the requester ------------------------------------------------------------- */

static void on_data(struct pair *pair, const struct frame *frame, const uint8_t *payload) {
    struct request *request = pair_request(pair, frame->sequence);
    if (!request || request->work.opcode != WORK_READ) return;
    pair->progress_ns = now_ns();
    if (!scatter(pair, &request->work, frame->address, payload, frame->length)) {
        pair_acked(pair, frame->sequence);
        pair_fail(pair, STATUS_LOCAL_PROTECTION, "its own key is not alive");
    } else if (frame->last) {
        pair_acked(pair, frame->sequence + 1);
    }
}

static void on_nak(struct pair *pair, const struct frame *frame) {
    note("pair %x: its peer refused packet %u with status %u", pair->number, frame->sequence,
         frame->status);
    const struct request *request = pair_request(pair, frame->sequence);
    if (request) pair_acked(pair, request->first);
    pair_fail(pair, frame->status, "refused by its peer");
}

/* ---- receiving ------------------------------------------------------------------------------ */

static void on_frame(struct link *link, const struct frame *frame, const uint8_t *payload) {
    if (frame->kind == FRAME_HELLO && !link->requester && !link->pair && !link->leaving) {
        on_hello(link, frame);
    } else if (!link->pair) {
        return; /* refused, and on its way out */
    } else if (!link->requester && (frame->kind == FRAME_WRITE || frame->kind == FRAME_SEND ||
                                    frame->kind == FRAME_READ)) {
        on_request(link, frame, payload);
    } else if (link->requester && frame->kind == FRAME_WELCOME) {
        link->welcomed = link->pair->met = true;
        link->pair->progress_ns = now_ns();
    } else if (link->requester && frame->kind == FRAME_ACK) {
        pair_acked(link->pair, frame->sequence + 1);
    } else if (link->requester && frame->kind == FRAME_DATA) {
        on_data(link->pair, frame, payload);
    } else if (link->requester && frame->kind == FRAME_NAK) {
        on_nak(link->pair, frame);
    } else {
        link_close(link, "a frame that is not for it");
    }
}

static bool held(const struct link *link) {
    const char *folder = getenv("SOFTVERBS_FABRIC");
    if (!folder || link->requester || !link->pair) return false;
    struct in_addr address = {link->own_address};
    char path[4096];
    snprintf(path, sizeof path, "%s/%s.hold", folder, inet_ntoa(address));
    return access(path, F_OK) == 0;
}

static void take_frames(struct link *link) {
    size_t from = 0;
    while (link->fd >= 0 && link->received_size - from >= sizeof(struct frame)) {
        struct frame frame;
        memcpy(&frame, link->received + from, sizeof frame);
        bool carries = frame.kind == FRAME_WRITE || frame.kind == FRAME_SEND ||
                       frame.kind == FRAME_DATA;
        size_t payload = carries ? frame.length : 0;
        if (frame.magic != FRAME_MAGIC || payload > PACKET) {
            link_close(link, "not a frame");
            break;
        }
        if (link->received_size - from < sizeof frame + payload) break;
        if (held(link) || must_wait(link, &frame)) break;
        on_frame(link, &frame, link->received + from + sizeof frame);
        from += sizeof frame + payload;
    }
    if (link->fd < 0) return;
    memmove(link->received, link->received + from, link->received_size - from);
    link->received_size -= from;
    if (link->ended && !held(link)) {
        link_close(link, "its peer closed it");
        return;
    }
    if (link->full && link->received_size < link->received_room) await(link, link->awaits_room, false);
    link_pump(link);
}

static void receive(struct link *link) {
    while (link->fd >= 0 && !link->ended) {
        if (link->received_size == link->received_room) {
            take_frames(link);
            if (link->fd < 0) return;
            if (link->received_size == link->received_room) { /* they are held */
                if (link->received_room >= HELD) {
                    await(link, link->awaits_room, true);
                    return;
                }
                link->received_room *= 2;
                link->received = realloc(link->received, link->received_room);
            }
        }
        ssize_t got = recv(link->fd, link->received + link->received_size,
                           link->received_room - link->received_size, 0);
        if (got > 0) {
            link->received_size += got;
        } else if (got < 0 && errno == EAGAIN) {
            break;
        } else {
            link->ended = true; /* what it sent before may be held on the network */
            epoll_ctl(epoll, EPOLL_CTL_DEL, link->fd, NULL);
        }
    }
    if (link->fd >= 0) take_frames(link);
}

static void listen_to(struct listener *listener, bool wanted) {
    listener->waits = !wanted;
    struct epoll_event events = {.events = wanted ? EPOLLIN : 0, .data.ptr = listener};
    epoll_ctl(epoll, EPOLL_CTL_MOD, listener->fd, &events);
}

static void accept_all(struct listener *listener) {
    int fd;
    if (listener->fd < 0) return;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
        link_add(fd, false, 0);
    if (errno == EMFILE || errno == ENFILE) listen_to(listener, false);
}

void link_ready(void *what, uint32_t events) {
    if (*(enum kind *)what == LISTENER) {
        accept_all(what);
        return;
    }
    struct link *link = what;
    if (link->fd >= 0 && events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(link);
    if (link->fd >= 0 && events & EPOLLOUT) link_pump(link);
}

/* ---- time ----------------------------------------------------------------------------------- */

/* How long a request may go without progress: the specification's 4.096 us * 2^timeout for each
 * try, or $SOFTVERBS_PATIENCE_MS. */
static uint64_t patience_ns(const struct pair *pair) {
    const char *said = getenv("SOFTVERBS_PATIENCE_MS");
    if (said) return strtoull(said, NULL, 10) * 1000000ull;
    if (!pair->timeout) return UINT64_MAX / 2;
    return (4096ull << pair->timeout) * (pair->retries + 1) * TIMEOUT_FACTOR;
}

/* Bytes that reached the peer's machine are progress: its NIC may wait for a core. */
static void see_progress(struct pair *pair, uint64_t now) {
    struct tcp_info info = {0};
    socklen_t size = sizeof info;
    if (!pair->met || !pair->out || now < pair->progress_ns + LOOK_MS * 1000000ull) return;
    if (getsockopt(pair->out->fd, IPPROTO_TCP, TCP_INFO, &info, &size)) return;
    if (info.tcpi_bytes_acked > pair->acked_bytes) {
        pair->acked_bytes = info.tcpi_bytes_acked;
        pair->progress_ns = now;
    }
}

static void watch(struct pair *pair, uint64_t now) {
    if (pair->state != STATE_RTS || pair->sends_done == pair->sends_posted) return;
    see_progress(pair, now);
    if (now > pair->progress_ns && now - pair->progress_ns > patience_ns(pair))
        pair_fail(pair, STATUS_RETRIES_EXCEEDED, "no answer from its peer");
    else if (!pair->out && !pair->met && now >= pair->retry_ns)
        connect_pair(pair, now);
    else if (pair->out)
        link_pump(pair->out);
}

void links_forgive(uint64_t ns) {
    for (struct pair *pair = pair_first(); pair; pair = pair->following) pair->progress_ns += ns;
}

void links_work(uint64_t now) {
    for (struct pair *pair = pair_first(); pair; pair = pair->following) watch(pair, now);
    for (struct link *link = links; link; link = link->following)
        if (link->fd >= 0 && (link->received_size || link->ended)) take_frames(link);
    for (struct listener **place = &listeners; *place;) {
        struct listener *listener = *place;
        if (listener->fd >= 0) {
            if (listener->waits) listen_to(listener, true);
            place = &listener->following;
        } else {
            *place = listener->following;
            free(listener);
        }
    }
    for (struct link **place = &links; *place;) {
        struct link *link = *place;
        if (link->fd >= 0) {
            place = &link->following;
        } else {
            *place = link->following;
            link_free(link);
        }
    }
}
