/* The first process of the guest: devices, modules, then ticks, commands, a mounted disk and the agent as the
 * kernel's command line asks for:
 *   vk.ticks=vda,vdb   disks that get ticks        vk.rate=20   ticks a second (0: without a pause)
 *   vk.fs=vdc          ext4 disk to mount and write to          vk.agent     start qemu-ga
 */
#define _GNU_SOURCE
#include "guest.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/input.h>
#include <linux/random.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

uint64_t boot_id;
struct fs_state fs_state;
static int console = 1;

uint64_t now_ns(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return ts.tv_sec * 1000000000ull + ts.tv_nsec;
}

void pause_ns(uint64_t ns) {
    struct timespec ts = {ns / 1000000000, ns % 1000000000};
    if (ns) nanosleep(&ts, NULL);
}

/* splitmix64 */
uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

/* Each step is a bijection of the state, so a change of any one word always changes the sum. */
uint64_t sum64(const void *data, size_t bytes) {
    const uint64_t *word = data;
    uint64_t h = 0xcbf29ce484222325ull;
    for (size_t i = 0; i < bytes / 8; i++) {
        h ^= word[i];
        h = ((h << 23) | (h >> 41)) * 0x100000001b3ull;
    }
    return h;
}

/* What `fill` writes: a function of seed and place only, so the host can compute it too. */
void pattern(void *buffer, uint64_t offset, size_t bytes, uint64_t seed) {
    uint64_t *word = buffer, state = 0;
    for (size_t i = 0; i < bytes / 8; i++) {
        if (i % 64 == 0) state = mix(seed ^ mix((offset + i * 8) / SECTOR));
        state = state * 6364136223846793005ull + 1442695040888963407ull;
        word[i] = state;
    }
}

void *aligned(size_t bytes) {
    void *p = NULL;
    if (posix_memalign(&p, 4096, bytes)) abort();
    return p;
}

bool spawn_thread(void *(*body)(void *), void *arg) {
    pthread_t thread;
    return pthread_create(&thread, NULL, body, arg) == 0;
}

void say(const char *format, ...) {
    char line[256];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line - 2, format, args);
    va_end(args);
    if (n > (int)sizeof line - 3) n = sizeof line - 3;
    line[n++] = '\n';
    if (write(console, line, n) < 0) return;
}

static bool option(const char *key, char *value, size_t size) {
    static char line[2048];
    if (!line[0]) {
        int fd = open("/proc/cmdline", O_RDONLY);
        ssize_t n = fd < 0 ? 0 : read(fd, line, sizeof line - 1);
        line[n > 0 ? n : 0] = 0;
        if (fd >= 0) close(fd);
    }
    char copy[sizeof line];
    memcpy(copy, line, sizeof copy);
    size_t length = strlen(key);
    for (char *save = NULL, *word = strtok_r(copy, " \n", &save); word; word = strtok_r(NULL, " \n", &save)) {
        if (strncmp(word, key, length) || (word[length] != '=' && word[length] != 0)) continue;
        snprintf(value, size, "%s", word[length] ? word + length + 1 : "");
        return true;
    }
    return false;
}

/* Each pass loads what the pass before made possible: the order of the folder then does not matter. */
static void load_modules(void) {
    for (int pass = 0; pass < 3; pass++) {
        DIR *dir = opendir("/mod");
        for (struct dirent *entry; dir && (entry = readdir(dir));) {
            char path[300];
            snprintf(path, sizeof path, "/mod/%s", entry->d_name);
            int fd = open(path, O_RDONLY | O_CLOEXEC);
            if (fd < 0) continue;
            syscall(SYS_finit_module, fd, "", 0);
            close(fd);
        }
        if (dir) closedir(dir);
    }
}

static bool wait_for(const char *path) {
    for (int i = 0; i < 1000; i++) {
        if (access(path, F_OK) == 0) return true;
        pause_ns(10000000);
    }
    say("refused: no %s", path);
    return false;
}

bool find_port(const char *name, char *path, size_t size, int tries) {
    for (int i = 0; i < tries; i++) {
        DIR *dir = opendir("/sys/class/virtio-ports");
        for (struct dirent *entry; dir && (entry = readdir(dir));) {
            char file[300], found[64] = "";
            snprintf(file, sizeof file, "/sys/class/virtio-ports/%s/name", entry->d_name);
            int fd = open(file, O_RDONLY);
            if (fd < 0) continue;
            ssize_t n = read(fd, found, sizeof found - 1);
            close(fd);
            if (n <= 0) continue;
            found[strcspn(found, "\n")] = 0;
            if (strcmp(found, name) == 0) {
                snprintf(path, size, "/dev/%s", entry->d_name);
                closedir(dir);
                return true;
            }
        }
        if (dir) closedir(dir);
        pause_ns(10000000);
    }
    return false;
}

/* Appends a numbered line to a file of the mounted disk, with fsync. It blocks while the file system is frozen. */
static void *fs_writer(void *unused) {
    (void)unused;
    int fd = open("/mnt/log", O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (fd < 0) {
        say("error fs: %s", strerror(errno));
        return NULL;
    }
    fs_state.mounted = true;
    for (;;) {
        char line[64];
        int n = snprintf(line, sizeof line, "write %llu boot %016llx\n", (unsigned long long)fs_state.writes + 1,
                         (unsigned long long)boot_id);
        if (write(fd, line, n) != n || fsync(fd) < 0) {
            say("error fs: %s", strerror(errno));
            pause_ns(1000000000);
            continue;
        }
        fs_state.last_ns = now_ns();
        fs_state.writes++;
        pause_ns(50000000);
    }
    return NULL;
}

static void *agent_keeper(void *port) {
    for (;;) {
        pid_t pid = fork();
        if (pid == 0) {
            execl("/usr/sbin/qemu-ga", "qemu-ga", "-m", "virtio-serial", "-p", (char *)port, "-t", "/var/run", "-f",
                  "/var/run/qemu-ga.pid", "-l", "/var/run/qemu-ga.log", NULL);
            _exit(127);
        }
        waitpid(pid, NULL, 0);
        say("error agent: it ended");
        pause_ns(1000000000);
    }
    return NULL;
}

/* ACPI power button: `virsh shutdown` ends the guest in order. */
static void *power_button(void *path) {
    int fd = open(path, O_RDONLY);
    struct input_event event;
    while (fd >= 0 && read(fd, &event, sizeof event) == sizeof event) {
        if (event.type != EV_KEY || event.code != KEY_POWER || event.value != 1) continue;
        ticks_stop();
        say("powering off");
        sync();
        reboot(RB_POWER_OFF);
    }
    return NULL;
}

/* The pool may be empty this early: time and cycle counter make two boots differ all the same. */
static uint64_t make_boot_id(void) {
    uint64_t noise = 0;
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    if (getrandom(&noise, sizeof noise, GRND_INSECURE) < 0) noise = 0;
    return mix(noise ^ mix(ts.tv_sec * 1000000000ull + ts.tv_nsec) ^ __builtin_ia32_rdtsc());
}

int main(void) {
    static const char *folders[] = {"/proc", "/sys", "/dev", "/mnt", "/var", "/var/run", "/tmp", "/run"};
    for (unsigned i = 0; i < sizeof folders / sizeof *folders; i++) mkdir(folders[i], 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (fd >= 0) console = fd;
    setenv("PATH", "/bin:/sbin:/usr/bin:/usr/sbin", 1);
    load_modules();
    boot_id = make_boot_id();

    char value[128];
    static char port[64], agent[64];
    bool ticking = option("vk.ticks", value, sizeof value) && value[0];
    if (ticking) {
        char names[128];
        snprintf(names, sizeof names, "%s", value);
        for (char *save = NULL, *name = strtok_r(names, ",", &save); name; name = strtok_r(NULL, ",", &save)) {
            char path[160];
            snprintf(path, sizeof path, "/dev/%s", name);
            ticking = ticking && wait_for(path);
        }
        ticking = ticking && ticks_open(value);
    }
    if (option("vk.fs", value, sizeof value) && value[0]) {
        char path[160];
        snprintf(path, sizeof path, "/dev/%s", value);
        if (wait_for(path) && mount(path, "/mnt", "ext4", 0, NULL) == 0)
            spawn_thread(fs_writer, NULL);
        else
            say("error fs: %s is not mounted: %s", path, strerror(errno));
    }
    for (int i = 0; i < 8; i++) {
        static char paths[8][32];
        snprintf(paths[i], sizeof paths[i], "/dev/input/event%d", i);
        if (access(paths[i], F_OK) == 0) spawn_thread(power_button, paths[i]);
    }
    bool commands = find_port("org.vmkeep.testbed.0", port, sizeof port, 500);
    if (commands) spawn_thread(commands_run, port);
    if (option("vk.agent", value, sizeof value)) {
        if (find_port("org.qemu.guest_agent.0", agent, sizeof agent, 500))
            spawn_thread(agent_keeper, agent);
        else
            say("error agent: it has no port");
    }
    say("up boot %016llx tick %llu commands %s up %llu ms", (unsigned long long)boot_id,
        (unsigned long long)tick_number, commands ? "yes" : "no", (unsigned long long)(now_ns() / 1000000));
    if (ticking) ticks_start(option("vk.rate", value, sizeof value) ? strtoull(value, NULL, 10) : 20);
    for (;;) pause();
}
