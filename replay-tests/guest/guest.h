/* The small guest of the test bed: what its parts share.
 *
 * One static program is the guest's first process. It loads the virtio modules, writes ticks (ticks.c) and
 * obeys commands that arrive on a virtio port (commands.c). The layout of a tick is read again, from the
 * image on the host, by replay-tests/src/testbed/ticks.rs: change both together. */
#ifndef GUEST_H
#define GUEST_H

#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define SECTOR 512u
#define MIB (1024ull * 1024ull)
#define MAX_DISKS 8

#define HEADER_MAGIC 0x3152444854494b56ull /* "VKITHDR1" */
#define TICK_MAGIC 0x314b434954564b56ull   /* "VKVTICK1" */

/* The first sector of a disk with ticks. */
struct header {
    uint64_t magic, pair, slots, ring_offset, data_offset;
    uint32_t disk, disks;
    uint64_t filler[57];
    uint64_t sum; /* of all before it */
};

/* One sector of the ring: tick `number` lies in slot `number % slots`. */
struct tick {
    uint64_t magic, number, boot, ram, uptime_ns, pair;
    uint32_t disk, version;
    uint64_t prev; /* the sum of the tick before on the same disk: two histories cannot be mixed unseen */
    uint64_t filler[55];
    uint64_t sum;
};

_Static_assert(sizeof(struct header) == SECTOR, "a header is one sector");
_Static_assert(sizeof(struct tick) == SECTOR, "a tick is one sector");

struct disk {
    char name[16];
    int fd; /* O_DIRECT | O_DSYNC */
    uint64_t size;
    struct header header;
    uint64_t last, last_sum;
};

extern struct disk disks[MAX_DISKS];
extern int disk_count;
extern uint64_t boot_id;
extern _Atomic uint64_t tick_number, tick_ram;

uint64_t now_ns(void);
uint64_t mix(uint64_t x);
uint64_t sum64(const void *data, size_t bytes);
void pattern(void *buffer, uint64_t offset, size_t bytes, uint64_t seed);
void *aligned(size_t bytes);
bool spawn_thread(void *(*body)(void *), void *arg);
void pause_ns(uint64_t ns);

/* One whole line to the console, in one write. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Opens the tick disks ("vda,vdb"); false when their contents contradict each other. */
bool ticks_open(const char *names);
void ticks_start(uint64_t per_second);
/* Returns once no tick is in flight. */
void ticks_stop(void);

struct fs_state {
    _Atomic uint64_t writes, last_ns;
    _Atomic bool mounted;
};
extern struct fs_state fs_state;

/* Finds /dev/vportNpM of the port with this name, waiting for at most `tries` times 10 ms. */
bool find_port(const char *name, char *path, size_t size, int tries);
void *commands_run(void *port_path);

#endif
