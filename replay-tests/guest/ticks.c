/* Ticks: numbered, checksummed sectors, durable on every tick disk in turn.
 *
 * Tick n is written to the first disk, flushed, then to the second, flushed, then printed. Hence at any point
 * in time the first disk holds all ticks up to n and the second all up to n or n-1; and a printed tick is one
 * that a correct host may never lose. After a boot the numbers go on from what all disks hold; the boot id and
 * the count since boot live in RAM only, so a resumed memory can be told from a cold start. */
#define _GNU_SOURCE
#include "guest.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

struct disk disks[MAX_DISKS];
int disk_count;
_Atomic uint64_t tick_number, tick_ram;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static bool running;
static uint64_t pause_between;

#define RING_OFFSET MIB

static uint64_t slots_for(uint64_t size) {
    uint64_t slots = size / 8 / SECTOR;
    if (slots > 65536) slots = 65536;
    return slots & ~2047ull; /* whole MiB */
}

static bool all_zero(const void *data, size_t bytes) {
    const uint64_t *word = data;
    for (size_t i = 0; i < bytes / 8; i++)
        if (word[i]) return false;
    return true;
}

/* The last tick of the ring. */
static bool scan(struct disk *disk) {
    uint8_t *buffer = aligned(MIB);
    disk->last = 0;
    disk->last_sum = 0;
    for (uint64_t done = 0; done < disk->header.slots * SECTOR; done += MIB) {
        if (pread(disk->fd, buffer, MIB, disk->header.ring_offset + done) != (ssize_t)MIB) return false;
        bool any = false;
        for (uint64_t at = 0; at < MIB; at += SECTOR) {
            struct tick *tick = (struct tick *)(buffer + at);
            if (tick->magic != TICK_MAGIC || tick->sum != sum64(tick, SECTOR - 8)) continue;
            any = true;
            if (tick->number > disk->last) {
                disk->last = tick->number;
                disk->last_sum = tick->sum;
            }
        }
        if (!any) break; /* the ring fills from its start: nothing lies behind a mebibyte without a tick */
    }
    return true;
}

static bool read_tick(struct disk *disk, uint64_t number, struct tick *out) {
    struct tick *buffer = aligned(SECTOR);
    uint64_t at = disk->header.ring_offset + number % disk->header.slots * SECTOR;
    if (pread(disk->fd, buffer, SECTOR, at) != SECTOR) return false;
    *out = *buffer;
    return out->magic == TICK_MAGIC && out->number == number;
}

static bool format_disk(struct disk *disk, int index, int count, uint64_t pair) {
    struct header *header = aligned(SECTOR);
    memset(header, 0, SECTOR);
    header->magic = HEADER_MAGIC;
    header->pair = pair;
    header->slots = slots_for(disk->size);
    header->ring_offset = RING_OFFSET;
    header->data_offset = RING_OFFSET + header->slots * SECTOR;
    header->disk = index;
    header->disks = count;
    header->sum = sum64(header, SECTOR - 8);
    disk->header = *header;
    return header->slots > 0 && pwrite(disk->fd, header, SECTOR, 0) == SECTOR;
}

bool ticks_open(const char *names) {
    char list[128];
    snprintf(list, sizeof list, "%s", names);
    int fresh = 0;
    for (char *save = NULL, *name = strtok_r(list, ",", &save); name && disk_count < MAX_DISKS;
         name = strtok_r(NULL, ",", &save)) {
        struct disk *disk = &disks[disk_count];
        char path[64];
        snprintf(disk->name, sizeof disk->name, "%s", name);
        snprintf(path, sizeof path, "/dev/%s", name);
        disk->fd = open(path, O_RDWR | O_DIRECT | O_DSYNC);
        if (disk->fd < 0 || ioctl(disk->fd, BLKGETSIZE64, &disk->size) < 0) {
            say("refused %s: %s", name, strerror(errno));
            return false;
        }
        struct header *header = aligned(SECTOR);
        if (pread(disk->fd, header, SECTOR, 0) != SECTOR) return false;
        disk->header = *header;
        if (all_zero(header, SECTOR)) {
            fresh++;
        } else if (header->magic != HEADER_MAGIC || header->sum != sum64(header, SECTOR - 8)) {
            say("refused %s: its header is damaged", name);
            return false;
        }
        disk_count++;
    }
    if (fresh && fresh != disk_count) {
        say("refused: %d of %d disks are empty", fresh, disk_count);
        return false;
    }
    uint64_t pair = mix(boot_id);
    for (int i = 0; i < disk_count; i++) {
        struct disk *disk = &disks[i];
        if (fresh && !format_disk(disk, i, disk_count, pair)) {
            say("refused %s: it cannot be written", disk->name);
            return false;
        }
        if (disk->header.pair != disks[0].header.pair || disk->header.disk != (uint32_t)i) {
            say("refused %s: it belongs to another guest or place", disk->name);
            return false;
        }
        if (!fresh && !scan(disk)) {
            say("refused %s: it cannot be read", disk->name);
            return false;
        }
    }
    /* Each disk may lack at most the tick that the disk before it already holds. */
    for (int i = 1; i < disk_count; i++) {
        uint64_t before = disks[i - 1].last, here = disks[i].last;
        if (before != here && before != here + 1) {
            say("refused: %s ends at tick %llu but %s at %llu", disks[i - 1].name, (unsigned long long)before,
                disks[i].name, (unsigned long long)here);
            return false;
        }
    }
    uint64_t common = disk_count ? disks[disk_count - 1].last : 0;
    for (int i = 0; i < disk_count; i++) {
        struct disk *disk = &disks[i];
        if (disk->last != common) {
            struct tick tick = {0};
            if (common && !read_tick(disk, common, &tick)) {
                say("refused %s: tick %llu is missing", disk->name, (unsigned long long)common);
                return false;
            }
            disk->last = common;
            disk->last_sum = tick.sum;
        }
    }
    atomic_store(&tick_number, common);
    return true;
}

static bool write_tick(struct disk *disk, struct tick *tick) {
    tick->disk = disk->header.disk;
    tick->prev = disk->last_sum;
    tick->sum = sum64(tick, SECTOR - 8);
    uint64_t at = disk->header.ring_offset + tick->number % disk->header.slots * SECTOR;
    while (pwrite(disk->fd, tick, SECTOR, at) != SECTOR) {
        say("error %s: tick %llu: %s", disk->name, (unsigned long long)tick->number, strerror(errno));
        pause_ns(1000000000);
    }
    disk->last = tick->number;
    disk->last_sum = tick->sum;
    return true;
}

static void *ticker(void *unused) {
    (void)unused;
    struct tick *tick = aligned(SECTOR);
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!running) pthread_cond_wait(&changed, &lock);
        uint64_t pause = pause_between, began = now_ns();
        memset(tick, 0, SECTOR);
        tick->magic = TICK_MAGIC;
        tick->version = 1;
        tick->number = tick_number + 1;
        tick->boot = boot_id;
        tick->ram = tick_ram + 1;
        tick->uptime_ns = began;
        tick->pair = disks[0].header.pair;
        for (unsigned i = 0; i < sizeof tick->filler / 8; i++) tick->filler[i] = mix(tick->number * 64 + i);
        for (int i = 0; i < disk_count; i++) write_tick(&disks[i], tick);
        tick_number = tick->number;
        tick_ram = tick->ram;
        say("tick %llu boot %016llx ram %llu up %llu.%06llu", (unsigned long long)tick->number,
            (unsigned long long)boot_id, (unsigned long long)tick->ram, (unsigned long long)(began / 1000000000),
            (unsigned long long)(began % 1000000000 / 1000));
        pthread_mutex_unlock(&lock);
        pause_ns(pause);
        pthread_mutex_lock(&lock);
    }
    return NULL;
}

void ticks_start(uint64_t per_second) {
    static bool started;
    if (!disk_count) return;
    pthread_mutex_lock(&lock);
    pause_between = per_second ? 1000000000ull / per_second : 100000; /* never none: a stop must get its turn */
    running = true;
    pthread_cond_signal(&changed);
    if (!started) started = spawn_thread(ticker, NULL);
    pthread_mutex_unlock(&lock);
}

void ticks_stop(void) {
    pthread_mutex_lock(&lock); /* held during a tick, so none is in flight afterwards */
    running = false;
    pthread_mutex_unlock(&lock);
}
