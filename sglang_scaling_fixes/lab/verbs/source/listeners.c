/* Where queue pairs are reached: one listening port for 256 of them.
 *
 * A queue pair's number holds that port (16 bits) and its index there (8 bits), so nobody has to
 * look a number up. No number is given twice.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "link.h"

enum { NUMBERS = 256 /* of one port */ };

struct listener {
    enum kind kind;
    int fd;
    uint16_t port;
    bool waits; /* for a file descriptor that somebody closes */
    uint32_t given, ended;
    struct listener *following;
};

static int epoll = -1;
static struct listener *listeners;

void listeners_start(int shared) { epoll = shared; }

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

static void listen_to(struct listener *listener, bool wanted) {
    listener->waits = !wanted;
    struct epoll_event events = {.events = wanted ? EPOLLIN : 0, .data.ptr = listener};
    epoll_ctl(epoll, EPOLL_CTL_MOD, listener->fd, &events);
}

void listener_ready(void *what) {
    struct listener *listener = what;
    int fd;
    if (listener->fd < 0) return;
    while ((fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0)
        link_accept(fd);
    if (errno == EMFILE || errno == ENFILE) listen_to(listener, false);
}

void listeners_work(void) {
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
}
