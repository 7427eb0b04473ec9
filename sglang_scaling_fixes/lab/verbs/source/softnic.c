/* The NIC of one process, as a process of its own: softnic PID, its orders on descriptor 3.
 *
 * It ends when that process ends. Until then it goes on by itself, whatever the process does:
 * a stopped process is written to, and its own writes go out. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "nic.h"

enum { TICK_MS = 10, LATE_MS = 100, TABLE = 4096 };

static FILE *log_file;
static struct context *contexts[TABLE]; /* by number; 0 is nobody's */
static struct cq *cqs[TABLE];

uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

void note(const char *format, ...) {
    if (!log_file) return;
    fprintf(log_file, "[%.3f] ", now_ns() / 1e9);
    va_list arguments;
    va_start(arguments, format);
    vfprintf(log_file, format, arguments);
    va_end(arguments);
    fputc('\n', log_file);
    fflush(log_file);
}

static uint32_t free_place(void *const *table) {
    uint32_t place = 1;
    while (place < TABLE && table[place]) place++;
    return place < TABLE ? place : 0;
}

static void *at(void *const *table, uint32_t number) {
    return number < TABLE ? table[number] : NULL;
}

/* ---- orders ------------------------------------------------------------------------------ */

static struct reply open_context(const struct order *order, int events) {
    uint32_t place = free_place((void **)contexts);
    if (!place || events < 0) return (struct reply){ENOMEM, 0};
    contexts[place] = malloc(sizeof **contexts);
    *contexts[place] = (struct context){order->open.address, events};
    return (struct reply){0, place};
}

static struct reply close_context(uint32_t number) {
    struct context *context = at((void **)contexts, number);
    if (!context) return (struct reply){EINVAL, 0};
    for (struct pair *pair = pair_first(); pair; pair = pair->following)
        if (pair->context == context) return (struct reply){EBUSY, 0};
    close(context->events);
    free(context);
    contexts[number] = NULL;
    return (struct reply){0, 0};
}

static struct reply make_cq(const struct order *order, int memory, int events) {
    uint32_t place = free_place((void **)cqs);
    if (!place || memory < 0) return (struct reply){ENOMEM, 0};
    cqs[place] = cq_add(memory, events, order->cq.cookie, order->cq.entries);
    return (struct reply){cqs[place] ? 0 : ENOMEM, place};
}

static struct reply destroy_cq(uint32_t number) {
    struct cq *cq = at((void **)cqs, number);
    if (!cq) return (struct reply){EINVAL, 0};
    for (struct pair *pair = pair_first(); pair; pair = pair->following)
        if (pair->send_cq == cq || pair->receive_cq == cq) return (struct reply){EBUSY, 0};
    cq_remove(cq);
    cqs[number] = NULL;
    return (struct reply){0, 0};
}

static struct reply make_pair(const struct order *order) {
    struct context *context = at((void **)contexts, order->pair.context);
    struct cq *send_cq = at((void **)cqs, order->pair.send_cq);
    struct cq *receive_cq = at((void **)cqs, order->pair.receive_cq);
    if (!context || !send_cq || !receive_cq) return (struct reply){EINVAL, 0};
    uint32_t number = link_number();
    if (!number) return (struct reply){ENOMEM, 0};
    pair_add(order, number, context, send_cq, receive_cq);
    return (struct reply){0, number};
}

static struct reply with_pair(const struct order *order) {
    struct pair *pair = pair_numbered(order->number);
    if (!pair) return (struct reply){EINVAL, 0};
    if (order->kind == ORDER_MODIFY) {
        bool done = pair_modify(pair, order);
        return (struct reply){done ? 0 : EINVAL, pair->state};
    }
    if (order->kind == ORDER_DESTROY_QP)
        pair_remove(pair);
    else if (order->kind == ORDER_SEND)
        pair_send(pair, &order->work);
    else
        pair_receive(pair, &order->work);
    return (struct reply){0, 0};
}

static struct reply carry_out(const struct order *order, const int fds[2]) {
    switch (order->kind) {
    case ORDER_OPEN:
        return open_context(order, fds[0]);
    case ORDER_CLOSE:
        return close_context(order->number);
    case ORDER_REGISTER:
        return (struct reply){0, region_add(order->region.address, order->region.length,
                                            order->region.domain, order->region.access)};
    case ORDER_DEREGISTER:
        note("key %x: ended", order->number);
        return (struct reply){region_remove(order->number) ? 0 : EINVAL, 0};
    case ORDER_CQ:
        return make_cq(order, fds[0], fds[1]);
    case ORDER_DESTROY_CQ:
        return destroy_cq(order->number);
    case ORDER_QP:
        return make_pair(order);
    default:
        return with_pair(order);
    }
}

static void take_orders(void) {
    for (;;) {
        struct order order;
        int fds[2] = {-1, -1};
        char control[CMSG_SPACE(sizeof fds)] = {0};
        struct iovec part = {&order, sizeof order};
        struct msghdr message = {
            .msg_iov = &part, .msg_iovlen = 1, .msg_control = control,
            .msg_controllen = sizeof control,
        };
        ssize_t got = recvmsg(CONTROL_FD, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (got != sizeof order) exit(0);
        struct cmsghdr *passed = CMSG_FIRSTHDR(&message);
        if (passed && passed->cmsg_type == SCM_RIGHTS)
            memcpy(fds, CMSG_DATA(passed), passed->cmsg_len - CMSG_LEN(0));
        struct reply reply = carry_out(&order, fds);
        if (order.kind == ORDER_SEND || order.kind == ORDER_RECEIVE) continue;
        if (send(CONTROL_FD, &reply, sizeof reply, MSG_NOSIGNAL) != sizeof reply) exit(0);
    }
}

/* ---- the loop ---------------------------------------------------------------------------- */

static void watch_fd(int epoll, int fd, void *what) {
    struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = what};
    if (fd < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &wanted)) exit(1);
}

/* An orphan in a session of its own, so that nobody waits for it or stops it with a group, and
 * with nothing open that is the application's. */
static void leave(void) {
    if (setsid() < 0) exit(1);
    signal(SIGPIPE, SIG_IGN);
    syscall(SYS_close_range, CONTROL_FD + 1, ~0u, 0);
    struct rlimit files; /* a queue pair takes two */
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    const char *prefix = getenv("SOFTVERBS_LOG");
    if (prefix) {
        char path[4096];
        snprintf(path, sizeof path, "%s.%d", prefix, getpid());
        log_file = fopen(path, "w");
    }
}

int main(int count, char **arguments) {
    if (count != 2) return 2;
    pid_t application = atoi(arguments[1]);
    pid_t own = fork(); /* the application waits for the first process only */
    if (own) return own < 0;
    leave();
    memory_of(application);
    int orders, death;
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    watch_fd(epoll, CONTROL_FD, &orders);
    watch_fd(epoll, syscall(SYS_pidfd_open, application, 0), &death);
    links_start(epoll);
    struct reply hello = {0, getpid()};
    if (send(CONTROL_FD, &hello, sizeof hello, MSG_NOSIGNAL) != sizeof hello) return 1;
    uint64_t last = now_ns();
    for (;;) {
        struct epoll_event events[64];
        int ready = epoll_wait(epoll, events, 64, TICK_MS);
        uint64_t now = now_ns();
        if (now - last > LATE_MS * 1000000ull) links_forgive(now - last);
        last = now;
        for (int i = 0; i < ready; i++) {
            if (events[i].data.ptr == &death) return 0;
            if (events[i].data.ptr == &orders)
                take_orders();
            else
                link_ready(events[i].data.ptr, events[i].events);
        }
        links_work(now_ns());
    }
}
