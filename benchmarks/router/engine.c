/* A vLLM server without a model, for measuring what stands in front of it: one thread, epoll, keep-alive.
 *
 * usage: engine PORT...
 *
 * POST of anything answers a chat completion. With "stream":true it is max_tokens events, one each `seed`
 * milliseconds, and the usage where "include_usage":true asks for it. GET answers /health, /v1/models, /metrics.
 * Bodies come with a length or in chunks, in any pieces.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define FIRST_CAPACITY 4096
#define PARAMETERS_WITHIN 2048 /* of either end of the body, so that 20 MB are not searched */

typedef struct {
    int fd;
    bool listens;
    /* the request */
    char *in;
    size_t have, capacity;
    size_t head;              /* its length; 0: not complete yet */
    size_t length;            /* of the body, unless it is chunked */
    bool chunked, last_chunk;
    size_t next, chunk_left;  /* where undecoded bytes begin; what is missing of this chunk */
    size_t body_end;          /* decoded so far, in place */
    /* the stream */
    long place;               /* in `streams`, -1: none */
    long events, sent_events, interval;
    int64_t due;
    bool usage;
    /* what the socket did not take */
    char *out;
    size_t out_have, out_capacity;
} Conn;

static int poll_fd;
static Conn **streams;
static long stream_count, stream_capacity;

static const char ID[] = "chatcmpl-6f1c2a9b84d04c5fa7e3b1d2c4e5f607";

static int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void *grown(void *memory, size_t size) {
    void *larger = realloc(memory, size);
    if (!larger) {
        fprintf(stderr, "engine: out of memory\n");
        exit(1);
    }
    return larger;
}

static void watch(Conn *c, int operation, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(poll_fd, operation, c->fd, &event);
}

static void stop_stream(Conn *c) {
    if (c->place < 0) return;
    streams[c->place] = streams[--stream_count];
    streams[c->place]->place = c->place;
    c->place = -1;
}

static void drop(Conn *c) {
    stop_stream(c);
    close(c->fd);
    free(c->in);
    free(c->out);
    free(c);
}

/* Sends, and keeps what the socket does not take; a broken connection is noticed at the next read. */
static void put(Conn *c, const char *bytes, size_t size) {
    if (!c->out_have) {
        ssize_t sent = send(c->fd, bytes, size, MSG_NOSIGNAL);
        if (sent == (ssize_t)size || (sent < 0 && errno != EAGAIN)) return;
        if (sent > 0) bytes += sent, size -= (size_t)sent;
        watch(c, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    }
    if (c->out_have + size > c->out_capacity) {
        c->out_capacity = (c->out_have + size) * 2;
        c->out = grown(c->out, c->out_capacity);
    }
    memcpy(c->out + c->out_have, bytes, size);
    c->out_have += size;
}

static void put_rest(Conn *c) {
    ssize_t sent = send(c->fd, c->out, c->out_have, MSG_NOSIGNAL);
    if (sent < 0) return;
    c->out_have -= (size_t)sent;
    memmove(c->out, c->out + sent, c->out_have);
    if (!c->out_have) watch(c, EPOLL_CTL_MOD, EPOLLIN);
}

static void answer(Conn *c, const char *status, const char *type, const char *body) {
    char text[2048];
    int size = snprintf(text, sizeof text, "HTTP/1.1 %s\r\nserver: uvicorn\r\ncontent-length: %zu\r\ncontent-type: %s\r\n\r\n%s",
                        status, strlen(body), type, body);
    put(c, text, (size_t)size);
}

static void put_event(Conn *c, const char *prefix, const char *json) {
    char text[1024];
    int size = snprintf(text, sizeof text, "%s%zx\r\ndata: %s\n\n\r\n", prefix, strlen(json) + 8, json);
    put(c, text, (size_t)size);
}

static void next_event(Conn *c) {
    char json[512];
    bool first = c->sent_events == 0, last = c->sent_events + 1 >= c->events;
    snprintf(json, sizeof json,
             "{\"id\":\"%s\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":\"bench\",\"choices\":"
             "[{\"index\":0,\"delta\":{%s\"content\":\" @word\"},\"logprobs\":null,\"finish_reason\":%s}]}",
             ID, first ? "\"role\":\"assistant\"," : "", last ? "\"length\"" : "null");
    put_event(c, first ? "HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                         "transfer-encoding: chunked\r\n\r\n" : "", json);
    c->sent_events++;
    c->due += c->interval;
    if (!last) return;
    if (c->usage) {
        snprintf(json, sizeof json,
                 "{\"id\":\"%s\",\"object\":\"chat.completion.chunk\",\"created\":1767225600,\"model\":\"bench\",\"choices\":[],"
                 "\"usage\":{\"prompt_tokens\":21,\"total_tokens\":%ld,\"completion_tokens\":%ld}}",
                 ID, 21 + c->events, c->events);
        put_event(c, "", json);
    }
    put_event(c, "", "[DONE]");
    put(c, "0\r\n\r\n", 5);
    stop_stream(c);
}

/* What follows "NAME": in the first or the last bytes of the body, NULL where it is not said. */
static const char *parameter(const Conn *c, const char *name) {
    char quoted[64];
    size_t wanted = (size_t)snprintf(quoted, sizeof quoted, "\"%s\":", name);
    const char *body = c->in + c->head;
    size_t size = c->body_end - c->head, part = size < PARAMETERS_WITHIN ? size : PARAMETERS_WITHIN;
    const char *found = memmem(body, part, quoted, wanted);
    if (!found && size > part) found = memmem(body + size - part, part, quoted, wanted);
    if (!found) return NULL;
    for (found += wanted; *found == ' ';) found++;
    return found;
}

static long number(const Conn *c, const char *name, long otherwise) {
    const char *value = parameter(c, name);
    return value ? strtol(value, NULL, 10) : otherwise;
}

static bool is_true(const Conn *c, const char *name) {
    const char *value = parameter(c, name);
    return value && !strncmp(value, "true", 4);
}

static void answer_chat(Conn *c) {
    if (!is_true(c, "stream")) {
        char json[1024];
        snprintf(json, sizeof json,
                 "{\"id\":\"%s\",\"object\":\"chat.completion\",\"created\":1767225600,\"model\":\"bench\",\"choices\":[{\"index\":0,"
                 "\"message\":{\"role\":\"assistant\",\"content\":\"The capital of France is Paris. @word\",\"refusal\":null},"
                 "\"logprobs\":null,\"finish_reason\":\"stop\",\"stop_reason\":null}],\"usage\":{\"prompt_tokens\":21,"
                 "\"total_tokens\":29,\"completion_tokens\":8,\"prompt_tokens_details\":null}}", ID);
        answer(c, "200 OK", "application/json", json);
        return;
    }
    if (stream_count == stream_capacity) {
        stream_capacity = stream_capacity ? stream_capacity * 2 : 64;
        streams = grown(streams, (size_t)stream_capacity * sizeof *streams);
    }
    c->place = stream_count;
    streams[stream_count++] = c;
    c->events = number(c, "max_tokens", number(c, "max_completion_tokens", 16));
    c->interval = number(c, "seed", 10);
    c->usage = is_true(c, "include_usage");
    c->sent_events = 0;
    c->due = now_ms();
    next_event(c);
}

static void answer_request(Conn *c) {
    if (!strncmp(c->in, "POST ", 5)) answer_chat(c);
    else if (!strncmp(c->in, "GET /health", 11)) answer(c, "200 OK", "text/plain", "");
    else if (!strncmp(c->in, "GET /v1/models", 14))
        answer(c, "200 OK", "application/json", "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\","
               "\"created\":1767225600,\"owned_by\":\"vllm\",\"root\":\"bench\",\"parent\":null,\"max_model_len\":32768}]}");
    else if (!strncmp(c->in, "GET /metrics", 12))
        answer(c, "200 OK", "text/plain; version=0.0.4", "vllm:num_requests_running 0.0\n");
    else answer(c, "404 Not Found", "application/json", "{\"detail\":\"Not Found\"}");
}

/* The value of a header, NULL where it is not sent. */
static const char *header(const Conn *c, const char *name) {
    size_t size = strlen(name);
    const char *line = c->in, *end = c->in + c->head - 2;
    while ((line = memchr(line, '\n', (size_t)(end - line)))) {
        if (++line >= end) return NULL;
        if (!strncasecmp(line, name, size) && line[size] == ':') {
            for (line += size + 1; *line == ' ';) line++;
            return line;
        }
    }
    return NULL;
}

static bool head_is_complete(Conn *c) {
    if (c->head) return true;
    const char *end = memmem(c->in, c->have, "\r\n\r\n", 4);
    if (!end) return false;
    c->head = (size_t)(end - c->in) + 4;
    const char *length = header(c, "content-length"), *coding = header(c, "transfer-encoding");
    c->chunked = coding && !strncasecmp(coding, "chunked", 7);
    c->length = length ? strtoul(length, NULL, 10) : 0;
    c->next = c->body_end = c->head;
    c->chunk_left = 0;
    c->last_chunk = false;
    return true;
}

/* Moves what came of the chunks together; true when the last one is there. */
static bool chunks_are_complete(Conn *c) {
    for (;;) {
        if (c->chunk_left) {
            size_t size = c->have - c->next < c->chunk_left ? c->have - c->next : c->chunk_left;
            memmove(c->in + c->body_end, c->in + c->next, size);
            c->body_end += size, c->next += size, c->chunk_left -= size;
            if (c->chunk_left) return false;
        }
        const char *line = c->in + c->next, *end = memmem(line, c->have - c->next, "\r\n", 2);
        if (!end) return false;
        c->next = (size_t)(end - c->in) + 2;
        if (end == line) {
            if (c->last_chunk) return true;
        } else if (!c->last_chunk) { /* otherwise it is a trailer */
            c->chunk_left = strtoul(line, NULL, 16);
            c->last_chunk = !c->chunk_left;
        }
    }
}

static bool body_is_complete(Conn *c) {
    if (c->chunked) return chunks_are_complete(c);
    if (c->have < c->head + c->length) return false;
    c->body_end = c->next = c->head + c->length;
    return true;
}

/* False when the client is gone. */
static bool read_some(Conn *c) {
    if (c->have + 1 >= c->capacity) {
        c->capacity = c->capacity ? c->capacity * 2 : FIRST_CAPACITY;
        c->in = grown(c->in, c->capacity);
    }
    ssize_t size = read(c->fd, c->in + c->have, c->capacity - c->have - 1);
    if (size <= 0) return size < 0 && errno == EAGAIN;
    c->have += (size_t)size;
    c->in[c->have] = 0;
    return true;
}

static void serve(Conn *c) {
    while (c->place < 0 && head_is_complete(c) && body_is_complete(c)) {
        answer_request(c);
        c->have -= c->next;
        memmove(c->in, c->in + c->next, c->have + 1);
        c->head = 0;
    }
}

static void accept_one(int listening) {
    int fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    Conn *c = grown(NULL, sizeof *c);
    *c = (Conn){.fd = fd, .place = -1};
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
}

static void listen_on(int port) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) {
        fprintf(stderr, "engine: port %d: %s\n", port, strerror(errno));
        exit(1);
    }
    Conn *c = grown(NULL, sizeof *c);
    *c = (Conn){.fd = fd, .listens = true, .place = -1};
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
}

/* Sends the events that are due; milliseconds until the next one, -1 where no stream runs. */
static int send_due(void) {
    int64_t now = stream_count ? now_ms() : 0, soonest = INT64_MAX;
    for (long i = stream_count - 1; i >= 0; i--) { /* downward: the last one takes the place of one that ends */
        Conn *c = streams[i];
        while (c->place >= 0 && c->due <= now) next_event(c);
        if (c->place < 0) serve(c); /* what came meanwhile */
    }
    for (long i = 0; i < stream_count; i++)
        if (streams[i]->due < soonest) soonest = streams[i]->due;
    return !stream_count ? -1 : soonest <= now ? 0 : (int)(soonest - now);
}

int main(int count, char **arguments) {
    signal(SIGPIPE, SIG_IGN);
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    for (int i = 1; i < count; i++) listen_on(atoi(arguments[i]));
    struct epoll_event events[512];
    for (;;) {
        int ready = epoll_wait(poll_fd, events, 512, send_due());
        for (int i = 0; i < ready; i++) {
            Conn *c = events[i].data.ptr;
            if (c->listens) {
                accept_one(c->fd);
                continue;
            }
            if (events[i].events & EPOLLOUT) put_rest(c);
            if (!(events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) continue;
            if (read_some(c)) serve(c);
            else drop(c);
        }
    }
}
