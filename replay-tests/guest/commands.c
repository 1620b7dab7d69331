/* Commands: one line each on the virtio port, "ID COMMAND ARGUMENT…", answered by "ID ok TEXT" or "ID err TEXT".
 * The id lets the host drop an answer that was meant for an earlier, broken connection. */
#define _GNU_SOURCE
#include "guest.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#define CHUNK MIB

static char answer[4096];

static const char *fail(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(answer, sizeof answer, format, args);
    va_end(args);
    return "err";
}

static const char *ok(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(answer, sizeof answer, format, args);
    va_end(args);
    return "ok";
}

/* 4096, 4K, 16M, 2G */
static uint64_t number(const char *text) {
    char *end = NULL;
    uint64_t n = text ? strtoull(text, &end, 0) : 0;
    switch (end ? *end : 0) {
    case 'k': case 'K': return n << 10;
    case 'm': case 'M': return n << 20;
    case 'g': case 'G': return n << 30;
    default: return n;
    }
}

struct range {
    int fd;
    uint64_t offset, length;
};

/* Opens DEV and checks OFFSET and LENGTH; a write must stay clear of the header and the ring of ticks. */
static bool open_range(char **args, bool write, struct range *range) {
    if (!args[1] || !args[2] || !args[3]) return fail("needs DISK OFFSET LENGTH"), false;
    range->offset = number(args[2]);
    range->length = number(args[3]);
    uint64_t size = 0;
    char path[64];
    snprintf(path, sizeof path, "/dev/%s", args[1]);
    range->fd = open(path, (write ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
    if (range->fd < 0 || ioctl(range->fd, BLKGETSIZE64, &size) < 0) return fail("%s: %s", path, strerror(errno)), false;
    const char *why = NULL;
    if (range->offset % 4096 || range->length % 4096) why = "offset and length must be multiples of 4096";
    else if (range->offset > size || range->length > size - range->offset) why = "beyond the end of the disk";
    for (int i = 0; write && i < disk_count; i++)
        if (strcmp(disks[i].name, args[1]) == 0 && range->offset < disks[i].header.data_offset)
            why = "the ticks live there";
    if (why) return close(range->fd), fail("%s", why), false;
    return true;
}

static const char *fill_or_check(char **args, bool fill) {
    struct range range;
    if (!open_range(args, fill, &range)) return "err";
    uint64_t seed = number(args[4]), bad = UINT64_MAX;
    uint8_t *want = aligned(CHUNK), *got = aligned(CHUNK);
    bool failed = false;
    for (uint64_t done = 0; done < range.length && !failed && bad == UINT64_MAX;) {
        size_t n = range.length - done < CHUNK ? range.length - done : CHUNK;
        uint64_t at = range.offset + done;
        pattern(want, at, n, seed);
        if (fill) {
            failed = pwrite(range.fd, want, n, at) != (ssize_t)n;
        } else {
            failed = pread(range.fd, got, n, at) != (ssize_t)n;
            for (size_t i = 0; !failed && i < n && bad == UINT64_MAX; i += SECTOR)
                if (memcmp(want + i, got + i, SECTOR)) bad = at + i;
        }
        done += n;
    }
    if (!failed && fill) failed = fsync(range.fd) < 0;
    int error = errno;
    close(range.fd);
    free(want);
    free(got);
    if (failed) return fail("%s", strerror(error));
    if (bad != UINT64_MAX) return fail("differs at %llu", (unsigned long long)bad);
    return ok("%llu bytes", (unsigned long long)range.length);
}

static const char *checksum(char **args) {
    struct range range;
    if (!open_range(args, false, &range)) return "err";
    uint8_t *buffer = aligned(CHUNK);
    uint64_t total = 0;
    bool failed = false;
    for (uint64_t done = 0; done < range.length && !failed;) {
        size_t n = range.length - done < CHUNK ? range.length - done : CHUNK;
        failed = pread(range.fd, buffer, n, range.offset + done) != (ssize_t)n;
        total = mix(total ^ sum64(buffer, n));
        done += n;
    }
    int error = errno;
    close(range.fd);
    free(buffer);
    return failed ? fail("%s", strerror(error)) : ok("%016llx", (unsigned long long)total);
}

static const char *clear(char **args, unsigned long request) {
    struct range range;
    if (!open_range(args, true, &range)) return "err";
    uint64_t span[2] = {range.offset, range.length};
    bool failed = ioctl(range.fd, request, span) < 0 || fsync(range.fd) < 0;
    int error = errno;
    close(range.fd);
    return failed ? fail("%s", strerror(error)) : ok("%llu bytes", (unsigned long long)range.length);
}

/* Memory: `mem MIB RATE` goes on writing to MIB of memory at RATE MiB/s (0: as fast as it can). */
static _Atomic uint64_t mem_generation;
struct mem_job {
    uint64_t generation, bytes, rate;
};

static void *mem_writer(void *arg) {
    struct mem_job job = *(struct mem_job *)arg;
    free(arg);
    uint8_t *area = mmap(NULL, job.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED) return say("error mem: %s", strerror(errno)), NULL;
    uint64_t value = 0, began = now_ns(), written = 0;
    while (mem_generation == job.generation) {
        for (uint64_t at = 0; at < job.bytes && mem_generation == job.generation; at += 4096) {
            *(uint64_t *)(area + at) = mix(++value);
            written += 4096;
            if (job.rate && written % (256 * 4096) == 0) {
                uint64_t due = began + written * 1000000000ull / job.rate, now = now_ns();
                if (due > now) pause_ns(due - now);
            }
        }
    }
    munmap(area, job.bytes);
    return NULL;
}

/* The kernel would end the first process for want of memory, and the guest with it. */
static bool has_memory(uint64_t bytes) {
    struct sysinfo info;
    return sysinfo(&info) == 0 && bytes + 16 * MIB <= (uint64_t)info.freeram * info.mem_unit;
}

static const char *mem(char **args) {
    uint64_t generation = ++mem_generation; /* ends the writer before */
    if (!has_memory(number(args[1]) * MIB)) return fail("the guest has not that much memory");
    struct mem_job *job = calloc(1, sizeof *job);
    *job = (struct mem_job){generation, number(args[1]) * MIB, number(args[2]) * MIB};
    if (!job->bytes) return free(job), ok("stopped");
    return spawn_thread(mem_writer, job) ? ok("writing") : fail("no thread");
}

/* `hold MIB SEED` keeps a pattern in memory, `held` proves that it is still there, byte for byte. */
static uint8_t *held;
static uint64_t held_bytes, held_seed;

static const char *hold(char **args) {
    if (held) munmap(held, held_bytes);
    held = NULL;
    held_bytes = number(args[1]) * MIB;
    held_seed = number(args[2]);
    if (!held_bytes) return ok("nothing");
    if (!has_memory(held_bytes)) return fail("the guest has not that much memory");
    held = mmap(NULL, held_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (held == MAP_FAILED) return held = NULL, fail("%s", strerror(errno));
    pattern(held, 0, held_bytes, held_seed);
    return ok("%llu bytes", (unsigned long long)held_bytes);
}

static const char *check_held(void) {
    if (!held) return fail("nothing is held");
    static uint8_t want[4096];
    for (uint64_t at = 0; at < held_bytes; at += sizeof want) {
        pattern(want, at, sizeof want, held_seed);
        if (memcmp(want, held + at, sizeof want)) return fail("differs at %llu", (unsigned long long)at);
    }
    return ok("%llu bytes", (unsigned long long)held_bytes);
}

/* `load DISK OFFSET LENGTH MIB_PER_S`: goes on overwriting the range, for overlays that grow. */
static _Atomic uint64_t load_generation, load_written;
struct load_job {
    struct range range;
    uint64_t generation, rate;
};

static void *loader(void *arg) {
    struct load_job job = *(struct load_job *)arg;
    free(arg);
    const size_t chunk = 65536;
    uint8_t *buffer = aligned(chunk);
    uint64_t round = 0, began = now_ns(), written = 0;
    while (load_generation == job.generation) {
        round++;
        for (uint64_t at = 0; at + chunk <= job.range.length && load_generation == job.generation; at += chunk) {
            pattern(buffer, job.range.offset + at, chunk, round);
            if (pwrite(job.range.fd, buffer, chunk, job.range.offset + at) != (ssize_t)chunk) {
                say("error load: %s", strerror(errno));
                pause_ns(1000000000);
            }
            written += chunk;
            load_written += chunk;
            uint64_t due = job.rate ? began + written * 1000000000ull / job.rate : 0, now = now_ns();
            if (due > now) pause_ns(due - now);
        }
    }
    close(job.range.fd);
    free(buffer);
    return NULL;
}

static const char *load(char **args) {
    uint64_t generation = ++load_generation;
    if (!args[1] || strcmp(args[1], "stop") == 0)
        return ok("stopped after %llu bytes", (unsigned long long)load_written);
    struct load_job *job = calloc(1, sizeof *job);
    if (!open_range(args, true, &job->range)) return free(job), "err";
    if (job->range.length < 65536) return close(job->range.fd), free(job), fail("needs at least 64K");
    job->generation = generation;
    job->rate = number(args[4]) * MIB;
    load_written = 0;
    return spawn_thread(loader, job) ? ok("writing") : fail("no thread");
}

static const char *info(void) {
    int n = snprintf(answer, sizeof answer, "boot %016llx tick %llu ram %llu up %llu", (unsigned long long)boot_id,
                     (unsigned long long)tick_number, (unsigned long long)tick_ram, (unsigned long long)now_ns());
    for (int i = 0; i < disk_count && n < (int)sizeof answer; i++)
        n += snprintf(answer + n, sizeof answer - n, " %s size %llu slots %llu data %llu", disks[i].name,
                      (unsigned long long)disks[i].size, (unsigned long long)disks[i].header.slots,
                      (unsigned long long)disks[i].header.data_offset);
    return "ok";
}

static const char *shell(const char *command) {
    FILE *pipe = popen(command, "r");
    if (!pipe) return fail("%s", strerror(errno));
    size_t n = fread(answer, 1, sizeof answer - 1, pipe);
    answer[n] = 0;
    while (n && (answer[n - 1] == '\n' || answer[n - 1] == ' ')) answer[--n] = 0;
    for (size_t i = 0; i < n; i++)
        if (answer[i] == '\n') answer[i] = '|';
    return pclose(pipe) == 0 ? "ok" : "err";
}

static const char help[] =
    "ping; info; stop-ticks; start-ticks RATE; fill|check DISK OFFSET LENGTH SEED; "
    "checksum|zero|discard DISK OFFSET LENGTH; load DISK OFFSET LENGTH MIB_PER_S; load stop; mem MIB MIB_PER_S; "
    "mem 0; hold MIB SEED; held; fs; sh COMMAND; reboot; poweroff; panic";

static const char *obey(char *line) {
    char whole[1024], *args[8] = {0};
    snprintf(whole, sizeof whole, "%s", line);
    int count = 0;
    for (char *save = NULL, *word = strtok_r(line, " ", &save); word && count < 7; word = strtok_r(NULL, " ", &save))
        args[count++] = word;
    if (!count) return fail("no command");
    const char *verb = args[0];
    if (!strcmp(verb, "help")) return ok("%s", help);
    if (!strcmp(verb, "ping")) return ok("pong");
    if (!strcmp(verb, "info")) return info();
    if (!strcmp(verb, "stop-ticks")) return ticks_stop(), ok("%llu", (unsigned long long)tick_number);
    if (!strcmp(verb, "start-ticks")) return ticks_start(args[1] ? number(args[1]) : 20), ok("started");
    if (!strcmp(verb, "fill")) return fill_or_check(args, true);
    if (!strcmp(verb, "check")) return fill_or_check(args, false);
    if (!strcmp(verb, "checksum")) return checksum(args);
    if (!strcmp(verb, "zero")) return clear(args, BLKZEROOUT);
    if (!strcmp(verb, "discard")) return clear(args, BLKDISCARD);
    if (!strcmp(verb, "mem")) return mem(args);
    if (!strcmp(verb, "hold")) return hold(args);
    if (!strcmp(verb, "held")) return check_held();
    if (!strcmp(verb, "load")) return load(args);
    if (!strcmp(verb, "fs"))
        return fs_state.mounted ? ok("%llu", (unsigned long long)fs_state.writes) : fail("nothing is mounted");
    if (!strcmp(verb, "sh")) return strlen(whole) > 3 ? shell(whole + 3) : fail("no command");
    return fail("unknown command %s", verb);
}

static void reply(int fd, const char *id, const char *status) {
    static char line[sizeof answer + 64];
    int n = snprintf(line, sizeof line, "%s %s %s\n", id, status, answer);
    for (int done = 0; done < n;) {
        ssize_t w = write(fd, line + done, n - done);
        if (w <= 0) return; /* the host has gone: it will ask again */
        done += w;
    }
}

void *commands_run(void *port_path) {
    static char line[1024];
    size_t have = 0;
    int fd = open(port_path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return say("error commands: %s", strerror(errno)), NULL;
    for (;;) {
        ssize_t n = read(fd, line + have, 1);
        if (n <= 0) { /* nobody is connected */
            have = 0;
            pause_ns(5000000);
            continue;
        }
        if (line[have] != '\n') {
            if (++have == sizeof line) have = 0;
            continue;
        }
        line[have] = 0;
        have = 0;
        char *command = strchr(line, ' ');
        if (!command) continue;
        *command++ = 0;
        bool off = !strcmp(command, "poweroff"), again = !strcmp(command, "reboot");
        if (!strcmp(command, "panic")) {
            int trigger = open("/proc/sysrq-trigger", O_WRONLY);
            if (trigger >= 0 && write(trigger, "c", 1) < 0) continue;
        }
        if (off || again) {
            ticks_stop();
            reply(fd, line, ok("%llu", (unsigned long long)tick_number));
            sync();
            reboot(off ? RB_POWER_OFF : RB_AUTOBOOT);
            continue;
        }
        reply(fd, line, obey(command));
    }
    return NULL;
}
