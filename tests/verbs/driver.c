/* Calls libibverbs as its lines of standard input say, and answers each with a line.
 *
 *   memory SIZE              -> ADDRESS        the memory of this process, all zero
 *   fill BYTE | count BYTE   -> 0 | COUNT
 *   open N                   -> 0              device N; all below are its
 *   register ACCESS          -> KEY            all of the memory
 *   deregister KEY           -> ERROR
 *   pair DEPTH [ENTRIES]     -> NUMBER         a queue pair and its own completion queue
 *   meet NUMBER ADDRESS ACCESS -> ERROR        of the last pair: to that peer, up to RTS
 *   become STATE             -> ERROR
 *   fail | reset | destroy   -> ERROR
 *   state                    -> STATE
 *   write|read|send KEY REMOTE-ADDRESS REMOTE-KEY OFFSET LENGTH ID  -> ERROR
 *   receive KEY OFFSET LENGTH ID                                    -> ERROR
 *   poll COUNT MILLISECONDS  -> ID:STATUS ...  until so many, or so long
 *   event MILLISECONDS       -> TYPE           an asynchronous event; -1: none
 *   handles                  -> COUNT          of files below /dev/infiniband
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static struct ibv_context *context;
static struct ibv_pd *domain;
static struct ibv_cq *cq;
static struct ibv_qp *qp;
static struct ibv_mr *regions[64];
static int region_count;
static unsigned char *memory;
static size_t size;

static uint64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000ull + now.tv_nsec / 1000000;
}

static void open_device(int number) {
    int count;
    struct ibv_device **devices = ibv_get_device_list(&count);
    context = number < count ? ibv_open_device(devices[number]) : NULL;
    if (!context) exit(3);
    domain = ibv_alloc_pd(context);
    ibv_free_device_list(devices);
}

static uint32_t make_pair(int depth, int entries) {
    cq = ibv_create_cq(context, entries, NULL, NULL, 0);
    struct ibv_qp_init_attr asked = {
        .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .sq_sig_all = 1,
        .cap = {.max_send_wr = depth, .max_recv_wr = depth, .max_send_sge = 1, .max_recv_sge = 1},
    };
    qp = ibv_create_qp(domain, &asked);
    if (!qp) exit(4);
    return qp->qp_num;
}

static int meet(uint32_t number, const char *address, unsigned access) {
    struct ibv_qp_attr to = {
        .qp_state = IBV_QPS_INIT, .port_num = 1,
        .qp_access_flags = access,
    };
    int error = ibv_modify_qp(qp, &to, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
                                           IBV_QP_ACCESS_FLAGS);
    to = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_4096, .dest_qp_num = number,
        .max_dest_rd_atomic = 1, .min_rnr_timer = 12, .ah_attr = {.is_global = 1, .port_num = 1},
    };
    to.ah_attr.grh.dgid.raw[10] = to.ah_attr.grh.dgid.raw[11] = 0xff;
    inet_pton(AF_INET, address, to.ah_attr.grh.dgid.raw + 12);
    if (!error)
        error = ibv_modify_qp(qp, &to, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
                                           IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                                           IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
    to = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7,
        .max_rd_atomic = 1,
    };
    if (!error)
        error = ibv_modify_qp(qp, &to, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
                                           IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                                           IBV_QP_MAX_QP_RD_ATOMIC);
    return error;
}

static int change(enum ibv_qp_state state) {
    struct ibv_qp_attr to = {.qp_state = state};
    return ibv_modify_qp(qp, &to, IBV_QP_STATE);
}

static int state(void) {
    struct ibv_qp_attr found;
    struct ibv_qp_init_attr asked;
    return ibv_query_qp(qp, &found, IBV_QP_STATE, &asked) ? -1 : (int)found.qp_state;
}

static int post(enum ibv_wr_opcode opcode, const char *arguments) {
    unsigned key, remote_key, length;
    uint64_t remote, offset, id;
    if (sscanf(arguments, "%u %" SCNu64 " %u %" SCNu64 " %u %" SCNu64, &key, &remote, &remote_key,
               &offset, &length, &id) != 6)
        return -1;
    struct ibv_sge piece = {(uintptr_t)memory + offset, length, key};
    struct ibv_send_wr *bad, work = {
        .wr_id = id, .sg_list = &piece, .num_sge = 1, .opcode = opcode,
        .wr.rdma = {remote + offset, remote_key},
    };
    return ibv_post_send(qp, &work, &bad);
}

static int receive(const char *arguments) {
    unsigned key, length;
    uint64_t offset, id;
    if (sscanf(arguments, "%u %" SCNu64 " %u %" SCNu64, &key, &offset, &length, &id) != 4)
        return -1;
    struct ibv_sge piece = {(uintptr_t)memory + offset, length, key};
    struct ibv_recv_wr *bad, work = {.wr_id = id, .sg_list = &piece, .num_sge = 1};
    return ibv_post_recv(qp, &work, &bad);
}

static void poll_completions(int wanted, int ms) {
    uint64_t end = now_ms() + ms;
    for (int seen = 0; seen < wanted && now_ms() <= end;) {
        struct ibv_wc done;
        if (ibv_poll_cq(cq, 1, &done) == 1) {
            printf("%s%" PRIu64 ":%d", seen++ ? " " : "", done.wr_id, done.status);
        } else {
            usleep(200);
        }
    }
    printf("\n");
}

static int event(int ms) {
    struct pollfd wanted = {.fd = context->async_fd, .events = POLLIN};
    struct ibv_async_event found;
    if (poll(&wanted, 1, ms) != 1 || ibv_get_async_event(context, &found)) return -1;
    ibv_ack_async_event(&found);
    return found.event_type;
}

static int handles(void) {
    DIR *folder = opendir("/proc/self/fd");
    int count = 0;
    for (struct dirent *entry; (entry = readdir(folder));) {
        char path[300], target[300] = "";
        snprintf(path, sizeof path, "/proc/self/fd/%s", entry->d_name);
        if (readlink(path, target, sizeof target - 1) > 0)
            count += !strncmp(target, "/dev/infiniband/", 16);
    }
    closedir(folder);
    return count;
}

int main(void) {
    char line[512], verb[32], address[64];
    while (fgets(line, sizeof line, stdin)) {
        int used = 0;
        uint64_t number = 0;
        sscanf(line, "%31s%n", verb, &used);
        const char *rest = line + used;
        sscanf(rest, "%" SCNu64, &number);
        if (!strcmp(verb, "memory")) {
            size = number;
            memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            printf("%" PRIu64 "\n", (uint64_t)(uintptr_t)memory);
        } else if (!strcmp(verb, "fill")) {
            memset(memory, number, size);
            printf("0\n");
        } else if (!strcmp(verb, "count")) {
            size_t count = 0;
            for (size_t i = 0; i < size; i++) count += memory[i] == number;
            printf("%zu\n", count);
        } else if (!strcmp(verb, "open")) {
            open_device(number);
            printf("0\n");
        } else if (!strcmp(verb, "register")) {
            struct ibv_mr *region = ibv_reg_mr(domain, memory, size, (int)number);
            if (region) regions[region_count++] = region;
            printf("%u\n", region ? region->rkey : 0);
        } else if (!strcmp(verb, "deregister")) {
            int error = ENOENT;
            for (int i = 0; i < region_count; i++)
                if (regions[i] && regions[i]->rkey == number) {
                    error = ibv_dereg_mr(regions[i]);
                    regions[i] = NULL;
                }
            printf("%d\n", error);
        } else if (!strcmp(verb, "pair")) {
            int entries = number * 2;
            sscanf(rest, "%*u %d", &entries);
            printf("%u\n", make_pair(number, entries));
        } else if (!strcmp(verb, "meet")) {
            unsigned access = 0;
            sscanf(rest, "%*u %63s %u", address, &access);
            printf("%d\n", meet(number, address, access));
        } else if (!strcmp(verb, "become")) {
            printf("%d\n", change(number));
        } else if (!strcmp(verb, "fail")) {
            printf("%d\n", change(IBV_QPS_ERR));
        } else if (!strcmp(verb, "reset")) {
            printf("%d\n", change(IBV_QPS_RESET));
        } else if (!strcmp(verb, "destroy")) {
            printf("%d\n", ibv_destroy_qp(qp));
        } else if (!strcmp(verb, "state")) {
            printf("%d\n", state());
        } else if (!strcmp(verb, "write")) {
            printf("%d\n", post(IBV_WR_RDMA_WRITE, rest));
        } else if (!strcmp(verb, "read")) {
            printf("%d\n", post(IBV_WR_RDMA_READ, rest));
        } else if (!strcmp(verb, "send")) {
            printf("%d\n", post(IBV_WR_SEND, rest));
        } else if (!strcmp(verb, "receive")) {
            printf("%d\n", receive(rest));
        } else if (!strcmp(verb, "poll")) {
            int ms = 0;
            sscanf(rest, "%*d %d", &ms);
            poll_completions(number, ms);
        } else if (!strcmp(verb, "event")) {
            printf("%d\n", event(number));
        } else if (!strcmp(verb, "handles")) {
            printf("%d\n", handles());
        } else {
            return 2;
        }
        fflush(stdout);
    }
    return 0;
}
