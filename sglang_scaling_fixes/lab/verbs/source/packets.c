/* What packets mean: made of requests at one end, landed at the other.
 *
 *   requester                                 responder
 *   HELLO                   ------------->    is that queue pair ready, and is it ours?
 *                           <-------------    WELCOME
 *   WRITE, SEND, READ       ------------->    key alive? lands, then
 *                           <-------------    ACK, DATA or NAK
 */
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#include "link.h"

/* ---- sending ---------------------------------------------------------------------------- */

/* Between a packet and the application's memory, across the request's pieces: out of that memory
 * to be sent, or, `landing`, into it. */
static bool carry(const struct pair *pair, const struct work *work, uint32_t offset,
                  uint8_t *packet, uint32_t length, bool landing) {
    for (uint32_t i = 0; i < work->pieces && length; i++) {
        const struct piece *piece = &work->piece[i];
        if (offset >= piece->length) {
            offset -= piece->length;
            continue;
        }
        uint32_t part = piece->length - offset < length ? piece->length - offset : length;
        uint64_t address = piece->address + offset;
        uint32_t access = landing ? ACCESS_LOCAL_WRITE : 0;
        if (!region_covers(piece->key, pair->domain, address, part, access)) return false;
        if (landing ? !memory_write(address, packet, part) : !memory_read(address, packet, part))
            return false;
        packet += part;
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
        link_put(link, frame);
    } else {
        frame.kind = work->opcode == WORK_SEND ? FRAME_SEND : FRAME_WRITE;
        frame.length = request->length - offset < PACKET ? request->length - offset : PACKET;
        uint8_t *room = link_room(link, sizeof frame + frame.length);
        memcpy(room, &frame, sizeof frame);
        if (!carry(pair, work, offset, room + sizeof frame, frame.length, false)) {
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
    uint8_t *room = link_room(link, sizeof frame + frame.length);
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

bool packet_next(struct link *link) {
    if (!link->pair) return false;
    return link->requester ? next_request_packet(link) : next_read_packet(link);
}

/* ---- receiving: the responder ------------------------------------------------------------- */

/* The peer learns of it, whatever becomes of the queue pair. */
static void refuse(struct link *link, uint32_t sequence, uint32_t status) {
    struct pair *pair = link->pair;
    link_put(link, (struct frame){.kind = FRAME_NAK, .sequence = sequence, .status = status});
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
    link_put(link, (struct frame){.kind = FRAME_WELCOME});
}

/* A request is refused by its first packet, before a byte of it; a key may also end in its middle. */
static bool open_to(const struct pair *pair, const struct frame *frame, uint32_t access) {
    uint32_t length = frame->total > frame->length ? frame->total : frame->length;
    return pair->access & access &&
           region_covers(frame->key, pair->domain, frame->address, length, access);
}

static uint32_t land(struct pair *pair, const struct frame *frame, uint8_t *payload) {
    if (frame->kind == FRAME_WRITE) {
        if (!open_to(pair, frame, ACCESS_REMOTE_WRITE)) return STATUS_REMOTE_ACCESS;
        return memory_write(frame->address, payload, frame->length) ? STATUS_SUCCESS
                                                                    : STATUS_REMOTE_OPERATION;
    }
    const struct work *work = &pair->receives[pair->receives_done % MAX_QUEUE];
    if (!carry(pair, work, pair->receive_fill, payload, frame->length, true)) {
        pair_received(pair, STATUS_LOCAL_LENGTH);
        return STATUS_REMOTE_INVALID;
    }
    pair->receive_fill += frame->length;
    if (frame->last) pair_received(pair, STATUS_SUCCESS);
    return STATUS_SUCCESS;
}

/* What comes behind a read that is being answered waits, so that answers come in order; a message
 * waits for its receive. */
bool packet_must_wait(const struct link *link, const struct frame *frame) {
    const struct pair *pair = link->pair;
    return !link->requester && pair &&
           (link->readings || (frame->kind == FRAME_SEND &&
                               pair->receives_done == pair->receives_posted));
}

static void on_request(struct link *link, const struct frame *frame, uint8_t *payload) {
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
            link_put(link, (struct frame){.kind = FRAME_ACK, .sequence = frame->sequence});
    }
    pair->expected++;
}

/* ---- receiving: the requester ------------------------------------------------------------- */

static void on_data(struct pair *pair, const struct frame *frame, uint8_t *payload) {
    struct request *request = pair_request(pair, frame->sequence);
    if (!request || request->work.opcode != WORK_READ) return;
    pair->progress_ns = now_ns();
    if (!carry(pair, &request->work, frame->address, payload, frame->length, true)) {
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

void packet_take(struct link *link, const struct frame *frame, uint8_t *payload) {
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
