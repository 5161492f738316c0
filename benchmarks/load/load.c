/* SPDX-License-Identifier: MIT
 *
 * A closed-loop load generator: every connection keeps a fixed number of messages in flight and sends the next one
 * when an answer has come. One thread, epoll, Linux, no dependencies. Every answer is compared with what was sent.
 *
 *   load echo|lines|pipeline|churn|idle|silent|udp ADDRESS [--connections N] [--idle N] [--size BYTES] [--depth N]
 *        [--warmup SECONDS] [--seconds SECONDS] [--sources N] [--start clock|stdin]
 *
 * ADDRESS is tcp://127.0.0.1:PORT, tls://127.0.0.1:PORT, udp://127.0.0.1:PORT or unix:/path. Prints one line of JSON. */
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/un.h>
#include <time.h>

#include "load.h"

#define MAX_CONNECTIONS 200000 /* more than one loopback address pair has ports for */
#define MAX_SIZE (1 << 24)     /* 16 MiB: the message pool holds at least two */
#define MAX_DEPTH 4096
#define MAX_SECONDS 600.0      /* a benchmark that runs longer has been forgotten */
#define MAX_SOURCES 65000      /* 127.0.0.1 to 127.0.253.232 */

uint64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void die(const char *what, const char *which) {
    fprintf(stderr, "load: %s: %s\n", what, which);
    exit(2);
}

static void parse_address(struct plan *plan, const char *text) {
    memset(&plan->address, 0, sizeof plan->address);
    if (strncmp(text, "unix:", 5) == 0) {
        struct sockaddr_un *un = (struct sockaddr_un *)&plan->address;
        if (strlen(text + 5) >= sizeof un->sun_path)
            die("path too long for a Unix socket", text);
        un->sun_family = AF_UNIX;
        strcpy(un->sun_path, text + 5);
        plan->address_length = sizeof *un;
        return;
    }
    struct sockaddr_in *in = (struct sockaddr_in *)&plan->address;
    char host[64];
    unsigned port;
    int used = 0;
    plan->tls = strncmp(text, "tls://", 6) == 0;
    bool known = plan->tls || strncmp(text, "tcp://", 6) == 0 || strncmp(text, "udp://", 6) == 0;
    if (!known || sscanf(text + 6, "%63[0-9.]:%u%n", host, &port, &used) != 2 || text[6 + used] || port > 65535 ||
        inet_pton(AF_INET, host, &in->sin_addr) != 1)
        die("address is not tcp://IPV4:PORT, tls://IPV4:PORT, udp://IPV4:PORT or unix:/path", text);
    if ((text[0] == 'u') != plan->datagram)
        die("udp:// goes with the mode udp, and tcp:// and tls:// with the others", text);
    in->sin_family = AF_INET;
    in->sin_port = htons((uint16_t)port);
    plan->address_length = sizeof *in;
}

static double number(const char *name, const char *text, double least, double most) {
    char *end;
    double value = strtod(text, &end);
    if (end == text || *end || !(value >= least && value <= most)) {
        fprintf(stderr, "load: %s %s: not a number from %g to %g\n", name, text, least, most);
        exit(2);
    }
    return value;
}

static void parse_mode(struct plan *plan, const char *mode) {
    static const char *const known[] = {"echo", "lines", "pipeline", "churn", "idle", "silent", "udp", NULL};
    unsigned i = 0;
    while (known[i] && strcmp(known[i], mode))
        i++;
    if (!known[i])
        die("mode is not echo, lines, pipeline, churn, idle, silent or udp", mode);
    plan->mode = mode;
    plan->lines = !strcmp(mode, "lines") || !strcmp(mode, "pipeline");
    plan->reopen = !strcmp(mode, "churn");
    plan->datagram = !strcmp(mode, "udp");
    plan->silent = !strcmp(mode, "silent");
    plan->hold = plan->silent || !strcmp(mode, "idle");
    plan->depth = strcmp(mode, "pipeline") ? 1 : 16;
}

static bool is_stdin(const char *text) {
    if (strcmp(text, "stdin") && strcmp(text, "clock"))
        die("--start is not clock or stdin", text);
    return !strcmp(text, "stdin");
}

static void parse(struct plan *plan, int count, char **words) {
    if (count < 3 || count % 2 == 0)
        die("usage", "load MODE ADDRESS [--connections N] [--idle N] [--size BYTES] [--depth N] [--warmup S] [--seconds S] "
                     "[--sources N] [--start clock|stdin]");
    parse_mode(plan, words[1]);
    for (int i = 3; i < count; i += 2) {
        const char *name = words[i], *text = words[i + 1];
        if (!strcmp(name, "--connections"))
            plan->connections = (unsigned)number(name, text, 1, MAX_CONNECTIONS);
        else if (!strcmp(name, "--idle"))
            plan->idle = (unsigned)number(name, text, 0, MAX_CONNECTIONS);
        else if (!strcmp(name, "--start"))
            plan->on_word = is_stdin(text);
        else if (!strcmp(name, "--size"))
            plan->size = (size_t)number(name, text, 1, MAX_SIZE);
        else if (!strcmp(name, "--depth"))
            plan->depth = (size_t)number(name, text, 1, MAX_DEPTH);
        else if (!strcmp(name, "--warmup"))
            plan->warmup = number(name, text, 0, MAX_SECONDS);
        else if (!strcmp(name, "--seconds"))
            plan->seconds = number(name, text, 0.01, MAX_SECONDS);
        else if (!strcmp(name, "--sources"))
            plan->sources = (unsigned)number(name, text, 1, MAX_SOURCES);
        else
            die("unknown option", name);
    }
    if (plan->idle && (plan->reopen || plan->datagram || plan->hold))
        die("--idle goes with the modes echo, lines and pipeline", plan->mode);
    if (plan->depth > 1 && strcmp(plan->mode, "pipeline"))
        die("--depth goes with the mode pipeline", plan->mode);
    if (plan->datagram && plan->size > 65507)
        die("--size is more than one datagram holds (65507)", plan->mode);
    parse_address(plan, words[2]);
}

static void raise_file_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

int main(int count, char **words) {
    static struct tally tally;
    struct plan plan = {.connections = 1, .sources = 200, .size = 64, .warmup = 0.3, .seconds = 2};
    parse(&plan, count, words);
    signal(SIGPIPE, SIG_IGN); /* OpenSSL writes without MSG_NOSIGNAL */
    raise_file_limit();
    run_plan(&plan, &tally);
    double rate = tally.seconds > 0 ? (double)tally.messages / tally.seconds : 0;
    const struct histogram *h = &tally.latency;
    printf("{\"mode\": \"%s\", \"connections\": %u, \"idle\": %u, \"size\": %zu, \"depth\": %zu, \"messages\": %llu, "
           "\"seconds\": %.6f, \"rate\": %.1f, \"p50_us\": %.1f, \"p90_us\": %.1f, \"p99_us\": %.1f, \"max_us\": %.1f, "
           "\"errors\": %llu, \"bytes\": %llu, \"connects\": %llu, \"open\": %u, \"opening\": %.6f}\n",
           plan.mode, plan.connections, plan.idle, plan.size, plan.depth, (unsigned long long)tally.messages, tally.seconds, rate,
           (double)histogram_at(h, 0.5) / 1e3, (double)histogram_at(h, 0.9) / 1e3, (double)histogram_at(h, 0.99) / 1e3,
           (double)h->max / 1e3, (unsigned long long)tally.errors, (unsigned long long)tally.bytes,
           (unsigned long long)tally.connects, tally.open, tally.opening);
    return 0;
}
