/* The synthetic backend: speaks just enough of an OpenAI server that routers work in front of it, and costs
   next to nothing.

   backend --port P [--relay-port R]

   POST /v1/chat/completions: a short whole answer with usage; with `"stream": true` a stream of `max_tokens`
   records between a role record and a finish record, then [DONE]. A text `delay_ms=D` in the first or last
   8 KiB of the body sets the time between two tokens (0 without it); a number in a prompt survives routers that
   write the body anew and drop fields they do not know. The first token comes at once.
   Without a delay every stream gets one token a turn, one write each, as servers do that batch.
   GET /v1/models, /health and what the other routers ask at their start.
   GET /herd/v1/ping is passed on, byte for byte, to a program on port R that can sign the answer. That blocks:
   pings come before a node is online, never while something is measured.

   Port 0 takes a free one; the port is printed on standard output. It ends with its standard input, so it
   never outlives who started it. */
#include "net.h"

#define EDGE_BYTES 8192
#define HEAD_BYTES 16384
#define WHEEL_MS 1024
#define MOST_DELAY_MS (WHEEL_MS - 24)
#define MOST_BACKLOG_BYTES (256 * 1024)

enum state { HEAD, BODY, STREAM };

struct client {
    int fd;
    enum state state;
    bool closing, wants_out, dead;
    char head[HEAD_BYTES];
    size_t head_bytes;
    bool is_chat, is_get;
    long long body_left, body_bytes;
    char front[EDGE_BYTES], back[EDGE_BYTES];
    size_t front_bytes, back_bytes;
    char *out;
    size_t out_bytes, out_room;
    long tokens, sent;
    int delay_ms;
    double began_s;
    struct client *next, **slot; /* in the list of the turn, in the wheel, or in that of the dead */
};

static int epoll_fd, relay_port;
static struct client *turn, *wheel[WHEEL_MS], *graveyard;
static long on_turn, on_wheel;
static long long tick_ms;
static char buffer[1 << 18];

static char head_record[1024], token_record[512], end_record[1024], whole_answer[1024];
static size_t head_size, token_size, end_size, whole_size;

#define CHUNK "{\"id\":\"chatcmpl-bench0000000000000000\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":%s,\"logprobs\":null,\"finish_reason\":%s}]%s}"

static size_t framed(char *out, const char *delta, const char *finish, const char *rest) {
    char record[512];
    int size = snprintf(record, sizeof record, "data: " CHUNK "\n\n", delta, finish, rest);
    return (size_t)sprintf(out, "%x\r\n%s\r\n", size, record);
}

static void render(void) {
    head_size = (size_t)sprintf(head_record,
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
        "transfer-encoding: chunked\r\n\r\n");
    head_size += framed(head_record + head_size, "{\"role\":\"assistant\",\"content\":\"\"}", "null", "");
    token_size = framed(token_record, "{\"content\":\" token\"}", "null", "");
    end_size = framed(end_record, "{}", "\"length\"",
        ",\"usage\":{\"prompt_tokens\":32,\"completion_tokens\":128,\"total_tokens\":160}");
    end_size += (size_t)sprintf(end_record + end_size, "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n");
    const char *body =
        "{\"id\":\"chatcmpl-bench0000000000000000\",\"object\":\"chat.completion\",\"created\":1700000000,"
        "\"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
        "\"The quick brown fox jumps over the lazy dog.\"},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
        "\"usage\":{\"prompt_tokens\":32,\"completion_tokens\":10,\"total_tokens\":42}}";
    whole_size = (size_t)sprintf(whole_answer,
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", strlen(body), body);
}

/* ---- lists ------------------------------------------------------------------------------------------------ */

static void link_into(struct client **list, struct client *c) {
    c->next = *list;
    if (c->next) c->next->slot = &c->next;
    c->slot = list;
    *list = c;
}

static void unlink_from_list(struct client *c) {
    if (c->slot == NULL) return;
    *c->slot = c->next;
    if (c->next) c->next->slot = c->slot;
    if (c->delay_ms) on_wheel--;
    else on_turn--;
    c->slot = NULL;
    c->next = NULL;
}

/* Other events of this turn may still point here: it is freed when the turn is over. */
static void drop(struct client *c) {
    if (c->dead) return;
    c->dead = true;
    unlink_from_list(c);
    close(c->fd);
    link_into(&graveyard, c);
}

static void bury(void) {
    while (graveyard) {
        struct client *c = graveyard;
        graveyard = c->next;
        free(c->out);
        free(c);
    }
}

/* ---- output ----------------------------------------------------------------------------------------------- */

static void want_out(struct client *c, bool wanted) {
    if (c->wants_out == wanted) return;
    struct epoll_event event = {.events = EPOLLIN | (wanted ? EPOLLOUT : 0), .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
    c->wants_out = wanted;
}

static void keep(struct client *c, const char *data, size_t size) {
    if (c->out_bytes + size > c->out_room) {
        c->out_room = 2 * (c->out_bytes + size);
        c->out = must(realloc(c->out, c->out_room));
    }
    memcpy(c->out + c->out_bytes, data, size);
    c->out_bytes += size;
    want_out(c, true);
}

static void put(struct client *c, const char *data, size_t size) {
    if (c->dead) return;
    if (c->out_bytes) {
        keep(c, data, size);
        return;
    }
    ssize_t n = send(c->fd, data, size, MSG_NOSIGNAL);
    if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
        drop(c);
        return;
    }
    if (n < 0) n = 0;
    if ((size_t)n < size) keep(c, data + n, size - (size_t)n);
}

static void flush(struct client *c) {
    ssize_t n = send(c->fd, c->out, c->out_bytes, MSG_NOSIGNAL);
    if (n < 0) {
        if (errno != EAGAIN && errno != EWOULDBLOCK) drop(c);
        return;
    }
    memmove(c->out, c->out + n, c->out_bytes - (size_t)n);
    c->out_bytes -= (size_t)n;
    if (c->out_bytes == 0) want_out(c, false);
}

static void answer_json(struct client *c, const char *status, const char *body) {
    char answer[2048];
    int size = snprintf(answer, sizeof answer,
        "HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n%s", status, strlen(body), body);
    put(c, answer, (size_t)size);
}

/* ---- streams ---------------------------------------------------------------------------------------------- */

static void schedule(struct client *c) {
    if (c->delay_ms == 0) {
        link_into(&turn, c);
        on_turn++;
        return;
    }
    double due_s = c->began_s + (double)c->sent * c->delay_ms * 1e-3;
    long long due_ms = (long long)(due_s * 1e3);
    if (due_ms <= tick_ms) due_ms = tick_ms + 1;
    if (due_ms > tick_ms + WHEEL_MS - 1) due_ms = tick_ms + WHEEL_MS - 1;
    link_into(&wheel[due_ms % WHEEL_MS], c);
    on_wheel++;
}

static void next_token(struct client *c) {
    if (c->out_bytes < MOST_BACKLOG_BYTES) {
        if (c->sent == c->tokens) {
            put(c, end_record, end_size);
            c->state = HEAD;
            return;
        }
        put(c, token_record, token_size);
        c->sent++;
    }
    if (!c->dead) schedule(c);
}

static void take_turn(void) {
    struct client *c = turn;
    turn = NULL;
    if (c) c->slot = &c; /* so that one that dies on the way leaves this very list */
    while (c) {
        struct client *now = c;
        unlink_from_list(now);
        next_token(now);
    }
}

static void advance_wheel(void) {
    long long until_ms = (long long)(now_s() * 1e3);
    while (tick_ms < until_ms) {
        tick_ms++;
        struct client *c = wheel[tick_ms % WHEEL_MS];
        wheel[tick_ms % WHEEL_MS] = NULL;
        if (c) c->slot = &c;
        while (c) {
            struct client *now = c;
            unlink_from_list(now);
            next_token(now);
        }
    }
}

/* ---- requests --------------------------------------------------------------------------------------------- */

static const char *after(const char *text, size_t size, const char *word) {
    const char *found = memmem(text, size, word, strlen(word));
    return found ? found + strlen(word) : NULL;
}

/* The first character of a JSON value behind a key, in the front or the back of the body. */
static const char *value_of(struct client *c, const char *key) {
    const char *at = after(c->front, c->front_bytes, key);
    if (at == NULL) at = after(c->back, c->back_bytes, key);
    while (at && (*at == ' ' || *at == ':')) at++;
    return at;
}

static void answer_chat(struct client *c) {
    const char *stream = value_of(c, "\"stream\"");
    const char *tokens = value_of(c, "\"max_tokens\"");
    if (tokens == NULL) tokens = value_of(c, "\"max_completion_tokens\"");
    const char *delay = value_of(c, "delay_ms=");
    if (stream == NULL || *stream != 't') {
        put(c, whole_answer, whole_size);
        return;
    }
    c->tokens = tokens ? strtol(tokens, NULL, 10) : 16;
    c->delay_ms = delay ? (int)strtol(delay, NULL, 10) : 0;
    if (c->delay_ms > MOST_DELAY_MS) c->delay_ms = MOST_DELAY_MS;
    c->sent = 0;
    c->began_s = now_s();
    c->state = STREAM;
    put(c, head_record, head_size);
    if (!c->dead) {
        if (c->delay_ms) next_token(c);
        else schedule(c);
    }
}

static void pass_on(struct client *c) {
    struct sockaddr_in address = loopback(relay_port);
    struct timeval patience = {.tv_sec = 2};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    char answer[8192];
    size_t size = 0;
    if (connect(fd, (struct sockaddr *)&address, sizeof address) == 0 &&
        send(fd, c->head, c->head_bytes, MSG_NOSIGNAL) == (ssize_t)c->head_bytes) {
        ssize_t n; /* the other program closes behind its answer */
        while (size < sizeof answer && (n = recv(fd, answer + size, sizeof answer - size, 0)) > 0) size += (size_t)n;
    }
    close(fd);
    if (size) put(c, answer, size);
    else answer_json(c, "502 Bad Gateway", "{\"error\":\"nobody signs here\"}");
}

static void answer_get(struct client *c) {
    char path[128];
    if (sscanf(c->head, "%*s %127s", path) != 1) path[0] = 0;
    if (relay_port && strcmp(path, "/herd/v1/ping") == 0) pass_on(c);
    else if (strcmp(path, "/v1/models") == 0)
        answer_json(c, "200 OK", "{\"object\":\"list\",\"data\":[{\"id\":\"bench\",\"object\":\"model\",\"created\":1700000000,\"owned_by\":\"bench\"}]}");
    else if (strcmp(path, "/health") == 0 || strcmp(path, "/health_generate") == 0)
        answer_json(c, "200 OK", "{\"status\":\"ok\"}");
    else if (strcmp(path, "/get_model_info") == 0 || strcmp(path, "/model_info") == 0)
        answer_json(c, "200 OK", "{\"model_path\":\"bench\",\"tokenizer_path\":\"bench\",\"is_generation\":true}");
    else if (strcmp(path, "/get_server_info") == 0 || strcmp(path, "/server_info") == 0)
        answer_json(c, "200 OK", "{\"model_path\":\"bench\",\"served_model_name\":\"bench\",\"tp_size\":1,\"dp_size\":1,\"max_running_requests\":8192,\"version\":\"0\"}");
    else
        answer_json(c, "404 Not Found", "{\"error\":{\"message\":\"not found\",\"type\":\"not_found_error\"}}");
}

static void answer(struct client *c) {
    c->state = HEAD;
    if (c->is_chat) answer_chat(c);
    else if (c->is_get) answer_get(c);
    else answer_json(c, "404 Not Found", "{\"error\":{\"message\":\"not found\",\"type\":\"not_found_error\"}}");
    c->head_bytes = 0;
}

static void take_body(struct client *c, const char *data, size_t size) {
    if (c->front_bytes < EDGE_BYTES) {
        size_t room = EDGE_BYTES - c->front_bytes, part = size < room ? size : room;
        memcpy(c->front + c->front_bytes, data, part);
        c->front_bytes += part;
    }
    if (size >= EDGE_BYTES) {
        memcpy(c->back, data + size - EDGE_BYTES, EDGE_BYTES);
        c->back_bytes = EDGE_BYTES;
    } else if (c->body_bytes + (long long)size > EDGE_BYTES) { /* else the front has it all */
        size_t kept = c->back_bytes < EDGE_BYTES - size ? c->back_bytes : EDGE_BYTES - size;
        memmove(c->back, c->back + c->back_bytes - kept, kept);
        memcpy(c->back + kept, data, size);
        c->back_bytes = kept + size;
    }
    c->body_bytes += (long long)size;
    c->body_left -= (long long)size;
    if (c->body_left == 0) answer(c);
}

static void take_head(struct client *c, const char *data, size_t size) {
    size_t room = HEAD_BYTES - 1 - c->head_bytes, part = size < room ? size : room;
    memcpy(c->head + c->head_bytes, data, part);
    size_t known = c->head_bytes + part;
    char *end = memmem(c->head, known, "\r\n\r\n", 4);
    if (end == NULL) {
        c->head_bytes = known;
        if (known >= HEAD_BYTES - 1) drop(c);
        return;
    }
    size_t head_bytes = (size_t)(end + 4 - c->head), used = head_bytes - c->head_bytes;
    c->head_bytes = head_bytes;
    c->head[head_bytes] = 0;
    const char *length = header_value(c->head, "content-length:");
    c->is_get = strncmp(c->head, "GET ", 4) == 0;
    c->is_chat = strncmp(c->head, "POST /v1/chat/completions ", 26) == 0;
    c->body_left = length ? atoll(length) : 0;
    c->body_bytes = 0;
    c->front_bytes = c->back_bytes = 0;
    if (header_value(c->head, "transfer-encoding:")) {
        answer_json(c, "411 Length Required", "{\"error\":\"a length is required\"}");
        drop(c);
        return;
    }
    if (c->body_left == 0) {
        answer(c);
        return;
    }
    c->state = BODY;
    if (size > used) {
        size_t here = size - used;
        take_body(c, data + used, here < (size_t)c->body_left ? here : (size_t)c->body_left);
    }
}

static void readable(struct client *c) {
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (n <= 0 || c->state == STREAM) { /* gone, or it speaks out of turn */
        drop(c);
        return;
    }
    if (c->state == HEAD) take_head(c, buffer, (size_t)n);
    else take_body(c, buffer, (long long)n < c->body_left ? (size_t)n : (size_t)c->body_left);
}

static void accept_all(int listener) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) return;
        no_delay(fd);
        struct client *c = must(calloc(1, sizeof *c));
        c->fd = fd;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
        if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
    }
}

static int listen_on(int wanted) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    struct sockaddr_in address = loopback(wanted);
    socklen_t size = sizeof address;
    if (bind(fd, (struct sockaddr *)&address, size) < 0 || listen(fd, 4096) < 0) die("listen");
    getsockname(fd, (struct sockaddr *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    raise_file_limit();
    render();
    relay_port = atoi(option(argc, argv, "--relay-port", "0"));
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(atoi(option(argc, argv, "--port", "0")));
    struct epoll_event of_listener = {.events = EPOLLIN, .data.ptr = NULL};
    static int input_mark;
    struct epoll_event of_input = {.events = EPOLLIN, .data.ptr = &input_mark};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, listener, &of_listener);
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, STDIN_FILENO, &of_input);
    struct epoll_event events[1024];
    tick_ms = (long long)(now_s() * 1e3);
    for (;;) {
        if (on_wheel == 0) tick_ms = (long long)(now_s() * 1e3);
        int count = epoll_wait(epoll_fd, events, 1024, on_turn ? 0 : on_wheel ? 1 : -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr == NULL) {
                accept_all(listener);
                continue;
            }
            if (events[i].data.ptr == &input_mark) return 0;
            struct client *c = events[i].data.ptr;
            if (c->dead) continue;
            if (events[i].events & EPOLLOUT) flush(c);
            if (!c->dead && (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) readable(c);
        }
        if (on_turn) take_turn();
        if (on_wheel) advance_wheel();
        bury();
    }
}
