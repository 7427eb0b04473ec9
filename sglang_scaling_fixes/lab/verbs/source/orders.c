/* The NIC of this process: started with the first device, told and asked over a socket. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <libgen.h>
#include <limits.h>
#include <poll.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "library.h"

pthread_mutex_t order_lock = PTHREAD_MUTEX_INITIALIZER;
static int control = -1;
static pid_t owner; /* of `control`: a forked child has no NIC */

/* Without its NIC a process would see nothing land, and take that for a proof. */
static void nic_is_gone(void) {
    fprintf(stderr, "softverbs: the NIC of process %d is gone\n", getpid());
    abort();
}

static void *watch_nic(void *unused) {
    struct pollfd end = {.fd = control, .events = POLLRDHUP};
    while (poll(&end, 1, -1) < 0 && errno == EINTR) continue;
    nic_is_gone();
    return unused;
}

int nic_start(void) {
    Dl_info here;
    char library[PATH_MAX], program[PATH_MAX + 16], pid[16];
    int ends[2], size = 1 << 20, status;
    if (!dladdr((void *)&nic_start, &here) || !realpath(here.dli_fname, library)) return ENOENT;
    snprintf(program, sizeof program, "%s/softnic", dirname(library));
    snprintf(pid, sizeof pid, "%d", getpid());
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends)) return errno;
    setsockopt(ends[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    /* Twice: to its own number dup2 keeps the close-on-exec mark. */
    posix_spawn_file_actions_adddup2(&actions, ends[1], CONTROL_FD + 1);
    posix_spawn_file_actions_adddup2(&actions, CONTROL_FD + 1, CONTROL_FD);
    pid_t child;
    int failed = posix_spawn(&child, program, &actions, NULL,
                             (char *[]){"softnic", pid, NULL}, environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    struct reply hello;
    if (!failed) waitpid(child, &status, 0);
    if (failed || recv(ends[0], &hello, sizeof hello, 0) != sizeof hello) {
        close(ends[0]);
        return failed ? failed : EIO;
    }
    prctl(PR_SET_PTRACER, hello.value, 0, 0, 0); /* it reads and writes our memory */
    control = ends[0];
    owner = getpid();
    pthread_t watcher;
    if (!pthread_create(&watcher, NULL, watch_nic, NULL)) pthread_detach(watcher);
    return 0;
}

void nic_tell(const struct order *order, const int *fds, int count) {
    char space[CMSG_SPACE(2 * sizeof(int))] = {0};
    struct iovec part = {(void *)order, sizeof *order};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    if (count) {
        message.msg_control = space;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        struct cmsghdr *passed = CMSG_FIRSTHDR(&message);
        passed->cmsg_level = SOL_SOCKET;
        passed->cmsg_type = SCM_RIGHTS;
        passed->cmsg_len = CMSG_LEN(count * sizeof(int));
        memcpy(CMSG_DATA(passed), fds, count * sizeof(int));
    }
    ssize_t sent;
    do sent = sendmsg(control, &message, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent != sizeof *order) nic_is_gone();
}

/* Before any lock is taken: in a forked child somebody else may have held it. */
bool nic_there(void) { return control >= 0 && owner == getpid(); }

int nic_ask_with(const struct order *order, const int *fds, int count, uint32_t *value) {
    struct reply reply;
    ssize_t got;
    if (!nic_there()) return ENODEV;
    pthread_mutex_lock(&order_lock);
    nic_tell(order, fds, count);
    do got = recv(control, &reply, sizeof reply, 0);
    while (got < 0 && errno == EINTR);
    if (got != sizeof reply) nic_is_gone();
    pthread_mutex_unlock(&order_lock);
    if (value) *value = reply.value;
    return reply.error;
}

int nic_ask(const struct order *order, uint32_t *value) {
    return nic_ask_with(order, NULL, 0, value);
}
