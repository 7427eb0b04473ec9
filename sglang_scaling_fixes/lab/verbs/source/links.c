/* The network: one TCP connection for each direction of a pair of queue pairs, made by the
 * requester. TCP stands for the loss-free order that an adapter makes by its own retries.
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

#include "link.h"

enum {
    RECEIVED = 256 * 1024,     /* read ahead; held packets may be much more */
    HELD = 256 * 1024 * 1024,
    RETRY_MS = 50,
    LOOK_MS = 100, /* at what TCP knows of a request without an answer */
    TIMEOUT_FACTOR = 4, /* an adapter may take up to four times its nominal time-out */
};

static int epoll = -1;
static struct link *links;

void links_start(int shared) {
    epoll = shared;
    listeners_start(shared);
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

void link_accept(int fd) { link_add(fd, false, 0); }

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

uint8_t *link_room(struct link *link, size_t size) {
    if (link->send_size + size > link->send_room) {
        link->send_room = (link->send_size + size) * 2;
        link->sending = realloc(link->sending, link->send_room);
    }
    uint8_t *room = link->sending + link->send_size;
    link->send_size += size;
    return room;
}

void link_put(struct link *link, struct frame frame) {
    frame.magic = FRAME_MAGIC;
    memcpy(link_room(link, sizeof frame), &frame, sizeof frame);
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
    link_put(link, (struct frame){.kind = FRAME_HELLO, .source = pair->number, .target = pair->peer});
}

/* ---- sending ---------------------------------------------------------------------------- */

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
        if (!packet_next(link) && link->fd >= 0 && link->send_size == 0) {
            await(link, false, link->full);
            return;
        }
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
        if (held(link) || packet_must_wait(link, &frame)) break;
        packet_take(link, &frame, link->received + from + sizeof frame);
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

void link_ready(void *what, uint32_t events) {
    if (*(enum kind *)what == LISTENER) {
        listener_ready(what);
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
    listeners_work();
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
