/* The load generator: N keep-alive connections send one raw request over and over, and every answer is checked.

   load --port P --request FILE --connections N
        (--seconds T | --requests K | --once)      until then; what runs is always finished and counted
        [--ramp-s R]                               the connections are opened evenly within R seconds
        [--records M]                              an answer is a stream of exactly M "data:" records, the last
                                                   one [DONE]; without it, a whole body
        [--limit-s L]                              what has not ended after L seconds is an error

   FILE is the request as it goes over the wire, head and body. Where it holds "@@@@@@@@", each request has its
   own eight digits there, so that no two prompts are equal. Time to first token is the time to the second
   record: the first one only names the role.

   One line of JSON on standard output. It judges the answers and measures nothing but itself. */
#include "net.h"

#define HEAD_BYTES 16384
#define LINE_BYTES 16
#define MOST_ERRORS 200
#define MARK "@@@@@@@@"

enum body { BY_LENGTH, CHUNKED, UNTIL_CLOSE };
enum chunk { SIZE, EXTENSION, DATA, DATA_END, TRAILER };

struct connection {
    int fd;
    bool open, busy, connecting, in_body, wants_out, last, is_done, broken;
    char *request;
    size_t sent;
    char head[HEAD_BYTES];
    size_t head_bytes;
    int status;
    enum body body;
    enum chunk chunk;
    long long left, body_bytes;
    size_t trailer_bytes;
    char line[LINE_BYTES];
    size_t line_bytes;
    long records;
    double began_s, first_s;
};

struct series {
    double *values;
    size_t count, room;
};

static char *template_bytes;
static size_t template_size, mark_at;
static bool has_mark, once;
static long expected_records, wanted_requests;
static int port, connection_count, epoll_fd;
static double began_s, stop_s;

static struct connection *connections;
static struct series latency, first_token;
static long started, finished, records_seen, errors, reconnects;
static long long bytes_seen;
static int running;
static double last_end_s;
static char first_error[200];
static char buffer[1 << 18];

static void add(struct series *series, double value) {
    if (series->count == series->room) {
        series->room = series->room ? 2 * series->room : 4096;
        series->values = must(realloc(series->values, series->room * sizeof(double)));
    }
    series->values[series->count++] = value;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_series(const char *name, struct series *series) {
    qsort(series->values, series->count, sizeof(double), by_size);
    if (series->count == 0) {
        printf(",\"%s\":null", name);
        return;
    }
    const struct { const char *name; double share; } points[] = {{"p50", .5}, {"p95", .95}, {"p99", .99}, {"max", 1}};
    printf(",\"%s\":{", name);
    for (size_t i = 0; i < 4; i++) {
        size_t at = (size_t)(points[i].share * (double)(series->count - 1) + 0.5);
        printf("%s\"%s\":%.4f", i ? "," : "", points[i].name, series->values[at] * 1e3);
    }
    printf("}");
}

static void read_template(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) die(path);
    fseek(file, 0, SEEK_END);
    template_size = (size_t)ftell(file);
    rewind(file);
    template_bytes = must(malloc(template_size + 1));
    if (fread(template_bytes, 1, template_size, file) != template_size) die(path);
    fclose(file);
    char *mark = memmem(template_bytes, template_size, MARK, strlen(MARK));
    has_mark = mark != NULL;
    mark_at = has_mark ? (size_t)(mark - template_bytes) : 0;
}

static void watch(struct connection *c, int action, bool out) {
    struct epoll_event event = {.events = EPOLLIN | (out ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(epoll_fd, action, c->fd, &event) < 0) die("epoll_ctl");
    c->wants_out = out;
}

static void fail(struct connection *c, const char *format, ...);

/* ---- sending ---------------------------------------------------------------------------------------------- */

static void push(struct connection *c) {
    while (c->sent < template_size) {
        ssize_t n = send(c->fd, c->request + c->sent, template_size - c->sent, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            if (!c->wants_out) watch(c, EPOLL_CTL_MOD, true);
            return;
        }
        if (n < 0) {
            fail(c, "send: %s", strerror(errno));
            return;
        }
        c->sent += (size_t)n;
    }
    if (c->wants_out) watch(c, EPOLL_CTL_MOD, false);
}

static void reset(struct connection *c) {
    c->head_bytes = c->line_bytes = c->trailer_bytes = 0;
    c->in_body = c->is_done = c->broken = c->last = false;
    c->records = 0;
    c->body_bytes = 0;
    c->sent = 0;
    c->first_s = 0;
    c->busy = true;
}

static bool may_start(void) {
    if (errors >= MOST_ERRORS) return false;
    if (wanted_requests && started >= wanted_requests) return false;
    return once || stop_s == 0 || now_s() < stop_s;
}

static void begin(struct connection *c) {
    reset(c);
    if (has_mark) {
        char digits[16];
        snprintf(digits, sizeof digits, "%08ld", started % 100000000L);
        memcpy(c->request + mark_at, digits, strlen(MARK));
    }
    started++;
    running++;
}

static void dial(struct connection *c) {
    begin(c);
    c->began_s = now_s();
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) die("socket");
    c->open = c->connecting = true;
    no_delay(c->fd);
    struct sockaddr_in address = loopback(port);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) < 0 && errno != EINPROGRESS) {
        watch(c, EPOLL_CTL_ADD, false);
        fail(c, "connect: %s", strerror(errno));
        return;
    }
    watch(c, EPOLL_CTL_ADD, true);
}

static void hang_up(struct connection *c) {
    if (c->open) close(c->fd);
    c->open = c->connecting = false;
}

static void next(struct connection *c) {
    if (once || !may_start()) return;
    if (!c->open) {
        reconnects++;
        dial(c);
        return;
    }
    begin(c);
    c->began_s = now_s();
    push(c);
}

static void fail(struct connection *c, const char *format, ...) {
    if (errors++ == 0) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(first_error, sizeof first_error, format, arguments);
        va_end(arguments);
    }
    last_end_s = now_s();
    if (c->busy) running--;
    c->busy = false;
    hang_up(c);
    next(c);
}

/* ---- the answer ------------------------------------------------------------------------------------------- */

static void end_of_answer(struct connection *c) {
    if (c->status != 200) {
        fail(c, "status %d", c->status);
        return;
    }
    if (expected_records && (!c->is_done || c->broken || c->records != expected_records)) {
        fail(c, "a stream of %ld records%s%s", c->records, c->is_done ? "" : " without [DONE]",
             c->broken ? " with an error record" : "");
        return;
    }
    if (!expected_records && c->body_bytes == 0) {
        fail(c, "an empty body");
        return;
    }
    last_end_s = now_s();
    add(&latency, last_end_s - c->began_s);
    if (expected_records) add(&first_token, c->first_s - c->began_s);
    finished++;
    records_seen += c->records;
    running--;
    c->busy = false;
    if (c->last) hang_up(c);
    next(c);
}

static void end_of_line(struct connection *c) {
    if (c->line_bytes >= 5 && memcmp(c->line, "data:", 5) == 0) {
        if (c->is_done) c->broken = true;
        if (++c->records == 2) c->first_s = now_s();
        if (c->line_bytes >= 12 && memcmp(c->line, "data: [DONE]", 12) == 0) c->is_done = true;
        if (c->line_bytes >= 14 && memcmp(c->line, "data: {\"error\"", 14) == 0) c->broken = true;
    }
    c->line_bytes = 0;
}

static void take_body(struct connection *c, const char *data, size_t size) {
    c->body_bytes += (long long)size;
    if (!expected_records) return;
    while (size > 0) {
        const char *end = memchr(data, '\n', size);
        size_t length = end ? (size_t)(end - data) : size;
        if (c->line_bytes < LINE_BYTES) {
            size_t room = LINE_BYTES - c->line_bytes;
            memcpy(c->line + c->line_bytes, data, length < room ? length : room);
        }
        c->line_bytes += length;
        if (end == NULL) return;
        end_of_line(c);
        data += length + 1;
        size -= length + 1;
    }
}

/* How many bytes of the chunked body were used; *ended when it is over. -1: badly framed. */
static ssize_t take_chunked(struct connection *c, const char *data, size_t size, bool *ended) {
    size_t at = 0;
    while (at < size) {
        char byte = data[at];
        switch (c->chunk) {
        case SIZE:
            at++;
            if (byte >= '0' && byte <= '9') c->left = c->left * 16 + (byte - '0');
            else if ((byte | 32) >= 'a' && (byte | 32) <= 'f') c->left = c->left * 16 + ((byte | 32) - 'a' + 10);
            else if (byte == ';' || byte == '\r') c->chunk = EXTENSION;
            else return -1;
            break;
        case EXTENSION:
            at++;
            if (byte == '\n') c->chunk = c->left ? DATA : TRAILER;
            break;
        case DATA: {
            size_t here = size - at;
            if ((long long)here > c->left) here = (size_t)c->left;
            take_body(c, data + at, here);
            at += here;
            c->left -= (long long)here;
            if (c->left == 0) c->chunk = DATA_END;
            break;
        }
        case DATA_END:
            at++;
            if (byte == '\n') c->chunk = SIZE;
            break;
        case TRAILER:
            at++;
            if (byte == '\n') {
                if (c->trailer_bytes == 0) {
                    *ended = true;
                    return (ssize_t)at;
                }
                c->trailer_bytes = 0;
            } else if (byte != '\r') {
                c->trailer_bytes++;
            }
            break;
        }
    }
    return (ssize_t)at;
}

static bool read_head(struct connection *c) {
    if (sscanf(c->head, "HTTP/1.%*d %d", &c->status) != 1) return false;
    const char *length = header_value(c->head, "content-length:");
    const char *coding = header_value(c->head, "transfer-encoding:");
    const char *connection = header_value(c->head, "connection:");
    c->last = connection != NULL && strncasecmp(connection, "close", 5) == 0;
    c->chunk = SIZE;
    c->left = 0;
    if (coding != NULL && strncasecmp(coding, "chunked", 7) == 0) {
        c->body = CHUNKED;
    } else if (length != NULL) {
        c->body = BY_LENGTH;
        c->left = atoll(length);
    } else {
        c->body = UNTIL_CLOSE;
        c->last = true;
    }
    c->in_body = true;
    return true;
}

static void take(struct connection *c, char *data, size_t size) {
    bytes_seen += (long long)size;
    if (!c->busy) {
        fail(c, "an answer that nobody asked for");
        return;
    }
    if (!c->in_body) {
        size_t room = HEAD_BYTES - 1 - c->head_bytes, part = size < room ? size : room;
        size_t from = c->head_bytes > 3 ? c->head_bytes - 3 : 0;
        memcpy(c->head + c->head_bytes, data, part);
        size_t known = c->head_bytes + part;
        char *end = memmem(c->head + from, known - from, "\r\n\r\n", 4);
        if (end == NULL) {
            c->head_bytes = known;
            if (known >= HEAD_BYTES - 1) fail(c, "a head without an end");
            return;
        }
        size_t used = (size_t)(end + 4 - c->head) - c->head_bytes;
        end[2] = 0;
        if (!read_head(c)) {
            fail(c, "not an HTTP answer");
            return;
        }
        data += used;
        size -= used;
    }
    bool ended = false;
    if (c->body == CHUNKED) {
        if (take_chunked(c, data, size, &ended) < 0) {
            fail(c, "a badly framed body");
            return;
        }
    } else {
        if (c->body == BY_LENGTH && (long long)size > c->left) size = (size_t)c->left;
        take_body(c, data, size);
        if (c->body == BY_LENGTH) {
            c->left -= (long long)size;
            ended = c->left == 0;
        }
    }
    if (ended) end_of_answer(c);
}

static void readable(struct connection *c) {
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n > 0) {
        take(c, buffer, (size_t)n);
        return;
    }
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (n == 0 && c->busy && c->in_body && c->body == UNTIL_CLOSE) {
        end_of_answer(c);
        return;
    }
    if (c->busy) {
        fail(c, n == 0 ? "closed before the end of an answer" : "recv: %s", strerror(errno));
        return;
    }
    hang_up(c);
}

static void connected(struct connection *c) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    c->connecting = false;
    if (error) fail(c, "connect: %s", strerror(error));
    else push(c);
}

/* ---- the run ---------------------------------------------------------------------------------------------- */

static void run(double ramp_s, double limit_s) {
    struct epoll_event events[1024];
    int opened = 0;
    for (;;) {
        double now = now_s();
        while (opened < connection_count && now >= began_s + ramp_s * opened / connection_count) {
            if (!once && !may_start()) opened = connection_count;
            else dial(&connections[opened++]);
        }
        if (opened >= connection_count && running == 0) return;
        if (now > began_s + limit_s) break;
        int timeout_ms = opened < connection_count ? 1 : 50;
        int count = epoll_wait(epoll_fd, events, 1024, timeout_ms);
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c->open) continue;
            if (c->connecting) {
                connected(c);
                continue;
            }
            if (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) readable(c);
            if (c->open && (events[i].events & EPOLLOUT) && c->wants_out) push(c);
        }
    }
    stop_s = now_s(); /* the time is up: what still runs has failed */
    once = true;
    for (int i = 0; i < connection_count; i++)
        if (connections[i].busy) fail(&connections[i], "not finished after %.1f s", limit_s);
}

static double own_cpu_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    port = atoi(option(argc, argv, "--port", "0"));
    connection_count = atoi(option(argc, argv, "--connections", "1"));
    wanted_requests = atol(option(argc, argv, "--requests", "0"));
    expected_records = atol(option(argc, argv, "--records", "0"));
    once = has_flag(argc, argv, "--once");
    double seconds = atof(option(argc, argv, "--seconds", "0"));
    double ramp_s = atof(option(argc, argv, "--ramp-s", "0"));
    double limit_s = atof(option(argc, argv, "--limit-s", "60"));
    if (port <= 0 || connection_count <= 0 || (!once && wanted_requests <= 0 && seconds <= 0)) {
        fprintf(stderr, "load: --port, --connections and one of --seconds, --requests, --once are needed\n");
        return 2;
    }
    read_template(option(argc, argv, "--request", "/dev/null"));
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    connections = must(calloc((size_t)connection_count, sizeof *connections));
    for (int i = 0; i < connection_count; i++) {
        connections[i].request = must(malloc(template_size));
        memcpy(connections[i].request, template_bytes, template_size);
    }
    began_s = last_end_s = now_s();
    stop_s = seconds > 0 ? began_s + seconds : 0;
    run(ramp_s, limit_s);

    printf("{\"requests\":%ld,\"chunks\":%ld,\"errors\":%ld,\"reconnects\":%ld,\"bytes\":%lld,\"seconds\":%.6f,\"cpu_s\":%.6f",
           finished, records_seen, errors, reconnects, bytes_seen, last_end_s - began_s, own_cpu_s());
    print_series("latency_ms", &latency);
    print_series("ttft_ms", &first_token);
    for (char *at = first_error; *at; at++)
        if (*at == '"' || *at == '\\' || (unsigned char)*at < 32) *at = '\'';
    printf(",\"first_error\":\"%s\"}\n", first_error);
    return 0;
}
