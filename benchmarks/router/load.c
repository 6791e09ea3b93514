/* The clients of a gateway: sends requests over many connections, checks every answer, prints what it saw as JSON.
 *
 * usage: load PORT CONNECTIONS WAVES EACH WARM_UP SECONDS MARKS END FILE...
 *
 * Each FILE is one request as it goes over the wire; a connection sends them in turn.
 * EACH > 0: every connection of a wave is new and sends EACH requests, one after the other; the next wave begins
 *           when all have their answers, unless a quarter of SECONDS is over. All that is not answered after SECONDS
 *           counts as an error.
 * EACH = 0: the connections are kept and send until SECONDS after WARM_UP; answers within SECONDS count.
 * An answer is complete with status 200, MARKS times the mark "@word" in its body, and END at its end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MOST_ERRORS 10000 /* after which no more is tried */

static const char MARK[] = "@word";

typedef struct {
    char *bytes;
    size_t size;
} Request;

typedef struct {
    int fd; /* -1: has nothing to do any more in this wave */
    long number, answered;
    const Request *request;
    size_t sent;
    bool waits_to_send;
    double began, first;
    /* the answer */
    char head[16384];
    size_t head_have;
    int status; /* 0: its head is not complete yet */
    bool chunked, last_chunk, closes;
    size_t left; /* of the body, or of this chunk */
    char line[24];
    size_t line_have;
    size_t matched;
    long marks;
    char end[8];
} Conn;

typedef struct {
    double *values;
    size_t count, capacity;
} Times;

static int poll_fd, port;
static long each, marks, file_count, errors, complete, running;
static const char *end_wanted;
static Request *requests;
static double counts_from, counts_until;
static Times first_times, whole_times;

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void keep(Times *times, double value) {
    if (times->count == times->capacity) {
        times->capacity = times->capacity ? times->capacity * 2 : 4096;
        times->values = realloc(times->values, times->capacity * sizeof *times->values);
        if (!times->values) fail("memory");
    }
    times->values[times->count++] = value;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, Times *times) {
    double none = 0, *values = times->count ? times->values : &none;
    if (times->count) qsort(values, times->count, sizeof *values, ascending);
    size_t last = times->count ? times->count - 1 : 0;
    printf(", \"%s\": {\"median\": %.4f, \"p99\": %.4f}", name, values[last / 2] * 1e3, values[last * 99 / 100] * 1e3);
}

static void watch(Conn *c, int operation, bool sends) {
    struct epoll_event event = {.events = EPOLLIN | (sends ? EPOLLOUT : 0u), .data.ptr = c};
    if (epoll_ctl(poll_fd, operation, c->fd, &event)) fail("epoll_ctl");
    c->waits_to_send = sends;
}

static void begin_request(Conn *c) {
    c->request = &requests[(c->number + c->answered) % file_count];
    c->sent = c->head_have = c->left = c->line_have = c->matched = 0;
    c->status = 0;
    c->marks = 0;
    c->chunked = c->last_chunk = c->closes = false;
    memset(c->end, 0, sizeof c->end);
    c->began = now();
    c->first = 0;
}

static void send_some(Conn *c) {
    ssize_t size = send(c->fd, c->request->bytes + c->sent, c->request->size - c->sent, MSG_NOSIGNAL);
    if (size > 0) c->sent += (size_t)size; /* an error shows at the next read */
    bool sends = c->sent < c->request->size;
    if (sends != c->waits_to_send) watch(c, EPOLL_CTL_MOD, sends);
}

static void open_connection(Conn *c) {
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    begin_request(c);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) fail("socket");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) fail("connect");
    watch(c, EPOLL_CTL_ADD, true);
}

static void complain(const Conn *c, const char *what) {
    if (errors++ >= 3) return;
    fprintf(stderr, "load: %s: status %d, %ld marks; the answer begins: %.*s\n", what, c->status, c->marks,
            (int)(c->head_have < 600 ? c->head_have : 600), c->head);
}

static void next_request(Conn *c, bool reconnects) {
    c->answered++;
    if (reconnects || (each && c->answered >= each)) close(c->fd), c->fd = -1;
    if (each && c->answered >= each) running--;
    else if (reconnects) open_connection(c);
    else {
        begin_request(c);
        send_some(c);
    }
}

static void end_answer(Conn *c) {
    double ended = now();
    size_t wanted = strlen(end_wanted), have = strnlen(c->end, sizeof c->end);
    bool ends_well = have >= wanted && !memcmp(c->end + have - wanted, end_wanted, wanted);
    if (c->status != 200 || c->marks != marks || !ends_well) complain(c, "not a complete answer");
    else if (ended >= counts_from && ended < counts_until) {
        complete++;
        keep(&first_times, c->first - c->began);
        keep(&whole_times, ended - c->began);
    }
    next_request(c, c->closes);
}

static void break_off(Conn *c) {
    complain(c, "the connection ended");
    next_request(c, true);
}

/* Counts the marks and keeps the last characters that are not white. */
static void look_at(Conn *c, const char *bytes, size_t size) {
    if (!c->first) c->first = now();
    for (size_t i = 0; i < size; i++) {
        if (!c->matched) {
            const char *at = memchr(bytes + i, MARK[0], size - i);
            if (!at) break;
            i = (size_t)(at - bytes);
        }
        c->matched = bytes[i] == MARK[c->matched] ? c->matched + 1 : bytes[i] == MARK[0];
        if (c->matched == sizeof MARK - 1) c->marks++, c->matched = 0;
    }
    size_t from = size > sizeof c->end + 4 ? size - sizeof c->end - 4 : 0;
    for (size_t i = from; i < size; i++) {
        if (bytes[i] == '\n' || bytes[i] == '\r' || bytes[i] == ' ') continue;
        size_t have = strnlen(c->end, sizeof c->end);
        if (have == sizeof c->end) memmove(c->end, c->end + 1, --have);
        c->end[have] = bytes[i];
    }
}

static const char *header(const char *head, const char *name) {
    size_t size = strlen(name);
    for (const char *line = head; (line = strchr(line, '\n'));)
        if (!strncasecmp(++line, name, size) && line[size] == ':') {
            for (line += size + 1; *line == ' ';) line++;
            return line;
        }
    return NULL;
}

/* True when the answer is complete; `bytes` are the next of its body. */
static bool take_body(Conn *c, const char *bytes, size_t size) {
    const char *end = bytes + size;
    while (bytes < end) {
        if (c->left) {
            size_t part = (size_t)(end - bytes) < c->left ? (size_t)(end - bytes) : c->left;
            look_at(c, bytes, part);
            bytes += part, c->left -= part;
            if (!c->left && !c->chunked) return true;
            continue;
        }
        char character = *bytes++;
        if (character != '\n') {
            if (character != '\r' && c->line_have < sizeof c->line - 1) c->line[c->line_have++] = character;
            continue;
        }
        bool empty = !c->line_have;
        c->line[c->line_have] = 0;
        c->line_have = 0;
        if (empty && c->last_chunk) return true;
        if (empty || c->last_chunk) continue; /* the end of a chunk; a trailer */
        c->left = strtoul(c->line, NULL, 16);
        c->last_chunk = !c->left;
    }
    return false;
}

/* True when the answer is complete. */
static bool take(Conn *c, const char *bytes, size_t size) {
    if (c->status) return take_body(c, bytes, size);
    size_t part = sizeof c->head - 1 - c->head_have < size ? sizeof c->head - 1 - c->head_have : size;
    memcpy(c->head + c->head_have, bytes, part);
    size_t had = c->head_have;
    c->head_have += part;
    c->head[c->head_have] = 0;
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) return false;
    end[2] = 0; /* of the headers; what follows is still in `bytes` */
    c->status = atoi(c->head + 9);
    const char *length = header(c->head, "content-length"), *coding = header(c->head, "transfer-encoding");
    const char *connection = header(c->head, "connection");
    c->closes = connection && !strncasecmp(connection, "close", 5);
    c->chunked = coding && !strncasecmp(coding, "chunked", 7);
    c->left = !c->chunked && length ? strtoul(length, NULL, 10) : 0;
    end[2] = '\r';
    size_t used = (size_t)(end - c->head) + 4 - had;
    if (!c->chunked && !c->left) return true;
    return take_body(c, bytes + used, size - used);
}

static void receive(Conn *c) {
    static char bytes[262144];
    ssize_t size = recv(c->fd, bytes, sizeof bytes, 0);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) break_off(c);
    else if (take(c, bytes, (size_t)size)) end_answer(c);
}

static void handle(Conn *c, uint32_t events) {
    if (events & EPOLLOUT && c->sent < c->request->size) send_some(c);
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(c);
}

/* One wave; false when time was up before its end. */
static bool run(Conn *connections, long count, double until) {
    struct epoll_event events[512];
    running = count;
    for (long i = 0; i < count; i++) {
        connections[i].number = i;
        connections[i].answered = 0;
        open_connection(&connections[i]);
    }
    while (running) {
        double left = until - now();
        if (left <= 0 || errors > MOST_ERRORS) return false;
        int ready = epoll_wait(poll_fd, events, 512, (int)(left * 1e3) + 1);
        for (int i = 0; i < ready; i++) handle(events[i].data.ptr, events[i].events);
    }
    return true;
}

static Request read_request(const char *path) {
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status)) fail(path);
    Request request = {malloc((size_t)status.st_size), 0};
    while (request.size < (size_t)status.st_size) {
        ssize_t size = read(fd, request.bytes + request.size, (size_t)status.st_size - request.size);
        if (size <= 0) fail(path);
        request.size += (size_t)size;
    }
    close(fd);
    return request;
}

int main(int count, char **arguments) {
    if (count < 10) {
        fprintf(stderr, "usage: load PORT CONNECTIONS WAVES EACH WARM_UP SECONDS MARKS END FILE...\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    port = atoi(arguments[1]);
    long connection_count = atol(arguments[2]), waves = atol(arguments[3]);
    double warm_up = atof(arguments[5]), seconds = atof(arguments[6]);
    each = atol(arguments[4]);
    marks = atol(arguments[7]);
    end_wanted = arguments[8];
    file_count = count - 9;
    requests = calloc((size_t)file_count, sizeof *requests);
    for (long i = 0; i < file_count; i++) requests[i] = read_request(arguments[9 + i]);
    Conn *connections = calloc((size_t)connection_count, sizeof *connections);
    poll_fd = epoll_create1(EPOLL_CLOEXEC);

    counts_from = now() + warm_up;
    counts_until = counts_from + seconds;
    long begun = 0;
    do begun++;
    while (run(connections, connection_count, counts_until) && begun < waves && now() < counts_from + seconds / 4);
    double took = (each ? now() : counts_until) - counts_from;
    if (each) errors = begun * connection_count * each - complete;
    printf("{\"complete\": %ld, \"errors\": %ld, \"seconds\": %.4f", complete, errors, took);
    print_times("first_ms", &first_times);
    print_times("whole_ms", &whole_times);
    printf("}\n");
}
